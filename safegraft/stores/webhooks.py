"""Webhook endpoints and the deliveries of the outbox's messages.

    pending ──claim (a lease), send──▶ delivered
       ▲           │ failed, tried again by the table ──▶ pending
       │           └ the table is used up, 410, or the endpoint is gone ──▶ failed
       └────────────────── replay ─────────────────────────────────────────────┘

Who sends holds a lease, so two gateways do not send the same delivery at the same time. The number of the attempt only
grows and fences: what a gateway has to say that was silent for too long is not recorded. A gateway that dies while it
sends costs a lease's length; the message may then arrive twice, with the same id.
"""

import base64
import json
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, insert, or_, select, update
from sqlalchemy.engine import Connection, Engine, Row

from safegraft.contracts.webhooks import (
    PING,
    DeliveryState,
    WebhookAttempt,
    WebhookDelivery,
    WebhookDeliveryDetail,
    WebhookEndpoint,
    WebhookEndpointCreate,
    WebhookEndpointUpdate,
    WebhookMessage,
)
from safegraft.errors import Conflict, InvalidParameter, NotFound
from safegraft.ids import new_id
from safegraft.stores import outbox, totals
from safegraft.stores.database import now, reading, webhook_deliveries, webhook_endpoints
from safegraft.vault import Vault

MAX_ENDPOINTS = 20
HISTORY = 20
SECRET_BYTES = 32
# An endpoint to which nothing could be delivered for so long is disabled.
PATIENCE_SECONDS = 5 * 24 * 3600.0
# So many deliveries of one endpoint, and of one tenant, are claimed at a time: a slow one leaves room for the others.
PER_ENDPOINT, PER_TENANT = 4, 16
BY_OWNER = "Disabled by its owner."

endpoint, delivery = webhook_endpoints.c, webhook_deliveries.c


@dataclass(frozen=True)
class Sending:
    """A delivery that the caller may send until its lease ends. `attempt` is the fencing token."""

    id: str
    tenant: str
    endpoint_id: str
    url: str
    body: bytes
    attempt: int
    step: int
    sealed: tuple[str, ...]  # the secrets that sign, the new one first


class WebhookStore:
    """Raises NotFound for ids that are not the tenant's."""

    def __init__(self, engine: Engine, vault: Vault, *, lease_seconds: float) -> None:
        self._engine = engine
        self._vault = vault
        self._lease = lease_seconds

    # Endpoints

    def create(self, tenant: str, request: WebhookEndpointCreate) -> tuple[WebhookEndpoint, str]:
        """Returns the endpoint and, this once, its secret.

        Raises Conflict: `webhook_url_taken`, `too_many_webhook_endpoints`.
        """
        endpoint_id, secret = new_id("we"), new_secret()
        with self._engine.begin() as connection:
            _one_at_a_time(connection, tenant)
            _ensure_free(connection, tenant, request.url)
            count = select(func.count()).where(endpoint.tenant == tenant)
            if connection.execute(count).scalar_one() >= MAX_ENDPOINTS:
                raise Conflict(
                    f"There are {MAX_ENDPOINTS} webhook endpoints already.",
                    code="too_many_webhook_endpoints",
                    hint="Delete one that is no longer used.",
                )
            connection.execute(
                insert(webhook_endpoints).values(
                    id=endpoint_id,
                    tenant=tenant,
                    url=request.url,
                    name=request.name,
                    events=_unique(request.event_types),
                    secret=self._vault.seal(secret),
                    created_at=now(),
                )
            )
            return _shown(_find(connection, tenant, endpoint_id)), secret

    def get(self, tenant: str, endpoint_id: str) -> WebhookEndpoint:
        with reading(self._engine) as connection:
            return _shown(_find(connection, tenant, endpoint_id))

    def page(self, tenant: str, *, limit: int, after: str | None = None) -> tuple[list[WebhookEndpoint], bool]:
        """Newest first; and whether there are more."""
        query = select(webhook_endpoints, now().label("now")).where(endpoint.tenant == tenant)
        if after is not None:
            query = query.where(endpoint.id < after)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(endpoint.id.desc()).limit(limit + 1)).all()
        return [_shown(row) for row in rows[:limit]], len(rows) > limit

    def update(self, tenant: str, endpoint_id: str, request: WebhookEndpointUpdate) -> WebhookEndpoint:
        """Changes what is given. Raises Conflict (`webhook_url_taken`)."""
        values: dict[str, Any] = request.model_dump(exclude_none=True, include={"url", "name"})
        if request.event_types is not None:
            values["events"] = _unique(request.event_types)
        if request.url is not None:
            values["failing_since"] = None  # whatever failed, failed at another address
        if request.enabled:
            values |= {"disabled_at": None, "disabled_reason": None, "failing_since": None}
        with self._engine.begin() as connection:
            _one_at_a_time(connection, tenant)
            row = _find(connection, tenant, endpoint_id)
            if request.url is not None and request.url != row.url:
                _ensure_free(connection, tenant, request.url)
            if values:
                connection.execute(update(webhook_endpoints).where(endpoint.id == endpoint_id).values(**values))
            if request.enabled is False:
                _disable(connection, endpoint_id, BY_OWNER)
            return _shown(_find(connection, tenant, endpoint_id))

    def delete(self, tenant: str, endpoint_id: str) -> None:
        """Deletes it with its secrets. Its deliveries stay to be read; pending ones fail when they are due."""
        with self._engine.begin() as connection:
            _find(connection, tenant, endpoint_id)
            connection.execute(delete(webhook_endpoints).where(endpoint.id == endpoint_id))

    def rotate(self, tenant: str, endpoint_id: str, overlap: float) -> tuple[WebhookEndpoint, str]:
        """Makes a new secret and returns it, this once. The old one signs as well for `overlap` seconds more."""
        secret = new_secret()
        with self._engine.begin() as connection:
            row = _find(connection, tenant, endpoint_id, lock=True)
            connection.execute(
                update(webhook_endpoints)
                .where(endpoint.id == endpoint_id)
                .values(
                    secret=self._vault.seal(secret),
                    previous_secret=row.secret if overlap > 0 else None,
                    previous_until=now() + overlap if overlap > 0 else None,
                )
            )
            return _shown(_find(connection, tenant, endpoint_id)), secret

    def registered(self, tenant: str, url: str) -> str:
        """The id of the tenant's live endpoint with this address, the newest of several. Raises InvalidParameter."""
        with reading(self._engine) as connection:
            return registered(connection, tenant, url)

    # Deliveries, as their tenant sees them

    def ping(self, tenant: str, endpoint_id: str) -> WebhookDelivery:
        """Puts a message of the type `ping` into the outbox. Raises Conflict (`webhook_endpoint_disabled`)."""
        with self._engine.begin() as connection:
            _ensure_live(_find(connection, tenant, endpoint_id))
            message_id = outbox.add(connection, tenant, endpoint_id, PING, endpoint_id)
            return _shown_delivery(_find_delivery(connection, tenant, message_id))

    def deliveries(
        self,
        tenant: str,
        *,
        limit: int,
        after: str | None = None,
        endpoint_id: str | None = None,
        state: DeliveryState | None = None,
    ) -> tuple[list[WebhookDelivery], bool]:
        """Newest first; and whether there are more."""
        query = select(webhook_deliveries).where(delivery.tenant == tenant)
        if after is not None:
            query = query.where(delivery.id < after)
        if endpoint_id is not None:
            query = query.where(delivery.endpoint_id == endpoint_id)
        if state is not None:
            query = query.where(delivery.state == state)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(delivery.id.desc()).limit(limit + 1)).all()
        return [_shown_delivery(row) for row in rows[:limit]], len(rows) > limit

    def delivery(self, tenant: str, delivery_id: str) -> WebhookDeliveryDetail:
        with reading(self._engine) as connection:
            row = _find_delivery(connection, tenant, delivery_id)
        return WebhookDeliveryDetail(
            **_shown_delivery(row).model_dump(),
            payload=WebhookMessage.model_validate(row.payload),
            history=[WebhookAttempt.model_validate(item) for item in row.history or []],
        )

    def replay(self, tenant: str, delivery_id: str) -> WebhookDelivery:
        """Makes it due at once, with the same message id and the whole table of retries before it.

        One that is being sent right now stays as it is. Raises Conflict (`webhook_endpoint_disabled`), and NotFound
        also where its endpoint was deleted.
        """
        with self._engine.begin() as connection:
            row = _find_delivery(connection, tenant, delivery_id, lock=True)
            _ensure_live(_find(connection, tenant, row.endpoint_id))
            connection.execute(
                update(webhook_deliveries)
                .where(delivery.id == delivery_id, _unleased())
                .values(state="pending", step=0, next_at=now(), lease_until=None, finished_at=None)
            )
            return _shown_delivery(_find_delivery(connection, tenant, delivery_id))

    # What the sender asks

    def claim(self, limit: int, *, busy: Collection[str] = (), full: Collection[str] = ()) -> list[Sending]:
        """Due deliveries, tenants in turns, each under a lease: nobody else gets them until it ends.

        busy: endpoints, full: tenants that get nothing now. A due delivery whose endpoint is gone or disabled fails.
        """
        place = func.row_number().over(partition_by=delivery.endpoint_id, order_by=(delivery.next_at, delivery.id))
        queue = (
            select(delivery.id, delivery.tenant, delivery.next_at, place.label("place"))
            .where(_due(), delivery.endpoint_id.not_in(list(busy)), delivery.tenant.not_in(list(full)))
            .subquery()
        )
        turn = func.row_number().over(partition_by=queue.c.tenant, order_by=(queue.c.next_at, queue.c.id))
        turns = select(queue.c.id, queue.c.next_at, turn.label("turn")).where(queue.c.place <= PER_ENDPOINT).subquery()
        first = (
            select(turns.c.id)
            .where(turns.c.turn <= PER_TENANT)
            .order_by(turns.c.turn, turns.c.next_at, turns.c.id)
            .limit(limit)
        )
        with reading(self._engine) as connection:
            ids = list(connection.execute(first).scalars())
        if not ids:
            return []  # the usual case, and it took no write lock
        with self._engine.begin() as connection:
            rows = connection.execute(
                select(webhook_deliveries)
                .where(delivery.id.in_(ids), _due())
                .with_for_update(skip_locked=True)  # Postgres: two gateways share the work instead of doubling it
            ).all()
            signs_too = (endpoint.previous_until > now()).label("signs_too")
            live = connection.execute(
                select(webhook_endpoints, signs_too).where(
                    endpoint.id.in_({row.endpoint_id for row in rows}), endpoint.disabled_at.is_(None)
                )
            ).all()
            by_id = {row.id: row for row in live}
            return [sending for row in rows if (sending := self._lend(connection, row, by_id.get(row.endpoint_id)))]

    def _lend(self, connection: Connection, row: Row[Any], to: Row[Any] | None) -> Sending | None:
        if to is None:
            connection.execute(
                update(webhook_deliveries)
                .where(delivery.id == row.id)
                .values(**_ended("failed"), last_error="The endpoint is disabled or was deleted.")
            )
            return None
        connection.execute(
            update(webhook_deliveries)
            .where(delivery.id == row.id)
            .values(attempts=row.attempts + 1, lease_until=now() + self._lease)
        )
        return Sending(
            id=row.id,
            tenant=row.tenant,
            endpoint_id=row.endpoint_id,
            url=to.url,
            body=json.dumps(row.payload, separators=(",", ":")).encode(),
            attempt=row.attempts + 1,
            step=row.step,
            sealed=(to.secret, to.previous_secret) if to.signs_too and to.previous_secret else (to.secret,),
        )

    def secrets(self, sending: Sending) -> list[str]:
        """What signs a message, the new secret first. Raises SystemFault (`wrong_pepper`)."""
        return [self._vault.unseal(sealed) for sealed in sending.sealed]

    def record(
        self,
        sending: Sending,
        attempt: WebhookAttempt,
        *,
        retry_in: float | None = None,
        disable: str | None = None,
    ) -> bool:
        """Notes how an attempt ended: delivered (it has no error), due again in `retry_in` seconds, or failed.

        disable: the reason why its endpoint gets nothing any more. False where the attempt no longer holds the lease.
        """
        mine = and_(delivery.id == sending.id, delivery.state == "pending", delivery.attempts == sending.attempt)
        with self._engine.begin() as connection:
            row = connection.execute(select(webhook_deliveries).where(mine).with_for_update()).one_or_none()
            if row is None:
                return False
            values: dict[str, Any] = {
                "last_status": attempt.status,
                "last_error": attempt.error,
                "history": [*(row.history or []), attempt.model_dump()][-HISTORY:],
            }
            if attempt.error is None:
                outcome, values = "delivered", values | _ended("delivered")
            elif retry_in is None:
                outcome, values = "failed", values | _ended("failed")
            else:
                outcome = "retried"
                values |= {"step": row.step + 1, "next_at": now() + retry_in, "lease_until": None}
            connection.execute(update(webhook_deliveries).where(delivery.id == row.id).values(**values))
            if attempt.error is None:
                _note_success(connection, sending.endpoint_id)
            else:
                _note_failure(connection, sending.endpoint_id)
            if disable is not None:
                _disable(connection, sending.endpoint_id, disable)
            totals.add(connection, "webhook_attempts", outcome)
        return True

    def give_back(self, sendings: Sequence[Sending]) -> None:
        """Ends the leases of what was not sent after all: the next gateway sends it at once."""
        with self._engine.begin() as connection:
            for sending in sendings:
                connection.execute(
                    update(webhook_deliveries)
                    .where(
                        delivery.id == sending.id,
                        delivery.state == "pending",
                        delivery.attempts == sending.attempt,
                    )
                    .values(lease_until=None)
                )


def new_secret() -> str:
    """As the specification writes them: `whsec_` and base64."""
    return f"whsec_{base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()}"


def _unleased() -> ColumnElement[bool]:
    return or_(delivery.lease_until.is_(None), delivery.lease_until < now())


def _due() -> ColumnElement[bool]:
    return and_(delivery.state == "pending", delivery.next_at <= now(), _unleased())


def _ended(state: DeliveryState) -> dict[str, Any]:
    return {"state": state, "next_at": None, "lease_until": None, "finished_at": now()}


def _note_success(connection: Connection, endpoint_id: str) -> None:
    connection.execute(
        update(webhook_endpoints)
        .where(endpoint.id == endpoint_id, endpoint.failing_since.is_not(None))
        .values(failing_since=None)
    )


def _note_failure(connection: Connection, endpoint_id: str) -> None:
    connection.execute(
        update(webhook_endpoints)
        .where(endpoint.id == endpoint_id, endpoint.failing_since.is_(None))
        .values(failing_since=now())
    )
    days = round(PATIENCE_SECONDS / 86400)
    _disable(
        connection,
        endpoint_id,
        f"Nothing could be delivered for {days} days.",
        endpoint.failing_since < now() - PATIENCE_SECONDS,
    )


def _disable(connection: Connection, endpoint_id: str, reason: str, *where: ColumnElement[bool]) -> None:
    """Whatever disabled it first stays the reason."""
    connection.execute(
        update(webhook_endpoints)
        .where(endpoint.id == endpoint_id, endpoint.disabled_at.is_(None), *where)
        .values(disabled_at=now(), disabled_reason=reason[:200])
    )


def _find(connection: Connection, tenant: str, endpoint_id: str, *, lock: bool = False) -> Row[Any]:
    query = select(webhook_endpoints, now().label("now")).where(endpoint.id == endpoint_id, endpoint.tenant == tenant)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFound(
            f"There is no webhook endpoint {endpoint_id[:80]!r}.",
            code="webhook_endpoint_not_found",
            param="endpoint_id",
        )
    return row


def _find_delivery(connection: Connection, tenant: str, delivery_id: str, *, lock: bool = False) -> Row[Any]:
    query = select(webhook_deliveries).where(delivery.id == delivery_id, delivery.tenant == tenant)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFound(
            f"There is no webhook delivery {delivery_id[:80]!r}.",
            code="webhook_delivery_not_found",
            param="delivery_id",
        )
    return row


def _ensure_live(row: Row[Any]) -> None:
    if row.disabled_at is not None:
        raise Conflict(
            f"{row.id} is disabled: {row.disabled_reason}",
            code="webhook_endpoint_disabled",
            hint='Enable it with {"enabled": true}.',
        )


def _ensure_free(connection: Connection, tenant: str, url: str) -> None:
    """One endpoint an address: `webhook_url` of a job must name exactly one."""
    taken = select(endpoint.id).where(endpoint.tenant == tenant, endpoint.url == url)
    if (found := connection.execute(taken).scalar()) is not None:
        raise Conflict(f"{found} has this address already.", code="webhook_url_taken", param="url")


def _one_at_a_time(connection: Connection, tenant: str) -> None:
    """Until the transaction ends nobody else changes this tenant's endpoints (SQLite has one writer anyway)."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"webhook endpoints of {tenant}"))))


def _unique(types: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(types))


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _shown(row: Row[Any]) -> WebhookEndpoint:
    overlapping = row.previous_until is not None and row.previous_until > row.now
    return WebhookEndpoint(
        id=row.id,
        name=row.name,
        url=row.url,
        event_types=row.events,
        enabled=row.disabled_at is None,
        disabled_at=_whole(row.disabled_at),
        disabled_reason=row.disabled_reason,
        failing_since=_whole(row.failing_since),
        previous_secret_until=_whole(row.previous_until) if overlapping else None,
        created_at=int(row.created_at),
    )


def _shown_delivery(row: Row[Any]) -> WebhookDelivery:
    return WebhookDelivery(
        id=row.id,
        endpoint_id=row.endpoint_id,
        type=row.type,
        state=row.state,
        attempts=row.attempts,
        next_attempt_at=_whole(row.next_at),
        last_status=row.last_status,
        last_error=row.last_error,
        created_at=int(row.created_at),
        finished_at=_whole(row.finished_at),
    )


def registered(connection: Connection, tenant: str, url: str) -> str:
    """`WebhookStore.registered` within a transaction of the caller's."""
    found: str | None = connection.execute(
        select(endpoint.id)
        .where(endpoint.tenant == tenant, endpoint.url == url, endpoint.disabled_at.is_(None))
        .order_by(endpoint.id.desc())
        .limit(1)
    ).scalar_one_or_none()
    if found is None:
        raise InvalidParameter(
            "webhook_url is not the address of a webhook endpoint that is enabled.",
            code="webhook_not_registered",
            param="webhook_url",
            hint="Register it first with POST /v1/webhook_endpoints: messages are signed with its secret.",
        )
    return found
