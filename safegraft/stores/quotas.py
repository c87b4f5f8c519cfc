"""How many bytes a tenant stores: adapters, files, the parts of uploads that are not completed, and what its jobs left
beside adapters, which are reports and side-cars. A job is not refused its result: that only counts from then on."""

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.engine import Connection, Engine

from safegraft.errors import QuotaExceeded
from safegraft.stores.database import adapters, files, reading, realignments, upload_parts


def stored_bytes(connection: Connection, tenant: str) -> int:
    def total(size: ColumnElement[int], of: ColumnElement[str]) -> ColumnElement[int]:
        return select(func.coalesce(func.sum(size), 0)).where(of == tenant).scalar_subquery()

    found = [total(table.c.bytes, table.c.tenant) for table in (adapters, files, upload_parts)]
    found.append(total(realignments.c.result_bytes, realignments.c.tenant))
    # Postgres sums big integers to a numeric.
    return sum(int(size) for size in connection.execute(select(*found)).one())


def room(engine: Engine, tenant: str, max_bytes: int) -> int | None:
    """How many bytes the tenant may add; None without a limit (`max_bytes` 0)."""
    if not max_bytes:
        return None
    with reading(engine) as connection:
        return max(0, max_bytes - stored_bytes(connection, tenant))


def claim_room(connection: Connection, tenant: str, added: int, max_bytes: int) -> None:
    """Asked in the transaction that adds a row of so many bytes. Raises QuotaExceeded; max_bytes 0: no limit.

    One such transaction of a tenant at a time, so that several uploads that end together cannot exceed it.
    """
    if not max_bytes:
        return
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"bytes of {tenant}"))))
    left = max_bytes - stored_bytes(connection, tenant)
    if added > left:
        raise no_room(added, max(0, left), max_bytes)


def no_room(added: int, left: int, max_bytes: int) -> QuotaExceeded:
    return QuotaExceeded(
        f"{added} more bytes do not fit: {left} of {max_bytes} are left.",
        code="storage_quota_exceeded",
        hint="Delete adapters or files that are no longer needed, or ask the operator for more.",
    )
