"""The tables, and an engine for them. SQLite for one machine, Postgres for several.

All times are the database's own clock (`now()` below), so that no two machines ever disagree about a lease.

What is changed here needs a revision in `migrations/versions`: see CONTRIBUTING.md, "How to change the schema".
"""

import fcntl
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    JSON,
    BigInteger,
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
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from safegraft.stores import migrations

log = logging.getLogger("safegraft.database")
Upgrade = Literal["auto", "always", "never"]
metadata = MetaData()
CREATING = 0x5AFE62AF7  # any number that no other program locks
SQLITE_CONNECTIONS = 40
DISK_FULL = "53100"  # among Postgres's codes

adapters = Table(
    "adapters",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("prefix", String(200), nullable=False),  # where its files lie in the object store
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("body", JSON, nullable=False),  # contracts.adapter.Adapter
    Index("adapters_by_tenant", "tenant", "id"),
    Index("adapters_expiring", "expires_at"),
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
    Column("ticket", String(64)),  # the job that the message named which its worker got; not always this one
    Column("next_at", Float),  # when a queued job is (again) announced to the workers
    Column("announced", Integer, nullable=False, default=0),
    Column("cancel_requested", Integer, nullable=False, default=0),
    Column("adapter_id", String(64), nullable=False),
    Column("reference_id", String(64), nullable=False),
    Column("request", JSON, nullable=False),  # contracts.realignment.RealignmentCreate
    Column("api", String(20), nullable=False, default="realignments"),  # or fine_tuning: the route that made it
    Column("batch_id", String(64)),
    Column("webhook_endpoint_id", String(64)),  # hears of this job's end, whatever it subscribes to
    Column("traceparent", String(64)),  # W3C trace context of the request that made it
    Column("training_file", String(80)),  # the upload that its adapter was made from, if one was named
    Column("idempotency_key", String(255)),
    Column("request_hash", String(64)),
    Column("progress", JSON),
    Column("result", JSON),
    Column("result_attempt", Integer),
    Column("result_bytes", BigInteger, nullable=False, default=0),  # of report and side-cars; adapters have their own
    Column("error", JSON),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("attempt_started_at", Float),
    Column("finished_at", Float),
    Column("expires_at", Float),
    UniqueConstraint("tenant", "idempotency_key", name="one_job_per_idempotency_key"),
    Index("realignments_by_tenant", "tenant", "id"),
    Index("realignments_due", "state", "next_at"),
    Index("realignments_by_batch", "batch_id"),
    Index("realignments_by_turn", "tenant", "attempt_started_at"),
    # Asked with every new job: how many are open, and was this sent before. By the tenant alone it would read them all.
    Index("realignments_by_state", "tenant", "state", "id"),
    Index("realignments_by_request", "tenant", "request_hash", "idempotency_key", "id"),
    Index("realignments_expiring", "expires_at"),
    Index("realignments_by_bytes", "tenant", "result_bytes"),  # summed with every upload, without reading the rows
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

# A tenant's own limits; what is null is the installation's default.
tenants = Table(
    "tenants",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("created_at", Float, nullable=False),
    Column("max_bytes", BigInteger),
    Column("max_jobs", Integer),
    Column("max_requests_per_second", Integer),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(40), nullable=False),
    Column("name", String(100), nullable=False),
    Column("hint", String(20), nullable=False),  # the key's first characters, to tell keys apart
    Column("mac", String(64), nullable=False, unique=True),  # HMAC-SHA-256 of the key; the key itself is nowhere
    Column("scopes", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Column("last_used_at", Float),
    Index("api_keys_by_tenant", "tenant", "id"),
)

# A resumable upload: its parts are objects of their own until `complete` names their order.
uploads = Table(
    "uploads",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(40), nullable=False),
    Column("state", String(16), nullable=False),  # pending completed cancelled expired
    Column("prefix", String(200), nullable=False),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(40), nullable=False),
    Column("mime_type", String(200), nullable=False),
    Column("bytes", BigInteger, nullable=False),  # as announced
    Column("request", JSON, nullable=False),
    Column("file_id", String(64)),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Index("uploads_by_tenant", "tenant", "id"),
    Index("uploads_expiring", "expires_at"),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("upload_id", String(64), nullable=False),
    Column("tenant", String(40), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64)),  # null: sent past the gateway, to a presigned address
    Column("created_at", Float, nullable=False),
    Index("upload_parts_by_upload", "upload_id", "id"),
    Index("upload_parts_by_tenant", "tenant"),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(40), nullable=False),
    Column("prefix", String(200), nullable=False),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(40), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Index("files_by_tenant", "tenant", "id"),
    Index("files_expiring", "expires_at"),
)

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(40), nullable=False),
    Column("url", String(2000), nullable=False),
    Column("name", String(100), nullable=False, default=""),
    Column("events", JSON, nullable=False),  # types that it hears of
    Column("secret", String(500), nullable=False),  # sealed
    Column("previous_secret", String(500)),  # sealed; signs as well until previous_until
    Column("previous_until", Float),
    Column("created_at", Float, nullable=False),
    Column("disabled_at", Float),
    Column("disabled_reason", String(200)),
    Column("failing_since", Float),  # the first failure since something was delivered
    Index("webhook_endpoints_by_tenant", "tenant", "id"),
)

# The outbox: written in the transaction that ends a job, sent later, again and again.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", String(64), primary_key=True),  # the message's id, the same in every attempt
    Column("tenant", String(40), nullable=False),
    Column("endpoint_id", String(64), nullable=False),
    Column("type", String(60), nullable=False),
    Column("payload", JSON, nullable=False),
    Column("state", String(16), nullable=False),  # pending delivered failed
    Column("attempts", Integer, nullable=False, default=0),  # only grows: the fencing token of who sends
    Column("step", Integer, nullable=False, default=0),  # failures since the first try or the last replay
    Column("next_at", Float),
    Column("lease_until", Float),  # somebody is sending it until then
    Column("last_status", Integer),
    Column("last_error", String(300)),
    Column("history", JSON),  # contracts.webhooks.WebhookAttempt of the last attempts
    Column("created_at", Float, nullable=False),
    Column("finished_at", Float),
    Index("webhook_deliveries_due", "state", "next_at"),
    Index("webhook_deliveries_by_endpoint", "tenant", "endpoint_id", "id"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(40), nullable=False),
    Column("state", String(16), nullable=False),  # canary running succeeded stopped cancelled
    Column("request", JSON, nullable=False),  # contracts.batch.BatchCreate, without its adapters
    Column("reason", String(300)),
    Column("webhook_endpoint_id", String(64)),  # hears of its end, whatever it subscribes to
    Column("idempotency_key", String(255)),
    Column("request_hash", String(64)),
    Column("created_at", Float, nullable=False),
    Column("finished_at", Float),
    UniqueConstraint("tenant", "idempotency_key", name="one_batch_per_idempotency_key"),
    Index("batches_by_tenant", "tenant", "id"),
    Index("batches_by_state", "state"),
)

# One row an adapter of a batch. A row and not a list in the batch: ten thousand of them change one by one.
batch_adapters = Table(
    "batch_adapters",
    metadata,
    Column("batch_id", String(64), primary_key=True),
    Column("adapter_id", String(64), primary_key=True),
    Column("position", Integer, nullable=False),
    Column("canary", Integer, nullable=False),
    Column("state", String(16), nullable=False),  # waiting open succeeded failed cancelled
    Column("realignment_id", String(64)),  # null: no job was made
    Column("tries", Integer, nullable=False, default=0),  # at making its job, that failed on our side
    Column("next_at", Float),  # when the next try is due
    Column("error", JSON),  # contracts.realignment.Failure
    Column("similarity", Float),  # what its job measured: for the batch's stop rule
    Column("edit", Float),
    Index("batch_adapters_by_batch", "batch_id", "state", "position"),
    Index("batch_adapters_by_state", "state"),
)

# Who did what. Rows are only ever added: triggers refuse anything else.
audit = Table(
    "audit",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("tenant", String(40), nullable=False),
    Column("actor", String(80), nullable=False),  # a key's id, or cli:<user>
    Column("action", String(60), nullable=False),  # the operation's id
    Column("target", String(200)),
    Column("status", Integer, nullable=False),
    Column("request_id", String(64)),
    Index("audit_by_tenant", "tenant", "sequence"),
)

workers = Table(
    "workers",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("device", String(20), nullable=False),
    Column("version", String(40), nullable=False),
    Column("started_at", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
    Column("draining", Integer, nullable=False, default=0),
)

# Counters that survive every process: jobs by outcome, seconds by stage, bytes.
totals = Table(
    "totals",
    metadata,
    Column("name", String(60), primary_key=True),
    Column("first", String(60), primary_key=True, default=""),
    Column("second", String(60), primary_key=True, default=""),
    Column("value", Float, nullable=False),
)

# What operators decide while the service runs, such as the default reference.
options = Table(
    "options",
    metadata,
    Column("name", String(60), primary_key=True),
    Column("value", JSON, nullable=False),
)


AUDIT_SQLITE = (
    """CREATE TRIGGER IF NOT EXISTS audit_no_update BEFORE UPDATE ON audit
    BEGIN SELECT RAISE(ABORT, 'audit rows are only ever added'); END""",
    """CREATE TRIGGER IF NOT EXISTS audit_no_delete BEFORE DELETE ON audit
    BEGIN SELECT RAISE(ABORT, 'audit rows are only ever added'); END""",
    # INSERT OR REPLACE deletes without the trigger above.
    """CREATE TRIGGER IF NOT EXISTS audit_no_replace BEFORE INSERT ON audit
    WHEN EXISTS (SELECT 1 FROM audit WHERE sequence = NEW.sequence)
    BEGIN SELECT RAISE(ABORT, 'audit rows are only ever added'); END""",
)
AUDIT_POSTGRES = (
    """CREATE OR REPLACE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'audit rows are only ever added'; END $$""",
    """CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()""",
)
AUDIT_GUARDS = "SELECT count(*) FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'audit'"
AUDIT_GUARDED = "SELECT 1 FROM pg_trigger WHERE tgname = 'audit_append_only' AND tgrelid = 'audit'::regclass"


@event.listens_for(metadata, "after_create")
def _guard_audit(target: Any, connection: Connection, **_: Any) -> None:
    """No part of a revision, but made at the end of every upgrade: SQLite's way to alter a table drops its triggers.
    Also at every opening of a database that lacks them."""
    if _guarded(connection):
        return  # making it again would wait for every transaction that uses the table
    for statement in AUDIT_SQLITE if connection.dialect.name == "sqlite" else AUDIT_POSTGRES:
        connection.exec_driver_sql(statement)


def _guarded(connection: Connection) -> bool:
    if connection.dialect.name == "sqlite":
        return connection.exec_driver_sql(AUDIT_GUARDS).scalar() == len(AUDIT_SQLITE)
    return connection.exec_driver_sql(AUDIT_GUARDED).first() is not None


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


def open_database(url: str, *, upgrade: Upgrade = "auto") -> Engine:
    """An engine on a database of this version's schema. Opened after a fork or spawn, never shared across one.

    upgrade: what is done without asking. auto: an empty database gets its tables, and SQLite is brought to the newest
    revision; Postgres waits for its operator. always: Postgres does not, either. never: not even tables are made.

    Raises SystemFault: `database_behind`, `database_ahead`, `database_unknown` or `schema_mismatch`.
    """
    engine = _engine(url)
    try:
        with _one_at_a_time(engine):
            with reading(engine) as connection:
                found = migrations.status(connection, metadata)
                migrations.refuse_strangers(found)
                ready = found.state == "current" and _guarded(connection)
            if not ready:
                if not _by_itself(engine, found, upgrade):
                    migrations.refuse_behind(found)
                _upgrade(engine)
            with reading(engine) as connection:
                migrations.same_columns(connection, _columns())
    except BaseException:
        engine.dispose()
        raise
    return engine


def _by_itself(engine: Engine, found: migrations.Status, upgrade: Upgrade) -> bool:
    if found.state == "current":
        return True  # it only lacks its guards
    if upgrade == "auto":
        return engine.dialect.name == "sqlite" or found.state == "empty"
    return upgrade == "always"


def upgrade_database(url: str) -> tuple[migrations.Status, list[str]]:
    """What `safegraft admin database upgrade` does: where the database stood, and the revisions that were applied.

    Raises SystemFault: `database_ahead`, `database_unknown` or `schema_mismatch`.
    """
    engine = _engine(url)
    try:
        with _one_at_a_time(engine):
            with reading(engine) as connection:
                before = migrations.status(connection, metadata)
            return before, _upgrade(engine)
    finally:
        engine.dispose()


def database_status(url: str) -> migrations.Status:
    """Where a database stands, without changing it. A file that is not there is an empty database."""
    parsed = make_url(url)
    here = parsed.get_backend_name() != "sqlite" or not parsed.database or Path(parsed.database).exists()
    engine = _engine(url) if here else create_engine("sqlite://")
    try:
        with reading(engine) as connection:
            return migrations.status(connection, metadata)
    finally:
        engine.dispose()


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True, hide_parameters=True)
    # Errors are logged, and what rows hold is not for logs: customers' names, sealed secrets, hashes of keys.
    engine = create_engine(
        url,
        hide_parameters=True,
        connect_args={"timeout": 30, "check_same_thread": False},
        # As many as a gateway has threads: beyond the pool's size a connection, which is a file, is opened and prepared
        # anew for every request. That was a fifth of what a poll costs.
        pool_size=SQLITE_CONNECTIONS,
    )
    event.listen(engine, "connect", _prepare_sqlite)
    # Python's own transaction handling starts transactions late, as readers; two of them then deadlock on writing.
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _upgrade(engine: Engine) -> list[str]:
    """In one transaction: an upgrade that is killed has not happened."""
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # Gateway and workers start together; the second one finds nothing left to do.
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({CREATING})")
        applied = migrations.migrate(connection, metadata)
        _guard_audit(None, connection)
    if applied:
        log.info("the database is at revision %s now", applied[-1])
    return applied


def _columns() -> dict[str, set[str]]:
    return {table.name: {column.name for column in table.columns} for table in metadata.sorted_tables}


@contextmanager
def _one_at_a_time(engine: Engine) -> Iterator[None]:
    """One process at a time on a file: turning a new one to WAL fails at once, whatever the timeout, while another one
    does. Postgres has a lock of its own (`_upgrade`)."""
    path = engine.url.database
    if engine.dialect.name != "sqlite" or not path or path == ":memory:":
        yield
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads: on SQLite it neither takes the write lock nor waits for it."""
    with engine.connect().execution_options(reading=True) as connection, connection.begin():
        yield connection


def disk_is_full(error: DBAPIError) -> bool:
    """Whether a statement failed because there was no room for what it writes."""
    code = getattr(error.orig, "sqlite_errorcode", None)
    return code == sqlite3.SQLITE_FULL or getattr(error.orig, "sqlstate", None) == DISK_FULL


def _begin_sqlite(connection: Connection) -> None:
    only_reads = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
