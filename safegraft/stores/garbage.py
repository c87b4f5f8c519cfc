"""What nobody needs any more: expired records with their bytes, bytes without a record, old messages, scratch.

Records go first and bytes afterwards, so that a collector that is killed leaves bytes without a record, which the next
one finds. Every row is deleted by a statement that names why, so that several collectors at once are harmless.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, or_, select
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from safegraft.contracts.keys import DEFAULT_TENANT
from safegraft.errors import NotFound, SafegraftError
from safegraft.stores import options
from safegraft.stores.database import (
    adapters,
    batch_adapters,
    batches,
    events,
    files,
    now,
    reading,
    realignments,
    tenants,
    upload_parts,
    uploads,
    webhook_deliveries,
)
from safegraft.stores.files import FileStore
from safegraft.stores.jobs import Erased, erase, made_adapters
from safegraft.stores.objects import Objects, job_prefix, result_prefix
from safegraft.stores.stitching import surplus
from safegraft.stores.uploads import PART, UploadStore, part_prefix

log = logging.getLogger("safegraft.garbage")
DAY = 86400.0
# Longer than anything may lie among the objects before its record is written.
ORPHAN_SECONDS = DAY
# So long a finished webhook message, and the record of an upload that came to nothing, can still be looked at.
HISTORY_SECONDS = 30 * DAY
PERIOD = 3600.0
TURN = "garbage_collected_at"


@dataclass
class Removed:
    count: int = 0
    bytes: int = 0


@dataclass
class Collected:
    """What was removed (or would be), by kind; and how many things could not be, which the log names."""

    kinds: dict[str, Removed] = field(default_factory=dict)
    failed: int = 0

    def add(self, kind: str, count: int = 1, size: int = 0) -> None:
        found = self.kinds.setdefault(kind, Removed())
        found.count += count
        found.bytes += size


class GarbageCollector:
    def __init__(self, engine: Engine, objects: Objects) -> None:
        self._engine = engine
        self._objects = objects

    def turn(self) -> Collected | None:
        """Collects where no gateway has done so for an hour; None where one has.

        Scratch is this machine's own, and swept in any case.
        """
        due = options.due(self._engine, TURN, 0.9 * PERIOD)
        collected = Collected()
        if due:
            collected = self.collect()
        else:
            self._scratch(collected, dry_run=False)
        for kind, removed in collected.kinds.items():
            log.info("removed %d %s, %d bytes", removed.count, kind, removed.bytes)
        if collected.failed:
            log.error("%d things could not be removed; see above", collected.failed)
        return collected if due else None

    def collect(self, *, dry_run: bool = False) -> Collected:
        """Removes all that is due; with `dry_run` nothing, and says what would be.

        Bytes are those of objects and scratch. What became an orphan by this very run is younger than a day. What
        cannot be removed is counted and logged, and does not keep the rest; only a database that fails does.
        """
        found = Collected()
        self._jobs(found, dry_run)
        self._adapters(found, dry_run)
        self._files(found, dry_run)
        self._uploads(found, dry_run)
        self._sent_past(found, dry_run)
        self._rows(found, dry_run)
        self._orphans(found, dry_run)
        self._scratch(found, dry_run)
        return found

    @contextmanager
    def _each(self, found: Collected, what: str) -> Iterator[None]:
        """Around what is done for one thing: its fault is not that of the others."""
        try:
            yield
        except SQLAlchemyError:
            raise  # nor would the others get any further
        except Exception:
            found.failed += 1
            log.exception("%s could not be collected", what)

    def _jobs(self, found: Collected, dry_run: bool) -> None:
        c = realignments.c
        ended = and_(c.expires_at < now(), c.state.notin_(("queued", "running")))
        for row in self._all(select(c.id).where(ended)):
            with self._each(found, row.id):
                with self._engine.begin() as connection:
                    job = connection.execute(
                        select(realignments).where(ended, c.id == row.id).with_for_update()
                    ).first()
                    if job is None:
                        continue
                    if dry_run:
                        made = adapters.c.id.in_(made_adapters(job.result))
                        kept = connection.execute(select(adapters.c.prefix).where(made)).scalars()
                        erased = Erased(job_prefix(job.tenant, job.id), frozenset(kept))
                    else:
                        erased = erase(connection, job)
                size, left = clear(self._objects, erased, dry_run=dry_run)
                found.failed += left
                found.add("realignments", size=size)

    def _adapters(self, found: Collected, dry_run: bool) -> None:
        c = adapters.c
        read = select(realignments.c.id).where(
            realignments.c.adapter_id == c.id, realignments.c.state.in_(("queued", "running"))
        )
        # A batch will still make a job for it.
        wanted = (
            select(batch_adapters.c.batch_id)
            .join(batches, batches.c.id == batch_adapters.c.batch_id)
            .where(
                batch_adapters.c.adapter_id == c.id,
                batch_adapters.c.state == "waiting",
                batches.c.state.in_(("canary", "running")),
            )
        )
        due = and_(c.expires_at < now(), ~read.exists(), ~wanted.exists())
        for row in self._all(select(c.id, c.prefix).where(due)):
            with self._each(found, row.prefix):
                size = weight(self._objects, row.prefix)
                if not dry_run:
                    with self._engine.begin() as connection:
                        if not connection.execute(delete(adapters).where(due, c.id == row.id)).rowcount:
                            continue  # a job reads it now
                    self._objects.remove(row.prefix)
                found.add("adapters", size=size)

    def _files(self, found: Collected, dry_run: bool) -> None:
        due = select(files.c.prefix).where(files.c.expires_at <= now())
        self._expired(
            found, "files", self._listed(due) if dry_run else _until_none(FileStore(self._engine).expire), dry_run
        )

    def _uploads(self, found: Collected, dry_run: bool) -> None:
        """Ended ones lose their parts when their time is over; their records stay for a while, to say so."""
        c = uploads.c
        due = select(c.prefix).where(c.expires_at <= now(), or_(c.state == "pending", c.prefix != ""))
        store = UploadStore(self._engine, seconds=0.0)
        for prefixes in self._listed(due) if dry_run else _until_none(store.expire):
            self._expired(found, "uploads", [prefixes], dry_run)
            if not dry_run:
                # Those too that could not be removed: no record names them any more, and so they are orphans.
                store.emptied(prefixes)
        old = and_(c.state != "pending", c.prefix == "", c.expires_at < now() - HISTORY_SECONDS)
        self._delete(found, "upload_records", uploads, old, dry_run)

    def _sent_past(self, found: Collected, dry_run: bool) -> None:
        """What was sent to addresses of the store and no quota counts: more than was announced, or after the end."""
        if self._objects.put_url("uploads", PART) is None:
            return
        c = uploads.c
        p = upload_parts.c
        open_parts = select(p.id, p.tenant, p.upload_id, p.bytes).join(uploads, c.id == p.upload_id)
        for row in self._all(open_parts.where(c.state == "pending")):
            prefix = part_prefix(row.tenant, row.upload_id, row.id)
            with self._each(found, prefix):
                if size := surplus(self._objects, prefix, row.bytes):
                    log.warning("%s: %d bytes were sent, %d announced", prefix, size, row.bytes)
                    self._remove(found, "oversized_parts", prefix, dry_run)
        ended = self._all(select(c.tenant, c.prefix).where(c.state != "pending", c.prefix != "", c.expires_at > now()))
        for tenant in sorted({row.tenant for row in ended}):
            root = f"tenants/{tenant}/uploads"
            with self._each(found, root):
                there = {prefix for prefix, _ in self._objects.prefixes(root)}
                for prefix in sorted(there & {row.prefix for row in ended}):
                    self._remove(found, "late_parts", prefix, dry_run)

    def _expired(self, found: Collected, kind: str, batches: Iterable[list[str]], dry_run: bool) -> None:
        for prefix in (prefix for prefixes in batches for prefix in prefixes):
            with self._each(found, prefix):
                self._remove(found, kind, prefix, dry_run)

    def _remove(self, found: Collected, kind: str, prefix: str, dry_run: bool) -> None:
        size = weight(self._objects, prefix)
        if not dry_run:
            self._objects.remove(prefix)
        found.add(kind, size=size)

    def _rows(self, found: Collected, dry_run: bool) -> None:
        d = webhook_deliveries.c
        old = and_(d.state != "pending", d.finished_at < now() - HISTORY_SECONDS)
        left = ~select(realignments.c.id).where(realignments.c.id == events.c.realignment_id).exists()
        self._delete(found, "webhook_deliveries", webhook_deliveries, old, dry_run)
        self._delete(found, "events", events, left, dry_run)

    def _delete(self, found: Collected, kind: str, table: Any, where: ColumnElement[bool], dry_run: bool) -> None:
        with self._engine.begin() as connection:
            if dry_run:
                count = connection.execute(select(func.count()).select_from(table).where(where)).scalar_one()
            else:
                count = connection.execute(delete(table).where(where)).rowcount
        if count:
            found.add(kind, count)

    def _orphans(self, found: Collected, dry_run: bool) -> None:
        """Bytes that no record names: what a process left that was killed between the one and the other."""
        # The objects first and the records afterwards: what is written in between has its record by then.
        before = time.time() - ORPHAN_SECONDS
        with reading(self._engine) as connection:
            names = {DEFAULT_TENANT, *connection.execute(select(tenants.c.id)).scalars()}
            for table in (adapters, realignments, files, uploads):
                names |= set(connection.execute(select(table.c.tenant).distinct()).scalars())
        kinds = ("adapters", "files", "uploads", "realignments")
        old: list[str] = []
        for root in (f"tenants/{name}/{kind}" for name in sorted(names) for kind in kinds):
            with self._each(found, root):
                old += [prefix for prefix, changed in self._objects.prefixes(root) if changed < before]
        with reading(self._engine) as connection:
            known, unmade = _named(connection)
        above = {prefix.rsplit("/", depth)[0] for prefix in known for depth in range(1, prefix.count("/"))}
        for prefix in old:
            with self._each(found, prefix):
                for orphan in list(self._below(prefix, known, above, before)):
                    self._orphan(found, orphan, dry_run)
        for prefix in unmade:
            with self._each(found, prefix):
                if self._objects.names(prefix):
                    self._orphan(found, prefix, dry_run)

    def _below(self, prefix: str, known: set[str], above: set[str], before: float) -> Iterator[str]:
        if prefix in known:
            return
        if prefix not in above:
            yield prefix
            return
        for inner, changed in list(self._objects.prefixes(prefix)):
            if changed < before:
                yield from self._below(inner, known, above, before)

    def _orphan(self, found: Collected, prefix: str, dry_run: bool) -> None:
        with self._each(found, prefix):
            if not dry_run:
                log.warning("%s belongs to no record", prefix)
            self._remove(found, "orphans", prefix, dry_run)

    def _scratch(self, found: Collected, dry_run: bool) -> None:
        with self._each(found, str(self._objects.scratch)):
            for size in self._objects.sweep(dry_run=dry_run):
                found.add("scratch", size=size)

    def _all(self, query: Any) -> list[Any]:
        with reading(self._engine) as connection:
            return list(connection.execute(query).all())

    def _listed(self, query: Any) -> Iterator[list[str]]:
        yield [row.prefix for row in self._all(query)]


def _until_none(expire: Callable[[], list[str]]) -> Iterator[list[str]]:
    """What a store expires, some at a time; each of them is to be dealt with before the next are asked for."""
    while prefixes := expire():
        yield prefixes


def clear(objects: Objects, erased: Erased, *, dry_run: bool = False) -> tuple[int, int]:
    """Removes the bytes of a deleted job, but for the adapters that stay.

    Returns how many bytes there were, and how many prefixes could not be removed: those are orphans from now on.
    """
    removed = left = 0
    above = {prefix.rsplit("/", depth)[0] for prefix in erased.kept for depth in range(1, prefix.count("/"))}

    def enter(prefix: str) -> None:
        nonlocal removed, left
        if prefix in erased.kept:
            return
        try:
            if prefix in above:
                for inner, _ in list(objects.prefixes(prefix)):
                    enter(inner)
                return
            size = weight(objects, prefix)
            if not dry_run:
                objects.remove(prefix)
            removed += size
        except (SafegraftError, OSError):
            left += 1
            log.exception("the bytes of %s could not be removed", prefix)

    enter(erased.prefix)
    return removed, left


def weight(objects: Objects, prefix: str) -> int:
    """The bytes below a prefix."""
    own = 0
    for name in objects.names(prefix):
        with suppress(NotFound):  # removed while we look
            own += objects.size(prefix, name)
    return own + sum(weight(objects, inner) for inner, _ in list(objects.prefixes(prefix)))


def _named(connection: Connection) -> tuple[set[str], list[str]]:
    """The prefixes that records name; and those of adapters that a job made and that were deleted since.

    All that lies below a job's result is its own, however it is called, except for deleted adapters.
    """
    known: set[str] = set()
    for table in (adapters, files, uploads):
        known |= set(connection.execute(select(table.c.prefix)).scalars())
    unmade = []
    c = realignments.c
    rows = connection.execute(
        select(c.id, c.tenant, c.result, c.result_attempt, c.state, c.attempt).where(
            or_(c.result_attempt.is_not(None), c.state.in_(("queued", "running")))
        )
    ).all()
    # After the jobs: on Postgres a job may end between the two questions, and its adapters must then be known.
    made = set(connection.execute(select(adapters.c.id)).scalars())
    for row in rows:
        if row.result_attempt is None:
            known.add(result_prefix(row.tenant, row.id, row.attempt))  # being written
            continue
        result = result_prefix(row.tenant, row.id, row.result_attempt)
        known.add(result)
        unmade += [f"{result}/adapter/{name}" for name in made_adapters(row.result) if name not in made]
    return known, unmade
