"""The job record, which is the truth. The queue only wakes workers up; it may lose or double a message.

    queued ──claim──▶ running ──▶ succeeded
       ▲                 ├──────▶ failed      the customer's input is at fault
       │                 ├──────▶ cancelled
       └──release, reap──┤
                         └──────▶ dead        attempts used up; shown as failed, with error.class = system

Every transition is one UPDATE that names the state and the attempt it leaves. The attempt number fences: a worker that
was silent too long finds no row for its attempt, and whatever it still writes is never published.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy import ColumnElement, and_, bindparam, delete, exists, func, insert, or_, select, update
from sqlalchemy.engine import Connection, Engine, Row
from sqlalchemy.exc import IntegrityError

from safegraft import failpoints
from safegraft.contracts.adapter import Adapter
from safegraft.contracts.realignment import (
    Event,
    Failure,
    Progress,
    Realignment,
    RealignmentCreate,
    Result,
    ResultEvaluation,
    Status,
    StrengthResult,
)
from safegraft.contracts.report import Summary
from safegraft.errors import Conflict, LostLease, NotFound, QuotaExceeded, SafegraftError
from safegraft.ids import new_id
from safegraft.stores import outbox, totals
from safegraft.stores.adapters import expiring, find_adapter, insert_adapter, remove_adapter
from safegraft.stores.database import adapters, events, now, reading, realignments, workers
from safegraft.stores.objects import job_prefix

# A queued job is announced again after this long, doubled each time up to a limit: a lost message costs seconds.
FIRST_REPEAT, LAST_REPEAT = 10.0, 40.0
# After a fault of ours (a full disk, say) the next attempt waits this long, doubled for the one after.
FAULT_PAUSE = 5.0
WAITING = {"stage": "waiting", "done": 0, "total": 0}
# OpenAI's client sends a POST again without a key of idempotency; what it sends within this time is the same job.
RETRY_WINDOW = 1800.0
# The largest number that the events' sequence can hold; Postgres refuses to compare with a larger one.
LAST_EVENT = 2**31 - 1
# How a job's time is shared among its stages, roughly: what an estimate of its end needs.
STAGES = {"fetch": 0.05, "compare": 0.3, "score": 0.15, "patch": 0.4, "publish": 0.1}
# Methods that repair every module whatever it measures: they have no stage of scores.
TAKES_ALL = ("gram", "antidote")
Api = Literal["realignments", "fine_tuning"]
# The event of an operator's requeue.
REVIVED = "revived"
# The event of an attempt that a planned stop ended: it does not count.
HANDED_BACK = "handed_back"
# What every poll asks: made once, since making it takes longer than SQLite needs to answer.
ONE = select(realignments).where(realignments.c.id == bindparam("wanted"), realignments.c.tenant == bindparam("whose"))


@dataclass(frozen=True)
class Claim:
    """A job as its worker sees it. `attempt` is the fencing token of everything the worker writes."""

    id: str
    tenant: str
    attempt: int
    adapter_id: str
    reference_id: str
    request: RealignmentCreate
    traceparent: str | None = None


@dataclass(frozen=True)
class Erased:
    """What a deleted job leaves among the objects: all below `prefix` is nobody's, but for what is below `kept`."""

    prefix: str
    kept: frozenset[str]


@dataclass(frozen=True)
class Created:
    job: Realignment
    replayed: bool


@dataclass(frozen=True)
class Origins:
    """Where a job comes from, beside its request.

    training_file: the upload that its adapter was made from. request_hash: of what the client sent, where that was not
    the request itself: repeats are told by it.
    """

    api: Api = "realignments"
    batch_id: str | None = None
    webhook_endpoint_id: str | None = None
    traceparent: str | None = None
    training_file: str | None = None
    request_hash: str | None = None


@dataclass(frozen=True)
class Filters:
    """What a list of jobs is narrowed to; None does not narrow. metadata: all of these values; without_metadata: only
    jobs that have none."""

    status: Status | None = None
    adapter_id: str | None = None
    reference_id: str | None = None
    batch_id: str | None = None
    api: Api | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    without_metadata: bool = False


class JobStore:
    """Jobs and their events. Raises NotFound for ids that are not the tenant's."""

    def __init__(self, engine: Engine, *, lease_seconds: float, max_attempts: int, retention: float = 0.0) -> None:
        """retention: seconds after its end for which a job, and the adapters it made, are kept; 0: for ever."""
        self._engine = engine
        self._retention = retention
        self._lease = lease_seconds
        self._max_attempts = max_attempts

    # What the gateway asks

    def create(
        self,
        tenant: str,
        reference_id: str,
        request: RealignmentCreate,
        idempotency_key: str | None = None,
        *,
        origins: Origins = Origins(),
        retried: bool = False,
        max_open: int = 0,
        of_stored: bool = False,
    ) -> Created:
        """Adds a queued job, due at once. The same key with the same request returns the first job.

        retried: the client says that it sent this before, without a key: a job that the same request made within
        RETRY_WINDOW seconds is returned instead. max_open: how many jobs the tenant may have queued or running.
        of_stored: looks once more, in the transaction that makes the job, whether the adapter is there; nobody deletes
        it meanwhile.

        Raises NotFound (`adapter_not_found`), Conflict (`idempotency_key_reused`) for the same key with another
        request, QuotaExceeded (`too_many_jobs`).
        """
        job_id = new_id("rlg")
        sent = origins.request_hash or hash_of(request)
        row = {
            "id": job_id,
            "tenant": tenant,
            "state": "queued",
            "attempt": 0,
            "next_at": now(),
            "adapter_id": request.adapter_id,
            "reference_id": reference_id,
            "request": request.model_dump(mode="json"),
            "api": origins.api,
            "batch_id": origins.batch_id,
            "webhook_endpoint_id": origins.webhook_endpoint_id,
            "traceparent": origins.traceparent,
            "training_file": origins.training_file,
            "idempotency_key": idempotency_key,
            "request_hash": sent,
            "progress": WAITING,
            "created_at": now(),
        }
        try:
            with self._engine.begin() as connection:
                if retried or max_open:
                    _one_at_a_time(connection, tenant)
                # With a key it is the key that tells: another key's job is another order, however alike.
                alike = _sent_before(connection, tenant, sent, origins.api) if retried and not idempotency_key else None
                if alike is not None:
                    return Created(_shown(_find(connection, tenant, alike)), replayed=True)
                if max_open and _open(connection, tenant) >= max_open:
                    raise QuotaExceeded(
                        f"{max_open} jobs are queued or running already.",
                        code="too_many_jobs",
                        hint="Wait until some have ended.",
                    )
                if of_stored:
                    find_adapter(connection, tenant, request.adapter_id, lock=True)
                connection.execute(insert(realignments).values(**row))
                _note(connection, job_id, "created", "Queued.")
                failpoints.hit("gateway.creating")
            failpoints.hit("gateway.created")
        except IntegrityError:
            first = self.replay(tenant, sent, idempotency_key) if idempotency_key is not None else None
            if first is None:
                raise
            return Created(first, replayed=True)
        return Created(self.get(tenant, job_id), replayed=False)

    def replay(self, tenant: str, request_hash: str, idempotency_key: str) -> Realignment | None:
        """The job that this key made before, None where it is new. request_hash: `hash_of` what was sent now.

        Raises Conflict like `create`.
        """
        with reading(self._engine) as connection:
            found = connection.execute(
                select(realignments).where(
                    realignments.c.tenant == tenant, realignments.c.idempotency_key == idempotency_key
                )
            ).one_or_none()
        if found is None:
            return None
        if found.request_hash != request_hash:
            raise Conflict(
                "This Idempotency-Key was used with another request.",
                code="idempotency_key_reused",
                param="Idempotency-Key",
                hint="Use a new key for a new request.",
            )
        return _shown(found)

    def sent_before(self, tenant: str, request_hash: str, api: Api) -> Realignment | None:
        """The job that the same request made within RETRY_WINDOW seconds."""
        with reading(self._engine) as connection:
            found = _sent_before(connection, tenant, request_hash, api)
            return _shown(_find(connection, tenant, found)) if found else None

    def get(self, tenant: str, job_id: str) -> Realignment:
        with reading(self._engine) as connection:
            return _shown(_find(connection, tenant, job_id))

    def result_attempt(self, tenant: str, job_id: str) -> int | None:
        """The attempt whose files are the result; None until the job has succeeded."""
        with reading(self._engine) as connection:
            found: int | None = _find(connection, tenant, job_id).result_attempt
            return found

    def page(
        self,
        tenant: str,
        *,
        limit: int,
        after: str | None = None,
        filters: Filters = Filters(),
    ) -> tuple[list[Realignment], bool]:
        """Newest first; and whether there are more."""
        query = select(realignments).where(
            realignments.c.tenant == tenant, *_narrowed(filters, self._engine.dialect.name)
        )
        if after is not None:
            query = query.where(realignments.c.id < after)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(realignments.c.id.desc()).limit(limit + 1)).all()
        return [_shown(row) for row in rows[:limit]], len(rows) > limit

    def cancel(self, tenant: str, job_id: str) -> Realignment:
        """Ends a queued job at once; asks the worker of a running one to stop. Ended jobs stay as they are."""
        with self._engine.begin() as connection:
            row = _find(connection, tenant, job_id, lock=True)
            if row.state == "queued":
                _end(connection, realignments.c.state == "queued", job_id, "cancelled", expires_at=self._expiry())
                _note(connection, job_id, "cancelled", "Cancelled before it started.")
            elif row.state == "running" and not row.cancel_requested:
                connection.execute(update(realignments).where(realignments.c.id == job_id).values(cancel_requested=1))
                _note(connection, job_id, "cancelling", "Cancellation was asked for.")
            return _shown(_find(connection, tenant, job_id))

    def evaluate(self, tenant: str, job_id: str, evaluation: ResultEvaluation | None) -> Realignment:
        """Keeps what was measured of a result, in place of what was before; None removes it.

        Raises Conflict (`no_report`) where the job has no result.
        """
        with self._engine.begin() as connection:
            row = _find(connection, tenant, job_id, lock=True)
            if row.state != "succeeded":
                raise no_report(job_id, row.state)
            result = {key: value for key, value in row.result.items() if key != "evaluation"}
            if evaluation is not None:
                result["evaluation"] = evaluation.model_dump(mode="json")
            connection.execute(update(realignments).where(realignments.c.id == job_id).values(result=result))
            return _shown(_find(connection, tenant, job_id))

    def events(self, tenant: str, job_id: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """The job's events with a sequence number above `after`, oldest first."""
        with reading(self._engine) as connection:
            _find(connection, tenant, job_id)
            rows = connection.execute(
                select(events)
                .where(events.c.realignment_id == job_id, events.c.sequence > min(after, LAST_EVENT))
                .order_by(events.c.sequence)
                .limit(limit)
            ).all()
        return [_event(row) for row in rows]

    def latest_events(self, tenant: str, job_id: str, *, before: int | None, limit: int) -> list[Event]:
        """The job's events with a sequence number below `before`, newest first."""
        query = select(events).where(events.c.realignment_id == job_id)
        if before is not None:
            query = query.where(events.c.sequence < min(before, LAST_EVENT))
        with reading(self._engine) as connection:
            _find(connection, tenant, job_id)
            rows = connection.execute(query.order_by(events.c.sequence.desc()).limit(limit)).all()
        return [_event(row) for row in rows]

    # What the dispatcher asks

    def due(self, limit: int) -> list[str]:
        """Queued jobs whose announcement is due, oldest first; the next one is put off before they are returned.

        A gateway that dies with these ids in hand therefore only delays them. Whose turn it is, is decided when a
        worker has time (`claim_next`): who came first with a thousand jobs fills the broker with messages, and no more.
        """
        c = realignments.c
        is_due = and_(c.state == "queued", c.next_at <= now())
        with reading(self._engine) as connection:
            chosen = list(
                connection.execute(select(c.id).where(is_due).order_by(c.next_at, c.id).limit(limit)).scalars()
            )
        if not chosen:
            return []
        with self._engine.begin() as connection:
            rows = connection.execute(
                select(c.id, c.announced)
                .where(c.id.in_(chosen), is_due)
                .with_for_update(skip_locked=True)  # Postgres: two gateways share the work instead of doubling it
            ).all()
            for row in rows:
                pause = min(LAST_REPEAT, FIRST_REPEAT * 2 ** min(row.announced, 8))
                connection.execute(
                    update(realignments)
                    .where(realignments.c.id == row.id, realignments.c.state == "queued")
                    .values(next_at=now() + pause, announced=row.announced + 1)
                )
        return sorted((row.id for row in rows), key=chosen.index)

    def unannounce(self, job_ids: list[str]) -> None:
        """Makes jobs due again whose announcement could not be sent: their pauses are for messages that got lost."""
        with self._engine.begin() as connection:
            connection.execute(
                update(realignments)
                .where(realignments.c.id.in_(job_ids), realignments.c.state == "queued", realignments.c.announced > 0)
                .values(next_at=now(), announced=realignments.c.announced - 1)
            )

    def waiting(self) -> int:
        """How many announced jobs no worker has claimed yet."""
        with reading(self._engine) as connection:
            query = select(func.count()).where(
                realignments.c.state == "queued", realignments.c.next_at > now(), realignments.c.announced > 0
            )
            return int(connection.execute(query).scalar_one())

    def reap(self) -> list[str]:
        """Takes jobs back whose lease ran out. Returns their ids."""
        with self._engine.begin() as connection:
            rows = connection.execute(
                select(realignments.c.id, realignments.c.attempt)
                .where(realignments.c.state == "running", realignments.c.lease_until < now())
                # Postgres: a heartbeat that is being written right now wins.
                .with_for_update(skip_locked=True)
            ).all()
            return [
                row.id for row in rows if self._give_back(connection, row.id, row.attempt, "Its worker fell silent.")
            ]

    # What the worker asks

    def claim_next(self, worker: str, ticket: str) -> Claim | None:
        """Makes the queued job this worker's whose turn it is; None where there is none, or the worker is draining.

        A message says that there is work, and not which: tenants take turns by how many of their jobs run, then by who
        has been served longest ago. ticket: the job that the message named. Where another one is claimed, it is due to
        be announced again at once.
        """
        c = realignments.c
        # Not those that a fault of ours has put off: these were never announced since.
        ready = and_(c.state == "queued", or_(c.next_at <= now(), c.announced > 0))
        first = (
            select(c.tenant, func.min(c.id).label("id")).where(ready, ~_draining(worker)).group_by(c.tenant).subquery()
        )
        busy = select(c.tenant, func.count().label("number")).where(c.state == "running").group_by(c.tenant).subquery()
        other = realignments.alias()
        served = select(func.max(other.c.attempt_started_at)).where(other.c.tenant == first.c.tenant).scalar_subquery()
        turn = (
            select(first.c.id)
            .outerjoin(busy, busy.c.tenant == first.c.tenant)
            .order_by(func.coalesce(busy.c.number, 0), func.coalesce(served, 0.0), first.c.id)
            .limit(1)
        )
        claimed = None
        # Where another worker was faster, it took one job: there are fewer each time.
        while claimed is None:
            with reading(self._engine) as connection:
                job_id = connection.execute(turn).scalar_one_or_none()
            if job_id is None:
                break
            claimed = self.claim(job_id, worker, ticket=ticket)
        if claimed is None or claimed.id != ticket:
            self.unannounce([ticket])
        return claimed

    def claim(self, job_id: str, worker: str, *, ticket: str | None = None) -> Claim | None:
        """Makes a queued job this worker's; None where it is not queued (any more), or the worker is draining."""
        with self._engine.begin() as connection:
            row = connection.execute(
                update(realignments)
                .where(realignments.c.id == job_id, realignments.c.state == "queued", ~_draining(worker))
                .values(
                    state="running",
                    attempt=realignments.c.attempt + 1,
                    lease_until=now() + self._lease,
                    worker=worker,
                    ticket=ticket or job_id,
                    next_at=None,
                    started_at=func.coalesce(realignments.c.started_at, now()),
                    attempt_started_at=now(),
                )
                .returning(realignments)
            ).one_or_none()
            if row is None:
                return None
            _note(connection, job_id, "started", f"Attempt {row.attempt} started.", {"attempt": row.attempt})
        return Claim(
            id=row.id,
            tenant=row.tenant,
            attempt=row.attempt,
            adapter_id=row.adapter_id,
            reference_id=row.reference_id,
            request=RealignmentCreate.model_validate(row.request),
            traceparent=row.traceparent,
        )

    def heartbeat(self, job_id: str, attempt: int, progress: Progress) -> bool:
        """Renews the lease; True where a cancellation was asked for. Raises LostLease."""
        with self._engine.begin() as connection:
            row = connection.execute(
                update(realignments)
                .where(_mine(job_id, attempt))
                .values(lease_until=now() + self._lease, progress=progress.model_dump())
                .returning(realignments.c.cancel_requested)
            ).one_or_none()
        if row is None:
            raise LostLease(f"{job_id}: attempt {attempt} is no longer the running one.")
        return bool(row.cancel_requested)

    def note(self, job_id: str, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        """Adds an event."""
        with self._engine.begin() as connection:
            _note(connection, job_id, kind, message, data)

    def succeed(
        self,
        job_id: str,
        attempt: int,
        published: Sequence[tuple[Adapter, str, str]] = (),
        *,
        strengths: Sequence[float] = (),
        side_cars: Sequence[str] = (),
        own_bytes: int = 0,
        summaries: Sequence[Summary] = (),
        modules: int = 0,
        method: str = "",
        timings: Mapping[str, float] | None = None,
    ) -> bool:
        """Publishes the result of this attempt: the job's end and the new adapters' rows, in one transaction.

        published: (adapter, tenant, prefix of its files), one a strength where there are several; side_cars: names of
        files beside them; own_bytes: of these and of the report, which count as the tenant's until the job is deleted;
        summaries: the report's, one a strength, or one; modules: how many were treated; method: the
        one that ran; timings: seconds by stage, for the totals. False where the attempt no longer owns the job.
        """
        made = [adapter.id for adapter, _, _ in published]
        found: list[Any] = [summary.model_dump() for summary in summaries]
        result = {
            "adapter_id": made[0] if made else None,
            "method": method or None,
            "summary": found[0] if found else None,
            "variants": [
                {"strength": strength, "adapter_id": adapter_id, "summary": summary}
                for strength, adapter_id, summary in zip(strengths, made, found or [None] * len(made), strict=False)
            ],
            "side_cars": list(side_cars),
        }
        done = Progress(stage="done", done=modules, total=modules).model_dump()
        values = {"result": result, "result_attempt": attempt, "result_bytes": own_bytes, "progress": done}
        with self._engine.begin() as connection:
            if not _end(connection, _mine(job_id, attempt), job_id, "succeeded", expires_at=self._expiry(), **values):
                return False
            for adapter, tenant, prefix in published:
                insert_adapter(connection, expiring(adapter, self._retention), tenant, prefix)
            totals.add(
                connection, "bytes_published", value=own_bytes + sum(adapter.bytes for adapter, _, _ in published)
            )
            # In one order in all transactions: Postgres locks the rows.
            for stage, seconds in sorted((timings or {}).items()):
                if stage != "total":
                    totals.add(connection, "stage_count", stage, method)
                    totals.add(connection, "stage_seconds", stage, method, seconds)
            _note(connection, job_id, "succeeded", "The result is ready.", {"adapter_id": result["adapter_id"]})
        return True

    def fail(self, job_id: str, attempt: int, error: SafegraftError) -> bool:
        """Ends the job because of its input. False where the attempt no longer owns it."""
        failure = Failure(code=error.code, message=str(error), fault=error.fault).model_dump(mode="json")
        with self._engine.begin() as connection:
            where = _mine(job_id, attempt)
            ended = _end(connection, where, job_id, "failed", error=failure, expires_at=self._expiry())
            if ended:
                _note(connection, job_id, "failed", str(error)[:1000], {"code": error.code})
        return ended

    def cancelled(self, job_id: str, attempt: int) -> bool:
        """Ends the job because its cancellation was asked for."""
        with self._engine.begin() as connection:
            ended = _end(connection, _mine(job_id, attempt), job_id, "cancelled", expires_at=self._expiry())
            if ended:
                _note(connection, job_id, "cancelled", "Cancelled while it ran.")
        return ended

    def release(self, job_id: str, attempt: int, reason: str, code: str = "worker_lost") -> bool:
        """Gives a job back that this attempt could not finish through no fault of the input."""
        with self._engine.begin() as connection:
            pause = FAULT_PAUSE * 2 ** min(attempt - 1, 6)
            return self._give_back(connection, job_id, attempt, reason, code, pause)

    def release_from(self, ticket: str, worker: str, reason: str) -> list[str]:
        """Gives back what `worker` claimed for the message that named `ticket`; the jobs' ids.

        For a parent that only knows that its child, which got the message, is dead.
        """
        c = realignments.c
        with self._engine.begin() as connection:
            rows = connection.execute(
                select(c.id, c.attempt).where(c.ticket == ticket, c.state == "running", c.worker == worker)
            ).all()
            return [row.id for row in rows if self._give_back(connection, row.id, row.attempt, reason)]

    def release_all(self, worker: str, reason: str) -> list[str]:
        """Gives back every job that `worker` holds: for a worker that has just started and so can hold none."""
        with self._engine.begin() as connection:
            rows = connection.execute(
                select(realignments.c.id, realignments.c.attempt).where(
                    realignments.c.state == "running", realignments.c.worker == worker
                )
            ).all()
            return [row.id for row in rows if self._give_back(connection, row.id, row.attempt, reason)]

    def hand_back(self, worker: str, reason: str) -> list[str]:
        """Like `release_all`, by a worker that is told to stop: the attempts are not held against the jobs."""
        with self._engine.begin() as connection:
            rows = connection.execute(
                select(realignments.c.id, realignments.c.attempt).where(
                    realignments.c.state == "running", realignments.c.worker == worker
                )
            ).all()
            return [
                row.id for row in rows if self._give_back(connection, row.id, row.attempt, reason, kind=HANDED_BACK)
            ]

    # What operators and owners ask about ended jobs

    def requeue(self, job_id: str) -> int:
        """Queues a dead job of any tenant once more, with as many attempts as a new one. Returns those made before.

        The attempts' numbers go on: they are what keeps a late worker of an earlier one from publishing.

        Raises NotFound, and Conflict (`not_dead`).
        """
        c = realignments.c
        with self._engine.begin() as connection:
            row = connection.execute(select(realignments).where(c.id == job_id).with_for_update()).one_or_none()
            if row is None:
                raise _missing(job_id)
            if row.state != "dead":
                raise Conflict(
                    f"{job_id} is {row.state}.",
                    code="not_dead",
                    param="realignment_id",
                    hint="Only jobs that our own failures ended are queued again: safegraft admin jobs --dead.",
                )
            fresh = {"state": "queued", "progress": WAITING, "announced": 0, "cancel_requested": 0, "worker": None}
            ended = {"error": None, "finished_at": None, "expires_at": None}
            connection.execute(
                update(realignments)
                .where(c.id == job_id)
                .values(**fresh, **ended, next_at=now(), attempt_started_at=now())
            )
            _note(connection, job_id, REVIVED, "An operator queued it again.", {"attempt": row.attempt})
            return int(row.attempt)

    def delete(self, tenant: str, job_id: str, *, with_adapters: bool = False) -> Erased:
        """Removes an ended job and its events, and with `with_adapters` the adapters that it made.

        The files are the caller's to remove, afterwards.

        Raises Conflict (`realignment_not_ended`, `adapter_in_use`).
        """
        with self._engine.begin() as connection:
            row = _find(connection, tenant, job_id, lock=True)
            if row.state in ("queued", "running"):
                cancelling = bool(row.cancel_requested)
                raise Conflict(
                    f"{job_id} is {'being cancelled' if cancelling else row.state}.",
                    code="realignment_not_ended",
                    param="realignment_id",
                    hint="Try again when it has ended." if cancelling else "Cancel it first.",
                )
            return erase(connection, row, with_adapters=with_adapters)

    def _expiry(self) -> Any:
        return now() + self._retention if self._retention else None

    def _give_back(
        self,
        connection: Connection,
        job_id: str,
        attempt: int,
        reason: str,
        code: str = "worker_lost",
        pause: float = 0.0,
        kind: str = "requeued",
    ) -> bool:
        row = connection.execute(select(realignments).where(_mine(job_id, attempt)).with_for_update()).one_or_none()
        if row is None:
            return False
        if row.cancel_requested:
            _end(connection, _mine(job_id, attempt), job_id, "cancelled", expires_at=self._expiry())
            _note(connection, job_id, "cancelled", f"{reason} It had been cancelled.")
        elif (
            kind != HANDED_BACK
            and attempt >= self._max_attempts
            and attempt - _forgiven(connection, job_id) >= self._max_attempts
        ):
            failure = Failure(code=code, message=f"{reason} {attempt} attempts were made.", fault="system")
            found = failure.model_dump(mode="json")
            _end(connection, _mine(job_id, attempt), job_id, "dead", error=found, expires_at=self._expiry())
            _note(connection, job_id, "failed", failure.message, {"code": code})
        else:
            connection.execute(
                update(realignments)
                .where(_mine(job_id, attempt))
                .values(state="queued", lease_until=None, next_at=now() + pause, announced=0, progress=WAITING)
            )
            _note(connection, job_id, kind, f"{reason} It is tried again.", {"attempt": attempt})
        return True


def hash_of(request: BaseModel) -> str:
    """What tells one request from another: SHA-256 of what was sent, with defaults filled in."""
    return hashlib.sha256(json.dumps(request.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _mine(job_id: str, attempt: int) -> ColumnElement[bool]:
    c = realignments.c
    return and_(c.id == job_id, c.state == "running", c.attempt == attempt)


def _find(connection: Connection, tenant: str, job_id: str, *, lock: bool = False) -> Row[Any]:
    # What is decided on a locked row still holds when it is written (SQLite has one writer anyway).
    query = ONE.with_for_update() if lock else ONE
    row = connection.execute(query, {"wanted": job_id, "whose": tenant}).one_or_none()
    if row is None:
        raise _missing(job_id)
    return row


def no_report(job_id: str, status: str) -> Conflict:
    return Conflict(f"{job_id} has no report: it is {status}.", code="no_report", param="realignment_id")


def _missing(job_id: str) -> NotFound:
    return NotFound(f"There is no realignment {job_id[:80]!r}.", code="realignment_not_found", param="realignment_id")


def _draining(worker: str) -> ColumnElement[bool]:
    return select(workers.c.name).where(workers.c.name == worker, workers.c.draining == 1).exists()


def _forgiven(connection: Connection, job_id: str) -> int:
    """How many attempts do not count: those before an operator queued the job again, and since then those that a
    worker's planned stop ended."""
    rows = connection.execute(
        select(events.c.type, events.c.data)
        .where(events.c.realignment_id == job_id, events.c.type.in_((REVIVED, HANDED_BACK)))
        .order_by(events.c.sequence)
    ).all()
    forgiven = 0
    for row in rows:
        forgiven = int(row.data["attempt"]) if row.type == REVIVED else forgiven + 1
    return forgiven


def made_adapters(result: Mapping[str, Any] | None) -> list[str]:
    """Ids of the adapters that a job made, whether or not they are still there."""
    result = result or {}
    found = [item["adapter_id"] for item in result.get("variants", [])] or [result.get("adapter_id")]
    return [adapter_id for adapter_id in found if adapter_id]


def erase(connection: Connection, row: Row[Any], *, with_adapters: bool = False) -> Erased:
    """Deletes an ended job's records within a transaction of the caller's."""
    made = and_(adapters.c.tenant == row.tenant, adapters.c.id.in_(made_adapters(row.result)))
    if with_adapters:
        for adapter_id in connection.execute(select(adapters.c.id).where(made)).scalars().all():
            remove_adapter(connection, row.tenant, adapter_id)
    connection.execute(delete(events).where(events.c.realignment_id == row.id))
    connection.execute(delete(realignments).where(realignments.c.id == row.id))
    kept = connection.execute(select(adapters.c.prefix).where(made)).scalars()
    return Erased(job_prefix(row.tenant, row.id), frozenset(kept))


def _end(connection: Connection, where: ColumnElement[bool], job_id: str, state: str, **values: Any) -> bool:
    statement = (
        update(realignments)
        .where(where, realignments.c.id == job_id)
        .values(state=state, lease_until=None, next_at=None, finished_at=now(), **values)
        .returning(realignments)
    )
    row = connection.execute(statement).one_or_none()
    if row is None:
        return False
    shown = "failed" if state == "dead" else state
    kind = "fine_tuning.job" if row.api == "fine_tuning" else "realignment"
    outbox.announce(connection, row.tenant, f"{kind}.{shown}", job_id, row.webhook_endpoint_id)
    # By the method that was asked for: which one `auto` chose stands in the report.
    totals.add(connection, "jobs", shown, row.request["method"]["type"])
    if row.error:
        totals.add(connection, "failures", row.error["code"], row.error["class"])
    return True


def _note(connection: Connection, job_id: str, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
    connection.execute(
        insert(events).values(
            realignment_id=job_id, created_at=now(), type=kind, message=message[:1000], data=data or {}
        )
    )


def _event(row: Row[Any]) -> Event:
    return Event(
        id=str(row.sequence), type=row.type, message=row.message, data=row.data, created_at=int(row.created_at)
    )


def _shown(row: Row[Any]) -> Realignment:
    request = RealignmentCreate.model_validate(row.request)
    status = {"dead": "failed"}.get(row.state, row.state)
    if row.state == "running" and row.cancel_requested:
        status = "cancelling"
    result = None
    if row.state == "succeeded":
        own = f"/v1/realignments/{row.id}"
        result = Result(
            adapter_id=row.result["adapter_id"],
            method=row.result.get("method"),
            summary=row.result.get("summary"),
            variants=[StrengthResult.model_validate(item) for item in row.result.get("variants", [])],
            side_car_urls=[f"{own}/side_car/{name}" for name in row.result.get("side_cars", [])],
            report_url=f"{own}/report",
            evaluation=row.result.get("evaluation"),
        )
    return Realignment.model_validate(
        {
            "id": row.id,
            "status": status,
            "progress": Progress.model_validate(row.progress),
            "attempt": row.attempt,
            "mode": request.mode,
            "method": request.method,
            "strengths": request.strengths,
            "output_rank": request.output_rank,
            "reference_id": row.reference_id,
            "adapter_id": row.adapter_id,
            "training_file": row.training_file,
            "batch_id": row.batch_id,
            "metadata": request.metadata,
            "result": result,
            "error": Failure.model_validate(row.error) if row.error else None,
            "created_at": int(row.created_at),
            "started_at": int(row.started_at) if row.started_at is not None else None,
            "finished_at": int(row.finished_at) if row.finished_at is not None else None,
            "estimated_finish": _estimate(row) if row.state == "running" else None,
            "expires_at": int(row.expires_at) if row.expires_at is not None else None,
        }
    )


def _estimate(row: Row[Any]) -> int | None:
    """When a running job will have ended, if it goes on as fast as it went; None while nothing can be said."""
    progress = Progress.model_validate(row.progress)
    if row.attempt_started_at is None or progress.stage not in STAGES:
        return None
    stages = list(STAGES)
    if row.request["mode"] == "patch" and row.request["method"]["type"] in TAKES_ALL and progress.stage != "score":
        stages.remove("score")
    before = sum(STAGES[stage] for stage in stages[: stages.index(progress.stage)])
    within = progress.done / progress.total if progress.total else 0.0
    share = (before + STAGES[progress.stage] * within) / sum(STAGES[stage] for stage in stages)
    elapsed = time.time() - row.attempt_started_at
    if share < 0.1 or elapsed <= 0:
        return None
    return int(row.attempt_started_at + elapsed / share) + 1


def _narrowed(filters: Filters, dialect: str) -> list[ColumnElement[bool]]:
    c = realignments.c
    found: list[ColumnElement[bool]] = []
    match filters.status:
        case None:
            pass
        case "failed":
            found.append(c.state.in_(("failed", "dead")))
        case "running":
            found.append(and_(c.state == "running", c.cancel_requested == 0))
        case "cancelling":
            found.append(and_(c.state == "running", c.cancel_requested == 1))
        case state:
            found.append(c.state == state)
    for column, value in (
        (c.adapter_id, filters.adapter_id),
        (c.reference_id, filters.reference_id),
        (c.batch_id, filters.batch_id),
        (c.api, filters.api),
    ):
        if value is not None:
            found.append(column == value)
    found += [has_metadata(dialect, c.request, key, value) for key, value in filters.metadata.items()]
    if filters.without_metadata:
        found.append(c.request["metadata"].as_string() == "{}")
    return found


def has_metadata(dialect: str, request: ColumnElement[Any], key: str, value: str) -> ColumnElement[bool]:
    """Does the request in this column have that metadata?"""
    # The key as a value of its own, never within a path: there quotes, commas, braces and dots have a meaning.
    if dialect == "postgresql":
        found: ColumnElement[str] = request.op("->")("metadata").op("->>")(bindparam(None, key))
        return found == value
    pairs = func.json_each(request, "$.metadata").table_valued("key", "value")
    return exists(select(pairs.c.key).where(pairs.c.key == key, pairs.c.value == value))


def _one_at_a_time(connection: Connection, tenant: str) -> None:
    """Until the transaction ends no other one of this tenant passes here (SQLite has one writer anyway)."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(tenant))))


def _sent_before(connection: Connection, tenant: str, request_hash: str, api: Api) -> str | None:
    c = realignments.c
    found: str | None = connection.execute(
        select(c.id)
        .where(
            c.tenant == tenant,
            c.api == api,
            c.request_hash == request_hash,
            c.idempotency_key.is_(None),
            c.created_at > now() - RETRY_WINDOW,
        )
        .order_by(c.id.desc())
        .limit(1)
    ).scalar_one_or_none()
    return found


def _open(connection: Connection, tenant: str) -> int:
    query = select(func.count()).where(realignments.c.tenant == tenant, realignments.c.state.in_(("queued", "running")))
    return int(connection.execute(query).scalar_one())
