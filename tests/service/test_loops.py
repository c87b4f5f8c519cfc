"""Loops end together, and quickly."""

import threading
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from kombu.exceptions import OperationalError

from service.app import create_app
from service.loops import Loop, stop_all
from service.queue import Queue
from service.settings import GatewaySettings
from tests.service.conftest import free_port
from tests.stores.records import queued


def test_all_are_told_before_one_is_waited_for() -> None:
    """The first one's turn lasts until the second one has ended."""
    second = Loop("second", lambda: None, 0.01)

    def turn() -> None:
        while second._thread.is_alive():
            time.sleep(0.01)

    first = Loop("first", turn, 0.01)
    second.start()
    first.start()
    began = time.monotonic()
    stop_all([first, second])
    assert not first._thread.is_alive()
    assert time.monotonic() - began < 5


def test_a_broker_that_is_away_is_not_waited_for() -> None:
    queue = Queue(f"redis://127.0.0.1:{free_port()}/0")
    began = time.monotonic()
    with pytest.raises(OperationalError):
        queue.submit("rlg_1")
    assert not queue.ping()
    assert time.monotonic() - began < 1.5
    queue.close()


def test_a_gateway_ends_at_once_while_it_tries_to_announce_a_job(tmp_path: Path) -> None:
    settings = GatewaySettings(dev=True, data=tmp_path, redis_url=f"redis://127.0.0.1:{free_port()}/0")
    app = create_app(settings)
    trying = threading.Event()
    with TestClient(app):
        here = app.state.services
        submit = here.queue.submit

        def noted(job_id: str) -> None:
            trying.set()
            submit(job_id)

        here.queue.submit = noted
        queued(here.jobs)
        here.dispatcher.wake()
        assert trying.wait(20)
        began = time.monotonic()
    assert time.monotonic() - began < 1.5
