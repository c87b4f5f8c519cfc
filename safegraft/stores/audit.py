"""Who did what. Rows are only ever added: triggers in the database refuse to change or delete one.

A row names keys by their ids and nothing else of a request: neither bodies nor headers.
"""

import re
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.engine import Engine, Row

from safegraft.contracts.audit import AuditEvent
from safegraft.stores.database import audit, now, reading

# A key that somebody put into an address by mistake must not be kept here for ever.
SECRET = re.compile(r"\b(sgk|whsec)_[0-9A-Za-z+/=_-]+")
# Sequence numbers are 32 bits wide; Postgres refuses to compare them with more.
LAST = 2**31 - 1


@dataclass(frozen=True)
class Entry:
    """actor: a key's id, or `cli:<user>`; action: the operation's id; status: of HTTP, or the command's exit status."""

    tenant: str
    actor: str
    action: str
    target: str | None
    status: int
    request_id: str | None = None


class AuditLog:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, entry: Entry) -> None:
        """Adds a row. Texts are cut to what fits and made printable: nothing that was sent makes this fail."""
        with self._engine.begin() as connection:
            connection.execute(
                insert(audit).values(
                    at=now(),
                    tenant=_kept(entry.tenant, 40),
                    actor=_kept(entry.actor, 80),
                    action=_kept(entry.action, 60),
                    target=None if entry.target is None else _kept(entry.target, 200),
                    status=entry.status,
                    request_id=entry.request_id,
                )
            )

    def page(
        self,
        tenant: str,
        *,
        limit: int,
        after: int | None = None,
        action: str | None = None,
        actor: str | None = None,
        since: float | None = None,
    ) -> tuple[list[AuditEvent], bool]:
        """Newest first, and whether there are more. after: the last sequence number of the page before; since: Unix
        seconds."""
        query = select(audit).where(audit.c.tenant == tenant)
        if after is not None:
            query = query.where(audit.c.sequence < min(after, LAST))
        if action is not None:
            query = query.where(audit.c.action == action)
        if actor is not None:
            query = query.where(audit.c.actor == actor)
        if since is not None:
            query = query.where(audit.c.at >= since)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(audit.c.sequence.desc()).limit(limit + 1)).all()
        return [_shown(row) for row in rows[:limit]], len(rows) > limit


def _kept(text: str, most: int) -> str:
    plain = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in text)
    return SECRET.sub(r"\1_***", plain)[:most]


def _shown(row: Row[Any]) -> AuditEvent:
    return AuditEvent(
        id=str(row.sequence),
        actor=row.actor,
        action=row.action,
        target=row.target,
        status=row.status,
        request_id=row.request_id,
        created_at=int(row.at),
    )
