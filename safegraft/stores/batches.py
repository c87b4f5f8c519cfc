"""Batches of realignments, and what became of each of their adapters.

    waiting ──a job was made──▶ open ──▶ succeeded | failed | cancelled      an adapter of a batch
       └──────refused, stopped, cancelled──────▶ failed | cancelled

    canary ──▶ running ──▶ succeeded | stopped | cancelled                   the batch

Every transition is one UPDATE that names the state it leaves, so that several gateways may advance one batch.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, case, exists, func, insert, literal, or_, select, update
from sqlalchemy.engine import Connection, Engine, Row
from sqlalchemy.exc import IntegrityError

from safegraft.contracts.batch import (
    MAX_ADAPTERS,
    BatchAdapter,
    BatchCounts,
    BatchCreate,
    BatchPlan,
    BatchSelect,
    BatchStatus,
    MemberStatus,
    RealignmentBatch,
)
from safegraft.contracts.realignment import Failure
from safegraft.errors import Conflict, InvalidParameter, NotFound, QuotaExceeded, TooLarge
from safegraft.ids import new_id
from safegraft.stores import outbox
from safegraft.stores.database import (
    adapters,
    batch_adapters,
    batches,
    now,
    reading,
    realignments,
)
from safegraft.stores.jobs import has_metadata, hash_of
from safegraft.stores.webhooks import registered

# Of one tenant. Each is looked after every second.
MAX_OPEN = 20

# How many parameters one statement may have: SQLite's limit is 32,766, an old one's 999.
CHUNK = 500
# A storage that is away for a while must not fail a batch: the tries at making a job spread over some 20 minutes.
MAX_TRIES, FAULT_PAUSE = 9, 5.0


@dataclass(frozen=True)
class Active:
    """A batch that goes on."""

    id: str
    tenant: str
    state: BatchStatus
    plan: BatchPlan


@dataclass(frozen=True)
class Waiting:
    """An adapter whose job is to be made. made: the job, where a process made it and died before it said so."""

    adapter_id: str
    key: str
    made: str | None


@dataclass(frozen=True)
class Tally:
    """What a stop rule is judged on. left: adapters that have not ended; means are None where nothing succeeded."""

    left: int
    succeeded: int
    failed: int
    similarity: float | None
    edit: float | None


class BatchStore:
    """Raises NotFound for ids that are not the tenant's."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # What the routes ask

    def create(self, tenant: str, request: BatchCreate, idempotency_key: str | None = None) -> RealignmentBatch:
        """Adds a batch with all of its adapters; the same key with the same request returns the first one.

        Raises NotFound for an adapter that is not there, InvalidParameter (`nothing_selected`), TooLarge
        (`too_many_adapters`), Conflict (`idempotency_key_reused`).
        """
        sent = hash_of(request)
        try:
            with self._engine.begin() as connection:
                first = _replayed(connection, tenant, sent, idempotency_key)
                return first or self._add(connection, tenant, request, idempotency_key, sent)
        except IntegrityError:  # on Postgres two of them may pass the look at once
            with self._engine.begin() as connection:
                first = _replayed(connection, tenant, sent, idempotency_key)
            if first is None:
                raise
            return first

    def _add(
        self, connection: Connection, tenant: str, request: BatchCreate, idempotency_key: str | None, sent: str
    ) -> RealignmentBatch:
        open_ = select(func.count()).where(batches.c.tenant == tenant, batches.c.state.in_(("canary", "running")))
        if connection.execute(open_).scalar_one() >= MAX_OPEN:
            raise QuotaExceeded(
                f"{MAX_OPEN} batches are under way already.", code="too_many_batches", hint="Wait until one has ended."
            )
        chosen = _chosen(connection, tenant, request)
        batch_id = new_id("rbt")
        # By chance, and the same whenever it is asked: the order of ids is that of age, and old adapters are no sample.
        random.Random(batch_id).shuffle(chosen)
        first = ceil(request.canary.share * len(chosen)) if request.canary else 0
        endpoint = registered(connection, tenant, request.webhook_url) if request.webhook_url else None
        connection.execute(
            insert(batches).values(
                id=batch_id,
                tenant=tenant,
                state="canary" if first else "running",
                request=request.model_dump(mode="json", exclude={"adapter_ids"}),
                webhook_endpoint_id=endpoint,
                idempotency_key=idempotency_key,
                request_hash=sent,
                created_at=now(),
            )
        )
        rows = [
            {
                "batch_id": batch_id,
                "adapter_id": adapter_id,
                "position": position,
                "canary": int(position < first),
                "state": "waiting",
                "tries": 0,
            }
            for position, adapter_id in enumerate(chosen)
        ]
        connection.execute(insert(batch_adapters), rows)
        return _one(connection, tenant, batch_id)

    def replay(self, tenant: str, request: BatchCreate, idempotency_key: str) -> RealignmentBatch | None:
        """The batch that this key made before, None where it is new. Raises Conflict like `create`."""
        with reading(self._engine) as connection:
            return _replayed(connection, tenant, hash_of(request), idempotency_key)

    def get(self, tenant: str, batch_id: str) -> RealignmentBatch:
        with reading(self._engine) as connection:
            return _one(connection, tenant, batch_id)

    def page(self, tenant: str, *, limit: int, after: str | None = None) -> tuple[list[RealignmentBatch], bool]:
        """Newest first; and whether there are more."""
        query = select(batches).where(batches.c.tenant == tenant)
        if after is not None:
            query = query.where(batches.c.id < after)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(batches.c.id.desc()).limit(limit + 1)).all()
            return _shown(connection, rows[:limit]), len(rows) > limit

    def adapters(
        self, tenant: str, batch_id: str, *, limit: int, after: str | None = None, status: MemberStatus | None = None
    ) -> tuple[list[BatchAdapter], bool]:
        """The batch's adapters in the order in which they come; and whether there are more."""
        c = batch_adapters.c
        shown = _member_status()
        query = _with_jobs(
            select(c.adapter_id, shown.label("status"), c.canary, c.realignment_id, c.error, realignments.c.error)
        ).where(c.batch_id == batch_id)
        if status is not None:
            query = query.where(shown == status)
        if after is not None:
            last = select(c.position).where(c.batch_id == batch_id, c.adapter_id == after).scalar_subquery()
            query = query.where(batch_adapters.c.position > last)
        with reading(self._engine) as connection:
            _find(connection, tenant, batch_id)
            rows = connection.execute(query.order_by(c.position).limit(limit + 1)).all()
        found = [
            BatchAdapter(
                id=adapter_id,
                status=state,
                canary=bool(canary),
                realignment_id=job_id,
                error=Failure.model_validate(own or of_job) if own or of_job else None,
            )
            for adapter_id, state, canary, job_id, own, of_job in rows[:limit]
        ]
        return found, len(rows) > limit

    # What the loop asks

    def active(self) -> list[Active]:
        """The batches that go on, oldest first."""
        query = select(batches).where(batches.c.state.in_(("canary", "running"))).order_by(batches.c.id)
        with reading(self._engine) as connection:
            rows = connection.execute(query).all()
        return [Active(row.id, row.tenant, row.state, BatchPlan.model_validate(row.request)) for row in rows]

    def take(self, batch: Active, room: int) -> list[Waiting]:
        """Adapters whose jobs are next, so that at most `room` of the batch are open. Changes nothing.

        In one statement: another gateway that opens some in between must not make room look larger than it is.
        """
        c = batch_adapters.c
        due = or_(c.next_at.is_(None), c.next_at <= now())
        wanted = [c.batch_id == batch.id, or_(c.state == "open", and_(c.state == "waiting", due))]
        if batch.state == "canary":
            wanted.append(c.canary == 1)
        key = literal(f"batch:{batch.id}:").concat(c.adapter_id)
        made = and_(realignments.c.tenant == batch.tenant, realignments.c.idempotency_key == key)
        query = (
            select(c.state, c.adapter_id, key, realignments.c.id)
            .select_from(batch_adapters.outerjoin(realignments, made))
            .where(*wanted)
            .order_by(c.state, c.position)  # "open" before "waiting"
            .limit(room)
        )
        with reading(self._engine) as connection:
            rows = connection.execute(query).all()
        return [Waiting(adapter_id, key, job_id) for state, adapter_id, key, job_id in rows if state == "waiting"]

    def opened(self, batch_id: str, adapter_id: str, job_id: str) -> bool:
        """The adapter's job was made. False where the adapter no longer waits."""
        return self._leave_waiting(batch_id, adapter_id, state="open", realignment_id=job_id)

    def refused(self, batch_id: str, adapter_id: str, failure: Failure) -> bool:
        """No job can be made for the adapter."""
        return self._leave_waiting(batch_id, adapter_id, state="failed", error=failure.model_dump(mode="json"))

    def faulted(self, batch_id: str, adapter_id: str, failure: Failure) -> None:
        """Making the job failed on our side: it is tried again later; after MAX_TRIES times the adapter has failed."""
        c = batch_adapters.c
        mine = and_(c.batch_id == batch_id, c.adapter_id == adapter_id, c.state == "waiting")
        with self._engine.begin() as connection:
            tries = connection.execute(select(c.tries).where(mine).with_for_update()).scalar_one_or_none()
            if tries is None:
                return
            values: dict[str, Any] = {"tries": tries + 1, "next_at": now() + FAULT_PAUSE * 2**tries}
            if tries + 1 >= MAX_TRIES:
                values |= {"state": "failed", "error": failure.model_dump(mode="json")}
            connection.execute(update(batch_adapters).where(mine).values(**values))

    def _leave_waiting(self, batch_id: str, adapter_id: str, **values: Any) -> bool:
        c = batch_adapters.c
        with self._engine.begin() as connection:
            changed = connection.execute(
                update(batch_adapters)
                .where(c.batch_id == batch_id, c.adapter_id == adapter_id, c.state == "waiting")
                .values(**values)
            )
            return changed.rowcount == 1

    def settle(self, limit: int = 1000) -> int:
        """Notes what became of adapters whose jobs have ended; returns how many. A job that was deleted meanwhile
        counts as cancelled: nothing tells how it ended."""
        c, jobs = batch_adapters.c, realignments.c
        ended = or_(jobs.id.is_(None), jobs.state.in_(("succeeded", "failed", "cancelled", "dead")))
        query = _with_jobs(select(c.batch_id, c.adapter_id, _member_status(), jobs.error, jobs.result)).where(
            c.state == "open", ended
        )
        with reading(self._engine) as connection:
            rows = connection.execute(query.limit(limit)).all()
        if not rows:
            return 0
        # In one order, so that two gateways that settle the same rows do not wait for each other.
        with self._engine.begin() as connection:
            for batch_id, adapter_id, state, error, result in sorted(rows, key=lambda row: row[:2]):
                summary = (result or {}).get("summary") or {}
                connection.execute(
                    update(batch_adapters)
                    .where(c.batch_id == batch_id, c.adapter_id == adapter_id, c.state == "open")
                    .values(
                        state=state,
                        error=error,
                        similarity=summary["similarity"]["median"] if summary else None,
                        edit=summary["edit"] if summary else None,
                    )
                )
        return len(rows)

    def tally(self, batch: Active) -> Tally:
        """Of the canary, while that is what runs, else of the whole batch."""
        c = batch_adapters.c

        def count(*states: str) -> Any:
            return func.coalesce(func.sum(case((c.state.in_(states), 1), else_=0)), 0)

        query = select(
            count("waiting", "open"), count("succeeded"), count("failed"), func.avg(c.similarity), func.avg(c.edit)
        ).where(c.batch_id == batch.id)
        if batch.state == "canary":
            query = query.where(c.canary == 1)
        with reading(self._engine) as connection:
            return Tally(*connection.execute(query).one())

    def go_on(self, batch_id: str) -> None:
        """The canary was well."""
        with self._engine.begin() as connection:
            connection.execute(
                update(batches).where(batches.c.id == batch_id, batches.c.state == "canary").values(state="running")
            )

    def end(self, batch_id: str, state: BatchStatus, reason: str | None = None) -> bool:
        """Ends a batch that goes on, and announces it; what waits is cancelled. False where it had ended.

        Its open jobs are the caller's to cancel: see `abandoned`.
        """
        with self._engine.begin() as connection:
            row = connection.execute(
                update(batches)
                .where(batches.c.id == batch_id, batches.c.state.in_(("canary", "running")))
                .values(state=state, reason=reason and reason[:300], finished_at=now())
                .returning(batches.c.tenant, batches.c.webhook_endpoint_id)
            ).one_or_none()
            if row is None:
                return False
            c = batch_adapters.c
            connection.execute(
                update(batch_adapters).where(c.batch_id == batch_id, c.state == "waiting").values(state="cancelled")
            )
            outbox.announce(connection, row.tenant, f"realignment_batch.{state}", batch_id, row.webhook_endpoint_id)
        return True

    def abandoned(self, limit: int = 1000) -> list[tuple[str, str]]:
        """(tenant, job) of jobs that go on although their batch was stopped or cancelled."""
        c = realignments.c
        query = (
            select(c.tenant, c.id)
            .join(batches, batches.c.id == c.batch_id)
            .where(
                c.state.in_(("queued", "running")),
                c.cancel_requested == 0,
                batches.c.state.in_(("stopped", "cancelled")),
                # Not one that had ended with the batch and that an operator has queued again.
                ~exists().where(
                    batch_adapters.c.realignment_id == c.id,
                    batch_adapters.c.state.in_(("succeeded", "failed", "cancelled")),
                ),
            )
            .limit(limit)
        )
        with reading(self._engine) as connection:
            return [(row.tenant, row.id) for row in connection.execute(query)]


def _find(connection: Connection, tenant: str, batch_id: str) -> Row[Any]:
    query = select(batches).where(batches.c.id == batch_id, batches.c.tenant == tenant)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound(f"There is no batch {batch_id[:80]!r}.", code="batch_not_found", param="batch_id")
    return row


def _replayed(connection: Connection, tenant: str, sent: str, idempotency_key: str | None) -> RealignmentBatch | None:
    if idempotency_key is None:
        return None
    row = connection.execute(
        select(batches).where(batches.c.tenant == tenant, batches.c.idempotency_key == idempotency_key)
    ).one_or_none()
    if row is None:
        return None
    if row.request_hash != sent:
        raise Conflict(
            "This Idempotency-Key was used with another request.",
            code="idempotency_key_reused",
            param="Idempotency-Key",
            hint="Use a new key for a new request.",
        )
    return _shown(connection, [row])[0]


def _chosen(connection: Connection, tenant: str, request: BatchCreate) -> list[str]:
    """The ids of the batch's adapters, in any order."""
    if request.select is not None:
        return _selected(connection, tenant, request.reference_id, request.select)
    wanted = sorted(request.adapter_ids or [])
    known: set[str] = set()
    for at in range(0, len(wanted), CHUNK):
        query = select(adapters.c.id).where(adapters.c.tenant == tenant, adapters.c.id.in_(wanted[at : at + CHUNK]))
        known.update(connection.execute(query).scalars())
    for adapter_id in wanted:
        if adapter_id not in known:
            raise NotFound(f"There is no adapter {adapter_id[:80]!r}.", code="adapter_not_found", param="adapter_ids")
    return wanted


def _selected(connection: Connection, tenant: str, reference_id: str, wanted: BatchSelect) -> list[str]:
    c = realignments.c
    patched = and_(c.tenant == tenant, c.state == "succeeded", c.request["mode"].as_string() == "patch")
    last = select(func.max(c.id).label("id")).where(patched).group_by(c.adapter_id).subquery()  # ids sort by age
    query = (
        select(adapters.c.id)
        .join(realignments, c.adapter_id == adapters.c.id)
        .join(last, last.c.id == c.id)
        .where(
            adapters.c.tenant == tenant,
            adapters.c.body[("origin", "realignment_id")].as_string().is_(None),
            c.reference_id != reference_id,
        )
    )
    if wanted.previous_reference_id is not None:
        query = query.where(c.reference_id == wanted.previous_reference_id)
    if wanted.metadata:
        any_ = realignments.alias()
        dialect = connection.dialect.name
        values = [has_metadata(dialect, any_.c.request, key, value) for key, value in wanted.metadata.items()]
        query = query.where(
            exists().where(any_.c.adapter_id == adapters.c.id, any_.c.tenant == tenant, any_.c.state == "succeeded")
            .where(*values)
        )  # fmt: skip
    found = list(connection.execute(query.order_by(adapters.c.id).limit(MAX_ADAPTERS + 1)).scalars())
    if not found:
        raise InvalidParameter(
            "No adapter is selected.",
            code="nothing_selected",
            param="select",
            hint="Those are selected whose last succeeded patch used another reference; name others as adapter_ids.",
        )
    if len(found) > MAX_ADAPTERS:
        raise TooLarge(
            f"More than {MAX_ADAPTERS} adapters are selected.",
            code="too_many_adapters",
            param="select",
            hint="Narrow it by previous_reference_id or metadata.",
        )
    return found


def _with_jobs(query: Select[Any]) -> Select[Any]:
    """Adapters of batches with their jobs beside them, where there are any."""
    return query.select_from(
        batch_adapters.outerjoin(realignments, realignments.c.id == batch_adapters.c.realignment_id)
    )


def _member_status() -> ColumnElement[str]:
    """How an adapter is shown: as its job, while that is what it waits for."""
    of_job = case(
        (realignments.c.state.is_(None), "cancelled"),
        (realignments.c.state == "dead", "failed"),
        else_=realignments.c.state,
    )
    return case((batch_adapters.c.state == "open", of_job), else_=batch_adapters.c.state)


def _one(connection: Connection, tenant: str, batch_id: str) -> RealignmentBatch:
    return _shown(connection, [_find(connection, tenant, batch_id)])[0]


def _shown(connection: Connection, rows: Sequence[Row[Any]]) -> list[RealignmentBatch]:
    counts: dict[str, Counter[str]] = {row.id: Counter() for row in rows}
    status = _member_status().label("status")
    mine = batch_adapters.c.batch_id.in_(list(counts))
    members = _with_jobs(select(batch_adapters.c.batch_id, status)).where(mine).subquery().c
    query = select(members.batch_id, members.status, func.count()).group_by(members.batch_id, members.status)
    for batch_id, name, count in connection.execute(query):
        counts[batch_id][name] = count
    found = []
    for row in rows:
        plan = BatchPlan.model_validate(row.request)
        own = counts[row.id]
        found.append(
            RealignmentBatch(
                id=row.id,
                status=row.state,
                counts=BatchCounts(total=sum(own.values()), **own),
                reason=row.reason,
                reference_id=plan.reference_id,
                select=plan.select,
                method=plan.method,
                mode=plan.mode,
                output_rank=plan.output_rank,
                canary=plan.canary,
                stop_rule=plan.stop_rule,
                metadata=plan.metadata,
                created_at=int(row.created_at),
                finished_at=int(row.finished_at) if row.finished_at is not None else None,
            )
        )
    return found
