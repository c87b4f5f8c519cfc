"""Downloads where bytes lie in S3: a client with a key is sent to an address that works for a while without one."""

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from safegraft.adapter import WEIGHTS
from safegraft.stores import s3
from service.app import create_app
from service.settings import GatewaySettings
from tests.service.answers import refused
from tests.service.conftest import files_of, free_port

Serve = Callable[..., TestClient]


@pytest.fixture
def serve(tmp_path: Path, storage_url: Callable[[], str]) -> Iterator[Serve]:
    """Gateways without broker and workers, on one bucket."""
    opened: list[TestClient] = []
    url = storage_url()

    def serve(**given: Any) -> TestClient:
        redis_url = f"redis://127.0.0.1:{free_port()}/0"
        settings = {"dev": True, "data": tmp_path / "data", "storage_url": url, "redis_url": redis_url} | given
        app = create_app(GatewaySettings.model_validate(settings))
        client = TestClient(
            app,
            client=("127.0.0.1", 50000),
            base_url="http://127.0.0.1",
            raise_server_exceptions=False,
            follow_redirects=False,
        )
        opened.append(client)
        return client.__enter__()

    yield serve
    for client in opened:
        client.__exit__(None, None, None)


def sent(client: TestClient, folder: Path) -> dict[str, Any]:
    answer = client.post("/v1/adapters", files=files_of(folder))
    assert answer.status_code == 201, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_a_file_is_fetched_from_where_it_lies(serve: Serve, fresh: Path) -> None:
    client = serve(presign_seconds=120)
    adapter = sent(client, fresh)
    for file in adapter["files"]:
        url = f"/v1/adapters/{adapter['id']}/files/{file['name']}"
        answer = client.get(url)
        assert (answer.status_code, answer.content) == (307, b"")
        assert answer.headers["cache-control"] == "no-store"
        assert "etag" not in answer.headers
        there = answer.headers["location"]
        assert there.startswith(os.environ["AWS_ENDPOINT_URL"])
        assert "X-Amz-Expires=120&" in there
        whole = httpx.get(there, trust_env=False)
        assert whole.content == (fresh / file["name"]).read_bytes()
        assert whole.headers["content-disposition"] == f'attachment; filename="{file["name"]}"'
        head = client.head(url)
        assert head.status_code == 200
        assert head.headers["etag"] == f'"sha256-{file["sha256"]}"'
        assert int(head.headers["content-length"]) == file["bytes"]
        assert client.get(url, headers={"if-none-match": head.headers["etag"]}).status_code == 304


def test_nobody_learns_an_address_without_a_key(serve: Serve, fresh: Path) -> None:
    adapter = sent(serve(), fresh)
    locked = serve(dev=False)
    for path in (f"files/{WEIGHTS}", "download"):
        answer = locked.get(f"/v1/adapters/{adapter['id']}/{path}")
        refused(answer, 401, "unauthorized")
        assert "location" not in answer.headers


def test_clients_may_reach_the_store_by_another_name(serve: Serve, fresh: Path) -> None:
    client = serve(storage_public_url="https://bytes.example.com")
    adapter = sent(client, fresh)
    answer = client.get(f"/v1/adapters/{adapter['id']}/files/{WEIGHTS}")
    assert answer.headers["location"].startswith("https://bytes.example.com/")


def test_conditions_that_the_store_would_misjudge_are_answered_here(serve: Serve, fresh: Path) -> None:
    client = serve()
    adapter = sent(client, fresh)
    url, raw = f"/v1/adapters/{adapter['id']}/files/{WEIGHTS}", (fresh / WEIGHTS).read_bytes()
    etag = client.head(url).headers["etag"]
    for headers in ({"if-match": etag}, {"range": "bytes=5-", "if-range": '"sha256-0"'}):
        answer = client.get(url, headers=headers)
        assert (answer.status_code, answer.content) == (200, raw)
        assert answer.headers["etag"] == etag
        assert int(answer.headers["content-length"]) == len(raw)
    assert client.get(url, headers={"range": "bytes=5-", "if-range": etag}).status_code == 307


def test_the_tar_comes_through_us_whole(serve: Serve, fresh: Path) -> None:
    client = serve()
    adapter = sent(client, fresh)
    answer = client.get(f"/v1/adapters/{adapter['id']}/download")
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) == len(answer.content)
    head = client.head(f"/v1/adapters/{adapter['id']}/download")
    assert head.headers["content-length"] == answer.headers["content-length"]
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            assert file.read() == (fresh / Path(member.name).name).read_bytes()


def test_a_store_that_is_silent_is_our_fault_and_worth_another_try(
    serve: Serve, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = sent(serve(), fresh)
    monkeypatch.setattr(s3, "PATIENT", s3.IMPATIENT)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    client = serve()
    answers = [
        client.post("/v1/adapters", files=files_of(fresh)),
        client.get(f"/v1/adapters/{adapter['id']}/files/{WEIGHTS}"),
        client.get(f"/v1/adapters/{adapter['id']}/download"),
    ]
    for answer in answers:
        refused(answer, 503, "storage_unavailable")
        assert int(answer.headers["retry-after"]) > 0
        assert not re.search(r"127\.0\.0\.1:\d", answer.text)
    assert len(client.get("/v1/adapters").json()["data"]) == 1


def test_nothing_of_an_upload_stays_on_this_machine(serve: Serve, fresh: Path, tmp_path: Path) -> None:
    sent(serve(), fresh)
    assert [path for path in (tmp_path / "data" / "objects").rglob("*") if path.is_file()] == []
