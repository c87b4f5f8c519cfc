"""File records. A file's bytes lie as one object, named CONTENT, under the record's prefix."""

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, delete, insert, or_, select
from sqlalchemy.engine import Connection, Engine, Row

from safegraft.contracts.files import FileObject
from safegraft.errors import NotFound
from safegraft.stores.database import files, now, reading
from safegraft.stores.quotas import claim_room

CONTENT = "content"


@dataclass(frozen=True)
class NewFile:
    """`seconds`: until it expires; None: never."""

    id: str
    prefix: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    seconds: int | None = None


@dataclass(frozen=True)
class StoredFile:
    """A file with what the API does not show."""

    shown: FileObject
    prefix: str
    sha256: str


class FileStore:
    """Raises NotFound for ids that are not the tenant's, and for files that have expired."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, tenant: str, file: NewFile, *, max_bytes: int = 0) -> FileObject:
        """max_bytes: what the tenant may store in all; 0: no limit. Raises QuotaExceeded."""
        with self._engine.begin() as connection:
            claim_room(connection, tenant, file.bytes, max_bytes)
            insert_file(connection, tenant, file)
            return file_object(_find(connection, tenant, file.id))

    def get(self, tenant: str, file_id: str) -> StoredFile:
        with reading(self._engine) as connection:
            row = _find(connection, tenant, file_id)
        return StoredFile(file_object(row), row.prefix, row.sha256)

    def page(
        self,
        tenant: str,
        *,
        limit: int,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> tuple[list[FileObject], bool]:
        """By age; and whether there are more."""
        query = select(files).where(files.c.tenant == tenant, _alive())
        if after is not None:
            query = query.where(files.c.id < after if order == "desc" else files.c.id > after)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        query = query.order_by(files.c.id.desc() if order == "desc" else files.c.id)
        with reading(self._engine) as connection:
            rows = connection.execute(query.limit(limit + 1)).all()
        return [file_object(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, tenant: str, file_id: str) -> str:
        """Removes the record and returns the prefix of its bytes, which are the caller's to remove."""
        with self._engine.begin() as connection:
            row = _find(connection, tenant, file_id)
            connection.execute(delete(files).where(files.c.id == file_id))
            return str(row.prefix)

    def expire(self, limit: int = 100) -> list[str]:
        """Removes the records of files that have expired; returns the prefixes of their bytes, to be removed."""
        with self._engine.begin() as connection:
            rows = connection.execute(
                select(files.c.id, files.c.prefix)
                .where(files.c.expires_at <= now())
                .order_by(files.c.expires_at)
                .limit(limit)
                .with_for_update(skip_locked=True)
            ).all()
            connection.execute(delete(files).where(files.c.id.in_([row.id for row in rows])))
        return [row.prefix for row in rows]


def insert_file(connection: Connection, tenant: str, file: NewFile) -> None:
    """Adds the record within a transaction of the caller's."""
    connection.execute(
        insert(files).values(
            id=file.id,
            tenant=tenant,
            prefix=file.prefix,
            filename=file.filename,
            purpose=file.purpose,
            bytes=file.bytes,
            sha256=file.sha256,
            created_at=now(),
            expires_at=None if file.seconds is None else now() + file.seconds,
        )
    )


def file_object(row: Row[Any]) -> FileObject:
    return FileObject(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created_at),
        expires_at=None if row.expires_at is None else int(row.expires_at),
        filename=row.filename,
        purpose=row.purpose,
    )


def file_not_found(file_id: str) -> NotFound:
    return NotFound(f"There is no file {file_id[:80]!r}.", code="file_not_found", param="file_id")


def _find(connection: Connection, tenant: str, file_id: str) -> Row[Any]:
    query = select(files).where(and_(files.c.id == file_id, files.c.tenant == tenant, _alive()))
    row = connection.execute(query).one_or_none()
    if row is None:
        raise file_not_found(file_id)
    return row


def _alive() -> ColumnElement[bool]:
    return or_(files.c.expires_at.is_(None), files.c.expires_at > now())
