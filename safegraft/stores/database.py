"""The tables, and an engine for them. SQLite for one machine, Postgres for several.

All times are the database's own clock (`now()` below), so that no two machines ever disagree about a lease.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    event,
)
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

metadata = MetaData()
CREATING = 0x5AFE62AF7  # any number that no other program locks

adapters = Table(
    "adapters",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("prefix", String(200), nullable=False),  # where its files lie in the object store
    Column("created_at", Float, nullable=False),
    Column("body", JSON, nullable=False),  # contracts.adapter.Adapter
    Index("adapters_by_tenant", "tenant", "id"),
)

realignments = Table(
    "realignments",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("state", String(16), nullable=False),  # queued running succeeded failed cancelled dead
    Column("attempt", Integer, nullable=False, default=0),
    Column("lease_until", Float),
    Column("worker", String(200)),  # who holds the lease, so that its parent can give the job back at once
    Column("next_at", Float),  # when a queued job is (again) announced to the workers
    Column("announced", Integer, nullable=False, default=0),
    Column("cancel_requested", Integer, nullable=False, default=0),
    Column("adapter_id", String(64), nullable=False),
    Column("reference_id", String(64), nullable=False),
    Column("request", JSON, nullable=False),  # method, mode, metadata
    Column("idempotency_key", String(255)),
    Column("request_hash", String(64)),
    Column("progress", JSON),
    Column("result", JSON),
    Column("result_attempt", Integer),
    Column("error", JSON),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    UniqueConstraint("tenant", "idempotency_key", name="one_job_per_idempotency_key"),
    Index("realignments_by_tenant", "tenant", "id"),
    Index("realignments_due", "state", "next_at"),
)

events = Table(
    "events",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("realignment_id", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("type", String(40), nullable=False),
    Column("message", String(1000), nullable=False),
    Column("data", JSON, nullable=False),
    Index("events_by_realignment", "realignment_id", "sequence"),
)


class now(FunctionElement[float]):
    """Seconds since 1970 by the database's clock."""

    type = Float()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    # Not unixepoch('subsec'): the SQLite that ships with older Debians lacks it.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgres(element: Any, compiler: Any, **kw: Any) -> str:
    return "extract(epoch from clock_timestamp())"


def open_database(url: str) -> Engine:
    """An engine whose tables exist. Opened after a fork or spawn, never shared across one."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False})
        event.listen(engine, "connect", _prepare_sqlite)
        # Python's own transaction handling starts transactions late, as readers; two of them then deadlock on writing.
        event.listen(engine, "begin", _begin_sqlite)
    else:
        engine = create_engine(url, pool_pre_ping=True)
    first = _first_opening(parsed.database if parsed.get_backend_name() == "sqlite" else None)
    with first, engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # Gateway and workers start together, and "create if it is not there" is no single step on Postgres.
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({CREATING})")
        metadata.create_all(connection)
    return engine


@contextmanager
def _first_opening(path: str | None) -> Iterator[None]:
    """One process at a time: turning a new file to WAL fails at once, whatever the timeout, while another one does."""
    if not path or path == ":memory:":
        yield
        return
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads: on SQLite it neither takes the write lock nor waits for it."""
    with engine.connect().execution_options(reading=True) as connection, connection.begin():
        yield connection


def _begin_sqlite(connection: Connection) -> None:
    only_reads = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
