"""Batches as records: who is chosen, what is next, what became of it, and that a batch ends once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import delete, insert, select, update
from sqlalchemy.engine import Engine

from safegraft.contracts.adapter import Origin
from safegraft.contracts.batch import BatchCreate
from safegraft.contracts.realignment import Failure
from safegraft.contracts.report import Spread, Summary
from safegraft.errors import Conflict, InvalidParameter, NotFound, UserError
from safegraft.stores import batches as module
from safegraft.stores.adapters import AdapterStore
from safegraft.stores.batches import Active, BatchStore
from safegraft.stores.database import adapters as adapter_rows
from safegraft.stores.database import batch_adapters, now, realignments, webhook_deliveries, webhook_endpoints
from safegraft.stores.jobs import JobStore, Origins
from tests.stores.records import REFERENCE, adapter, request

OLD = "ref_" + "1" * 24


@pytest.fixture
def batches(engine: Engine) -> BatchStore:
    return BatchStore(engine)


def summary(similarity: float, edit: float) -> Summary:
    spread = Spread(min=-1.0, median=similarity, max=1.0)
    return Summary(
        modules=2,
        repaired=1,
        similarity=spread,
        similarity_before=spread,
        similarity_after=spread,
        kept=0.5,
        edit=edit,
        truncation_error=0.0,
    )


def added(adapters: AdapterStore, count: int, tenant: str = "t") -> list[str]:
    made = [adapter(f"a{number}") for number in range(count)]
    for item in made:
        adapters.add(item, tenant, f"tenants/{tenant}/adapters/{item.id}")
    return [item.id for item in made]


def asked(ids: list[str] | None = None, **values: object) -> BatchCreate:
    return BatchCreate.model_validate({"reference_id": REFERENCE, "adapter_ids": ids, **values})


def the(batches: BatchStore, batch_id: str) -> Active:
    return next(batch for batch in batches.active() if batch.id == batch_id)


def ran(
    store: JobStore, adapter_id: str, reference: str = OLD, similarity: float = 0.5, edit: float = 0.1, **values: object
) -> str:
    """A job that has succeeded."""
    job = store.create("t", reference, request(adapter_id, **values)).job
    claim = store.claim(job.id, "w")
    assert claim is not None
    assert store.succeed(job.id, claim.attempt, summaries=[summary(similarity, edit)])
    return job.id


def open_next(batches: BatchStore, store: JobStore, batch: Active, room: int) -> list[str]:
    made = []
    for waiting in batches.take(batch, room):
        origins = Origins(batch_id=batch.id)
        job = store.create("t", REFERENCE, request(waiting.adapter_id), waiting.key, origins=origins).job
        assert batches.opened(batch.id, waiting.adapter_id, job.id)
        made.append(job.id)
    return made


def end(store: JobStore, job_id: str, how: str, similarity: float = 0.5, edit: float = 0.1) -> None:
    claim = store.claim(job_id, "w")
    assert claim is not None
    if how == "succeeded":
        assert store.succeed(job_id, claim.attempt, summaries=[summary(similarity, edit)])
    elif how == "failed":
        assert store.fail(job_id, claim.attempt, UserError("It does not fit.", code="lineage_mismatch"))
    else:
        store.cancel("t", job_id)
        assert store.cancelled(job_id, claim.attempt)


# Made once, of the tenant's own


def test_a_batch_shows_its_plan_and_counts(batches: BatchStore, adapters: AdapterStore) -> None:
    ids = added(adapters, 5)
    wanted = asked(ids, canary={"share": 0.3}, method={"type": "gram"}, mode="analyze", metadata={"a": "b"})
    batch = batches.create("t", wanted)
    assert batch.status == "canary"
    assert (batch.counts.total, batch.counts.waiting) == (5, 5)
    assert (batch.reference_id, batch.mode, batch.metadata, batch.method.type) == (
        REFERENCE,
        "analyze",
        {"a": "b"},
        "gram",
    )
    assert (batch.canary, batch.stop_rule, batch.reason) == (wanted.canary, wanted.stop_rule, None)
    assert batches.get("t", batch.id) == batch
    members, more = batches.adapters("t", batch.id, limit=10)
    assert not more
    assert sorted(item.id for item in members) == sorted(ids)
    # At least one, rounded up, and first.
    assert [item.canary for item in members] == [True, True, False, False, False]
    assert batches.create("t", asked(ids)).status == "running"


def test_the_canary_is_drawn_by_chance(batches: BatchStore, adapters: AdapterStore) -> None:
    ids = added(adapters, 40)
    batch = batches.create("t", asked(ids, canary={"share": 0.25}))
    first = [item.id for item in batches.adapters("t", batch.id, limit=10)[0]]
    # Ids sort by age: neither the oldest nor the newest.
    assert first not in (sorted(ids)[:10], sorted(ids)[:-11:-1], sorted(sorted(ids)[:-11:-1]))
    assert [item.id for item in batches.adapters("t", batch.id, limit=10)[0]] == first


def test_adapters_of_others_are_missing_ones(batches: BatchStore, adapters: AdapterStore) -> None:
    mine, foreign = added(adapters, 1), added(adapters, 1, "other")
    for ids in (foreign, [*mine, *foreign], ["adp_0"]):
        with pytest.raises(NotFound) as refused:
            batches.create("t", asked(ids))
        assert (refused.value.code, refused.value.param) == ("adapter_not_found", "adapter_ids")
    assert batches.page("t", limit=10) == ([], False)
    batch = batches.create("t", asked(mine))
    with pytest.raises(NotFound):
        batches.get("other", batch.id)
    with pytest.raises(NotFound):
        batches.adapters("other", batch.id, limit=10)
    assert batches.page("other", limit=10) == ([], False)


def test_twelve_posts_with_one_key_make_one_batch(batches: BatchStore, adapters: AdapterStore) -> None:
    wanted = asked(added(adapters, 3))
    barrier = threading.Barrier(12)

    def post(_: int) -> str:
        barrier.wait()
        return batches.create("t", wanted, "k").id

    with ThreadPoolExecutor(12) as pool:
        assert len(set(pool.map(post, range(12)))) == 1
    assert len(batches.page("t", limit=10)[0]) == 1
    replayed = batches.replay("t", wanted, "k")
    assert replayed is not None
    assert batches.replay("other", wanted, "k") is None
    with pytest.raises(Conflict) as refused:
        batches.create("t", asked(added(adapters, 1)), "k")
    assert refused.value.code == "idempotency_key_reused"


def test_pages_of_batches_and_of_their_adapters(batches: BatchStore, adapters: AdapterStore) -> None:
    ids = added(adapters, 5)
    made = [batches.create("t", asked(ids)).id for _ in range(3)]
    page, more = batches.page("t", limit=2)
    assert ([item.id for item in page], more) == (made[:0:-1], True)
    page, more = batches.page("t", limit=2, after=page[-1].id)
    assert ([item.id for item in page], more) == (made[:1], False)
    everything = [item.id for item in batches.adapters("t", made[0], limit=5)[0]]
    first, more = batches.adapters("t", made[0], limit=3)
    assert more
    second, more = batches.adapters("t", made[0], limit=3, after=first[-1].id)
    assert not more
    assert [item.id for item in [*first, *second]] == everything


# Selected


def test_those_are_selected_whose_last_patch_used_another_reference(
    batches: BatchStore, adapters: AdapterStore, store: JobStore
) -> None:
    never, old, new, back, analyzed, tried = added(adapters, 6)
    (foreign,) = added(adapters, 1, "other")
    ran(store, old)
    ran(store, new, REFERENCE)
    ran(store, back, REFERENCE)
    ran(store, back, OLD, metadata={"team": "a"})
    ran(store, analyzed, OLD, mode="analyze")
    failed = store.create("t", OLD, request(tried)).job.id
    end(store, failed, "failed")
    job = store.create("other", OLD, request(foreign)).job
    assert store.claim(job.id, "w") is not None
    assert store.succeed(job.id, 1)
    patched = adapter("patched")
    adapters.add(patched.model_copy(update={"origin": Origin(realignment_id=failed)}), "t", "tenants/t/x")
    ran(store, patched.id)

    def selected(**select_: object) -> set[str]:
        batch = batches.create("t", asked(select=select_))
        return {item.id for item in batches.adapters("t", batch.id, limit=100)[0]}

    assert selected() == {old, back}
    assert selected(previous_reference_id=OLD) == {old, back}
    assert selected(metadata={"team": "a"}) == {back}
    for nothing in ({"metadata": {"team": "b"}}, {"previous_reference_id": "ref_" + "2" * 24}):
        with pytest.raises(InvalidParameter) as refused:
            selected(**nothing)
        assert refused.value.code == "nothing_selected"
    assert never


def test_more_than_a_batch_holds_is_refused(
    batches: BatchStore, adapters: AdapterStore, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for adapter_id in added(adapters, 4):
        ran(store, adapter_id)
    monkeypatch.setattr(module, "MAX_ADAPTERS", 3)
    with pytest.raises(UserError) as refused:
        batches.create("t", asked(select={}))
    assert refused.value.code == "too_many_adapters"


# What is next, and what became of it


def test_never_more_than_the_room_are_open_and_the_canary_comes_first(
    batches: BatchStore, adapters: AdapterStore, store: JobStore
) -> None:
    batch_id = batches.create("t", asked(added(adapters, 10), canary={"share": 0.4})).id
    order = [item.id for item in batches.adapters("t", batch_id, limit=10)[0]]
    assert [item.adapter_id for item in batches.take(the(batches, batch_id), 3)] == order[:3]
    jobs = open_next(batches, store, the(batches, batch_id), 3)
    assert batches.take(the(batches, batch_id), 3) == []
    end(store, jobs[0], "succeeded")
    assert batches.settle() == 1
    assert batches.settle() == 0
    # One of the canary is left; what comes after it waits.
    assert [item.adapter_id for item in batches.take(the(batches, batch_id), 9)] == order[3:4]
    batches.go_on(batch_id)
    assert [item.adapter_id for item in batches.take(the(batches, batch_id), 3)] == order[3:4]
    assert [item.adapter_id for item in batches.take(the(batches, batch_id), 9)] == order[3:]
    counts = batches.get("t", batch_id).counts
    assert (counts.total, counts.waiting, counts.queued, counts.succeeded) == (10, 7, 2, 1)


def test_a_job_whose_maker_died_is_found_again(batches: BatchStore, adapters: AdapterStore, store: JobStore) -> None:
    batch_id = batches.create("t", asked(added(adapters, 2))).id
    batch = the(batches, batch_id)
    first, second = batches.take(batch, 2)
    job = store.create("t", REFERENCE, request(first.adapter_id), first.key, origins=Origins(batch_id=batch_id)).job
    # Another tenant's key of the same name is another key.
    store.create("other", REFERENCE, request(second.adapter_id), second.key)
    assert [item.made for item in batches.take(batch, 2)] == [job.id, None]


def test_every_end_of_a_job_is_noted(
    batches: BatchStore, adapters: AdapterStore, store: JobStore, engine: Engine
) -> None:
    batch_id = batches.create("t", asked(added(adapters, 7))).id
    batch = the(batches, batch_id)
    jobs = open_next(batches, store, batch, 6)
    end(store, jobs[0], "succeeded", 0.8, 0.2)
    end(store, jobs[1], "succeeded", 0.4, 0.6)
    end(store, jobs[2], "failed")
    end(store, jobs[3], "cancelled")
    assert store.claim(jobs[4], "w") is not None
    with engine.begin() as connection:
        connection.execute(delete(realignments).where(realignments.c.id == jobs[5]))
        for _ in range(2):  # a dead one is shown as failed
            connection.execute(
                update(realignments).where(realignments.c.id == jobs[4]).values(state="dead", error=None)
            )
    (waiting,) = [item for item in batches.take(batch, 9) if item.made is None]
    assert batches.refused(batch_id, waiting.adapter_id, Failure(code="base_mismatch", message="No.", fault="user"))
    assert not batches.opened(batch_id, waiting.adapter_id, "rlg_1")
    before = batches.get("t", batch_id).counts
    assert batches.settle() == 6
    counts = batches.get("t", batch_id).counts
    assert counts == before
    assert (counts.succeeded, counts.failed, counts.cancelled, counts.waiting, counts.total) == (2, 3, 2, 0, 7)
    tally = batches.tally(batch)
    assert (tally.left, tally.succeeded, tally.failed) == (0, 2, 3)
    assert tally.similarity == pytest.approx(0.6)
    assert tally.edit == pytest.approx(0.4)
    failed, _ = batches.adapters("t", batch_id, limit=10, status="failed")
    codes = {item.realignment_id: item.error and item.error.code for item in failed}
    assert codes == {jobs[2]: "lineage_mismatch", jobs[4]: None, None: "base_mismatch"}


def test_a_fault_of_ours_is_tried_again_later_and_not_for_ever(
    batches: BatchStore, adapters: AdapterStore, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = batches.create("t", asked(added(adapters, 2))).id
    batch = the(batches, batch_id)
    first, second = batches.take(batch, 2)
    fault = Failure(code="storage_fault", message="Away.", fault="system")
    monkeypatch.setattr(module, "MAX_TRIES", 3)
    for tries in range(1, 3):
        batches.faulted(batch_id, first.adapter_id, fault)
        assert [item.adapter_id for item in batches.take(batch, 1)] == [second.adapter_id]
        with engine.begin() as connection:
            c = batch_adapters.c
            mine = c.adapter_id == first.adapter_id
            row = connection.execute(select(c.tries, c.next_at - now()).where(mine)).one()
            assert row[0] == tries
            assert row[1] == pytest.approx(module.FAULT_PAUSE * 2 ** (tries - 1), abs=2)
            connection.execute(update(batch_adapters).where(mine).values(next_at=now() - 1))
        assert batches.take(batch, 1) == [first]
    batches.faulted(batch_id, first.adapter_id, fault)
    batches.faulted(batch_id, first.adapter_id, fault)
    (failed,) = batches.adapters("t", batch_id, limit=10, status="failed")[0]
    assert failed.error == fault


# Ended once


def endpoint(engine: Engine, events: list[str], tenant: str = "t", url: str = "https://x.test") -> str:
    name = f"whe_{len(events)}{tenant}{len(url)}"
    with engine.begin() as connection:
        connection.execute(
            insert(webhook_endpoints).values(
                id=name, tenant=tenant, url=url, events=events, secret="-", created_at=now()
            )
        )
    return name


def test_a_batch_ends_once_and_announces_it_once(
    batches: BatchStore, adapters: AdapterStore, store: JobStore, engine: Engine
) -> None:
    endpoint(engine, ["realignment_batch.stopped"])
    batch_id = batches.create("t", asked(added(adapters, 4))).id
    jobs = open_next(batches, store, the(batches, batch_id), 2)
    assert store.claim(jobs[0], "w") is not None
    barrier = threading.Barrier(6)

    def stop(_: int) -> bool:
        barrier.wait()
        return batches.end(batch_id, "stopped", "x" * 1000)

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(stop, range(6))) == [False] * 5 + [True]
    assert not batches.end(batch_id, "succeeded")
    batch = batches.get("t", batch_id)
    assert (batch.status, batch.reason, batch.finished_at is not None) == ("stopped", "x" * 300, True)
    assert (batch.counts.running, batch.counts.queued, batch.counts.cancelled) == (1, 1, 2)
    assert batches.active() == []
    with engine.begin() as connection:
        rows = connection.execute(select(webhook_deliveries)).all()
    assert [(row.type, row.payload["data"]) for row in rows] == [("realignment_batch.stopped", {"id": batch_id})]
    # Its open jobs are found until they were asked to stop.
    assert sorted(batches.abandoned()) == sorted(("t", job_id) for job_id in jobs)
    for job_id in jobs:
        store.cancel("t", job_id)
    assert batches.abandoned() == []
    assert store.cancelled(jobs[0], 1)
    assert batches.settle() == 2
    assert batches.get("t", batch_id).counts.cancelled == 4


def test_jobs_of_a_batch_that_succeeded_are_not_abandoned(
    batches: BatchStore, adapters: AdapterStore, store: JobStore
) -> None:
    batch_id = batches.create("t", asked(added(adapters, 1))).id
    open_next(batches, store, the(batches, batch_id), 1)
    assert batches.abandoned() == []


def test_an_endpoint_of_its_own_hears_of_the_end(batches: BatchStore, adapters: AdapterStore, engine: Engine) -> None:
    ids = added(adapters, 1)
    with pytest.raises(InvalidParameter) as refused:
        batches.create("t", asked(ids, webhook_url="https://x.test"))
    assert refused.value.param == "webhook_url"
    endpoint(engine, [], "other")
    with pytest.raises(InvalidParameter):
        batches.create("t", asked(ids, webhook_url="https://x.test"))
    name = endpoint(engine, [])
    batch = batches.create("t", asked(ids, webhook_url="https://x.test"))
    assert batches.end(batch.id, "cancelled")
    with engine.begin() as connection:
        (row,) = connection.execute(select(webhook_deliveries)).all()
    assert (row.endpoint_id, row.type) == (name, "realignment_batch.cancelled")


def test_ten_thousand_adapters_are_one_batch(batches: BatchStore, adapters: AdapterStore, engine: Engine) -> None:
    body = adapter().model_dump(mode="json")
    rows = [
        {"id": f"adp_{n:05}", "tenant": "t", "prefix": "p", "bytes": 1, "created_at": 1.0, "body": body}
        for n in range(10_000)
    ]
    with engine.begin() as connection:
        connection.execute(insert(adapter_rows), rows)
    batch = batches.create("t", asked([row["id"] for row in rows], canary={"share": 0.001}))  # type: ignore[misc]
    assert (batch.counts.total, batch.counts.waiting) == (10_000, 10_000)
    assert sum(item.canary for item in batches.adapters("t", batch.id, limit=100)[0]) == 10
    assert len(batches.take(the(batches, batch.id), 16)) == 10
    batches.go_on(batch.id)
    assert len(batches.take(the(batches, batch.id), 16)) == 16
