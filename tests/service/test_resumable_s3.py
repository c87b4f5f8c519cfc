"""Uploads in parts where bytes lie in S3: also past the gateway, to addresses that work for a while without a key."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from safegraft.stores.garbage import GarbageCollector, Removed, weight
from service.app import create_app
from service.settings import GatewaySettings
from tests.service.answers import refused
from tests.service.conftest import files_of, free_port
from tests.service.test_uploads import tar_of

MIB = 2**20


@pytest.fixture
def client(tmp_path: Path, storage_url: Callable[[], str]) -> Iterator[TestClient]:
    """A gateway without broker and workers, on a place of its own."""
    settings = GatewaySettings(
        dev=True,
        data=tmp_path / "data",
        storage_url=storage_url(),
        redis_url=f"redis://127.0.0.1:{free_port()}/0",
    )
    address = ("127.0.0.1", 50000)
    with TestClient(
        create_app(settings), client=address, base_url="http://127.0.0.1", follow_redirects=False
    ) as client:
        yield client
        assert list((tmp_path / "data").rglob("upload-*")) == []


def begin(client: TestClient, size: int, **values: Any) -> str:
    given = {"purpose": "fine-tune", "filename": "a.tar", "bytes": size, "mime_type": "application/x-tar", **values}
    return str(client.post("/v1/uploads", json=given).json()["id"])


def promised(client: TestClient, upload: str, size: int, **values: Any) -> dict[str, Any]:
    answer = client.post(f"/v1/uploads/{upload}/parts", json={"bytes": size, **values})
    assert answer.status_code == 200, answer.text
    part: dict[str, Any] = answer.json()
    return part


def complete(client: TestClient, upload: str, *parts: str, **values: Any) -> Any:
    return client.post(f"/v1/uploads/{upload}/complete", json={"part_ids": list(parts), **values})


def content(client: TestClient, file_id: str) -> bytes:
    answer = client.get(f"/v1/files/{file_id}/content")
    assert answer.status_code == 307
    return httpx.get(answer.headers["location"], trust_env=False).content


def test_parts_go_past_the_gateway(client: TestClient) -> None:
    data = bytes(range(256)) * 4096 * 12  # 12 MiB, more than a store takes in one request
    half = len(data) // 2
    upload = begin(client, len(data))
    digest = hashlib.sha256(data[:half]).hexdigest()
    first = promised(client, upload, half, sha256=digest.upper())
    assert first["sha256"] == digest
    sent = httpx.put(first["upload_url"], content=data[:half], trust_env=False)
    assert sent.is_success, sent.text
    second = client.post(
        f"/v1/uploads/{upload}/parts", content=data[half:], headers={"content-type": "application/octet-stream"}
    ).json()
    assert second["upload_url"] is None
    # An address is told once.
    listed = client.get(f"/v1/uploads/{upload}/parts").json()["data"]
    assert [part["id"] for part in listed] == [first["id"], second["id"]]
    assert all(part["upload_url"] is None for part in listed)
    done = complete(client, upload, first["id"], second["id"], sha256=hashlib.sha256(data).hexdigest())
    assert done.status_code == 200, done.text
    assert content(client, done.json()["file"]["id"]) == data


def test_what_did_not_arrive_as_promised_is_refused(client: TestClient) -> None:
    upload = begin(client, 3)
    part = promised(client, upload, 3)
    refused(complete(client, upload, part["id"]), 422, "part_missing")
    httpx.put(part["upload_url"], content=b"ab", trust_env=False).raise_for_status()
    refused(complete(client, upload, part["id"]), 422, "part_mismatch")
    httpx.put(part["upload_url"], content=b"abc", trust_env=False).raise_for_status()
    refused(complete(client, upload, part["id"], md5="0" * 32), 422, "checksum_mismatch")
    assert client.get(f"/v1/uploads/{upload}").json()["status"] == "pending"
    done = complete(client, upload, part["id"]).json()
    assert content(client, done["file"]["id"]) == b"abc"
    other = begin(client, 3)
    hashed = promised(client, other, 3, sha256="0" * 64)
    httpx.put(hashed["upload_url"], content=b"abc", trust_env=False).raise_for_status()
    refused(complete(client, other, hashed["id"]), 422, "part_mismatch")


def test_parts_with_more_bytes_than_announced_are_refused_and_removed(client: TestClient) -> None:
    """Else a tenant could keep any number of bytes, of which its quota knows none."""
    objects = client.app.state.services.objects  # type: ignore[attr-defined]
    upload = begin(client, 6)
    parts = [promised(client, upload, 3), promised(client, upload, 3)]
    for part in parts:
        httpx.put(part["upload_url"], content=bytes(MIB), trust_env=False).raise_for_status()
    answer = complete(client, upload, *(part["id"] for part in parts))
    refused(answer, 413, "part_too_large")
    assert weight(objects, "tenants/default") == 0
    # The address still works, and the part is what was announced.
    for part, data in zip(parts, (b"abc", b"def"), strict=True):
        httpx.put(part["upload_url"], content=data, trust_env=False).raise_for_status()
    done = complete(client, upload, *(part["id"] for part in parts))
    assert content(client, done.json()["file"]["id"]) == b"abcdef"


def test_bytes_that_no_quota_knows_are_collected(client: TestClient) -> None:
    """More than was announced, to an upload that nobody completes; and what comes after the end."""
    here = client.app.state.services  # type: ignore[attr-defined]
    collector = GarbageCollector(here.database, here.objects)
    upload, over = begin(client, 6), begin(client, 3)
    small, large = promised(client, upload, 3), promised(client, upload, 3)
    late = promised(client, over, 3)
    client.post(f"/v1/uploads/{over}/cancel").raise_for_status()
    for part, size in ((small, 3), (large, MIB), (late, 2 * MIB)):
        httpx.put(part["upload_url"], content=bytes(size), trust_env=False).raise_for_status()
    expected = {"oversized_parts": Removed(1, MIB), "late_parts": Removed(1, 2 * MIB)}
    assert collector.collect(dry_run=True).kinds == expected
    assert weight(here.objects, "tenants/default") == 3 * MIB + 3
    assert collector.collect().kinds == expected
    assert weight(here.objects, "tenants/default") == 3
    assert collector.collect().kinds == {}


def test_a_part_that_is_broken_after_many_megabytes_makes_no_file(client: TestClient) -> None:
    """The store is in the middle of a file then, which must not appear."""
    size = 32 * MIB
    upload = begin(client, 2 * size)
    good, bad = promised(client, upload, size), promised(client, upload, size)
    httpx.put(good["upload_url"], content=bytes(size), trust_env=False).raise_for_status()
    httpx.put(bad["upload_url"], content=bytes(size - 1), trust_env=False).raise_for_status()
    refused(complete(client, upload, good["id"], bad["id"]), 422, "part_mismatch")
    objects = client.app.state.services.objects  # type: ignore[attr-defined]
    assert list(objects.prefixes("tenants/default/files")) == []
    httpx.put(bad["upload_url"], content=bytes(size), trust_env=False).raise_for_status()
    assert complete(client, upload, good["id"], bad["id"]).status_code == 200
    assert list(objects.prefixes("tenants/default/uploads")) == []


def test_an_adapter_is_made_of_a_file_there(client: TestClient, fresh: Path) -> None:
    raw = tar_of(fresh)
    upload = begin(client, len(raw))
    part = promised(client, upload, len(raw))
    httpx.put(part["upload_url"], content=raw, trust_env=False).raise_for_status()
    file = complete(client, upload, part["id"]).json()["file"]
    answer = client.post("/v1/adapters", json={"file_ids": [file["id"]]})
    assert answer.status_code == 201, answer.text
    plain = client.post("/v1/adapters", files=files_of(fresh)).json()
    assert answer.json()["files"] == plain["files"]
    shown = client.get(f"/v1/files/{plain['id']}").json()
    assert len(client.get(f"/v1/files/{plain['id']}/content").content) == shown["bytes"]
