"""What happens to jobs after their end: an operator's requeue, deletion, retention, and the totals they leave."""

import pytest
from sqlalchemy import text
from sqlalchemy.engine import Engine

from safegraft.errors import Conflict, InvalidAdapter, NotFound
from safegraft.stores import overview, totals
from safegraft.stores.adapters import AdapterStore
from safegraft.stores.jobs import JobStore
from tests.stores.records import adapter, claimed, kinds, queued, request, shift

DAY = 86400.0


def killed(store: JobStore, job_id: str, times: int) -> None:
    for _ in range(times):
        claim = store.claim(job_id, "w")
        assert claim is not None
        assert store.release(job_id, claim.attempt, "It failed.")


def count(engine: Engine, table: str, where: str = "1 = 1") -> int:
    with engine.connect() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {table} WHERE {where}")).scalar_one())


def test_a_dead_job_gets_as_many_attempts_again_and_old_ones_stay_fenced(store: JobStore) -> None:
    job_id = queued(store)
    killed(store, job_id, 2)
    zombie = store.claim(job_id, "w")
    assert zombie is not None
    store.release(job_id, zombie.attempt, "It failed.")
    assert store.get("t", job_id).error is not None
    assert store.requeue(job_id) == 3
    job = store.get("t", job_id)
    assert (job.status, job.error, job.finished_at, job.progress.stage) == ("queued", None, None, "waiting")
    assert store.due(10) == [job_id]
    again = store.claim(job_id, "w")
    assert again is not None
    assert again.attempt == 4
    assert not store.succeed(job_id, zombie.attempt)
    store.release(job_id, again.attempt, "It failed.")
    killed(store, job_id, 1)
    assert store.get("t", job_id).status == "queued"
    killed(store, job_id, 1)
    assert store.get("t", job_id).status == "failed"
    assert kinds(store, job_id).count("revived") == 1
    # And once more: it counts from the last requeue.
    assert store.requeue(job_id) == 6
    killed(store, job_id, 2)
    assert store.get("t", job_id).status == "queued"


def test_only_dead_jobs_are_requeued(store: JobStore) -> None:
    waiting, ended = queued(store), claimed(store)
    store.fail(ended.id, ended.attempt, InvalidAdapter("Broken."))
    for job_id in (waiting, ended.id):
        with pytest.raises(Conflict) as refused:
            store.requeue(job_id)
        assert refused.value.code == "not_dead"
    with pytest.raises(NotFound) as missing:
        store.requeue("rlg_none")
    assert missing.value.code == "realignment_not_found"


def test_a_deleted_job_leaves_its_adapter_and_nothing_else(
    store: JobStore, adapters: AdapterStore, engine: Engine
) -> None:
    claim = claimed(store)
    made = adapter()
    prefix = f"tenants/t/realignments/{claim.id}/1/adapter/{made.id}"
    store.succeed(claim.id, 1, [(made, "t", prefix)])
    with pytest.raises(NotFound):
        store.delete("other", claim.id)
    erased = store.delete("t", claim.id)
    assert erased.prefix == f"tenants/t/realignments/{claim.id}"
    assert erased.kept == {prefix}
    with pytest.raises(NotFound):
        store.get("t", claim.id)
    assert count(engine, "events") == 0
    assert adapters.get("t", made.id) == made
    with pytest.raises(NotFound):
        store.delete("t", claim.id)


def test_a_deleted_job_takes_its_adapters_along_unless_one_is_read(
    store: JobStore, adapters: AdapterStore, engine: Engine
) -> None:
    claim = claimed(store)
    first, second = adapter(), adapter()
    published = [(item, "t", f"tenants/t/realignments/{claim.id}/1/adapter/{item.id}") for item in (first, second)]
    store.succeed(claim.id, 1, published, strengths=[0.1, 0.2])
    reader = store.create("t", "ref_1", request(second.id)).job.id
    with pytest.raises(Conflict) as busy:
        store.delete("t", claim.id, with_adapters=True)
    assert busy.value.code == "adapter_in_use"
    assert count(engine, "adapters") == 2  # all or nothing
    assert store.get("t", claim.id).status == "succeeded"
    store.cancel("t", reader)
    assert store.delete("t", claim.id, with_adapters=True).kept == frozenset()
    assert count(engine, "adapters") == 0


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_job_that_has_not_ended_cannot_be_deleted(store: JobStore, state: str) -> None:
    job_id = queued(store)
    if state == "running":
        assert store.claim(job_id, "w") is not None
    with pytest.raises(Conflict) as refused:
        store.delete("t", job_id, with_adapters=True)
    assert refused.value.code == "realignment_not_ended"
    assert str(refused.value) == f"{job_id} is {state}. Cancel it first."
    assert store.get("t", job_id).status == state
    if state == "running":
        store.cancel("t", job_id)
        with pytest.raises(Conflict, match=r"is being cancelled\. Try again when it has ended\."):
            store.delete("t", job_id, with_adapters=True)


def test_every_end_sets_the_time_of_deletion(engine: Engine) -> None:
    store = JobStore(engine, lease_seconds=30, max_attempts=1, retention=7 * DAY)
    ended = {name: claimed(store) for name in ("succeeded", "failed", "cancelled", "dead")}
    made = adapter()
    store.succeed(ended["succeeded"].id, 1, [(made, "t", "p")])
    store.fail(ended["failed"].id, 1, InvalidAdapter("Broken."))
    store.cancelled(ended["cancelled"].id, 1)
    store.release(ended["dead"].id, 1, "It failed.")
    at_once = queued(store)
    store.cancel("t", at_once)
    for job_id in (at_once, *(claim.id for claim in ended.values())):
        job = store.get("t", job_id)
        assert job.expires_at is not None
        assert job.finished_at is not None
        assert abs(job.expires_at - job.finished_at - 7 * DAY) <= 1
    assert AdapterStore(engine).get("t", made.id).expires_at == made.created_at + 7 * DAY
    received = AdapterStore(engine, retention=DAY).add(adapter(), "t", "q")
    assert received.expires_at == received.created_at + DAY
    assert AdapterStore(engine).get("t", received.id) == received
    waiting = queued(store)
    assert store.get("t", waiting).expires_at is None
    # An operator's requeue takes it back.
    store.requeue(ended["dead"].id)
    assert store.get("t", ended["dead"].id).expires_at is None


def test_without_retention_nothing_expires(store: JobStore, adapters: AdapterStore) -> None:
    claim = claimed(store)
    store.succeed(claim.id, 1)
    assert store.get("t", claim.id).expires_at is None
    assert adapters.add(adapter(), "t", "p").expires_at is None


def test_totals_of_time_and_bytes(store: JobStore, adapters: AdapterStore, engine: Engine) -> None:
    adapters.add(adapter(), "t", "p")
    for seconds in (1.5, 2.5):
        claim = claimed(store)
        timings = {"score": seconds, "patch": 0.25, "total": 9.0}
        store.succeed(claim.id, 1, [(adapter(), "t", "q")], method="gram", timings=timings)
        store.succeed(claim.id, 1, method="gram", timings=timings)  # no longer its job: counts nothing
    found = {(name, first, second): value for name, first, second, value in totals.read(engine)}
    assert found == {
        ("bytes_received", "", ""): 1024,
        ("bytes_published", "", ""): 2048,
        ("jobs", "succeeded", "auto"): 2,
        ("stage_count", "patch", "gram"): 2,
        ("stage_count", "score", "gram"): 2,
        ("stage_seconds", "patch", "gram"): 0.5,
        ("stage_seconds", "score", "gram"): 4.0,
    }


def test_the_queue_at_a_glance(store: JobStore, engine: Engine) -> None:
    assert overview.queue(engine) == overview.Queue(0, 0, 0.0)
    running, old = claimed(store), queued(store)
    queued(store, "other")
    shift(engine, running.id, "created_at", -9000)
    shift(engine, old, "created_at", -100)
    seen = overview.queue(engine)
    assert (seen.queued, seen.running) == (2, 1)
    assert 100 <= seen.oldest_seconds < 110
    assert [job.id for job in overview.jobs(engine, ["running"])] == [running.id]
    assert {job.tenant for job in overview.jobs(engine, ["queued"])} == {"t", "other"}
    assert len(overview.jobs(engine, ["queued", "running"], limit=2)) == 2


def test_a_requeued_job_does_not_look_as_if_it_had_waited_all_the_time(engine: Engine) -> None:
    store = JobStore(engine, lease_seconds=30, max_attempts=1)
    claim = claimed(store)
    store.release(claim.id, 1, "It failed.")
    for column in ("created_at", "attempt_started_at"):
        shift(engine, claim.id, column, -9000)
    [dead] = overview.jobs(engine, ["dead"])
    assert (dead.id, dead.error, dead.attempt) == (claim.id, "worker_lost", 1)
    store.requeue(claim.id)
    assert overview.queue(engine).oldest_seconds < 10
    assert overview.reading_reference(engine, claim.reference_id) == claim.id
    store.cancel("t", claim.id)
    assert overview.reading_reference(engine, claim.reference_id) is None
