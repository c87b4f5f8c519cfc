"""`safegraft admin` without a service: what it prints, what it refuses, and what it leaves in the database."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import Engine

from safegraft.contracts.keys import Limits
from safegraft.settings import SharedSettings
from safegraft.stores.database import open_database
from safegraft.stores.jobs import JobStore
from safegraft.stores.keys import KeyStore
from safegraft.stores.references import ReferenceRegistry
from safegraft.stores.workers import WorkerStore
from safegraft.vault import open_vault
from tests.service.conftest import SAFEGRAFT
from tests.stores.records import request


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def engine(data: Path) -> Iterator[Engine]:
    engine = open_database(SharedSettings(data=data).database)
    yield engine
    engine.dispose()


def admin(data: Path, *arguments: str | Path, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SAFEGRAFT_")}
    command = [SAFEGRAFT, "admin", *map(str, arguments)]
    done = subprocess.run(
        command, env=clean | {"SAFEGRAFT_DATA": str(data), "COLUMNS": "200"} | environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def as_json(data: Path, *arguments: str | Path, status: int = 0, **environment: str) -> Any:
    return json.loads(admin(data, *arguments, "--json", status=status, **environment).stdout)


def code(data: Path, *arguments: str | Path, **environment: str) -> str:
    return str(as_json(data, *arguments, status=2, **environment)["error"]["code"])


@pytest.mark.long
def test_limits_change_one_by_one_and_go_back_to_the_default(data: Path, engine: Engine) -> None:
    store = KeyStore(engine, open_vault(SharedSettings(data=data)))
    store.create("acme")
    nothing = {"tenant": "acme", "max_bytes": None, "max_jobs": None, "max_requests_per_second": None}
    assert as_json(data, "limits", "acme", "--show") == nothing
    admin(data, "limits", "acme", "--max-bytes", "5000000000000", "--max-jobs", "0")
    changed = as_json(data, "limits", "acme", "--max-requests-per-second", "7", "--max-jobs", "default")
    assert changed == {**nothing, "max_bytes": 5 * 10**12, "max_requests_per_second": 7}
    assert store.limits("acme") == Limits(max_bytes=5 * 10**12, max_requests_per_second=7)
    # The gateway's own setting is no order to limit this tenant.
    again = as_json(data, "limits", "acme", "--max-jobs", "9", SAFEGRAFT_MAX_REQUESTS_PER_SECOND="50")
    assert (again["max_jobs"], again["max_requests_per_second"]) == (9, 7)
    assert as_json(data, "limits", "acme", SAFEGRAFT_MAX_JOBS="3")["max_jobs"] == 3
    assert "max_jobs" in admin(data, "limits", "acme", "--show").stdout


@pytest.mark.parametrize(
    "arguments",
    [[], ["--max-jobs", "many"], ["--max-jobs", "-1"], ["--max-jobs", str(2**31)], ["--max-bytes", str(2**63)],
     ["--max-bytes", "1e9"], ["--max-requests", "٣"]],
    ids=" ".join,
)  # fmt: skip
def test_what_is_no_limit_is_refused(data: Path, engine: Engine, arguments: list[str]) -> None:
    KeyStore(engine, open_vault(SharedSettings(data=data))).create("acme")
    assert code(data, "limits", "acme", *arguments) == "invalid_parameter"


def test_limits_of_nobody(data: Path, engine: Engine) -> None:
    assert code(data, "limits", "nobody", "--max-jobs", "1") == "tenant_not_found"


@pytest.mark.long
def test_references_are_preferred_and_removed_when_no_job_needs_them(
    data: Path, engine: Engine, bundle: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "name": "[red]other"}))
    first = as_json(data, "references", "add", bundle)["id"]
    second = admin(data, "references", "add", other).stdout.strip()
    assert admin(data, "references", "default", second).stderr == f"{second} is preferred.\n"
    listed = {item["id"]: item["default"] for item in as_json(data, "references", "list")}
    assert listed == {first: False, second: True}
    shown = admin(data, "references", "list").stdout
    assert second in shown
    assert "[red]other" in shown
    jobs = JobStore(engine, lease_seconds=30, max_attempts=3)
    job = jobs.create("t", second, request()).job
    assert code(data, "references", "remove", second) == "reference_in_use"
    jobs.cancel("t", job.id)
    assert as_json(data, "references", "remove", second) == {"id": second, "removed": True}
    assert [item.id for item in ReferenceRegistry(data / "references").installed()] == [first]
    assert list((data / "references").glob(".removed-*")) == []
    # What is gone is no longer preferred.
    assert as_json(data, "references", "list") == [{"id": first, "name": manifest["name"], "default": False}]
    for action in ("remove", "default"):
        assert code(data, "references", action, second) == "reference_not_found"
        assert code(data, "references", action, "../../etc") == "reference_not_found"
    assert as_json(data, "references", "default", "none") == {"default": None}


@pytest.mark.long
def test_workers_are_named_to_drain(data: Path, engine: Engine) -> None:
    assert as_json(data, "workers") == []
    assert "There is no worker" in admin(data, "drain", "--all").stderr
    store = WorkerStore(engine, lease_seconds=45)
    store.beat("worker1@abc", "cuda:1", "9.9", started=True)
    assert code(data, "drain") == "invalid_parameter"
    assert code(data, "drain", "worker1@abc", "--all") == "invalid_parameter"
    assert code(data, "drain", "worker2@abc") == "worker_not_found"
    assert admin(data, "drain", "worker1@abc").stderr == "worker1@abc takes no new jobs.\n"
    assert store.all()[0].state == "draining"
    shown = admin(data, "workers").stdout
    for word in ("worker1@abc", "draining", "cuda:1", "9.9", "s ago"):
        assert word in shown
    assert admin(data, "drain", "worker1@abc", "--undo").stderr == "worker1@abc takes jobs again.\n"
    with engine.begin() as connection:
        connection.execute(text("UPDATE workers SET seen_at = seen_at - 50"))
    assert as_json(data, "workers")[0]["state"] == "silent"
    assert as_json(data, "workers", SAFEGRAFT_LEASE_SECONDS="100")[0]["state"] == "live"


def test_a_mistyped_folder_is_no_service_without_jobs(tmp_path: Path) -> None:
    for command in (("jobs",), ("workers",), ("requeue", "rlg_1"), ("gc",), ("limits", "acme"), ("drain", "w")):
        assert code(tmp_path / "typo", *command) == "no_installation"
    assert not (tmp_path / "typo").exists()


def test_jobs_and_requeue(data: Path, engine: Engine) -> None:
    assert as_json(data, "jobs") == as_json(data, "jobs", "--dead") == []
    store = JobStore(engine, lease_seconds=30, max_attempts=1)
    dead, running, waiting = (store.create("acme", "ref_1", request()).job.id for _ in range(3))
    for job_id in (dead, running):
        assert store.claim(job_id, "worker1") is not None
    store.release(dead, 1, "It failed.", code="storage_fault")
    assert [job["id"] for job in as_json(data, "jobs")] == [waiting, running]
    assert [job["id"] for job in as_json(data, "jobs", "--limit", "1")] == [waiting]
    [shown] = as_json(data, "jobs", "--dead")
    assert (shown["id"], shown["tenant"], shown["error"]) == (dead, "acme", "storage_fault")
    # A line a job, in a pipe and on a terminal of any width.
    [header, line] = admin(data, "jobs", "--dead").stdout.splitlines()
    assert header.split() == ["id", "tenant", "state", "attempt", "method", "error", "worker", "made", "ended"]
    assert line.split()[:6] == [dead, "acme", "dead", "1", "auto", "storage_fault"]
    assert code(data, "requeue", running) == "not_dead"
    assert code(data, "requeue", "rlg_nobody") == "realignment_not_found"
    assert admin(data, "requeue", dead).stderr == f"{dead} is queued again, after 1 attempts.\n"
    assert store.get("acme", dead).status == "queued"


def test_gc_says_what_it_would_do_and_does_it(data: Path, engine: Engine) -> None:
    assert as_json(data, "gc") == {"dry_run": False, "removed": {}, "failed": 0}
    scratch = data / "objects" / "scratch" / "left"
    scratch.mkdir(parents=True)
    (scratch / "x").write_bytes(bytes(11))
    for path in (scratch / "x", scratch):
        os.utime(path, (1, 1))
    expected = {"scratch": {"count": 1, "bytes": 11}}
    assert as_json(data, "gc", "--dry-run") == {"dry_run": True, "removed": expected, "failed": 0}
    assert scratch.exists()
    shown = admin(data, "gc").stdout
    assert "scratch" in shown
    assert "11" in shown
    assert not scratch.exists()
