"""Webhook messages, written in the same transaction as what they tell: none is lost, none tells what did not happen."""

import time

from sqlalchemy import insert, select
from sqlalchemy.engine import Connection

from safegraft.ids import new_id
from safegraft.stores.database import now, webhook_deliveries, webhook_endpoints


def announce(connection: Connection, tenant: str, kind: str, subject: str, endpoint_id: str | None = None) -> None:
    """One pending message for each endpoint of the tenant that subscribes to `kind`, and for `endpoint_id`.

    kind: for example `realignment.succeeded`; subject: the id of what it is about. The payload is thin: who wants to
    know more asks for the subject, with a key.
    """
    rows = connection.execute(
        select(webhook_endpoints.c.id, webhook_endpoints.c.events).where(
            webhook_endpoints.c.tenant == tenant, webhook_endpoints.c.disabled_at.is_(None)
        )
    ).all()
    for row in rows:
        if row.id != endpoint_id and kind not in row.events and "*" not in row.events:
            continue
        add(connection, tenant, row.id, kind, subject)


def add(connection: Connection, tenant: str, endpoint_id: str, kind: str, subject: str) -> str:
    """One pending message for one endpoint; returns the message's id."""
    message_id = new_id("msg")
    payload = {
        "id": message_id,
        "object": "event",
        "type": kind,
        "created_at": int(time.time()),
        "data": {"id": subject},
    }
    connection.execute(
        insert(webhook_deliveries).values(
            id=message_id,
            tenant=tenant,
            endpoint_id=endpoint_id,
            type=kind,
            payload=payload,
            state="pending",
            attempts=0,
            next_at=now(),
            created_at=now(),
        )
    )
    return message_id
