"""API keys and tenants. A key is shown once, when it is made; what is kept is its HMAC under the pepper.

A key reads `sgk_`, 32 random characters, 6 of checksum: secret scanners can tell one from chance without asking us.
"""

import logging
import re
import secrets
import zlib
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine, Row
from sqlalchemy.exc import SQLAlchemyError

from safegraft.contracts.keys import ALLOWS, TENANT, Key, Limits, Scope
from safegraft.errors import Conflict, InvalidParameter, NotFound
from safegraft.ids import new_id
from safegraft.stores.database import api_keys, now, reading, tenants
from safegraft.vault import Vault

log = logging.getLogger("safegraft.keys")
PREFIX = "sgk_"
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FORM = re.compile(r"sgk_[0-9A-Za-z]{38}")
# Rotation without a gap needs the old key and the new one; a third is one that somebody forgot.
MAX_LIVE = 2
# A key's last use is noted at most this often, so that polling does not become writing.
NOTE_SECONDS = 60.0


@dataclass(frozen=True)
class Holder:
    """Who a live key belongs to. seconds_left: until it expires, by the database's clock; None: never."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]
    seconds_left: float | None
    limits: Limits


class KeyStore:
    def __init__(self, engine: Engine, vault: Vault) -> None:
        self._engine = engine
        self._vault = vault

    def create(
        self, tenant: str, *, name: str = "default", scopes: list[Scope] | None = None, seconds: float | None = None
    ) -> tuple[Key, str]:
        """Makes a key; returns its record and, this once, the key. seconds: until it expires; None: never.

        Raises InvalidParameter, and Conflict (`too_many_keys`) where two live keys have this tenant and name already.
        """
        if not re.fullmatch(TENANT, tenant):
            raise InvalidParameter(
                "A tenant's name is up to 40 of a-z, 0-9, - and _, and begins with a letter or digit.",
                code="bad_tenant",
                param="tenant",
            )
        if not name or len(name) > 100 or not name.isprintable():
            raise InvalidParameter("A key's name has 1 to 100 printable characters.", code="bad_name", param="name")
        if seconds is not None and seconds <= 0:
            raise InvalidParameter("A key must expire in the future.", code="bad_expiry", param="expires")
        text = new_key()
        key_id = new_id("key")
        with self._engine.begin() as connection:
            _ensure_tenant(connection, tenant)
            live = connection.execute(
                select(func.count()).where(
                    api_keys.c.tenant == tenant,
                    api_keys.c.name == name,
                    _live(),
                )
            ).scalar_one()
            if live >= MAX_LIVE:
                raise Conflict(
                    f"{tenant} has {live} live keys named {name!r} already.",
                    code="too_many_keys",
                    param="name",
                    hint="Revoke one that is no longer used, or give the key another name.",
                )
            connection.execute(
                insert(api_keys).values(
                    id=key_id,
                    tenant=tenant,
                    name=name,
                    hint=text[:8],
                    mac=self._vault.mark(text),
                    scopes=sorted(set(scopes or ["write"])),
                    created_at=now(),
                    expires_at=None if seconds is None else now() + seconds,
                )
            )
            row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one()
        return _shown(row), text

    def find(self, text: str) -> Holder | None:
        """Who holds this key; None where it is unknown, revoked or expired. Notes its use."""
        if not well_formed(text):
            return None
        with reading(self._engine) as connection:
            row = connection.execute(
                select(
                    api_keys,
                    tenants.c.max_bytes,
                    tenants.c.max_jobs,
                    tenants.c.max_requests_per_second,
                    now().label("now"),
                )
                .join(tenants, tenants.c.id == api_keys.c.tenant)
                .where(api_keys.c.mac == self._vault.mark(text), _live())
            ).one_or_none()
        if row is None:
            return None
        if row.last_used_at is None or row.last_used_at < row.now - NOTE_SECONDS:
            self._note_use(row.id)
        granted: frozenset[Scope] = frozenset().union(*(ALLOWS[scope] for scope in row.scopes))
        left = None if row.expires_at is None else row.expires_at - row.now
        return Holder(row.id, row.tenant, granted, left, _limits(row))

    def _note_use(self, key_id: str) -> None:
        try:
            with self._engine.begin() as connection:
                connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(last_used_at=now()))
        except SQLAlchemyError as error:
            # A full disk must not lock out those who only read, or come to delete.
            log.warning("the use of %s was not noted (%s)", key_id, error)

    def list(self, tenant: str | None = None) -> list[Key]:
        """Newest first; of one tenant or of all."""
        query = select(api_keys).order_by(api_keys.c.id.desc())
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        with reading(self._engine) as connection:
            return [_shown(row) for row in connection.execute(query)]

    def any_live(self) -> bool:
        """Is there a key that opens anything?"""
        query = select(api_keys.c.id).where(_live()).limit(1)
        with reading(self._engine) as connection:
            return connection.execute(query).first() is not None

    def revoke(self, key_id: str) -> Key:
        """Ends a key. Revoking it again changes nothing. Raises NotFound."""
        with self._engine.begin() as connection:
            connection.execute(
                update(api_keys)
                .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
                .values(revoked_at=now())
            )
            row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
        if row is None:
            raise NotFound(f"There is no key {key_id[:80]!r}.", code="key_not_found", param="key_id")
        return _shown(row)

    def limits(self, tenant: str) -> Limits:
        with reading(self._engine) as connection:
            row = connection.execute(select(tenants).where(tenants.c.id == tenant)).one_or_none()
        return Limits() if row is None else _limits(row)

    def set_limits(self, tenant: str, limits: Limits) -> None:
        """Replaces a tenant's own limits. Raises NotFound."""
        with self._engine.begin() as connection:
            changed = connection.execute(update(tenants).where(tenants.c.id == tenant).values(**limits.model_dump()))
            if not changed.rowcount:
                raise NotFound(f"There is no tenant {tenant[:80]!r}.", code="tenant_not_found", param="tenant")


def new_key() -> str:
    body = "".join(secrets.choice(ALPHABET) for _ in range(32))
    return f"{PREFIX}{body}{_checksum(body)}"


def well_formed(text: str) -> bool:
    """Can this be one of our keys? A typing error is found without asking the database."""
    return FORM.fullmatch(text) is not None and _checksum(text[4:36]) == text[36:]


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(6):
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits


def _live() -> ColumnElement[bool]:
    c = api_keys.c
    return and_(c.revoked_at.is_(None), or_(c.expires_at.is_(None), c.expires_at > now()))


def _ensure_tenant(connection: Connection, tenant: str) -> None:
    insert_ = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(insert_(tenants).values(id=tenant, created_at=now()).on_conflict_do_nothing())
    # Two keys that are made at the same time must not both be the second one (SQLite has one writer anyway).
    connection.execute(select(tenants.c.id).where(tenants.c.id == tenant).with_for_update())


def _limits(row: Row[Any]) -> Limits:
    return Limits(max_bytes=row.max_bytes, max_jobs=row.max_jobs, max_requests_per_second=row.max_requests_per_second)


def _shown(row: Row[Any]) -> Key:
    def whole(value: float | None) -> int | None:
        return None if value is None else int(value)

    return Key(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        hint=row.hint,
        scopes=row.scopes,
        created_at=int(row.created_at),
        expires_at=whole(row.expires_at),
        revoked_at=whole(row.revoked_at),
        last_used_at=whole(row.last_used_at),
    )
