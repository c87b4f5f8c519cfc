"""Bodies that are no JSON, or do not say that they are: what was wrong, where, and what to do, on every route."""

import asyncio
import gzip
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from starlette.requests import Request
from starlette.types import Message

from safegraft.errors import InvalidParameter
from service import body
from service.app import create_app
from service.body import MAX_BRACKETS, MAX_COLONS, object_of
from service.errors import MAX_ERRORS
from service.settings import GatewaySettings
from tests.service.answers import refused
from tests.service.conftest import free_port
from tests.service.gateway import Gateway

JSON = {"content-type": "application/json"}
NESTED = f"At most {MAX_BRACKETS} lists and objects are accepted."
DO = "Send one JSON object, with the header `Content-Type: application/json`."


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = GatewaySettings(
        dev=True,
        data=tmp_path_factory.mktemp("body"),
        redis_url=f"redis://127.0.0.1:{free_port()}/0",
        max_requests_per_second=0,
    )
    with TestClient(create_app(settings), client=("127.0.0.1", 50000), base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture(scope="module")
def upload(client: TestClient) -> str:
    """The id of an upload that waits for parts."""
    given = {"purpose": "fine-tune", "filename": "a.tar", "bytes": 3, "mime_type": "application/x-tar"}
    return str(client.post("/v1/uploads", json=given).json()["id"])


def json_operations(client: TestClient, upload: str) -> list[tuple[str, str, bool]]:
    """(method, path, whether it takes nothing but JSON) of every operation that takes a JSON body."""
    paths: dict[str, dict[str, Any]] = client.get("/openapi.json").json()["paths"]
    return [
        (method, path.replace("{upload_id}", upload).replace("{", "").replace("}", ""), len(asked["content"]) == 1)
        for path, operations in paths.items()
        for method, operation in operations.items()
        if "application/json" in (asked := operation.get("requestBody", {"content": {}}))["content"]
    ]


def test_every_operation_says_where_a_body_stops_to_be_json(client: TestClient, upload: str) -> None:
    found = json_operations(client, upload)
    assert len(found) >= 9
    for method, path, _ in found:
        error = refused(
            client.request(method, path, content=b'{"a": 1,\n "b": tru}', headers=JSON), 422, "invalid_json"
        )
        assert error["message"] == f"The body is not JSON: line 2, column 7: expecting value. {DO}", path
        assert error["param"] == "body"


def test_every_operation_says_what_content_type_it_wants(client: TestClient, upload: str) -> None:
    for method, path, alone in json_operations(client, upload):
        for kind, said in (
            ({}, "The request has no Content-Type."),
            # What curl says where nothing is said.
            (
                {"content-type": "Application/x-www-form-urlencoded"},
                "The Content-Type 'application/x-www-form-urlencoded' is not accepted here.",
            ),
            ({"content-type": "application/jsonp"}, "The Content-Type 'application/jsonp' is not accepted here."),
        ):
            answer = client.request(method, path, content=b"{}", headers=kind)
            error = refused(answer, 415, "unsupported_media_type")
            assert error["message"].startswith(f"{said} Send "), path
            assert error["param"] == "Content-Type"
            assert not alone or error["message"].endswith(DO)


def test_a_body_in_a_coding_is_refused_by_name(client: TestClient, upload: str) -> None:
    whole = gzip.compress(b'{"part_ids": ["part_1"]}')
    for path, kind in (
        (f"/v1/uploads/{upload}/complete", "application/json"),
        (f"/v1/uploads/{upload}/parts", "application/octet-stream"),
        ("/v1/adapters", "application/x-tar"),
        ("/v1/adapters", "multipart/form-data; boundary=x"),
    ):
        content = b"ab" if path.endswith("parts") else whole
        answer = client.post(path, content=content, headers={"content-type": kind, "content-encoding": "GZIP"})
        error = refused(answer, 415, "unsupported_media_type")
        assert (error["param"], "'gzip'" in error["message"]) == ("Content-Encoding", True)
    plain = {"content-type": "application/octet-stream", "content-encoding": "identity"}
    assert client.post(f"/v1/uploads/{upload}/parts", content=b"a", headers=plain).status_code == 200
    assert client.get("/v1/adapters", headers={"content-encoding": "gzip"}).status_code == 200


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"{", "line 1, column 2: expecting property name enclosed in double quotes"),
        (b"{'a': 1}", "line 1, column 2: expecting property name enclosed in double quotes"),
        (b'{"a": 1} {', "line 1, column 10: extra data"),
        (b'{"a": 1\n"b": 2}', "line 2, column 1: expecting ',' delimiter"),
        ('{"ä": "ö}'.encode(), "line 1, column 7: unterminated string starting"),
        (b'{"a": "\xff"}', "byte 8 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "byte 1 is not UTF-8"),
        (b'{"a": NaN}', "NaN is no number there"),
        (b'{"a": -Infinity}', "-Infinity is no number there"),
        (b"[" * 4000, "its values are nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number has too many digits"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_json(client: TestClient, raw: bytes, said: str) -> None:
    for path in ("/v1/realignments", "/v1/adapters"):
        error = refused(client.post(path, content=raw, headers=JSON), 422, "invalid_json")
        assert error["message"] == f"The body is not JSON: {said}. {DO}"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "The request has no body."),
        (b"null", "The body is null, not an object."),
        (b"[1]", "The body is a list, not an object."),
        (b'"x"', "The body is a string, not an object."),
        (b"7", "The body is a number, not an object."),
        (b"true", "The body is true or false, not an object."),
    ],
)
def test_what_is_no_object(client: TestClient, raw: bytes, said: str) -> None:
    error = refused(client.post("/v1/realignments", content=raw, headers=JSON), 422, "invalid_request")
    assert error["message"] == f"{said} {DO}"


def test_what_is_json_is_read(client: TestClient) -> None:
    given = {"adapter_id": "adp_0"}
    assert object_of(b'\xef\xbb\xbf{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    for kind in ("application/json", "APPLICATION/JSON; charset=utf-8", "application/vnd.acme+json"):
        answer = client.post("/v1/realignments", json=given, headers={"content-type": kind})
        refused(answer, 404, "adapter_not_found")
    # A body that may be left out, and one that nobody asked for.
    refused(client.post("/v1/webhook_endpoints/we_0/rotate_secret"), 404, "webhook_endpoint_not_found")
    refused(client.post("/v1/realignments/rlg_0/cancel", content=b"a=b"), 404, "realignment_not_found")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (
            json.dumps({f"{number:x}": 1 for number in range(80_000)}).encode(),
            f"At most {MAX_COLONS} colons (every key has one) are accepted in a body.",
        ),
        (b'{"a": [' + b"[]," * 200_000 + b"1]}", NESTED),
        (b'{"a": [' + b"{}," * 200_000 + b"1]}", NESTED),
        (b"[" * 50_000, NESTED),
    ],
    ids=["keys", "lists", "objects", "nested"],
)
def test_a_body_of_very_many_things_is_refused_unread(client: TestClient, upload: str, raw: bytes, said: str) -> None:
    for method, path, _ in json_operations(client, upload):
        error = refused(client.request(method, path, content=raw, headers=JSON), 413, "request_too_large")
        assert error["message"] == said, path


def test_of_many_faults_some_are_told(client: TestClient, upload: str) -> None:
    raw = json.dumps({f"{number:x}": 1 for number in range(MAX_COLONS)}).encode()
    for path in ("/v1/realignments", "/v1/adapters", f"/v1/uploads/{upload}/parts"):
        answer = client.post(path, content=raw, headers=JSON)
        refused(answer, 422, "invalid_request")
        assert len(answer.json()["errors"]) == MAX_ERRORS


def read(messages: list[Message], pause: float) -> list[Message]:
    """What a route gets of a body: the first message at once, the others each after a pause."""
    left = list(messages)

    async def receive() -> Message:
        if len(left) < len(messages):
            await asyncio.sleep(pause)
        return left.pop(0)

    async def whole() -> list[Message]:
        limited = body.limited(Request({"type": "http", "headers": []}, receive), 2**20)
        return [await limited() for _ in messages]

    return asyncio.run(whole())


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "IDLE_SECONDS", 0.2)
    piece: Message = {"type": "http.request", "body": b" ", "more_body": True}
    for count, pause, said in ((2, 0.5, "Nothing arrived for 0.2 s."), (30, 0.02, "Less than 8192 bytes/s arrived.")):
        with pytest.raises(InvalidParameter) as error:
            read([piece] * count, pause)
        assert (error.value.code, error.value.message) == ("upload_stalled", said)
    # Who has sent all may wait for the answer as long as it takes.
    whole: list[Message] = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]
    assert read(whole, 0.5) == whole


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b'{"adapter_id": "adp_1", "mode": "patch", "adapter_id": "adp_2"}', "adapter_id"),
        (b'{"adapter_id": "adp_1", "metadata": {"a": "1", "\\u0061": "2"}}', "a"),
        (b'{"file_ids": [], "\\ud800": 1, "\\ud800": 1}', "\\ud800"),
    ],
)
def test_a_key_that_stands_twice_is_named(client: TestClient, upload: str, raw: bytes, name: str) -> None:
    for path in ("/v1/realignments", "/v1/adapters", f"/v1/uploads/{upload}/parts"):
        error = refused(client.post(path, content=raw, headers=JSON), 422, "duplicate_field")
        assert (error["param"], error["message"]) == (name, f"'{name}' stands twice.")


@pytest.mark.parametrize("name", ["sha256", "name"])
def test_a_field_of_a_form_that_stands_twice_is_named(client: TestClient, name: str) -> None:
    parts = "".join(f'--x\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value * 64}\r\n' for value in "ab")
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = client.post("/v1/adapters", content=f"{parts}--x--\r\n".encode(), headers=headers)
    assert refused(answer, 422, "duplicate_field")["param"] == name


def test_a_form_without_a_boundary(client: TestClient) -> None:
    for path in ("/v1/adapters", "/v1/files"):
        answer = client.post(path, content=b"x", headers={"content-type": "multipart/form-data"})
        error = refused(answer, 415, "unsupported_media_type")
        assert "names no boundary" in error["message"]


def test_a_client_that_goes_away_is_no_fault_of_ours(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path / "gateway")
    try:
        with gateway.client() as http:
            given = {"purpose": "fine-tune", "filename": "a.tar", "bytes": 3, "mime_type": "application/x-tar"}
            part = f"/v1/uploads/{http.post('/v1/uploads', json=given).json()['id']}/parts"
        where = httpx.URL(gateway.url)
        kind = "content-type: application/json\r\ncontent-length: 100"
        for path in ("/v1/realignments", "/v1/adapters", part):
            head = f"POST {path} HTTP/1.1\r\nhost: {where.host}\r\n{kind}\r\n\r\n{{"
            with socket.create_connection((where.host, where.port or 0)) as connection:
                connection.sendall(head.encode())
                time.sleep(0.3)
        deadline = time.monotonic() + 20
        while gateway.log.read_text().count(" 422 ") < 3:
            assert time.monotonic() < deadline, gateway.log.read_text()
            time.sleep(0.1)
    finally:
        gateway.stop()
    assert "Traceback" not in gateway.log.read_text()
