"""docs/batches.md: every command on it, run as it stands there, on a service with two references."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from safegraft.contracts import batch
from safegraft.stores import batches
from service.settings import GatewaySettings
from tests.service.conftest import Running, operate, realign, start, upload

PAGE = (Path(__file__).parents[2] / "docs" / "batches.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.M | re.S)


@pytest.fixture(scope="module")
def references(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An old one and a new one: the same, with another name in its manifest."""
    new = tmp_path_factory.mktemp("references") / "new"
    shutil.copytree(bundle, new)
    manifest = json.loads((new / "manifest.json").read_text())
    (new / "manifest.json").write_text(json.dumps({**manifest, "name": "new"}))
    return bundle, new


@pytest.fixture(scope="module")
def running(references: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    data = tmp_path_factory.mktemp("page") / "data"
    for reference in references:
        operate(data, "reference", "add", str(reference))
    running = start(data, workers=1, log=data / "serve.log")
    yield running
    running.process.terminate()
    assert running.process.wait(60) == 0


@pytest.mark.long
def test_every_command_of_the_page(running: Running, fresh: Path, continued: Path, tmp_path: Path) -> None:
    key = "any, in development"
    with running.client() as client:
        found = {item["name"]: item["id"] for item in client.get("/v1/references").json()["data"]}
        new = found.pop("new")
        (old,) = found.values()
        patched = patch_all(client, old, [fresh, continued, fresh])
        # Another stage, and never patched: not selected.
        realign(client, upload(client, fresh)["id"], reference_id=old, method={"type": "gram"}, mode="analyze")
        upload(client, fresh)
        assert len(COMMANDS) == 4
        path = tmp_path / "commands.sh"
        path.write_text("set -euo pipefail\n" + "\n".join(COMMANDS), encoding="utf-8")
        environment = os.environ | {"URL": running.url, "KEY": key, "OLD": old, "NEW": new}
        done = subprocess.run(["bash", str(path)], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert '"status": "succeeded"' in done.stdout
        pairs = dict(re.findall(r"^(adp_\w+)\t(adp_\w+)$", done.stdout, flags=re.M))
        assert set(pairs) == set(patched)
        for before, after in pairs.items():
            made = client.get(f"/v1/adapters/{after}").json()
            job = client.get(f"/v1/realignments/{made['origin']['realignment_id']}").json()
            assert (job["adapter_id"], job["reference_id"], job["metadata"]) == (before, new, {"round": "2"})
        assert done.stdout.rstrip().endswith("cancelled")
        cancelled, canary = client.get("/v1/realignment_batches").json()["data"]
        assert (cancelled["mode"], cancelled["counts"]["total"]) == ("analyze", 4)
        assert (canary["counts"]["total"], canary["counts"]["succeeded"]) == (3, 3)


def patch_all(client: httpx.Client, reference_id: str, folders: list[Path]) -> list[str]:
    ids = []
    for folder in folders:
        adapter_id = upload(client, folder)["id"]
        job = realign(
            client, adapter_id, reference_id=reference_id, method={"type": "gram"}, metadata={"stage": "live"}
        )
        assert job["status"] == "succeeded"
        ids.append(adapter_id)
    return ids


def test_the_page_names_every_field_state_and_limit() -> None:
    selection = {*batch.BatchSelect.model_fields, *batch.StopRule.model_fields}
    for name in selection | {"adapter_ids", "canary.share", "stop_rule", "webhook_url"}:
        assert f"`{name}`" in PAGE or f'`"{name}"`' in PAGE, name
    for status in ("canary", "running", "succeeded", "stopped", "cancelled"):
        assert f"`{status}`" in PAGE
    assert f"| {batch.MAX_ADAPTERS:,} |".replace(",", " ") in PAGE
    assert f"| {batches.MAX_OPEN} (429 `too_many_batches`) |" in PAGE
    assert f"`SAFEGRAFT_BATCH_OPEN_JOBS` ({GatewaySettings().batch_open_jobs})" in PAGE
    assert batch.MIN_JUDGED == 10
    assert "from the tenth" in PAGE
    assert f"`max_failed_share` ({batch.StopRule().max_failed_share})" in PAGE
