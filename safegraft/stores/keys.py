"""API keys and tenants. A key is shown once, when it is made; what is kept is its HMAC under the pepper.

A key reads `sgk_`, 32 random characters, 6 of checksum: secret scanners can tell one from chance without asking us.
"""

import re
import secrets
import zlib
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine, Row

from safegraft.contracts.keys import ALLOWS, TENANT, Key, Limits, Scope
from safegraft.errors import Conflict, InvalidParameter, NotFound
from safegraft.ids import new_id
from safegraft.stores.database import api_keys, now, reading, tenants
from safegraft.vault import Vault

PREFIX = "sgk_"
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FORM = re.compile(r"sgk_[0-9A-Za-z]{38}")
# Rotation without a gap needs the old key and the new one; a third is one that somebody forgot.
MAX_LIVE = 2
# A key's last use is noted at most this often, so that polling does not become writing.
NOTE_SECONDS = 60.0


@dataclass(frozen=True)
class Holder:
    """Who a live key belongs to."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]
    expires_at: float | None
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
                    api_keys.c.revoked_at.is_(None),
                    or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now()),
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
                .where(
                    api_keys.c.mac == self._vault.mark(text),
                    api_keys.c.revoked_at.is_(None),
                    or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now()),
                )
            ).one_or_none()
        if row is None:
            return None
        if row.last_used_at is None or row.last_used_at < row.now - NOTE_SECONDS:
            with self._engine.begin() as connection:
                connection.execute(update(api_keys).where(api_keys.c.id == row.id).values(last_used_at=now()))
        granted: frozenset[Scope] = frozenset().union(*(ALLOWS[scope] for scope in row.scopes))
        return Holder(row.id, row.tenant, granted, row.expires_at, _limits(row))

    def list(self, tenant: str | None = None) -> list[Key]:
        """Newest first; of one tenant or of all."""
        query = select(api_keys).order_by(api_keys.c.id.desc())
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        with reading(self._engine) as connection:
            return [_shown(row) for row in connection.execute(query)]

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
