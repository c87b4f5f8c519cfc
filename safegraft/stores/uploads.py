"""Resumable uploads. Each part is an object of its own until `complete` names their order.

    pending ──complete──▶ completed
       ├──────cancel────▶ cancelled
       └──────expire────▶ expired

Objects come before rows: a part's bytes lie there before its row does, so a row never names bytes that are missing
(unless they were to be sent to an address of the store). Rows come before deletions: whatever a crash leaves behind
lies under the prefix of an upload that has ended, and `expire` names it again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import delete, func, insert, or_, select, update
from sqlalchemy.engine import Connection, Engine, Row

from safegraft.contracts.files import MAX_PARTS, MAX_SENT, Upload, UploadCreate, UploadPart
from safegraft.errors import Conflict, InvalidParameter, NotFound, TooLarge
from safegraft.ids import new_id
from safegraft.stores.database import files, now, reading, upload_parts, uploads
from safegraft.stores.files import NewFile, file_object, insert_file
from safegraft.stores.objects import upload_prefix
from safegraft.stores.quotas import claim_room

PART = "data"


def part_prefix(tenant: str, upload_id: str, part_id: str) -> str:
    """Where a part's bytes lie, as one object named PART."""
    return f"{upload_prefix(tenant, upload_id)}/{part_id}"


def check_part(size: int, announced: int) -> None:
    """Raises TooLarge (`part_too_large`) for a part with more bytes than its whole upload: it cannot be completed."""
    if size > announced:
        raise TooLarge(
            f"The part has {size} bytes; {announced} were announced for the whole upload.", code="part_too_large"
        )


class UploadStore:
    """Raises NotFound for ids that are not the tenant's. seconds: from an upload's creation until it expires."""

    def __init__(self, engine: Engine, *, seconds: float) -> None:
        self._engine = engine
        self._seconds = seconds

    def create(self, tenant: str, request: UploadCreate) -> Upload:
        upload_id = new_id("upload")
        with self._engine.begin() as connection:
            connection.execute(
                insert(uploads).values(
                    id=upload_id,
                    tenant=tenant,
                    state="pending",
                    prefix=upload_prefix(tenant, upload_id),
                    filename=request.filename,
                    purpose=request.purpose,
                    mime_type=request.mime_type,
                    bytes=request.bytes,
                    request=request.model_dump(mode="json"),
                    created_at=now(),
                    expires_at=now() + self._seconds,
                )
            )
            return _shown(connection, _find(connection, tenant, upload_id))

    def get(self, tenant: str, upload_id: str) -> Upload:
        with reading(self._engine) as connection:
            return _shown(connection, _find(connection, tenant, upload_id))

    def require_pending(self, tenant: str, upload_id: str) -> Upload:
        """Before the bytes of a part are read. Raises Conflict (`upload_not_pending`)."""
        with reading(self._engine) as connection:
            row = _find(connection, tenant, upload_id)
            _require_pending(row)
            return _shown(connection, row)

    def add_part(
        self, tenant: str, upload_id: str, part_id: str, size: int, sha256: str | None, *, max_bytes: int = 0
    ) -> UploadPart:
        """Adds a part of `size` bytes. max_bytes: what the tenant may store in all; 0: no limit.

        Raises Conflict, QuotaExceeded, TooLarge (`part_too_large`, `too_many_parts`).
        """
        with self._engine.begin() as connection:
            row = _find(connection, tenant, upload_id, lock=True)
            _require_pending(row)
            check_part(size, row.bytes)
            of_upload = upload_parts.c.upload_id == upload_id
            total = func.coalesce(func.sum(upload_parts.c.bytes), 0)
            count, sent = connection.execute(select(func.count(), total).where(of_upload)).one()
            if count >= MAX_PARTS:
                raise TooLarge(f"An upload has at most {MAX_PARTS} parts.", code="too_many_parts")
            if int(sent) + size > MAX_SENT * row.bytes:
                raise TooLarge(
                    f"The parts of {upload_id} have {sent} bytes, many times the {row.bytes} that were announced.",
                    code="too_many_parts",
                    hint="Complete the upload with those that have arrived, or create a new one.",
                )
            claim_room(connection, tenant, size, max_bytes)
            connection.execute(
                insert(upload_parts).values(
                    id=part_id, upload_id=upload_id, tenant=tenant, bytes=size, sha256=sha256, created_at=now()
                )
            )
            return _part(connection.execute(select(upload_parts).where(upload_parts.c.id == part_id)).one())

    def parts(
        self, tenant: str, upload_id: str, *, limit: int, after: str | None = None
    ) -> tuple[list[UploadPart], bool]:
        """What has arrived, oldest first; and whether there is more. Empty once the upload has ended."""
        query = select(upload_parts).where(upload_parts.c.upload_id == upload_id)
        if after is not None:
            query = query.where(upload_parts.c.id > after)
        with reading(self._engine) as connection:
            _find(connection, tenant, upload_id)
            rows = connection.execute(query.order_by(upload_parts.c.id).limit(limit + 1)).all()
        return [_part(row) for row in rows[:limit]], len(rows) > limit

    def chosen(self, tenant: str, upload_id: str, part_ids: Sequence[str]) -> list[UploadPart]:
        """The parts in this order; together they have the announced size.

        Raises Conflict (`upload_not_pending`), InvalidParameter (`duplicate_part`, `part_not_found`,
        `upload_incomplete`).
        """
        with reading(self._engine) as connection:
            row = _find(connection, tenant, upload_id)
            _require_pending(row)
            rows = connection.execute(select(upload_parts).where(upload_parts.c.upload_id == upload_id)).all()
        found = {part.id: _part(part) for part in rows}
        if len(set(part_ids)) != len(part_ids):
            raise InvalidParameter("A part stands twice in part_ids.", code="duplicate_part", param="part_ids")
        for part_id in part_ids:
            if part_id not in found:
                raise InvalidParameter(
                    f"{part_id[:80]!r} is no part of {upload_id}.", code="part_not_found", param="part_ids"
                )
        total = sum(found[part_id].bytes for part_id in part_ids)
        if total != row.bytes:
            raise InvalidParameter(
                f"These parts have {total} bytes; {row.bytes} were announced.",
                code="upload_incomplete",
                param="part_ids",
                hint=f"GET /v1/uploads/{upload_id}/parts lists what has arrived.",
            )
        return [found[part_id] for part_id in part_ids]

    def completed(self, tenant: str, upload_id: str, part_ids: Sequence[str]) -> tuple[Upload, dict[str, str]] | None:
        """The upload, if these parts completed it before, and the hashes that its file was found to have, by name.
        Raises Conflict where others did."""
        with reading(self._engine) as connection:
            row = _find(connection, tenant, upload_id)
            if row.state != "completed":
                return None
            if row.request.get("completed_from") != _order(part_ids):
                raise Conflict(
                    f"{upload_id} was completed from other parts.", code="upload_not_pending", param="part_ids"
                )
            return _shown(connection, row), row.request.get("hashes", {})

    def complete(
        self,
        tenant: str,
        upload_id: str,
        part_ids: Sequence[str],
        *,
        file_id: str,
        prefix: str,
        hashes: Mapping[str, str],
    ) -> bool:
        """Makes the file (whose bytes lie under `prefix`) and ends the upload, in one transaction. hashes: `sha256`,
        and whatever else was taken of the bytes.

        False where somebody else completed it meanwhile. Raises Conflict where it was cancelled or has expired.
        """
        with self._engine.begin() as connection:
            row = _find(connection, tenant, upload_id, lock=True)
            if row.state == "completed":
                return False
            _require_pending(row)
            kept = row.request.get("expires_after")
            # No question of quota: the file takes the place of its parts. Those that are left over go.
            insert_file(
                connection,
                tenant,
                NewFile(
                    id=file_id,
                    prefix=prefix,
                    filename=row.filename,
                    purpose=row.purpose,
                    bytes=row.bytes,
                    sha256=hashes["sha256"],
                    seconds=kept["seconds"] if kept else None,
                ),
            )
            request = {**row.request, "completed_from": _order(part_ids), "hashes": dict(hashes)}
            _end(connection, upload_id, "completed", file_id=file_id, request=request)
        return True

    def cancel(self, tenant: str, upload_id: str) -> Upload:
        """Ends an upload; its bytes are the caller's to remove. Cancelling twice changes nothing. Raises Conflict."""
        with self._engine.begin() as connection:
            row = _find(connection, tenant, upload_id, lock=True)
            if row.state != "cancelled":
                _require_pending(row)
                _end(connection, upload_id, "cancelled")
            return _shown(connection, _find(connection, tenant, upload_id))

    def expire(self, limit: int = 100) -> list[str]:
        """Ends uploads whose time is over; returns the prefixes of bytes to be removed, then told to `emptied`.

        Among them are those of completed and cancelled uploads, once their time is over: a crash may have come between
        their end and the removal of their parts, and what is sent to an address of the store may come at any time.
        """
        with self._engine.begin() as connection:
            rows = connection.execute(
                select(uploads.c.id, uploads.c.prefix, uploads.c.state)
                .where(uploads.c.expires_at <= now(), or_(uploads.c.state == "pending", uploads.c.prefix != ""))
                .order_by(uploads.c.expires_at)
                .limit(limit)
                .with_for_update(skip_locked=True)
            ).all()
            for row in rows:
                if row.state == "pending":
                    _end(connection, row.id, "expired")
        return [row.prefix for row in rows]

    def emptied(self, prefixes: Sequence[str]) -> None:
        """The bytes under these prefixes are gone; `expire` does not name them again."""
        with self._engine.begin() as connection:
            connection.execute(update(uploads).where(uploads.c.prefix.in_(list(prefixes))).values(prefix=""))


def _find(connection: Connection, tenant: str, upload_id: str, *, lock: bool = False) -> Row[Any]:
    query = select(uploads, (uploads.c.expires_at <= now()).label("over")).where(
        uploads.c.id == upload_id, uploads.c.tenant == tenant
    )
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFound(f"There is no upload {upload_id[:80]!r}.", code="upload_not_found", param="upload_id")
    return row


def _state(row: Row[Any]) -> Any:
    # Nobody need have looked for expired uploads yet.
    return "expired" if row.state == "pending" and row.over else row.state


def _require_pending(row: Row[Any]) -> None:
    if _state(row) != "pending":
        raise Conflict(
            f"{row.id} is {_state(row)}.",
            code="upload_not_pending",
            param="upload_id",
            hint="Create a new upload.",
        )


def _end(connection: Connection, upload_id: str, state: str, **values: Any) -> None:
    connection.execute(update(uploads).where(uploads.c.id == upload_id).values(state=state, **values))
    connection.execute(delete(upload_parts).where(upload_parts.c.upload_id == upload_id))


def _order(part_ids: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(part_ids)).encode()).hexdigest()


def _shown(connection: Connection, row: Row[Any]) -> Upload:
    file = connection.execute(select(files).where(files.c.id == row.file_id)).one_or_none() if row.file_id else None
    return Upload(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created_at),
        expires_at=int(row.expires_at),
        filename=row.filename,
        purpose=row.purpose,
        status=_state(row),
        file=None if file is None else file_object(file),
    )


def _part(row: Row[Any]) -> UploadPart:
    return UploadPart(
        id=row.id, upload_id=row.upload_id, bytes=row.bytes, sha256=row.sha256, created_at=int(row.created_at)
    )
