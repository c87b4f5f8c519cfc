"""What a platform does with OpenAI's client, step by step, against a running service.

Run in a process of its own, so that the client's version can be chosen. Ends with 0, or with the step that went wrong.
"""

import hashlib
import http.server
import io
import json
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

WEIGHTS = "adapter_model.safetensors"
received: list[tuple[bytes, dict[str, str]]] = []


class Receiver(http.server.BaseHTTPRequestHandler):
    """A platform's own server, which hears of the ends of jobs."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        received.append((body, {name.lower(): value for name, value in self.headers.items()}))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def ended(client: openai.OpenAI, job_id: str) -> Any:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.1)
    raise AssertionError(f"{job_id} did not end")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files_and_uploads(client: openai.OpenAI, archive: Path) -> str:
    """Returns the id of the uploaded archive."""
    upload = client.uploads.upload_file_chunked(
        file=archive, mime_type="application/x-tar", purpose="fine-tune", part_size=50_000
    )
    assert upload.status == "completed"
    assert upload.file is not None
    assert upload.file.bytes == archive.stat().st_size
    assert upload.file.filename == archive.name
    assert sha256(client.files.content(upload.file.id).read()) == sha256(archive.read_bytes())
    # Without a file in between: by hand, part by part.
    data = archive.read_bytes()
    made = client.uploads.create(
        bytes=len(data), filename="by-hand.tar", mime_type="application/x-tar", purpose="fine-tune"
    )
    half = len(data) // 2
    parts = [client.uploads.parts.create(made.id, data=piece).id for piece in (data[half:], data[:half])]
    done = client.uploads.complete(made.id, part_ids=parts[::-1], md5=hashlib.md5(data).hexdigest())
    assert done.file is not None
    assert client.files.content(done.file.id).read() == data
    stopped = client.uploads.create(bytes=10, filename="x.tar", mime_type="application/x-tar", purpose="fine-tune")
    assert client.uploads.cancel(stopped.id).status == "cancelled"
    # The Files API.
    small = client.files.create(file=("notes.txt", b"hello"), purpose="user_data")
    assert client.files.retrieve(small.id).filename == "notes.txt"
    assert client.files.content(small.id).read() == b"hello"
    assert small.id in [item.id for item in client.files.list(purpose="user_data")]
    assert small.id not in [item.id for item in client.files.list(purpose="fine-tune")]
    assert len({item.id for item in client.files.list(limit=1)}) >= 3  # the client turns the pages
    assert client.files.delete(small.id).deleted
    return upload.file.id


def fine_tuning(client: openai.OpenAI, file_id: str, archive: Path, out: Path) -> str:
    """Returns the id of the job."""
    job = client.fine_tuning.jobs.create(
        model="auto",
        training_file=file_id,
        suffix="reviews",
        metadata={"team": "blue"},
        extra_body={"method": {"type": "gram"}, "strengths": [0.1, 1.0]},
    )
    assert job.object == "fine_tuning.job"
    assert job.status in ("queued", "running")
    job = ended(client, job.id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model
    assert job.finished_at
    assert job.id in [item.id for item in client.fine_tuning.jobs.list()]
    assert job.id in [item.id for item in client.fine_tuning.jobs.list(metadata={"team": "blue"})]
    assert job.id not in [item.id for item in client.fine_tuning.jobs.list(metadata={"team": "red"})]
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=1))
    assert {"created", "succeeded"} <= {event.data["event"] for event in events if isinstance(event.data, dict)}, events
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert len(checkpoints) == 2
    assert job.fine_tuned_model in {item.fine_tuned_model_checkpoint for item in checkpoints}
    # The patched adapter, as a tar, by the Files API: the customer's files with other weights.
    with tarfile.open(fileobj=io.BytesIO(client.files.content(job.fine_tuned_model).read())) as patched:
        patched.extractall(out, filter="data")
    with tarfile.open(archive) as given:
        names = {Path(name).name for name in given.getnames() if Path(name).suffix}
    found = {path.name: path for path in out.rglob("*") if path.is_file()}
    assert WEIGHTS in found
    assert set(found) == names
    # Everything that the job lists as a result can be fetched.
    for result in job.result_files:
        assert client.files.content(result).read()
    # Cancelling what has ended changes nothing.
    assert client.fine_tuning.jobs.cancel(job.id).status == "succeeded"
    other = client.fine_tuning.jobs.create(model="auto", training_file=file_id, extra_body={"method": {"type": "gram"}})
    assert client.fine_tuning.jobs.cancel(other.id).status in ("cancelled", "running", "succeeded")
    assert ended(client, other.id).status in ("cancelled", "succeeded")
    return str(job.id)


def webhooks(client: openai.OpenAI, raw: httpx.Client, file_id: str) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = raw.post(
        "/webhook_endpoints",
        json={
            "url": f"http://127.0.0.1:{server.server_port}/hook",
            "name": "end of jobs",
            "event_types": ["fine_tuning.job.succeeded"],
        },
    )
    assert endpoint.status_code == 201, endpoint.text
    job = client.fine_tuning.jobs.create(model="auto", training_file=file_id, extra_body={"method": {"type": "none"}})
    assert ended(client, job.id).status == "succeeded"
    deadline = time.monotonic() + 30
    while not received:
        assert time.monotonic() < deadline, "no webhook came"
        time.sleep(0.1)
    body, headers = received[0]
    event: Any = client.webhooks.unwrap(body, headers, secret=endpoint.json()["signing_secret"])
    assert event.type == "fine_tuning.job.succeeded"
    assert event.data.id == job.id
    wrong = "whsec_" + "A" * 43 + "="
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret=wrong)
    server.shutdown()


def refusals(url: str, client: openai.OpenAI, read_key: str, file_id: str, limited_key: str) -> None:
    def refused(kind: type[openai.APIStatusError], code: str, call: Any) -> openai.APIStatusError:
        with pytest.raises(kind) as raised:
            call()
        error = raised.value
        assert type(error) is kind, (type(error), error)
        assert error.code == code, (error.code, error)
        assert error.request_id, error
        assert "Traceback" not in str(error)
        return error

    jobs = client.fine_tuning.jobs
    refused(openai.NotFoundError, "realignment_not_found", lambda: jobs.retrieve("rlg_nothing"))
    refused(openai.NotFoundError, "file_not_found", lambda: client.files.retrieve("file_nothing"))
    refused(openai.NotFoundError, "upload_not_found", lambda: client.uploads.complete("upload_nothing", part_ids=["x"]))
    stranger = openai.OpenAI(base_url=url, api_key="sgk_wrong", max_retries=0)
    refused(openai.AuthenticationError, "unauthorized", stranger.files.list)
    reader = openai.OpenAI(base_url=url, api_key=read_key, max_retries=0)
    assert file_id in [item.id for item in reader.files.list()]
    refused(
        openai.PermissionDeniedError,
        "insufficient_scope",
        lambda: reader.fine_tuning.jobs.create(model="auto", training_file=file_id),
    )
    refused(
        openai.UnprocessableEntityError,
        "invalid_request",
        lambda: jobs.create(model="auto", training_file=file_id, extra_body={"unheard_of": 1}),
    )
    limited = openai.OpenAI(base_url=url, api_key=limited_key, max_retries=0)

    def often() -> None:
        for _ in range(50):
            limited.files.list()

    error = refused(openai.RateLimitError, "rate_limit_exceeded", often)
    assert 0 < float(error.response.headers["retry-after"]) <= 120
    # With its retries the same client gets through.
    patient = openai.OpenAI(base_url=url, api_key=limited_key, max_retries=5)
    for _ in range(6):
        patient.files.list()


def main() -> None:
    url, key, read_key, limited_key, archive, out = sys.argv[1:]
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=2)
    headers = {"authorization": f"Bearer {key}"}
    file_id = files_and_uploads(client, Path(archive))
    job_id = fine_tuning(client, file_id, Path(archive), Path(out))
    with httpx.Client(base_url=url, headers=headers, trust_env=False) as raw:
        webhooks(client, raw, file_id)
    refusals(url, client, read_key, file_id, limited_key)
    print(json.dumps({"openai": openai.__version__, "job": job_id}))  # noqa: T201


if __name__ == "__main__":
    main()
