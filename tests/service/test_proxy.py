"""docs/nginx.conf before a real gateway: what it keeps out, and that it holds nothing back. Needs nginx."""

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service.conftest import Running, files_of, free_port, operate, start

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
EXAMPLE = Path(__file__).parents[2] / "docs" / "nginx.conf"
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@pytest.fixture(scope="module")
def proxied(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of the proxy, with a key."""
    data = tmp_path_factory.mktemp("proxied") / "data"
    operate(data, "reference", "add", str(bundle))
    key = operate(data, "keys", "create")
    running = start(data, workers=1, log=data / "serve.log", dev=False)
    operate(data, "admin", "drain", "--all")
    port, folder = free_port(), tmp_path_factory.mktemp("nginx")
    text = adapted(EXAMPLE.read_text(), running, port)
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log warn;\nevents {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/bodies; proxy_temp_path {folder}/answers;\n"
        f"fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n{text}\n}}\n"
    )
    command = [str(NGINX), "-p", str(folder), "-e", f"{folder}/error.log", "-c", str(folder / "nginx.conf")]
    process = subprocess.Popen(command)
    client = httpx.Client(
        base_url=f"http://127.0.0.1:{port}", headers={"authorization": f"Bearer {key}"}, trust_env=False, timeout=60
    )
    deadline = time.monotonic() + 20
    while True:
        try:
            client.get("/livez").raise_for_status()
            break
        except httpx.TransportError:
            assert process.poll() is None, (folder / "error.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    yield client
    client.close()
    process.terminate()
    assert process.wait(30) == 0
    # It warns where a body was written down on its way.
    assert "buffered to a temporary file" not in (folder / "error.log").read_text()
    running.process.terminate()
    assert running.process.wait(60) == 0


def adapted(text: str, running: Running, port: int) -> str:
    """The example with this machine's addresses, and without TLS."""
    changes = {
        "server 127.0.0.1:8000;": f"server {running.url.removeprefix('http://')};",
        "listen 443 ssl;": f"listen 127.0.0.1:{port};",
        "client_header_timeout 10s;": "client_header_timeout 2s;",
    }
    for written, here in changes.items():
        assert written in text
        text = text.replace(written, here)
    return re.sub(r"ssl_certificate.*;\n", "", text)


def test_large_heads_do_not_reach_the_gateway(proxied: httpx.Client) -> None:
    assert proxied.get("/v1/adapters", headers={"x-a": "a" * 7000}).status_code == 200
    refused = proxied.get("/v1/adapters", headers={"x-a": "a" * 9000})
    assert refused.status_code == 400
    assert "x-request-id" not in refused.headers
    many = {f"x-{number}": "a" * 7000 for number in range(5)}
    assert proxied.get("/v1/adapters", headers=many).status_code == 400


def test_a_head_that_does_not_end_is_cut_off(proxied: httpx.Client) -> None:
    with socket.create_connection(("127.0.0.1", proxied.base_url.port or 0), timeout=30) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n")
        assert connection.recv(1000)[:12] in (b"", b"HTTP/1.1 408")


def test_uploads_of_any_size_pass_and_are_refused_early(proxied: httpx.Client, fresh: Path) -> None:
    assert proxied.post("/v1/adapters", files=files_of(fresh)).status_code == 201
    large = proxied.post("/v1/files", files={"file": ("a.bin", bytes(20_000_000))}, data={"purpose": "fine-tune"})
    assert large.status_code == 200, large.text
    # Refused by its head: the body is never sent.
    with socket.create_connection(("127.0.0.1", proxied.base_url.port or 0), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=x\r\n"
            b"content-length: 900000000\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 401")


def test_events_come_as_they_happen(proxied: httpx.Client, fresh: Path) -> None:
    adapter_id = proxied.post("/v1/adapters", files=files_of(fresh)).json()["id"]
    job_id = proxied.post("/v1/realignments", json={"adapter_id": adapter_id}).json()["id"]
    # Its worker is draining: the stream does not end by itself, and what it says arrives all the same.
    path, sse = f"/v1/realignments/{job_id}/events", {"accept": "text/event-stream"}
    with proxied.stream("GET", path, headers=sse, timeout=10) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("id: ")
        assert next(lines) == "event: created"
    assert proxied.post(f"/v1/realignments/{job_id}/cancel").json()["status"] == "cancelled"


def test_metrics_are_not_shown(proxied: httpx.Client) -> None:
    answer = proxied.get("/metrics")
    assert answer.status_code == 404
    assert "x-request-id" not in answer.headers
