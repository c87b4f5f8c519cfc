"""What the whole installation is doing: for metrics and for the operator's commands. Not narrowed to a tenant."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.engine import Engine

from safegraft.stores.database import batches, now, reading, realignments


@dataclass(frozen=True)
class Queue:
    """Jobs by state, and for how many seconds the oldest queued one has been waiting (0 where none is)."""

    queued: int
    running: int
    oldest_seconds: float


@dataclass(frozen=True)
class Job:
    """One line of the operator's list. error: the code of what ended it."""

    id: str
    tenant: str
    state: str
    attempt: int
    method: str
    adapter_id: str
    reference_id: str
    worker: str | None
    error: str | None
    created_at: float
    finished_at: float | None


def queue(engine: Engine) -> Queue:
    c = realignments.c
    # A job that was given back waits since its last attempt began.
    since = func.coalesce(c.attempt_started_at, c.created_at)
    query = (
        select(c.state, func.count().label("jobs"), (now() - func.min(since)).label("oldest"))
        .where(c.state.in_(("queued", "running")))
        .group_by(c.state)
    )
    with reading(engine) as connection:
        rows = {row.state: row for row in connection.execute(query)}
    return Queue(
        queued=rows["queued"].jobs if "queued" in rows else 0,
        running=rows["running"].jobs if "running" in rows else 0,
        oldest_seconds=max(0.0, rows["queued"].oldest) if "queued" in rows else 0.0,
    )


def jobs(engine: Engine, states: Sequence[str], *, limit: int = 100) -> list[Job]:
    """Jobs of all tenants in one of the states, newest first."""
    query = select(realignments).where(realignments.c.state.in_(states)).order_by(realignments.c.id.desc()).limit(limit)
    with reading(engine) as connection:
        rows = connection.execute(query).all()
    return [
        Job(
            id=row.id,
            tenant=row.tenant,
            state=row.state,
            attempt=row.attempt,
            method=row.request["method"]["type"],
            adapter_id=row.adapter_id,
            reference_id=row.reference_id,
            worker=row.worker,
            error=row.error["code"] if row.error else None,
            created_at=row.created_at,
            finished_at=row.finished_at,
        )
        for row in rows
    ]


def reading_reference(engine: Engine, reference_id: str) -> str | None:
    """A queued or running job, or a batch under way, that uses this reference, if there is one."""
    c = realignments.c
    query = select(c.id).where(c.reference_id == reference_id, c.state.in_(("queued", "running"))).limit(1)
    with reading(engine) as connection:
        found: str | None = connection.execute(query).scalar_one_or_none()
        if found is None:
            under_way = select(batches.c.id, batches.c.request).where(batches.c.state.in_(("canary", "running")))
            rows = connection.execute(under_way)
            found = next((row.id for row in rows if row.request.get("reference_id") == reference_id), None)
    return found
