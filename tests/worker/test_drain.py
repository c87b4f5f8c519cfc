"""Planned stops: a job may end, or is handed back uncounted; a rolling restart under load loses nothing."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.conftest import SAFEGRAFT, Running, finished, start, upload
from tests.test_launch import pid, processes, ready, until

pytestmark = pytest.mark.long

JOBS = 40


@contextlib.contextmanager
def served(data: Path, bundle: Path, workers: int, **settings: str) -> Iterator[Running]:
    subprocess.run([SAFEGRAFT, "reference", "add", str(bundle), "--data", str(data)], check=True, capture_output=True)
    running = start(data, workers=workers, log=data / "serve.log", dev=True, **settings)
    try:
        yield running
    finally:
        running.process.terminate()
        assert running.process.wait(120) == 0
    assert processes(data) == {}


def patiently(client: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
    """As a client does that knows of restarts: what was not answered is sent again."""
    deadline = time.monotonic() + 90
    while True:
        try:
            answer = client.request(method, path, **options)
            if answer.status_code not in (429, 502, 503, 504):
                return answer
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)


def events(client: httpx.Client, job_id: str) -> list[str]:
    answer = patiently(client, "GET", f"/v1/realignments/{job_id}/events", headers={"accept": "application/json"})
    return [event["type"] for event in answer.json()["data"]]


def worker_pids(data: Path) -> dict[str, int]:
    """The main processes of the workers."""
    found = {number: command for number, command in processes(data).items() if "worker.main" in command}
    return {command.partition("-n ")[2].split("@")[0]: number for number, command in found.items()}


def engine_of(data: Path) -> int:
    """The engine's process of the only worker, once it has loaded its reference."""
    until(lambda: " loaded" in (data / "logs" / "worker1.log").read_text(), 90)
    [found] = [number for number, command in processes(data).items() if "worker.engine_process" in command]
    return found


def test_a_job_that_takes_longer_than_the_grace_is_handed_back_and_not_counted(
    bundle: Path, fresh: Path, tmp_path: Path
) -> None:
    """With one attempt allowed: an uncounted one is what lets the second one be made."""
    settings = {"SAFEGRAFT_DRAIN_SECONDS": "1", "SAFEGRAFT_MAX_ATTEMPTS": "1"}
    with served(tmp_path / "data", bundle, 1, **settings) as running, running.client() as client:
        job_id = ""
        adapter_id = upload(client, fresh)["id"]
        worker = worker_pids(running.data)["worker1"]
        # The engine's process stands still, so the job lasts for as long as we like.
        engine = engine_of(running.data)
        os.kill(engine, signal.SIGSTOP)
        job_id = client.post("/v1/realignments", json={"adapter_id": adapter_id}).json()["id"]
        until(lambda: client.get(f"/v1/realignments/{job_id}").json()["status"] == "running")
        os.kill(worker, signal.SIGTERM)
        until(lambda: worker not in processes(running.data), 60)
        assert engine not in processes(running.data)
        job = finished(client, job_id, 90)
        assert (job["status"], job["attempt"]) == ("succeeded", 2), job
        kinds = events(client, job_id)
        assert kinds == ["created", "started", "handed_back", "started", "succeeded"]
        # The worker clears away after it has said that the job is done.
        until(lambda: not list((running.data / "objects" / "scratch").glob("rlg_*")))


def test_a_job_that_ends_within_the_grace_ends(bundle: Path, fresh: Path, tmp_path: Path) -> None:
    with served(tmp_path / "data", bundle, 1) as running, running.client() as client:
        adapter_id = upload(client, fresh)["id"]
        worker = worker_pids(running.data)["worker1"]
        engine = engine_of(running.data)
        os.kill(engine, signal.SIGSTOP)
        job_id = client.post("/v1/realignments", json={"adapter_id": adapter_id}).json()["id"]
        until(lambda: client.get(f"/v1/realignments/{job_id}").json()["status"] == "running")
        os.kill(worker, signal.SIGTERM)
        time.sleep(1)
        os.kill(engine, signal.SIGCONT)
        job = finished(client, job_id, 60)
        assert (job["status"], job["attempt"]) == ("succeeded", 1), job
        until(lambda: worker not in processes(running.data), 60)


def test_a_rolling_restart_under_load_loses_nothing(bundle: Path, fresh: Path, tmp_path: Path) -> None:
    """40 jobs; gateway and both workers are stopped once each, by SIGTERM, while these come in and run."""
    with served(tmp_path / "data", bundle, 2, SAFEGRAFT_DRAIN_SECONDS="20") as running, running.client() as client:
        adapter_id = upload(client, fresh)["id"]

        def order(number: int) -> str:
            body = {"adapter_id": adapter_id, "metadata": {"number": str(number)}}
            with running.client() as own:
                time.sleep(0.25 * number / 4)
                answer = patiently(
                    own, "POST", "/v1/realignments", json=body, headers={"Idempotency-Key": f"job-{number}"}
                )
            assert answer.status_code in (200, 202), answer.text
            return str(answer.json()["id"])

        with ThreadPoolExecutor(4) as pool:
            ordered = [pool.submit(order, number) for number in range(JOBS)]
            for name in ("worker1", "gateway", "worker2"):
                before = pid(running.data, "uvicorn") if name == "gateway" else worker_pids(running.data)[name]
                os.kill(before, signal.SIGTERM)
                until(lambda before=before: before not in processes(running.data), 60)  # type: ignore[misc]
                until(lambda: ready(client), 60)
                if name != "gateway":
                    until(lambda name=name: name in worker_pids(running.data), 60)  # type: ignore[misc]
            ids = [future.result() for future in ordered]
        assert len(set(ids)) == JOBS
        jobs = []
        deadline = time.monotonic() + 240
        for job_id in ids:
            job: dict[str, Any] = {}
            while job.get("status") not in ("succeeded", "failed", "cancelled"):
                assert time.monotonic() < deadline, job
                job = patiently(client, "GET", f"/v1/realignments/{job_id}").json()
                time.sleep(0.05)
            jobs.append(job)
        assert [job["status"] for job in jobs] == ["succeeded"] * JOBS
        # A stop is no lost attempt: only one that is handed back is made again, at most one for each worker.
        repeated = [job["id"] for job in jobs if job["attempt"] != 1]
        assert len(repeated) <= 2
        assert all("handed_back" in events(client, job_id) for job_id in repeated)
        assert sum(job["attempt"] - 1 for job in jobs) <= 2
        adapters = {job["result"]["adapter_id"] for job in jobs}
        assert len(adapters) == JOBS
