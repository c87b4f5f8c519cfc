"""Requests that a planned stop of the gateway cuts short."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.service.answers import refused
from tests.service.gateway import Gateway


def test_an_upload_that_is_cut_short_by_a_stop_is_told_so(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path / "data", UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN="1")
    first, found = threading.Event(), []

    def slow() -> Iterator[bytes]:
        while True:
            yield b"x" * 65536
            first.set()
            time.sleep(0.1)

    def send() -> None:
        with gateway.client() as client:
            tar: Any = {"content-type": "application/x-tar"}
            found.append(client.post("/v1/adapters", content=slow(), headers=tar))

    sender = threading.Thread(target=send)
    try:
        sender.start()
        assert first.wait(30)
        gateway.process.terminate()
        sender.join(60)
        gateway.process.wait(30)
    finally:
        gateway.stop()
    [answer] = found
    error = refused(answer, 503, "shutting_down")
    assert "again" in error["message"]
    assert int(answer.headers["retry-after"]) > 0
    log = gateway.log.read_text()
    assert "Traceback" not in log
    assert log.count("was cut short") == 1
    assert gateway.scratch() == []


def test_a_web_socket_is_answered_like_any_other_request(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path / "data", UVICORN_WS="none")
    try:
        wanted = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
                  "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
        with gateway.client() as client:
            refused(client.get("/v1/nothing", headers=wanted), 404, "route_not_found")
            assert client.get("/livez", headers=wanted).status_code == 200
    finally:
        gateway.stop()
