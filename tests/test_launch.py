"""`safegraft serve` as a supervisor: real processes, real signals. What was accepted is never lost."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from safegraft.errors import Conflict, InvalidParameter
from safegraft.launch import check_port, find_broker, locked
from tests.service.conftest import SAFEGRAFT, Running, finished, free_port, start, upload

ANALYZE = {"method": {"type": "gram"}, "mode": "analyze"}


def processes(data: Path) -> dict[int, str]:
    """Every living process that works on this data folder, whoever started it: pid → command line."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (folder / "environ").read_bytes().split(b"\0")
            place = (folder / "cwd").readlink()  # Valkey writes its own title over its command line and environment
        except OSError:
            continue
        mine = f"SAFEGRAFT_DATA={data}".encode() in environment or str(data) in command or place == data / "broker"
        if mine and command:  # a zombie has none
            found[int(folder.name)] = command
    return found


def pid(data: Path, word: str) -> int:
    """The one process of this service whose command line has the word, and which is nobody's pool process."""
    found = {number: command for number, command in processes(data).items() if word in command}
    found = {number: command for number, command in found.items() if "spawn_main" not in command}
    assert len(found) == 1, found
    return next(iter(found))


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def order(client: httpx.Client, adapter_id: str) -> str:
    answer = client.post("/v1/realignments", json={"adapter_id": adapter_id, **ANALYZE})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").is_success
    except httpx.TransportError:
        return False


def serve_again(data: Path, port: int) -> subprocess.CompletedProcess[str]:
    command = [SAFEGRAFT, "serve", "--dev", "--data", str(data), "--port", str(port)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def running(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One service with one worker, that these tests may hurt."""
    data = tmp_path_factory.mktemp("launch") / "data"
    subprocess.run([SAFEGRAFT, "reference", "add", str(bundle), "--data", str(data)], check=True, capture_output=True)
    # A short lease: the job that a killed worker held comes back soon.
    running = start(data, workers=1, log=data / "serve.log", SAFEGRAFT_LEASE_SECONDS="4")
    yield running
    running.process.terminate()
    assert running.process.wait(60) == 0
    assert processes(data) == {}


@pytest.mark.long
def test_a_folder_is_served_once_and_a_port_by_one(running: Running, tmp_path: Path) -> None:
    second = serve_again(running.data, free_port())
    assert second.returncode == 2
    assert "data_folder_in_use: " in second.stderr
    port = int(running.url.rsplit(":", 1)[1])
    third = serve_again(tmp_path / "other", port)
    assert third.returncode == 2
    assert f"port_in_use: Port {port} of 127.0.0.1 is in use" in third.stderr
    assert "Traceback" not in second.stderr + third.stderr
    assert processes(tmp_path / "other") == {}
    with running.client() as client:
        assert ready(client)


def test_whatever_part_is_killed_comes_back_and_jobs_complete(running: Running, fresh: Path) -> None:
    """Each part dies with jobs waiting; none is lost, none is done twice."""
    ids = []
    with running.client() as client:
        adapter_id = upload(client, fresh)["id"]
        broker = "redis" if "redis" in find_broker().name else "valkey"  # whichever this machine has
        for word in (f"{broker}-server", "uvicorn", "celery"):
            ids += [order(client, adapter_id) for _ in range(2)]
            killed = pid(running.data, word)
            os.kill(killed, signal.SIGKILL)
            until(lambda word=word, killed=killed: any(  # type: ignore[misc]
                word in command for number, command in processes(running.data).items() if number != killed
            ))  # fmt: skip
            until(lambda: ready(client))
        ids.append(order(client, adapter_id))
        for job_id in ids:
            job = finished(client, job_id, 90)
            assert job["status"] == "succeeded", job
            events = client.get(f"/v1/realignments/{job_id}/events").json()["data"]
            assert [event["type"] for event in events].count("succeeded") == 1
    log = (running.data / "serve.log").read_text()
    assert "broker ended; starting it again" in log
    assert "gateway ended; starting it again" in log
    assert "worker1 ended; starting it again" in log


@pytest.mark.long
def test_nothing_is_lost_when_everything_is_killed(bundle: Path, fresh: Path, tmp_path: Path) -> None:
    """SIGKILL for the supervisor takes its children along; what was queued is done after the next start."""
    data = tmp_path / "data"
    subprocess.run([SAFEGRAFT, "reference", "add", str(bundle), "--data", str(data)], check=True, capture_output=True)
    first = start(data, workers=1, log=tmp_path / "first.log")
    try:
        with first.client() as client:
            adapter_id = upload(client, fresh)["id"]
            ids = [order(client, adapter_id) for _ in range(4)]
            before = client.get(f"/v1/adapters/{adapter_id}").json()
        assert len(processes(data)) >= 4
    finally:
        first.process.kill()
        first.process.wait()
    until(lambda: processes(data) == {}, 15)
    second = start(data, workers=1, log=tmp_path / "second.log")
    try:
        with second.client() as client:
            assert client.get(f"/v1/adapters/{adapter_id}").json() == before
            for job_id in ids:
                assert finished(client, job_id, 90)["status"] == "succeeded"
    finally:
        second.process.send_signal(signal.SIGINT)
        assert second.process.wait(60) == 0
    assert processes(data) == {}


def test_a_lock_is_held_by_whoever_inherited_it(tmp_path: Path) -> None:
    """A broker that outlives its supervisor keeps the folder."""
    with locked(tmp_path / "data") as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    try:
        with pytest.raises(Conflict) as refused, locked(tmp_path / "data"):
            pass
        assert refused.value.code == "data_folder_in_use"
    finally:
        child.kill()
        child.wait()
    with locked(tmp_path / "data"):
        pass


def test_ports_and_hosts_are_checked_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            with pytest.raises(Conflict) as refused:
                check_port(host, port)
            assert refused.value.code == "port_in_use"
            assert refused.value.param == "--port"
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        check_port(host, port)
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises(InvalidParameter) as wrong:
            check_port(host, port)
        assert wrong.value.code == "bad_host"
