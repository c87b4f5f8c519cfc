"""A real service: gateway, Valkey and two workers as `safegraft serve` starts them, with the tiny reference."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.engine import Engine

from safegraft.settings import SharedSettings
from safegraft.stores.database import open_database
from safegraft.stores.objects import Objects, open_objects
from tests import scaled, zygote
from tests.scaled import free_port as free_port

SAFEGRAFT = str(Path(sys.executable).parent / "safegraft")


@dataclass
class Running:
    url: str
    data: Path
    process: subprocess.Popen[bytes]

    def client(self) -> httpx.Client:
        # With object storage, files are one step further.
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, follow_redirects=scaled.SCALED)


def objects_of(data: Path) -> Objects:
    """Where the installation in a data folder keeps its bytes."""
    return open_objects(
        SharedSettings(data=data, storage_url=scaled.environment(data).get("SAFEGRAFT_STORAGE_URL", ""))
    )


def database_of(data: Path) -> Engine:
    """The database of the installation in a data folder; to be disposed of."""
    given = scaled.environment(data).get("SAFEGRAFT_DATABASE_URL", "")
    return open_database(SharedSettings(data=data, database_url=given).database)


def execute(data: Path, statement: str, **values: object) -> None:
    """SQL on the database of the installation in a data folder."""
    engine = database_of(data)
    with engine.begin() as connection:
        connection.execute(text(statement), values)
    engine.dispose()


def environment_of(data: Path) -> dict[str, str]:
    """What a program needs to work on the installation in a data folder."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SAFEGRAFT_") and key != "REDIS_URL"}
    return clean | scaled.environment(data)


def operate(data: Path, *arguments: str) -> str:
    """Runs `safegraft …` on the installation in a data folder; what it printed."""
    ended = zygote.run([*arguments, "--data", str(data)], environment_of(data))
    ended.check_returncode()
    return ended.stdout.strip()


def start(data: Path, *, workers: int, log: Path, dev: bool = True, **environment: str) -> Running:
    """Starts a service and waits until it is ready."""
    port = free_port()
    command = [SAFEGRAFT, "serve", "--port", str(port), "--data", str(data), "--workers", str(workers)]
    command += ["--dev"] if dev else []
    clean = environment_of(data)
    if scaled.SCALED:
        # What the tests added to this data folder is to be found by all machines.
        for folder in (data / "references").glob("ref_*"):
            command_line = [SAFEGRAFT, "reference", "add", str(folder), "--data", str(data)]
            subprocess.run(command_line, check=True, capture_output=True, env=clean)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=clean | environment)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", trust_env=False).is_success:
                return Running(url, data, process)
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the service did not start: {log.read_text()}")


@pytest.fixture(scope="session")
def service(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    data = tmp_path_factory.mktemp("service") / "data"
    subprocess.run([SAFEGRAFT, "reference", "add", str(bundle), "--data", str(data)], check=True, capture_output=True)
    running = start(data, workers=2, log=data / "serve.log")
    yield running
    running.process.terminate()
    assert running.process.wait(60) == 0


@pytest.fixture
def client(service: Running) -> Iterator[httpx.Client]:
    with service.client() as client:
        yield client


def files_of(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    """A folder as multipart parts."""
    return [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir()) if path.is_file()]


def upload(client: httpx.Client, folder: Path, **fields: str) -> dict[str, Any]:
    answer = client.post("/v1/adapters", files=files_of(folder), data=fields)
    assert answer.status_code == 201, answer.text
    body: dict[str, Any] = answer.json()
    return body


def finished(client: httpx.Client, job_id: str, seconds: float = 60) -> dict[str, Any]:
    """Polls a realignment until it has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job: dict[str, Any] = client.get(f"/v1/realignments/{job_id}").json()
        if job["status"] in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.05)
    raise AssertionError(f"{job_id} did not end: {job}")


def realign(client: httpx.Client, adapter_id: str, **request: Any) -> dict[str, Any]:
    answer = client.post("/v1/realignments", json={"adapter_id": adapter_id, **request})
    assert answer.status_code == 202, answer.text
    return finished(client, answer.json()["id"])


def take_database_away(client: TestClient, data: Path) -> None:
    """Leaves a folder where SQLite's file was."""
    while not (data / "safegraft.sqlite").is_dir():
        for file in data.glob("safegraft.sqlite*"):
            file.unlink()
        client.app.state.services.database.dispose()  # type: ignore[attr-defined]
        with contextlib.suppress(FileExistsError):  # whoever looks for work in between makes it anew
            (data / "safegraft.sqlite").mkdir()
