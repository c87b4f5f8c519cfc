"""docs/operations.md: every command on it, run as it stands there, on a service that runs."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from safegraft.stores.jobs import JobStore
from service.settings import GatewaySettings
from tests.scaled import SCALED
from tests.service.conftest import SAFEGRAFT, Running, database_of, environment_of, start, upload

ALERTS = Path(__file__).parents[2] / "docs" / "prometheus" / "alerts.yml"
PROMTOOL = shutil.which("promtool")
PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.M | re.S)


@pytest.fixture(scope="module")
def running(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    data = tmp_path_factory.mktemp("page") / "data"
    subprocess.run([SAFEGRAFT, "reference", "add", str(bundle), "--data", str(data)], check=True, capture_output=True)
    running = start(data, workers=1, log=data / "serve.log")
    yield running
    running.process.terminate()
    assert running.process.wait(60) == 0


@pytest.mark.long
def test_every_command_of_the_page(running: Running, bundle: Path, fresh: Path, tmp_path: Path) -> None:
    clean = environment_of(running.data)
    environment = clean | {
        "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}",
        "SAFEGRAFT_DATA": str(running.data),
        "URL": running.url,
        "KEY": "not asked for in development",
        "BACKUP": str(tmp_path / "backup"),
    }

    def run(script: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, script + done.stdout + done.stderr
        return done.stdout

    # Another bundle than the one that serves: the same, with another name in its manifest.
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "name": "another"}))
    environment["BUNDLE"] = str(other)
    environment["WORKER"] = json.loads(run("safegraft admin workers --json"))[0]["name"]
    environment["JOB"] = dead_job(running, fresh, lambda: run("safegraft admin drain --all"))
    run("safegraft admin drain --all --undo")

    said = {}
    assert len(BLOCKS) >= 12
    for block in BLOCKS:
        if "references default $REFERENCE" in block:
            environment["OLD"] = json.loads(run("safegraft admin references list --json"))[0]["id"]
            environment["REFERENCE"] = run("safegraft admin references add $BUNDLE").strip()
        said[block.splitlines()[0]] = run(block)
    assert "sgk_" in said["safegraft keys create --tenant acme --name platform --scopes write --expires 90d"]
    assert '"status":"ok"' in said["curl -s $URL/livez"]
    assert environment["REFERENCE"] in said["safegraft admin references default $OLD"]
    assert environment["JOB"] in said["safegraft admin jobs"]
    assert environment["WORKER"] in said["safegraft admin workers"] if "safegraft admin workers" in said else True
    if not SCALED:  # there is no such file
        assert (tmp_path / "backup" / "safegraft.sqlite").stat().st_size > 4096
    assert (tmp_path / "backup" / "pepper").is_file()
    assert environment["REFERENCE"] not in run("safegraft admin references list")
    # Nothing that was done here keeps the service from serving.
    with running.client() as client:
        assert client.get("/readyz").status_code == 200
        deadline = time.monotonic() + 60
        while client.get(f"/v1/realignments/{environment['JOB']}").json()["status"] != "succeeded":
            assert time.monotonic() < deadline
            time.sleep(0.1)


def dead_job(running: Running, fresh: Path, drain: object) -> str:
    """A job that used all its attempts."""
    assert callable(drain)
    drain()
    with running.client() as client:
        adapter_id = upload(client, fresh)["id"]
        request = {"adapter_id": adapter_id, "method": {"type": "gram"}, "mode": "analyze"}
        job_id = str(client.post("/v1/realignments", json=request).json()["id"])
    engine = database_of(running.data)
    store = JobStore(engine, lease_seconds=30, max_attempts=1)
    assert store.claim(job_id, "somebody") is not None
    store.release(job_id, 1, "It failed on our side.")
    engine.dispose()
    return job_id


def test_the_page_names_every_command_of_admin() -> None:
    done = subprocess.run([SAFEGRAFT, "admin", "--help"], capture_output=True, text=True, check=True)
    commands = re.findall(r"^\W*(\w+)  ", done.stdout.partition("Commands")[2], flags=re.M)
    assert set(commands) >= {"jobs", "requeue", "workers", "drain", "limits", "gc", "references"}
    for command in commands:
        assert f"safegraft admin {command}" in PAGE


def test_the_page_says_what_to_do_about_every_alert() -> None:
    rules = [rule["alert"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    section = PAGE.partition("## Alerts, and what to do")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (Safegraft\w+) \|", section, flags=re.M) == rules


@pytest.mark.skipif(PROMTOOL is None, reason="promtool, which comes with Prometheus, is not installed")
def test_alerts_come_when_they_should() -> None:
    for command in (["check", "rules", str(ALERTS)], ["test", "rules", str(Path(__file__).parent / "alerts.test.yml")]):
        done = subprocess.run([str(PROMTOOL), *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_names_what_one_tenant_cannot_take_whole() -> None:
    defaults = GatewaySettings()
    for name in ("max_active_uploads", "max_event_streams"):
        assert f"`SAFEGRAFT_{name.upper()}` ({getattr(defaults, name)})" in PAGE.replace("\n  ", " ")
