"""Which workers there are: each reports itself every few seconds, and learns whether it should take no new jobs."""

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Engine

from safegraft.errors import NotFound
from safegraft.stores.database import now, reading, workers

# A worker that was killed stays in the list for so long: somebody should see that it is missing.
FORGET_SECONDS = 3600.0

State = Literal["live", "draining", "silent"]


@dataclass(frozen=True)
class Worker:
    """A worker as operators see it. seen_seconds: since it last reported itself; `silent`: for longer than a lease."""

    name: str
    device: str
    version: str
    state: State
    started_at: float
    seen_seconds: float


class WorkerStore:
    def __init__(self, engine: Engine, *, lease_seconds: float) -> None:
        self._engine = engine
        self._lease = lease_seconds

    def beat(self, name: str, device: str, version: str, *, started: bool = False) -> bool:
        """Notes that the worker lives (and, with `started`, that it has just started); True while it is to drain.

        A drain outlives a worker that was killed, so that its successor of the same name does not end it.
        """
        insert = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        row = {"name": name, "device": device, "version": version, "started_at": now(), "seen_at": now()}
        changed = {"device": device, "version": version, "seen_at": now()} | ({"started_at": now()} if started else {})
        with self._engine.begin() as connection:
            draining = connection.execute(
                insert(workers)
                .values(**row, draining=0)
                .on_conflict_do_update(index_elements=["name"], set_=changed)
                .returning(workers.c.draining)
            ).scalar_one()
            if started:
                connection.execute(delete(workers).where(workers.c.seen_at < now() - FORGET_SECONDS))
        return bool(draining)

    def leave(self, name: str) -> None:
        """Forgets a worker that stops by itself, and with it that it was draining."""
        with self._engine.begin() as connection:
            connection.execute(delete(workers).where(workers.c.name == name))

    def all(self) -> list[Worker]:
        """By name."""
        with reading(self._engine) as connection:
            rows = connection.execute(
                select(workers, (now() - workers.c.seen_at).label("silence"))
                .where(workers.c.seen_at >= now() - FORGET_SECONDS)
                .order_by(workers.c.name)
            ).all()
        return [
            Worker(
                name=row.name,
                device=row.device,
                version=row.version,
                state="silent" if row.silence > self._lease else "draining" if row.draining else "live",
                started_at=row.started_at,
                seen_seconds=max(0.0, row.silence),
            )
            for row in rows
        ]

    def any_alive(self) -> bool:
        """Was any worker seen within a lease, draining or not?"""
        with reading(self._engine) as connection:
            query = select(func.count()).select_from(workers).where(workers.c.seen_at > now() - self._lease)
            return bool(connection.execute(query).scalar_one())

    def drain(self, name: str | None = None, *, undo: bool = False) -> list[str]:
        """Tells a worker (None: all) to take no new jobs, or to take them again. Returns the names.

        Raises NotFound (`worker_not_found`).
        """
        statement = update(workers).values(draining=0 if undo else 1).returning(workers.c.name)
        if name is not None:
            statement = statement.where(workers.c.name == name)
        with self._engine.begin() as connection:
            names = sorted(connection.execute(statement).scalars())
        if name is not None and not names:
            raise NotFound(
                f"There is no worker {name[:200]!r}.",
                code="worker_not_found",
                param="worker",
                hint="safegraft admin workers lists them.",
            )
        return names
