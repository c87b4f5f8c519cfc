"""Keys: asked for everywhere but where a machine must get in without one, and before anything is read."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

import service.main
from service.app import create_app
from service.settings import GatewaySettings
from tests.service.answers import refused
from tests.service.conftest import SAFEGRAFT, files_of, free_port

KEY, OTHER = "sgk_the-right-key", "sgk_the-other-key"
MAX_UPLOAD = 2**22


def clean(**environment: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SAFEGRAFT_") and key != "REDIS_URL"}
    return kept | environment


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway that asks for keys, as uvicorn runs it; without broker and workers."""
    folder, port = tmp_path_factory.mktemp("keys"), free_port()
    environment = clean(
        SAFEGRAFT_API_KEYS=f'["{KEY}", "{OTHER}"]',
        SAFEGRAFT_DATA=str(folder),
        SAFEGRAFT_REDIS_URL=f"redis://127.0.0.1:{free_port()}/0",
        SAFEGRAFT_MAX_UPLOAD_BYTES=str(MAX_UPLOAD),
    )
    command = [sys.executable, "-m", "uvicorn", "--factory", "service.main:app", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{url}/livez", trust_env=False).raise_for_status()
                break
            except httpx.TransportError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)
    assert "Traceback" not in (folder / "log").read_text()
    assert KEY not in (folder / "log").read_text()


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        yield client


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}",
     f"Bearer {KEY} {OTHER}", f"Bearer {KEY.upper()}", "Bearer \xe9\xff"],
)  # fmt: skip
def test_without_a_right_key_there_is_no_entry(client: httpx.Client, given: str | None) -> None:
    headers = {} if given is None else {b"authorization": given.encode("latin-1")}
    answer = client.get("/v1/adapters", headers=headers)
    refused(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert KEY not in answer.text


@pytest.mark.parametrize("given", [f"Bearer {KEY}", f"Bearer {OTHER}", f"bearer {KEY}", f"BEARER   {KEY}"])
def test_any_of_the_keys_opens(client: httpx.Client, given: str) -> None:
    assert client.get("/v1/adapters", headers={"authorization": given}).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json"])
def test_what_machines_look_at_needs_no_key(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200


def test_readiness_needs_no_key(client: httpx.Client) -> None:
    assert client.get("/readyz").json()["checks"]["reference"] is False


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/realignments"])
def test_without_a_key_no_body_is_read(url: str, path: str) -> None:
    """The answer comes although not one byte of the body was sent."""
    kinds = {"/v1/adapters": "multipart/form-data; boundary=b", "/v1/realignments": "application/json"}
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kinds[path]}\r\nContent-Length: 1000000\r\n"
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_without_a_key_a_broken_body_is_not_looked_at(client: httpx.Client) -> None:
    refused(client.post("/v1/realignments", content=b"{"), 401, "unauthorized")
    refused(client.post("/v1/adapters", content=b"{"), 401, "unauthorized")


def test_bodies_are_bounded(client: httpx.Client, fresh: Path) -> None:
    client.headers["authorization"] = f"Bearer {KEY}"
    large = b'{"adapter_id": "' + b"x" * 2**20 + b'"}'
    refused(client.post("/v1/realignments", content=large), 413, "request_too_large")
    # The kind of the body makes no difference, nor that its length is not announced.
    kind = {"content-type": "multipart/form-data; boundary=b"}
    refused(client.post("/v1/realignments", content=large, headers=kind), 413, "request_too_large")
    refused(client.post("/v1/realignments", content=iter([large])), 413, "request_too_large")
    form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.bin"\r\n\r\n' + bytes(MAX_UPLOAD)
    refused(client.post("/v1/adapters", content=iter([form]), headers=kind), 413, "upload_too_large")
    refused(client.post("/v1/adapters", content=form, headers=kind), 413, "upload_too_large")
    assert client.post("/v1/adapters", files=files_of(fresh)).status_code == 201


def test_serving_without_keys_is_refused(tmp_path: Path) -> None:
    command = [SAFEGRAFT, "serve", "--data", str(tmp_path / "data"), "--port", str(free_port())]
    ended = subprocess.run(command, env=clean(), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert "no_api_keys" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1"])
def test_serving_the_world_without_keys_is_refused(tmp_path: Path, host: str) -> None:
    command = [SAFEGRAFT, "serve", "--dev", "--host", host, "--data", str(tmp_path / "data")]
    ended = subprocess.run(command, env=clean(), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert "loopback" in ended.stderr
    assert not (tmp_path / "data").exists()


def test_a_gateway_on_its_own_wants_keys_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SAFEGRAFT_API_KEYS", "SAFEGRAFT_DEV"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="SAFEGRAFT_API_KEYS"):
        service.main.app()
    monkeypatch.setenv("SAFEGRAFT_API_KEYS", "[]")
    with pytest.raises(SystemExit, match="SAFEGRAFT_API_KEYS"):
        service.main.app()
    # An empty key would let in everybody who sends `Authorization: Bearer`.
    monkeypatch.setenv("SAFEGRAFT_API_KEYS", '[""]')
    with pytest.raises(SystemExit, match="api_keys"):
        service.main.app()


def test_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEGRAFT_API_KEYS", f'["{KEY}"]')
    assert KEY not in repr(GatewaySettings())


def test_development_mode_answers_this_machine_alone(tmp_path: Path) -> None:
    """However the server was started: by hand it may listen on every address."""
    settings = GatewaySettings(dev=True, data=tmp_path, redis_url="redis://127.0.0.1:1/0")
    for host, status in (("127.0.0.1", 200), ("::1", 200), ("192.168.1.5", 401), ("10.0.0.1", 401)):
        with TestClient(create_app(settings), client=(host, 50000), base_url="http://localhost:8000") as client:
            assert client.get("/v1/adapters").status_code == status
            assert client.get("/livez").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"host": "10.0.0.1:8000"}, {"origin": "https://evil.example"}, {"origin": "null"}],
)
def test_development_mode_answers_no_page_of_another_host(tmp_path: Path, headers: dict[str, str]) -> None:
    """A page that the operator has open can send requests to this machine, under any name that points here."""
    settings = GatewaySettings(dev=True, data=tmp_path, redis_url="redis://127.0.0.1:1/0")
    with TestClient(create_app(settings), client=("127.0.0.1", 1), base_url="http://localhost:8000") as client:
        assert client.get("/v1/adapters", headers=headers).status_code == 401
        assert client.get("/v1/adapters", headers={"origin": "http://localhost:8000"}).status_code == 200


@pytest.mark.parametrize(
    ("given", "keys"), [("one", ["one"]), ("one, two", ["one", "two"]), ('["one", "two"]', ["one", "two"]), ("", [])]
)
def test_keys_are_given_plainly_or_as_json(monkeypatch: pytest.MonkeyPatch, given: str, keys: list[str]) -> None:
    monkeypatch.setenv("SAFEGRAFT_API_KEYS", given)
    assert [key.get_secret_value() for key in GatewaySettings().api_keys] == keys
