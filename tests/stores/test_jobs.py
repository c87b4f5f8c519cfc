"""The state machine of jobs, on real SQLite files: who may do what, in races, after silence, and never twice."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test
from sqlalchemy import delete, select
from sqlalchemy.engine import Engine

from safegraft.contracts.realignment import Progress, Realignment
from safegraft.errors import Conflict, Incompatible, LostLease, NotFound, QuotaExceeded
from safegraft.stores import jobs as module
from safegraft.stores.adapters import AdapterStore
from safegraft.stores.database import adapters as adapter_rows
from safegraft.stores.database import events, open_database, realignments
from safegraft.stores.jobs import Claim, Filters, JobStore, Origins
from safegraft.stores.workers import WorkerStore
from tests.stores.records import REFERENCE, adapter, claimed, kinds, queued, request, shift

PROGRESS = Progress(stage="patch", done=3, total=14)


# Created once


def test_a_new_job_is_queued_and_shows_what_was_asked_for(store: JobStore) -> None:
    asked = request("adp_9", mode="analyze", method={"type": "gram", "general_weight": 2.0}, metadata={"a": "b"})
    created = store.create("t", REFERENCE, asked)
    assert not created.replayed
    job = store.get("t", created.job.id)
    assert job == created.job
    assert (job.status, job.attempt, job.result, job.error, job.started_at) == ("queued", 0, None, None, None)
    assert (job.adapter_id, job.reference_id, job.mode, job.metadata) == ("adp_9", REFERENCE, "analyze", {"a": "b"})
    assert job.method == asked.method
    assert job.progress.stage == "waiting"


def test_twenty_posts_with_one_key_make_one_job(store: JobStore, engine: Engine) -> None:
    barrier = threading.Barrier(20)

    def post(_: int) -> tuple[str, bool]:
        barrier.wait()
        created = store.create("t", REFERENCE, request(), "order-1")
        return created.job.id, created.replayed

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(post, range(20)))
    assert len({job_id for job_id, _ in answers}) == 1
    assert sum(not replayed for _, replayed in answers) == 1
    with engine.begin() as connection:
        assert len(connection.execute(select(realignments)).all()) == 1
    assert kinds(store, answers[0][0]) == ["created"]


def test_a_job_and_the_deletion_of_its_adapter_exclude_each_other(store: JobStore, adapters: AdapterStore) -> None:
    with pytest.raises(NotFound) as gone:
        store.create("t", REFERENCE, request("adp_none"), of_stored=True)
    assert gone.value.code == "adapter_not_found"
    outcomes = set()
    with ThreadPoolExecutor(2) as pool:
        for number in range(20):
            item = adapters.add(adapter(f"a{number}"), "t", f"adapters/{number}")
            barrier = threading.Barrier(2)

            def post(adapter_id: str = item.id, barrier: threading.Barrier = barrier) -> str:
                barrier.wait()
                try:
                    return store.create("t", REFERENCE, request(adapter_id), of_stored=True).job.status
                except NotFound as error:
                    return error.code

            def remove(adapter_id: str = item.id, barrier: threading.Barrier = barrier) -> str:
                barrier.wait()
                try:
                    return adapters.delete("t", adapter_id)[:8]
                except Conflict as error:
                    return error.code

            made, removed = pool.submit(post), pool.submit(remove)
            outcomes.add((made.result(), removed.result()))
    assert outcomes <= {("queued", "adapter_in_use"), ("adapter_not_found", "adapters")}


def test_a_key_means_one_request_of_one_tenant(store: JobStore) -> None:
    first = store.create("t", REFERENCE, request("adp_1"), "k").job
    with pytest.raises(Conflict) as refused:
        store.create("t", REFERENCE, request("adp_2"), "k")
    assert refused.value.code == "idempotency_key_reused"
    assert store.create("other", REFERENCE, request("adp_2"), "k").job.id != first.id
    # A replay shows the job as it is now.
    claim = store.claim(first.id, "w")
    assert claim is not None
    assert store.create("t", REFERENCE, request("adp_1"), "k").job.status == "running"
    assert not store.create("t", REFERENCE, request("adp_1"), None).replayed


# Sent again without a key


def test_a_request_that_is_sent_again_is_the_same_job_for_half_an_hour(store: JobStore, engine: Engine) -> None:
    asked = request("adp_1", metadata={"a": "b"})
    first = store.create("t", REFERENCE, asked)
    again = store.create("t", REFERENCE, asked, retried=True)
    assert (again.job, again.replayed) == (first.job, True)
    # As it is now, whatever became of it.
    store.cancel("t", first.job.id)
    assert store.create("t", REFERENCE, asked, retried=True).job.status == "cancelled"
    shift(engine, first.job.id, "created_at", -module.RETRY_WINDOW + 5)
    assert store.create("t", REFERENCE, asked, retried=True).replayed
    shift(engine, first.job.id, "created_at", -6)
    later = store.create("t", REFERENCE, asked, retried=True)
    assert not later.replayed
    assert later.job.id != first.job.id
    assert kinds(store, first.job.id) == ["created", "cancelled"]


def test_only_the_same_request_of_the_same_tenant_and_route_was_sent_before(store: JobStore) -> None:
    asked = request("adp_1")
    first = store.create("t", REFERENCE, asked).job.id
    others = [
        store.create("t", REFERENCE, request("adp_2"), retried=True),
        store.create("t", REFERENCE, request("adp_1", mode="analyze"), retried=True),
        store.create("t", REFERENCE, request("adp_1", metadata={"a": "b"}), retried=True),
        store.create("t", REFERENCE, asked, retried=True, origins=Origins(api="fine_tuning")),
        store.create("other", REFERENCE, asked, retried=True),
        store.create("t", REFERENCE, asked),  # who asks for the first time means another job
    ]
    assert not any(created.replayed for created in others)
    assert len({first, *(created.job.id for created in others)}) == 7


def test_a_key_tells_orders_apart_that_are_alike(store: JobStore) -> None:
    """OpenAI's client counts its retries also where its user names a key."""
    asked = request("adp_1")
    keyless = store.create("t", REFERENCE, asked).job.id
    first = store.create("t", REFERENCE, asked, "order-1", retried=True)
    assert not first.replayed
    second = store.create("t", REFERENCE, asked, "order-2", retried=True)
    assert not second.replayed
    assert store.create("t", REFERENCE, asked, "order-2", retried=True).job == second.job
    assert store.create("t", REFERENCE, asked, retried=True).job.id == keyless
    alone = request("adp_2")
    keyed = store.create("t", REFERENCE, alone, "order-3").job.id
    assert store.create("t", REFERENCE, alone, retried=True).job.id != keyed


@pytest.mark.parametrize("max_open", [0, 100])
def test_twenty_retries_of_each_of_ten_requests_make_ten_jobs(store: JobStore, engine: Engine, max_open: int) -> None:
    barrier = threading.Barrier(20)

    def post(_: int) -> list[tuple[str, bool]]:
        found = []
        for number in range(10):
            barrier.wait()
            created = store.create("t", REFERENCE, request(f"adp_{number}"), retried=True, max_open=max_open)
            found.append((created.job.id, created.replayed))
        return found

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(post, range(20)))
    for number in range(10):
        assert len({answer[number][0] for answer in answers}) == 1
        assert sum(not answer[number][1] for answer in answers) == 1
    with engine.begin() as connection:
        assert len(connection.execute(select(realignments)).all()) == 10
        assert len(connection.execute(select(events)).all()) == 10


def test_a_retry_is_answered_also_when_no_more_jobs_may_be_open(store: JobStore) -> None:
    asked = request("adp_1")
    first = store.create("t", REFERENCE, asked, max_open=1).job
    assert store.create("t", REFERENCE, asked, retried=True, max_open=1).job == first
    with pytest.raises(QuotaExceeded) as refused:
        store.create("t", REFERENCE, request("adp_2"), retried=True, max_open=1)
    assert refused.value.code == "too_many_jobs"


@pytest.mark.parametrize("end", ["cancel", "succeed", "fail"])
def test_jobs_that_have_ended_are_not_open(store: JobStore, end: str) -> None:
    job_id = store.create("t", REFERENCE, request(), max_open=1).job.id
    store.create("other", REFERENCE, request(), max_open=1)
    if end != "cancel":
        assert store.claim(job_id, "w") is not None
        with pytest.raises(QuotaExceeded):
            store.create("t", REFERENCE, request(), max_open=1)
    if end == "cancel":
        store.cancel("t", job_id)
    elif end == "succeed":
        store.succeed(job_id, 1)
    else:
        store.fail(job_id, 1, Incompatible("no"))
    assert not store.create("t", REFERENCE, request(), max_open=1).replayed


# Claimed once


def test_eight_threads_race_for_one_job_and_one_gets_it(store: JobStore) -> None:
    for _ in range(10):
        job_id = queued(store)
        barrier = threading.Barrier(8)

        def race(number: int, job_id: str = job_id, barrier: threading.Barrier = barrier) -> Claim | None:
            barrier.wait()
            return store.claim(job_id, f"w{number}")

        with ThreadPoolExecutor(8) as pool:
            won = [claim for claim in pool.map(race, range(8)) if claim is not None]
        assert [claim.attempt for claim in won] == [1]
        assert kinds(store, job_id) == ["created", "started"]


def claim_all(url: str, job_ids: list[str], number: int) -> list[str]:
    """In a process of its own."""
    engine = open_database(url)
    try:
        store = JobStore(engine, lease_seconds=30, max_attempts=3)
        return [job_id for job_id in job_ids if store.claim(job_id, f"p{number}") is not None]
    finally:
        engine.dispose()


def test_four_processes_race_for_fifty_jobs_and_each_job_is_claimed_once(store: JobStore, url: str) -> None:
    ids = [queued(store) for _ in range(50)]
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        won = list(pool.map(claim_all, [url] * 4, [ids] * 4, range(4)))
    assert sorted(job_id for part in won for job_id in part) == sorted(ids)


def test_twelve_threads_open_a_new_database_at_once(url: str) -> None:
    """Gateway and workers start together on a new data folder."""
    barrier = threading.Barrier(12)

    def use(_: int) -> str:
        barrier.wait()
        engine = open_database(url)
        try:
            return queued(JobStore(engine, lease_seconds=30, max_attempts=3))
        finally:
            engine.dispose()

    with ThreadPoolExecutor(12) as pool:
        assert len(set(pool.map(use, range(12)))) == 12


def test_only_a_queued_job_can_be_claimed(store: JobStore) -> None:
    claim = claimed(store)
    assert store.claim(claim.id, "w2") is None
    store.succeed(claim.id, claim.attempt)
    assert store.claim(claim.id, "w2") is None
    assert store.claim("rlg_nothing", "w2") is None


# Leases


def test_a_heartbeat_shows_progress_and_hears_of_cancellation(store: JobStore) -> None:
    claim = claimed(store)
    assert store.heartbeat(claim.id, claim.attempt, PROGRESS) is False
    assert store.get("t", claim.id).progress == PROGRESS
    assert store.cancel("t", claim.id).status == "cancelling"
    assert store.heartbeat(claim.id, claim.attempt, PROGRESS) is True


def test_a_heartbeat_renews_the_lease(store: JobStore, engine: Engine) -> None:
    claim = claimed(store)
    shift(engine, claim.id, "lease_until", -29.0)
    store.heartbeat(claim.id, claim.attempt, PROGRESS)
    shift(engine, claim.id, "lease_until", -29.0)
    assert store.reap() == []
    shift(engine, claim.id, "lease_until", -2.0)
    assert store.reap() == [claim.id]


def test_a_silent_worker_loses_its_job_and_whatever_it_still_says_is_ignored(
    store: JobStore, engine: Engine, adapters: AdapterStore
) -> None:
    old = claimed(store)
    store.heartbeat(old.id, old.attempt, PROGRESS)
    shift(engine, old.id, "lease_until", -31.0)
    assert store.reap() == [old.id]
    assert store.reap() == []
    job = store.get("t", old.id)
    assert (job.status, job.progress.stage, job.finished_at) == ("queued", "waiting", None)
    assert store.due(10) == [old.id]

    def zombie_is_ignored() -> None:
        with pytest.raises(LostLease):
            store.heartbeat(old.id, old.attempt, PROGRESS)
        made = adapter("zombie's")
        assert store.succeed(old.id, old.attempt, [(made, "t", "realignments/x/1/adapter")]) is False
        assert store.fail(old.id, old.attempt, Incompatible("no")) is False
        assert store.release(old.id, old.attempt, "no") is False
        assert store.cancelled(old.id, old.attempt) is False
        assert store.release_from(old.id, "w1", "no") == []
        with pytest.raises(NotFound):
            adapters.get("t", made.id)

    zombie_is_ignored()
    new = store.claim(old.id, "w2")
    assert new is not None
    assert new.attempt == 2
    zombie_is_ignored()
    result = adapter()
    assert store.succeed(new.id, new.attempt, [(result, "t", "realignments/x/2/adapter")], modules=14) is True
    zombie_is_ignored()
    job = store.get("t", new.id)
    assert job.status == "succeeded"
    assert job.result is not None
    assert job.result.adapter_id == result.id
    assert store.result_attempt("t", new.id) == 2
    assert adapters.prefix("t", result.id) == "realignments/x/2/adapter"
    assert kinds(store, new.id) == ["created", "started", "requeued", "started", "succeeded"]


@pytest.mark.parametrize("way", ["release", "reap", "release_from"])
def test_after_the_last_attempt_the_failure_is_ours(store: JobStore, engine: Engine, way: str) -> None:
    job_id = queued(store)
    for attempt in (1, 2, 3):
        claim = store.claim(job_id, "w1")
        assert claim is not None
        assert claim.attempt == attempt
        if way == "release":
            assert store.release(job_id, attempt, "It failed on our side.", code="corrupt_reference")
        elif way == "release_from":
            assert store.release_from(job_id, "w1", "Its worker process died.")
        else:
            shift(engine, job_id, "lease_until", -31.0)
            assert store.reap() == [job_id]
    job = store.get("t", job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error.fault == "system"
    assert job.error.code == ("corrupt_reference" if way == "release" else "worker_lost")
    assert "3 attempts" in job.error.message
    assert job.finished_at is not None
    assert store.claim(job_id, "w1") is None
    assert store.due(10) == []
    assert kinds(store, job_id) == ["created", *["started", "requeued"] * 2, "started", "failed"]


def test_what_a_planned_stop_hands_back_does_not_count(store: JobStore, engine: Engine) -> None:
    """Three attempts are allowed: two are lost, and one is handed back between them."""
    job_id = queued(store)
    for lose in (True, False, True):
        assert store.claim(job_id, "w1") is not None
        if lose:
            assert store.release_from(job_id, "w1", "Its worker process died.") == [job_id]
        else:
            assert store.hand_back("w2", "Its worker was stopped.") == []
            assert store.hand_back("w1", "Its worker was stopped.") == [job_id]
            assert store.due(10) == [job_id]  # at once
        assert store.get("t", job_id).status == "queued"
    claim = store.claim(job_id, "w1")
    assert claim is not None
    assert claim.attempt == 4  # the number still fences
    assert store.heartbeat(job_id, 4, Progress(stage="score", done=1, total=2)) is False
    with pytest.raises(LostLease):
        store.heartbeat(job_id, 2, Progress(stage="score", done=1, total=2))
    assert store.release_from(job_id, "w1", "Its worker process died.") == [job_id]
    assert store.get("t", job_id).status == "failed"
    ways = ["requeued", "handed_back", "requeued", "failed"]
    assert kinds(store, job_id) == ["created", *[kind for way in ways for kind in ("started", way)]]


def test_a_cancelled_job_that_is_handed_back_is_cancelled(store: JobStore) -> None:
    claim = claimed(store, "w1")
    store.cancel("t", claim.id)
    assert store.hand_back("w1", "Its worker was stopped.") == [claim.id]
    assert store.get("t", claim.id).status == "cancelled"


def test_a_job_is_given_back_only_from_the_worker_that_holds_it(store: JobStore) -> None:
    claim = claimed(store, "w1")
    assert store.release_from(claim.id, "w2", "It died.") == []
    assert store.get("t", claim.id).status == "running"
    assert store.release_from(claim.id, "w1", "It died.") == [claim.id]
    assert store.get("t", claim.id).status == "queued"
    assert store.release_from(claim.id, "w1", "It died.") == []
    assert store.release_from("rlg_nothing", "w1", "It died.") == []


def test_a_failure_of_the_input_is_final(store: JobStore) -> None:
    claim = claimed(store)
    error = Incompatible("Not this base.", code="base_mismatch", param="layers.0", hint="Use another.")
    assert store.fail(claim.id, claim.attempt, error) is True
    job = store.get("t", claim.id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.fault, job.error.message) == (
        "base_mismatch",
        "user",
        "Not this base. Use another.",
    )
    assert store.claim(claim.id, "w2") is None


# Cancelled


def test_a_queued_job_is_cancelled_at_once(store: JobStore) -> None:
    job_id = queued(store)
    assert store.cancel("t", job_id).status == "cancelled"
    assert store.claim(job_id, "w") is None
    assert store.due(10) == []
    assert store.cancel("t", job_id).status == "cancelled"
    assert kinds(store, job_id) == ["created", "cancelled"]


def test_a_running_job_is_asked_to_stop_once(store: JobStore) -> None:
    claim = claimed(store)
    for _ in range(3):
        assert store.cancel("t", claim.id).status == "cancelling"
    assert store.cancelled(claim.id, claim.attempt) is True
    assert store.get("t", claim.id).status == "cancelled"
    assert kinds(store, claim.id) == ["created", "started", "cancelling", "cancelled"]


@pytest.mark.parametrize("way", ["release", "reap"])
def test_a_cancelled_job_whose_worker_dies_is_not_tried_again(store: JobStore, engine: Engine, way: str) -> None:
    claim = claimed(store)
    store.cancel("t", claim.id)
    if way == "release":
        assert store.release(claim.id, claim.attempt, "It died.")
    else:
        shift(engine, claim.id, "lease_until", -31.0)
        assert store.reap() == [claim.id]
    assert store.get("t", claim.id).status == "cancelled"
    assert store.claim(claim.id, "w2") is None


def test_ended_jobs_stay_as_they_are(store: JobStore) -> None:
    ends: list[tuple[str, Callable[[Claim], Any]]] = [
        ("succeeded", lambda claim: store.succeed(claim.id, claim.attempt)),
        ("failed", lambda claim: store.fail(claim.id, claim.attempt, Incompatible("no"))),
    ]
    for status, end in ends:
        claim = claimed(store)
        end(claim)
        before = store.get("t", claim.id)
        assert store.cancel("t", claim.id) == before
        assert before.status == status
        assert store.reap() == []


# Announced


def test_a_job_is_announced_once_and_then_ever_more_rarely(store: JobStore, engine: Engine) -> None:
    job_id = queued(store)
    assert store.waiting() == 0
    assert store.due(10) == [job_id]
    assert store.due(10) == []
    assert store.waiting() == 1
    pause = module.FIRST_REPEAT
    for _ in range(7):
        shift(engine, job_id, "next_at", -pause + 1.0)
        assert store.due(10) == []
        shift(engine, job_id, "next_at", -1.1)
        assert store.due(10) == [job_id]
        pause = min(module.LAST_REPEAT, 2 * pause)
    assert pause == module.LAST_REPEAT


def test_a_job_whose_worker_died_is_announced_at_once(store: JobStore) -> None:
    job_id = queued(store)
    store.due(10)
    assert store.claim(job_id, "w") is not None
    assert store.due(10) == []
    store.release_from(job_id, "w", "It died.")
    assert store.due(10) == [job_id]


def test_a_fault_of_ours_is_given_time_that_does_not_count_as_announced(store: JobStore, engine: Engine) -> None:
    job_id = queued(store)
    for attempt in (1, 2):
        claim = store.claim(job_id, "w")
        assert claim is not None
        store.release(job_id, claim.attempt, "The disk is full.", code="disk_full")
        assert store.due(10) == []
        assert store.waiting() == 0
        shift(engine, job_id, "next_at", -module.FAULT_PAUSE * 2 ** (attempt - 1) + 1)
        assert store.due(10) == []
        shift(engine, job_id, "next_at", -1.5)
        assert store.due(10) == [job_id]


def test_a_job_that_waited_for_weeks_is_still_announced(store: JobStore, engine: Engine) -> None:
    job_id = queued(store)
    with engine.begin() as connection:
        connection.execute(realignments.update().values(announced=5000))
    assert store.due(10) == [job_id]


def test_a_reader_does_not_wait_for_a_writer(store: JobStore, engine: Engine) -> None:
    if engine.dialect.name != "sqlite":
        pytest.skip("SQLite alone has one writer")
    job_id = queued(store)
    with engine.begin() as connection:
        connection.execute(realignments.update().values(announced=7))
        began = time.monotonic()
        assert store.get("t", job_id).status == "queued"
        assert time.monotonic() - began < 5


def test_an_announcement_that_could_not_be_sent_does_not_count(store: JobStore, engine: Engine) -> None:
    sent, unsent = queued(store), queued(store)
    for _ in range(10):  # a broker that stays away for long
        assert unsent in store.due(10)
        store.unannounce([unsent])
    assert store.due(10) == [unsent]
    assert store.due(10) == []
    shift(engine, unsent, "next_at", -module.FIRST_REPEAT)
    shift(engine, sent, "next_at", -module.FIRST_REPEAT / 2)
    assert store.due(10) == [unsent]
    store.claim(sent, "w")
    store.unannounce([sent])  # it was claimed in the meantime: nothing happens
    assert store.get("t", sent).status == "running"


def test_only_so_many_are_announced_oldest_first(store: JobStore) -> None:
    ids = [queued(store) for _ in range(5)]
    assert store.due(2) == ids[:2]
    assert store.due(10) == ids[2:]


def test_a_message_is_for_whoever_s_turn_it_is(store: JobStore, engine: Engine) -> None:
    first = [queued(store, "first") for _ in range(3)]
    assert store.due(10) == first
    late = queued(store, "late")
    claim = store.claim_next("w", first[0])
    assert claim is not None
    assert claim.id == first[0]
    # Nobody has announced it, and it is next: its tenant has nothing at work.
    claim = store.claim_next("w", first[1])
    assert claim is not None
    assert claim.id == late
    assert store.due(10) == [first[1]], "the message that named it is used up"
    # Its parent knows the message alone.
    assert store.release_from(late, "w", "It died.") == []
    assert store.release_from(first[1], "other", "It died.") == []
    assert store.release_from(first[1], "w", "It died.") == [late]
    assert store.claim_next("w", "rlg_gone") is not None


def test_tenants_take_turns(store: JobStore) -> None:
    """One worker: by who was served longest ago."""
    ids = {name: [queued(store, name) for _ in range(number)] for name, number in {"a": 5, "b": 2, "c": 1}.items()}
    order = []
    for _ in range(8):
        claim = store.claim_next("w", "ticket")
        assert claim is not None
        order.append(claim.id)
        assert store.succeed(claim.id, claim.attempt)
    a, b, c = ids["a"], ids["b"], ids["c"]
    assert order == [a[0], b[0], c[0], a[1], b[1], a[2], a[3], a[4]]
    assert store.claim_next("w", "ticket") is None


def test_who_came_first_with_many_jobs_does_not_get_every_worker(store: JobStore) -> None:
    many = [queued(store, "many") for _ in range(20)]
    running = [store.claim_next(f"w{number}", many[number]) for number in range(4)]
    assert [claim and claim.id for claim in running] == many[:4]
    few = [queued(store, "few") for _ in range(2)]
    claims = [store.claim_next(f"w{number}", many[number]) for number in range(4, 8)]
    assert [claim and claim.id for claim in claims] == [*few, *many[4:6]]


def test_what_a_fault_of_ours_put_off_has_no_turn(store: JobStore, engine: Engine) -> None:
    claim = claimed(store)
    store.release(claim.id, claim.attempt, "The disk is full.", code="disk_full")
    assert store.claim_next("w", claim.id) is None
    shift(engine, claim.id, "next_at", -module.FAULT_PAUSE - 1)
    again = store.claim_next("w", claim.id)
    assert again is not None
    assert again.attempt == 2


def test_a_draining_worker_has_no_turn_and_the_message_is_given_back(store: JobStore, engine: Engine) -> None:
    workers = WorkerStore(engine, lease_seconds=30)
    workers.beat("w", "cpu", "1")
    workers.drain("w")
    job_id = queued(store)
    assert store.due(10) == [job_id]
    assert store.claim_next("w", job_id) is None
    assert store.due(10) == [job_id]


def test_as_many_turns_at_once_as_there_are_jobs(store: JobStore) -> None:
    ids = {queued(store, f"t{number % 3}") for number in range(12)}
    barrier = threading.Barrier(16)

    def take(number: int) -> str | None:
        barrier.wait()
        claim = store.claim_next(f"w{number}", "ticket")
        return claim.id if claim else None

    with ThreadPoolExecutor(16) as pool:
        taken = list(pool.map(take, range(16)))
    assert taken.count(None) == 4
    assert set(taken) - {None} == ids


def test_a_lost_announcement_is_repeated_in_its_turn(store: JobStore, engine: Engine) -> None:
    lost, other = queued(store, "a"), queued(store, "b")
    assert store.due(1) == [lost]
    shift(engine, lost, "next_at", -module.FIRST_REPEAT - 5)
    assert store.due(10) == [lost, other]


# Read


def estimated(store: JobStore, engine: Engine, progress: Progress, seconds: float) -> float | None:
    """How much longer a job has, after so many seconds; None where nothing is said."""
    claim = claimed(store)
    shift(engine, claim.id, "attempt_started_at", -seconds)
    store.heartbeat(claim.id, claim.attempt, progress)
    found = store.get("t", claim.id).estimated_finish
    return None if found is None else found - time.time()


@pytest.mark.parametrize(
    ("stage", "done", "total", "wanted"),
    [
        ("fetch", 0, 0, None),
        ("compare", 0, 14, None),  # too early to tell
        ("compare", 7, 14, 70 / 0.2 - 70),
        ("score", 0, 14, 70 / 0.35 - 70),
        ("patch", 7, 14, 70 / 0.7 - 70),
        ("publish", 0, 0, 70 / 0.9 - 70),
        ("waiting", 0, 0, None),
        ("something new", 1, 2, None),
    ],
)
def test_the_end_is_extrapolated_from_the_progress(
    store: JobStore, engine: Engine, stage: str, done: int, total: int, wanted: float | None
) -> None:
    left = estimated(store, engine, Progress(stage=stage, done=done, total=total), 70.0)
    if wanted is None:
        assert left is None
    else:
        assert left == pytest.approx(wanted, rel=0.05, abs=3)


def test_a_method_that_takes_all_modules_has_no_share_for_scores(store: JobStore, engine: Engine) -> None:
    asked = store.create("t", REFERENCE, request(method={"type": "gram"})).job.id
    claim = store.claim(asked, "w1")
    assert claim is not None
    shift(engine, claim.id, "attempt_started_at", -70)
    store.heartbeat(claim.id, claim.attempt, Progress(stage="patch", done=0, total=14))
    found = store.get("t", claim.id).estimated_finish
    assert found is not None
    assert found - time.time() == pytest.approx(70 / (0.35 / 0.85) - 70, rel=0.05, abs=3)


def test_only_a_running_job_has_an_estimated_end(store: JobStore, engine: Engine) -> None:
    claim = claimed(store)
    shift(engine, claim.id, "attempt_started_at", -70)
    store.heartbeat(claim.id, claim.attempt, PROGRESS)
    first = store.get("t", claim.id).estimated_finish
    assert first is not None
    assert first >= time.time() - 1
    store.cancel("t", claim.id)
    assert store.get("t", claim.id).estimated_finish is not None
    store.release_from(claim.id, "w1", "It died.")
    assert store.get("t", claim.id).estimated_finish is None
    ended = claimed(store)
    store.succeed(ended.id, ended.attempt)
    assert store.get("t", ended.id).estimated_finish is None


def test_a_second_attempt_is_estimated_from_its_own_start(store: JobStore, engine: Engine) -> None:
    claim = claimed(store)
    shift(engine, claim.id, "started_at", -3600)
    store.release_from(claim.id, "w1", "It died.")
    assert store.claim(claim.id, "w1") is not None
    shift(engine, claim.id, "attempt_started_at", -70)
    store.heartbeat(claim.id, 2, Progress(stage="patch", done=7, total=14))
    found = store.get("t", claim.id).estimated_finish
    assert found is not None
    assert found - time.time() == pytest.approx(30, abs=3)


def ids(found: tuple[list[Realignment], bool]) -> set[str]:
    return {job.id for job in found[0]}


def test_lists_are_narrowed_by_status(store: JobStore) -> None:
    by_status: dict[str, str] = {"queued": queued(store)}
    for status in ("running", "cancelling", "succeeded", "failed", "cancelled"):
        by_status[status] = claimed(store).id
    store.cancel("t", by_status["cancelling"])
    store.succeed(by_status["succeeded"], 1)
    store.fail(by_status["failed"], 1, Incompatible("no"))
    store.cancel("t", by_status["cancelled"])
    store.cancelled(by_status["cancelled"], 1)
    dead = queued(store)
    for attempt in (1, 2, 3):
        assert store.claim(dead, "w") is not None
        store.release(dead, attempt, "It failed on our side.")
    for status, job_id in by_status.items():
        wanted = {job_id, dead} if status == "failed" else {job_id}
        filters = Filters(status=status)  # type: ignore[arg-type]
        assert ids(store.page("t", limit=100, filters=filters)) == wanted
        assert {job.status for job in store.page("t", limit=100, filters=filters)[0]} == {status}
        assert ids(store.page("other", limit=100, filters=filters)) == set()
    assert len(ids(store.page("t", limit=100))) == 7


def test_lists_are_narrowed_by_what_was_asked_for(store: JobStore) -> None:
    first = store.create("t", "ref_1", request("adp_1")).job.id
    second = store.create("t", "ref_2", request("adp_1"), origins=Origins(api="fine_tuning")).job.id
    third = store.create("t", "ref_1", request("adp_2"), origins=Origins(batch_id="batch_1")).job.id
    store.create("other", "ref_1", request("adp_1"))
    cases: list[tuple[Filters, set[str]]] = [
        (Filters(), {first, second, third}),
        (Filters(adapter_id="adp_1"), {first, second}),
        (Filters(reference_id="ref_1"), {first, third}),
        (Filters(adapter_id="adp_1", reference_id="ref_1"), {first}),
        (Filters(batch_id="batch_1"), {third}),
        (Filters(api="realignments"), {first, third}),
        (Filters(adapter_id="adp_2", status="running"), set()),
        (Filters(adapter_id="adp_%"), set()),
    ]
    for filters, wanted in cases:
        assert ids(store.page("t", limit=100, filters=filters)) == wanted


# What has a meaning in JSON, in paths into it, in Postgres's arrays, in SQL, or in patterns.
ODD = ["team", "a.b", 'a"b', "a'b", "a,b", "{a}", "a[0]", "0", "$", "$.team", "#", "a\\b", "a\\\"b", "ü 漢 🙂", "%",
       "_", "a\nb", " ", "", "NULL", "null", "\u202e", "a]b", "team.x"]  # fmt: skip


@pytest.mark.parametrize("key", [key for key in ODD if key])
def test_lists_are_narrowed_by_metadata_whatever_it_says(store: JobStore, key: str) -> None:
    made = {}
    for value in ODD:
        made[value] = store.create("t", REFERENCE, request(metadata={key: value, "run": "7"})).job.id
    bare = store.create("t", REFERENCE, request()).job.id
    swapped = store.create("t", REFERENCE, request(metadata={"x": key, "y": "team"})).job.id
    for value, job_id in made.items():
        found = store.page("t", limit=100, filters=Filters(metadata={key: value}))
        assert ids(found) == {job_id}, value
        both = {key: value, "run": "7"}
        assert ids(store.page("t", limit=100, filters=Filters(metadata=both))) == {job_id}
        assert ids(store.page("t", limit=100, filters=Filters(metadata=both | {"run": "8"}))) == set()
    everything = ids(store.page("t", limit=100, filters=Filters(metadata={"run": "7"})))
    assert everything == set(made.values())
    assert not everything & {bare, swapped}


def test_a_narrowed_list_pages_too(store: JobStore) -> None:
    wanted = []
    for number in range(12):
        job_id = store.create("t", REFERENCE, request(metadata={"odd": str(number % 2)})).job.id
        wanted += [job_id] if number % 2 else []
    filters, seen, after, more = Filters(metadata={"odd": "1"}), [], None, True
    while more:
        items, more = store.page("t", limit=4, after=after, filters=filters)
        seen += [item.id for item in items]
        after = seen[-1]
    assert seen == sorted(wanted, reverse=True)


def test_events_are_in_order_and_resume(store: JobStore) -> None:
    claim, other = claimed(store), claimed(store)
    store.note(claim.id, "warned", "x" * 2000, {"a": 1})
    store.note(other.id, "warned", "of another job")
    store.succeed(claim.id, claim.attempt)
    found = store.events("t", claim.id)
    assert [event.type for event in found] == ["created", "started", "warned", "succeeded"]
    numbers = [int(event.id) for event in found]
    assert numbers == sorted(numbers)
    assert found[2].data == {"a": 1}
    assert len(found[2].message) == 1000
    assert store.events("t", claim.id, after=numbers[1]) == found[2:]
    assert store.events("t", claim.id, after=numbers[1], limit=1) == found[2:3]
    assert store.events("t", claim.id, after=numbers[-1]) == []


def test_tenants_do_not_see_each_other(store: JobStore, adapters: AdapterStore) -> None:
    job_id = queued(store, "one")
    theirs = adapter()
    adapters.add(theirs, "one", "adapters/x")
    asks: list[Callable[[str], Any]] = [
        lambda tenant: store.get(tenant, job_id),
        lambda tenant: store.events(tenant, job_id),
        lambda tenant: store.result_attempt(tenant, job_id),
        lambda tenant: adapters.get(tenant, theirs.id),
        lambda tenant: adapters.prefix(tenant, theirs.id),
        lambda tenant: store.cancel(tenant, job_id),
        lambda tenant: adapters.delete(tenant, theirs.id),
    ]
    for ask in asks:
        with pytest.raises(NotFound):
            ask("two")
    assert store.page("two", limit=10) == ([], False)
    assert adapters.page("two", limit=10) == ([], False)
    assert store.get("one", job_id).status == "queued"
    for ask in asks:
        ask("one")
    with pytest.raises(NotFound):
        adapters.get("one", theirs.id)


def test_an_adapter_in_use_is_not_deleted(store: JobStore, adapters: AdapterStore) -> None:
    made = adapter()
    adapters.add(made, "t", "adapters/x")
    job_id = store.create("t", REFERENCE, request(made.id)).job.id
    for step in ("queued", "running"):
        with pytest.raises(Conflict) as refused:
            adapters.delete("t", made.id)
        assert refused.value.code == "adapter_in_use"
        assert job_id in str(refused.value)
        if step == "queued":
            assert store.claim(job_id, "w") is not None
    store.succeed(job_id, 1)
    assert adapters.delete("t", made.id) == "adapters/x"


def test_pages_are_newest_first_and_complete(store: JobStore, adapters: AdapterStore) -> None:
    jobs = {queued(store) for _ in range(7)}
    queued(store, "other")
    made = [adapter(str(number)) for number in range(7)]
    for item in made:
        adapters.add(item, "t", "adapters/x")
    for page, wanted in ((store.page, jobs), (adapters.page, {item.id for item in made})):
        seen: list[str] = []
        more, after = True, None
        while more:
            items, more = page("t", limit=3, after=after)
            assert len(items) == 3 or not more
            seen += [item.id for item in items]
            after = seen[-1]
        assert seen == sorted(wanted, reverse=True)
        assert page("t", limit=7)[1] is False
        assert page("t", limit=6)[1] is True


# Any order of anything


class Model:
    """What a job must look like after the steps so far."""

    def __init__(self) -> None:
        self.state = "queued"
        self.attempt = 0
        self.due = True
        self.asked = False
        self.worker = ""


class AnyOrder(RuleBasedStateMachine):
    """Every operation, with live and stale attempts, in any order: the store agrees with a model of a few lines."""

    engine: Engine  # one file for all examples; opening one for each would take most of the time
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.store = JobStore(self.engine, lease_seconds=30, max_attempts=2)
        self.jobs: dict[str, Model] = {}
        self.ended: dict[str, Realignment] = {}

    def teardown(self) -> None:
        with self.engine.begin() as connection:
            for table in (realignments, events, adapter_rows):
                connection.execute(delete(table))

    def pick(self, data: st.DataObject, state: str) -> str | None:
        """A job, in the wanted state where there is one."""
        found = [job_id for job_id, job in self.jobs.items() if job.state == state] or list(self.jobs)
        return data.draw(st.sampled_from(found)) if found else None

    def holds(self, claim: Claim) -> bool:
        job = self.jobs[claim.id]
        return job.state == "running" and job.attempt == claim.attempt

    def given_back(self, job: Model) -> None:
        if job.asked:
            job.state = "cancelled"
        elif job.attempt >= 2:
            job.state = "dead"
        else:
            job.state, job.due = "queued", True

    @rule()
    def create(self) -> None:
        self.jobs[queued(self.store)] = Model()

    @rule(target=claims, data=st.data(), worker=st.sampled_from(["w1", "w2"]))
    def claim(self, data: st.DataObject, worker: str) -> Any:
        job_id = self.pick(data, "queued")
        if job_id is None:
            return multiple()
        job = self.jobs[job_id]
        claim = self.store.claim(job_id, worker)
        assert (claim is not None) == (job.state == "queued")
        if claim is None:
            return multiple()
        job.state, job.attempt, job.worker = "running", job.attempt + 1, worker
        assert claim.attempt == job.attempt
        return claim

    @rule(claim=claims)
    def heartbeat(self, claim: Claim) -> None:
        if self.holds(claim):
            assert self.store.heartbeat(claim.id, claim.attempt, PROGRESS) == self.jobs[claim.id].asked
        else:
            with pytest.raises(LostLease):
                self.store.heartbeat(claim.id, claim.attempt, PROGRESS)

    @rule(claim=claims, patch=st.booleans())
    def succeed(self, claim: Claim, patch: bool) -> None:
        held = self.holds(claim)
        made = [(adapter(claim.id), "t", "realignments/x/1/adapter")] if patch else []
        assert self.store.succeed(claim.id, claim.attempt, made) == held
        if held:
            self.jobs[claim.id].state = "succeeded"

    @rule(claim=claims)
    def fail(self, claim: Claim) -> None:
        held = self.holds(claim)
        assert self.store.fail(claim.id, claim.attempt, Incompatible("no")) == held
        if held:
            self.jobs[claim.id].state = "failed"

    @rule(claim=claims)
    def cancelled(self, claim: Claim) -> None:
        held = self.holds(claim)
        assert self.store.cancelled(claim.id, claim.attempt) == held
        if held:
            self.jobs[claim.id].state = "cancelled"

    @rule(claim=claims)
    def release(self, claim: Claim) -> None:
        held = self.holds(claim)
        assert self.store.release(claim.id, claim.attempt, "It failed.") == held
        if held:
            self.given_back(self.jobs[claim.id])
            self.jobs[claim.id].due = False  # a fault of ours is given time

    @rule(claim=claims, worker=st.sampled_from(["w1", "w2"]))
    def release_from(self, claim: Claim, worker: str) -> None:
        job = self.jobs[claim.id]
        held = job.state == "running" and job.worker == worker
        assert self.store.release_from(claim.id, worker, "It died.") == [claim.id] * held
        if held:
            self.given_back(job)

    @rule(data=st.data())
    def fall_silent(self, data: st.DataObject) -> None:
        running = [job_id for job_id, job in self.jobs.items() if job.state == "running"]
        silent = data.draw(st.lists(st.sampled_from(running), unique=True)) if running else []
        for job_id in silent:
            shift(self.engine, job_id, "lease_until", -3600.0)
        assert sorted(self.store.reap()) == sorted(silent)
        for job_id in silent:
            self.given_back(self.jobs[job_id])

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = self.pick(data, "running")
        if job_id is None:
            return
        self.store.cancel("t", job_id)
        job = self.jobs[job_id]
        if job.state == "queued":
            job.state = "cancelled"
        elif job.state == "running":
            job.asked = True

    @rule()
    def announce(self) -> None:
        wanted = [job_id for job_id, job in self.jobs.items() if job.state == "queued" and job.due]
        assert sorted(self.store.due(1000)) == sorted(wanted)
        for job_id in wanted:
            self.jobs[job_id].due = False

    @invariant()
    def agrees(self) -> None:
        shown = {job.id: job for job in self.store.page("t", limit=1000)[0]}
        assert shown.keys() == self.jobs.keys()
        with self.engine.begin() as connection:
            noted = connection.execute(select(events.c.realignment_id, events.c.type)).all()
            published = [row.body["name"] for row in connection.execute(select(adapter_rows.c.body))]
        for job_id, job in self.jobs.items():
            wanted = {"dead": "failed"}.get(job.state, job.state)
            if job.state == "running" and job.asked:
                wanted = "cancelling"
            assert shown[job_id].status == wanted
            # One holder an attempt: the number rises by one with every claim and never falls.
            assert shown[job_id].attempt == job.attempt
            kinds = [row.type for row in noted if row.realignment_id == job_id]
            assert kinds.count("started") == job.attempt
            assert kinds.count("succeeded") == (job.state == "succeeded")
            ends = sum(kinds.count(kind) for kind in ("succeeded", "failed", "cancelled"))
            assert ends == (job.state not in ("queued", "running"))
            assert published.count(job_id) <= (job.state == "succeeded")
            if job_id in self.ended:
                assert shown[job_id] == self.ended[job_id]
            elif ends:
                self.ended[job_id] = shown[job_id]


def test_any_order_of_anything_keeps_the_invariants(engine: Engine) -> None:
    AnyOrder.engine = engine
    run_state_machine_as_test(
        AnyOrder,
        settings=settings(
            max_examples=120,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def test_a_restarted_worker_takes_back_what_it_held_and_nothing_else(store: JobStore) -> None:
    mine = [claimed(store, "worker1").id for _ in range(2)]
    other = claimed(store, "worker2").id
    ended = claimed(store, "worker1")
    store.fail(ended.id, ended.attempt, Incompatible("no"))
    assert sorted(store.release_all("worker1", "Killed.")) == sorted(mine)
    assert [store.get("t", job_id).status for job_id in [*mine, other, ended.id]] == [
        "queued",
        "queued",
        "running",
        "failed",
    ]
    assert store.release_all("worker1", "Killed.") == []
