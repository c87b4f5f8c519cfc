"""/livez and /readyz with parts of the service missing."""

import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from safegraft.files import MIN_FREE_BYTES
from safegraft.stores.references import LIST_SECONDS, open_references
from service.app import create_app
from service.queue import PING_SECONDS, Queue
from service.settings import GatewaySettings
from tests.scaled import SCALED
from tests.service.conftest import Running, free_port, take_database_away


def test_a_gateway_without_broker_and_reference_lives_but_is_not_ready(tmp_path: Path, bundle: Path) -> None:
    settings = GatewaySettings(dev=True, data=tmp_path / "data", redis_url=f"redis://127.0.0.1:{free_port()}/0")
    with TestClient(create_app(settings), client=("127.0.0.1", 50000), base_url="http://127.0.0.1") as client:
        assert client.get("/livez").json() == {"status": "ok", "checks": {}}
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json() == {
            "status": "not ready",
            "checks": {
                "database": True,
                "broker": False,
                "storage": True,
                "space": True,
                "reference": False,
                "worker": False,
            },
        }
        # A reference counts as soon as it is there.
        open_references(settings).add(bundle)
        if SCALED:  # … or as soon as the bucket is looked at again
            time.sleep(LIST_SECONDS + 0.5)
        assert client.get("/readyz").json()["checks"]["reference"] is True
        # So does a worker, until it has been silent for a lease.
        workers = client.app.state.services.workers  # type: ignore[attr-defined]
        workers.beat("w1", "cpu", "1")
        assert client.get("/readyz").json()["checks"]["worker"] is True
        workers.drain("w1")
        assert client.get("/readyz").json()["checks"]["worker"] is True
        workers.leave("w1")
        assert client.get("/readyz").json()["checks"]["worker"] is False
        assert client.get("/livez").status_code == 200


@pytest.mark.skipif(SCALED, reason="the database is not a file that could be taken away")
def test_a_database_that_is_gone_is_named(tmp_path: Path) -> None:
    settings = GatewaySettings(dev=True, data=tmp_path / "data", redis_url=f"redis://127.0.0.1:{free_port()}/0")
    with TestClient(create_app(settings), client=("127.0.0.1", 50000), base_url="http://127.0.0.1") as client:
        take_database_away(client, tmp_path / "data")
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert (answer.json()["checks"]["database"], answer.json()["checks"]["worker"]) == (False, False)
        assert client.get("/livez").status_code == 200


def test_a_whole_service_is_ready(service: Running) -> None:
    with service.client() as client:
        answer = client.get("/readyz")
    assert answer.status_code == 200
    names = ("database", "broker", "storage", "space", "reference", "worker")
    assert answer.json() == {"status": "ok", "checks": dict.fromkeys(names, True)}


def test_monitors_may_ask_with_head(service: Running) -> None:
    with service.client() as client:
        answers = [client.head(path) for path in ("/livez", "/readyz")]
    assert [(answer.status_code, answer.content) for answer in answers] == [(200, b"")] * 2


def test_a_broker_that_says_nothing_is_away_soon() -> None:
    """Whoever asks after health gives up after a second or two."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as silent:
        queue = Queue(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        queue.ping()  # imports what it needs
        began = time.monotonic()
        assert queue.ping() is False
        assert PING_SECONDS / 2 < time.monotonic() - began < 4 * PING_SECONDS + 1.0
        queue.close()


def test_a_place_for_bytes_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    settings = GatewaySettings(dev=True, data=tmp_path / "data", redis_url=f"redis://127.0.0.1:{free_port()}/0")
    with TestClient(create_app(settings), client=("127.0.0.1", 50000), base_url="http://127.0.0.1") as client:
        assert client.get("/readyz").json()["checks"]["storage"] is True
        shutil.rmtree(settings.objects, ignore_errors=True)
        settings.objects.write_text("no folder")
        assert client.get("/readyz").json()["checks"]["storage"] is False


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = GatewaySettings(dev=True, data=tmp_path / "data", redis_url=f"redis://127.0.0.1:{free_port()}/0")
    with TestClient(create_app(settings), client=("127.0.0.1", 50000), base_url="http://127.0.0.1") as client:
        for free, room in ((MIN_FREE_BYTES, True), (MIN_FREE_BYTES - 1, False)):

            def usage(path: Path, free: int = free) -> SimpleNamespace:
                return SimpleNamespace(free=free if path == settings.data else 2**40)

            monkeypatch.setattr("shutil.disk_usage", usage)
            answer = client.get("/readyz")
            assert (answer.status_code, answer.json()["checks"]["space"]) == (503, room)


def test_the_page_tells_how_much_room_is_needed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    assert f"| `space` | less than {MIN_FREE_BYTES // 2**20} MiB are left" in page
