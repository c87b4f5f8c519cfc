"""Adapter records. Their bytes lie in the object store under the record's prefix."""

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, delete, insert, select
from sqlalchemy.engine import Connection, Engine, Row

from safegraft.contracts.adapter import Adapter
from safegraft.errors import Conflict, NotFound
from safegraft.stores import totals
from safegraft.stores.database import adapters, reading, realignments
from safegraft.stores.quotas import claim_room


@dataclass(frozen=True)
class AdapterFilters:
    """What a list of adapters is narrowed to; None does not narrow.

    name: a part of it, in small or capital letters (of other alphabets than A to Z as the database knows them). origin:
    uploaded, or the result of a realignment.
    """

    name: str | None = None
    base_model: str | None = None
    sha256: str | None = None
    origin: Literal["uploaded", "realigned"] | None = None


class AdapterStore:
    """Raises NotFound for ids that are not the tenant's."""

    def __init__(self, engine: Engine, *, retention: float = 0.0) -> None:
        """retention: seconds for which an adapter is kept; 0: for ever."""
        self._engine = engine
        self._retention = retention

    def add(self, adapter: Adapter, tenant: str, prefix: str, *, max_bytes: int = 0) -> Adapter:
        """Adds what was received; returns it with the time of its end.

        max_bytes: what the tenant may store in all; 0: no limit. Raises QuotaExceeded.
        """
        adapter = expiring(adapter, self._retention)
        with self._engine.begin() as connection:
            claim_room(connection, tenant, adapter.bytes, max_bytes)
            insert_adapter(connection, adapter, tenant, prefix)
            totals.add(connection, "bytes_received", value=adapter.bytes)
        return adapter

    def get(self, tenant: str, adapter_id: str) -> Adapter:
        with reading(self._engine) as connection:
            return _shown(find_adapter(connection, tenant, adapter_id))

    def prefix(self, tenant: str, adapter_id: str) -> str:
        """Where the adapter's files lie in the object store."""
        with reading(self._engine) as connection:
            return str(find_adapter(connection, tenant, adapter_id).prefix)

    def page(
        self,
        tenant: str,
        *,
        limit: int,
        after: str | None = None,
        filters: AdapterFilters = AdapterFilters(),
    ) -> tuple[list[Adapter], bool]:
        """Newest first; and whether there are more."""
        query = select(adapters).where(adapters.c.tenant == tenant, *_narrowed(filters))
        if after is not None:
            query = query.where(adapters.c.id < after)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(adapters.c.id.desc()).limit(limit + 1)).all()
        return [_shown(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, tenant: str, adapter_id: str) -> str:
        """Removes the record and returns the prefix of its files, which are the caller's to remove.

        Raises Conflict (`adapter_in_use`) while a job that reads it is queued or running.
        """
        with self._engine.begin() as connection:
            return remove_adapter(connection, tenant, adapter_id)


def insert_adapter(connection: Connection, adapter: Adapter, tenant: str, prefix: str) -> None:
    """Adds the record within a transaction of the caller's."""
    connection.execute(
        insert(adapters).values(
            id=adapter.id,
            tenant=tenant,
            prefix=prefix,
            bytes=adapter.bytes,
            created_at=adapter.created_at,
            expires_at=adapter.expires_at,
            body=adapter.model_dump(mode="json"),
        )
    )


def expiring(adapter: Adapter, retention: float) -> Adapter:
    """The record with the time of its end, `retention` seconds after it was made; 0: as it is."""
    if not retention:
        return adapter
    return adapter.model_copy(update={"expires_at": int(adapter.created_at + retention)})


def remove_adapter(connection: Connection, tenant: str, adapter_id: str) -> str:
    """`AdapterStore.delete` within a transaction of the caller's."""
    row = find_adapter(connection, tenant, adapter_id, lock=True)
    busy = connection.execute(
        select(realignments.c.id).where(
            realignments.c.adapter_id == adapter_id, realignments.c.state.in_(("queued", "running"))
        )
    ).first()
    if busy is not None:
        raise Conflict(
            f"{adapter_id} is being read by {busy.id}.",
            code="adapter_in_use",
            param="adapter_id",
            hint="Cancel that realignment or wait for its end.",
        )
    connection.execute(delete(adapters).where(adapters.c.id == adapter_id))
    return str(row.prefix)


def find_adapter(connection: Connection, tenant: str, adapter_id: str, *, lock: bool = False) -> Row[Any]:
    """lock: until the transaction ends nobody else locks it (SQLite has one writer anyway). Raises NotFound."""
    query = select(adapters).where(adapters.c.id == adapter_id, adapters.c.tenant == tenant)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFound(f"There is no adapter {adapter_id[:80]!r}.", code="adapter_not_found", param="adapter_id")
    return row


def _narrowed(filters: AdapterFilters) -> list[ColumnElement[bool]]:
    body = adapters.c.body
    found: list[ColumnElement[bool]] = []
    if filters.name is not None:
        found.append(body["name"].as_string().icontains(filters.name, autoescape=True))
    for key, value in (("base_model", filters.base_model), ("sha256", filters.sha256)):
        if value is not None:
            found.append(body[key].as_string() == value)
    if filters.origin is not None:
        made_by = body["origin", "realignment_id"].as_string()
        found.append(made_by.is_(None) if filters.origin == "uploaded" else made_by.is_not(None))
    return found


def _shown(row: Row[Any]) -> Adapter:
    return Adapter.model_validate(row.body)
