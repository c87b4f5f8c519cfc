"""What a platform does with a client that was generated from the API description. Run in a process of its own, with the
folder of the generated package on its path: URL KEY ADAPTER_FOLDER OUT.
"""

import hashlib
import importlib
import io
import sys
import tarfile
import time
from pathlib import Path
from typing import Any


def operation(tag: str, name: str) -> Any:
    return importlib.import_module(f"safegraft_client.api.{tag}.{name}")


def main() -> None:
    url, key, folder, out = sys.argv[1:]
    # With object storage, files are one step further.
    made = importlib.import_module("safegraft_client").AuthenticatedClient
    client = made(base_url=url, token=key, follow_redirects=True)
    models = importlib.import_module("safegraft_client.models")
    file_of = importlib.import_module("safegraft_client.types").File
    paths = sorted(path for path in Path(folder).iterdir() if path.is_file())

    # Uploads: the folder as a form …
    files = [file_of(payload=io.BytesIO(path.read_bytes()), file_name=path.name) for path in paths]
    body = models.CreateAdapterFilesBody(files=files, name="generated")
    adapter = operation("adapters", "create_adapter").sync(client=client, body=body)
    assert adapter.status == "ready", adapter
    assert adapter.name == "generated"
    # … and as one archive, raw.
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in paths:
            tar.add(path, path.name)
    raw = file_of(payload=io.BytesIO(archive.getvalue()), mime_type="application/x-tar")
    again = operation("adapters", "create_adapter").sync_detailed(client=client, body=raw)
    assert again.status_code in (201, 422), again

    # A job, with a method that is one of several shapes.
    asked = models.RealignmentCreate(
        adapter_id=adapter.id, method=models.GramParameters(type_="gram", general_weight=0.3)
    )
    job = operation("realignments", "create_realignment").sync(client=client, body=asked)
    deadline = time.monotonic() + 60
    while job.status not in ("succeeded", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        job = operation("realignments", "get_realignment").sync(job.id, client=client)
    assert job.status == "succeeded", job
    report = operation("realignments", "get_report").sync(job.id, client=client)
    assert report.summary.modules == adapter.modules

    # Downloads, whole and binary.
    patched = operation("adapters", "get_adapter").sync(job.result.adapter_id, client=client)
    weights = operation("adapters", "get_adapter_file").sync(patched.id, "adapter_model.safetensors", client=client)
    data = weights.payload.read()
    assert hashlib.sha256(data).hexdigest() == patched.sha256 != adapter.sha256
    folder_tar = operation("adapters", "download_adapter").sync(patched.id, client=client)
    with tarfile.open(fileobj=folder_tar.payload) as tar:
        tar.extractall(out, filter="data")

    # Errors have a shape of their own.
    missing = operation("adapters", "get_adapter").sync("adp_nothing", client=client)
    assert isinstance(missing, models.Problem)
    assert missing.error.code == "adapter_not_found"


if __name__ == "__main__":
    main()
