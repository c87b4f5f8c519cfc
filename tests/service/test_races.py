"""What goes away while it is being worked on: whose fault it is, and how it is said."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from safegraft.errors import StorageFault
from service.app import create_app
from service.routes.realignments import _stream
from service.settings import GatewaySettings
from tests.scaled import SCALED, free_port
from tests.service.answers import refused

pytestmark = pytest.mark.skipif(SCALED, reason="the gateway is this process, on files and SQLite")


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    settings = GatewaySettings(dev=True, data=tmp_path / "data", redis_url=f"redis://127.0.0.1:{free_port()}/0")
    with TestClient(create_app(settings), client=("127.0.0.1", 50000), base_url="http://127.0.0.1") as client:
        yield client


def services(client: TestClient) -> Any:
    return client.app.state.services  # type: ignore[attr-defined]


def gone(first: Callable[[], Any]) -> Callable[..., None]:
    """A store that finds a folder gone, just after `first` happened."""

    def fault(*_: Any) -> None:
        first()
        raise StorageFault("No such file or directory.")

    return fault


def test_a_part_whose_upload_is_cancelled_meanwhile_is_no_fault_of_storage(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"filename": "a.tar", "bytes": 3, "mime_type": "application/x-tar", "purpose": "user_data"}
    upload = client.post("/v1/uploads", json=body).json()["id"]

    def send() -> Any:
        headers = {"content-type": "application/octet-stream"}
        return client.post(f"/v1/uploads/{upload}/parts", content=b"abc", headers=headers)

    store = services(client).objects
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "publish", gone(lambda: None))
        refused(send(), 507, "storage_fault")
        patch.setattr(type(store), "publish", gone(lambda: client.post(f"/v1/uploads/{upload}/cancel")))
        refused(send(), 409, "upload_not_pending")


def test_a_file_that_is_deleted_while_an_adapter_is_made_of_it_is_missing(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = client.post("/v1/files", files={"file": ("a.tar", b"abc")}, data={"purpose": "user_data"})
    file = sent.json()["id"]
    store = services(client).objects
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "fetch", gone(lambda: None))
        refused(client.post("/v1/adapters", json={"file_ids": [file]}), 507, "storage_fault")
        patch.setattr(type(store), "fetch", gone(lambda: client.delete(f"/v1/files/{file}")))
        refused(client.post("/v1/adapters", json={"file_ids": [file]}), 404, "file_not_found")


def test_a_stream_of_a_job_that_is_deleted_ends(client: TestClient) -> None:
    async def connected() -> bool:
        return False

    async def told() -> list[str]:
        request: Any = SimpleNamespace(is_disconnected=connected)
        return [line async for line in _stream(services(client), "default", "rlg_deleted", 0, request)]

    assert asyncio.run(told()) == []
