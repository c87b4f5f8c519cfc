"""The list of workers, and what draining one does to its claims."""

import pytest
from sqlalchemy import text
from sqlalchemy.engine import Engine

from safegraft.errors import NotFound
from safegraft.stores.jobs import JobStore
from safegraft.stores.workers import FORGET_SECONDS, WorkerStore
from tests.stores.records import queued


@pytest.fixture
def workers(engine: Engine) -> WorkerStore:
    return WorkerStore(engine, lease_seconds=30)


def silence(engine: Engine, name: str, seconds: float) -> None:
    with engine.begin() as connection:
        moved = connection.execute(
            text("UPDATE workers SET seen_at = seen_at - :seconds, started_at = started_at - :seconds WHERE name = :n"),
            {"seconds": seconds, "n": name},
        )
        assert moved.rowcount == 1


def test_who_beats_is_live_until_a_lease_has_passed(workers: WorkerStore, engine: Engine) -> None:
    assert workers.all() == []
    assert not workers.any_alive()
    assert workers.beat("w1", "cuda:1", "1.2", started=True) is False
    [shown] = workers.all()
    assert (shown.name, shown.device, shown.version, shown.state) == ("w1", "cuda:1", "1.2", "live")
    assert 0 <= shown.seen_seconds < 5
    assert workers.any_alive()
    silence(engine, "w1", 31)
    assert [worker.state for worker in workers.all()] == ["silent"]
    assert not workers.any_alive()
    workers.beat("w1", "cpu", "1.3")
    [back] = workers.all()
    assert (back.state, back.device, back.version) == ("live", "cpu", "1.3")
    assert back.started_at < shown.started_at  # the same run
    workers.beat("w1", "cpu", "1.3", started=True)
    assert workers.all()[0].started_at >= shown.started_at
    workers.leave("w1")
    assert workers.all() == []


def test_a_killed_worker_is_shown_for_an_hour(workers: WorkerStore, engine: Engine) -> None:
    workers.beat("w1", "cpu", "1")
    silence(engine, "w1", FORGET_SECONDS - 10)
    assert [worker.name for worker in workers.all()] == ["w1"]
    silence(engine, "w1", 20)
    assert workers.all() == []
    workers.beat("w2", "cpu", "1", started=True)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM workers")).scalar_one() == 1


def test_a_draining_worker_claims_nothing(workers: WorkerStore, store: JobStore) -> None:
    for name in ("w1", "w2"):
        workers.beat(name, "cpu", "1")
    assert workers.drain("w1") == ["w1"]
    assert workers.beat("w1", "cpu", "1") is True
    assert workers.beat("w2", "cpu", "1") is False
    assert [worker.state for worker in workers.all()] == ["draining", "live"]
    job_id = queued(store)
    assert store.claim(job_id, "w1") is None
    assert store.get("t", job_id).status == "queued"
    assert store.claim(job_id, "w2") is not None
    assert workers.drain("w1", undo=True) == ["w1"]
    assert workers.beat("w1", "cpu", "1") is False
    assert store.claim(queued(store), "w1") is not None


def test_all_workers_can_drain_and_unknown_ones_are_named(workers: WorkerStore) -> None:
    assert workers.drain() == []
    for name in ("w1", "w2"):
        workers.beat(name, "cpu", "1")
    assert workers.drain() == ["w1", "w2"]
    # A restart after a kill does not end it; a clean stop does.
    assert workers.beat("w1", "cpu", "1", started=True) is True
    workers.leave("w1")
    assert workers.beat("w1", "cpu", "1", started=True) is False
    with pytest.raises(NotFound) as missing:
        workers.drain("w3")
    assert missing.value.code == "worker_not_found"
