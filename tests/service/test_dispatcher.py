"""The dispatcher's turns, with a broker that may be away."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError
from sqlalchemy.engine import Engine

from safegraft.stores.database import open_database
from safegraft.stores.jobs import JobStore
from service.loops import Loop
from service.queue import Dispatcher, Queue
from service.settings import GatewaySettings
from tests.stores.records import kinds, queued, shift


class Broker(Queue):
    """Notes what is sent; refuses everything after `capacity` messages."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.sent: list[str] = []

    def submit(self, job_id: str) -> None:
        if len(self.sent) >= self.capacity:
            raise OperationalError("away")
        self.sent.append(job_id)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{tmp_path / 'safegraft.sqlite'}")
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> JobStore:
    return JobStore(engine, lease_seconds=30, max_attempts=3)


def dispatcher(store: JobStore, broker: Broker, **settings: float) -> Dispatcher:
    return Dispatcher(GatewaySettings.model_validate(settings), store, broker)


def test_due_jobs_are_announced_once_up_to_the_limit(store: JobStore) -> None:
    ids = [queued(store) for _ in range(5)]
    broker = Broker(100)
    loop = dispatcher(store, broker, announce_limit=3)
    assert [loop.turn(), loop.turn()] == [3, 0]
    assert broker.sent == ids[:3]
    assert store.claim(ids[0], "w") is not None
    assert loop.turn() == 1
    assert broker.sent == ids[:4]


def test_a_broker_that_was_away_costs_no_pause(store: JobStore) -> None:
    ids = [queued(store) for _ in range(4)]
    broker = Broker(2)
    loop = dispatcher(store, broker)
    for _ in range(10):
        with pytest.raises(OperationalError):
            loop.turn()
    broker.capacity = 100
    assert loop.turn() == 2
    assert sorted(broker.sent) == sorted(ids)
    assert loop.turn() == 0


def test_a_job_whose_worker_fell_silent_is_announced_in_the_same_turn(store: JobStore, engine: Engine) -> None:
    job_id = queued(store)
    broker = Broker(100)
    loop = dispatcher(store, broker)
    loop.turn()
    assert store.claim(job_id, "w") is not None
    shift(engine, job_id, "lease_until", -31.0)
    assert loop.turn() == 1
    assert broker.sent == [job_id, job_id]
    assert kinds(store, job_id) == ["created", "started", "requeued"]


def test_the_loop_goes_on_after_a_fault_and_wakes_at_once(store: JobStore, caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker(0)
    loop = Loop("dispatcher", dispatcher(store, broker).turn, 600)
    job_id = queued(store)
    loop.start()
    try:
        deadline = time.monotonic() + 10
        while "dispatcher failed" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        broker.capacity = 1
        loop.wake()
        while not broker.sent:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        loop.stop()
    assert broker.sent == [job_id]
