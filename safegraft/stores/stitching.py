"""From an upload's parts to its file: one pass over the bytes, hashed on the way, memory flat."""

import hashlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NoReturn, cast

from safegraft.contracts.files import Upload, UploadComplete, UploadPart
from safegraft.errors import Conflict, InvalidParameter, NotFound, SafegraftError, StorageFault
from safegraft.files import CHUNK
from safegraft.ids import new_id
from safegraft.stores.files import CONTENT
from safegraft.stores.objects import Objects, file_prefix, remove_or_leave, upload_prefix
from safegraft.stores.uploads import PART, UploadStore, part_prefix

# Of the parts: in an object store each piece is one request.
PIECE = 2**23


def complete(uploads: UploadStore, objects: Objects, tenant: str, upload_id: str, request: UploadComplete) -> Upload:
    """Stitches the parts into a file. The upload stays pending if that fails, and can be completed again.

    Repeated with the same parts it returns what the first time made. Raises NotFound, Conflict, InvalidParameter
    (`part_missing`, `checksum_mismatch`, …), StorageFault.
    """
    done = uploads.completed(tenant, upload_id, request.part_ids)
    if done is not None:
        return done
    try:
        parts = uploads.chosen(tenant, upload_id, request.part_ids)
    except Conflict:
        return _by_another(uploads, tenant, upload_id, request)
    # Of its own for every try: two tries at once, with parts in another order, must not write the same file.
    file_id = new_id("file")
    prefix = file_prefix(tenant, file_id)
    try:
        sha256 = _stitch(objects, tenant, parts, prefix, request)
        won = uploads.complete(tenant, upload_id, request.part_ids, file_id=file_id, prefix=prefix, sha256=sha256)
    except BaseException as error:
        remove_or_leave(objects, prefix)
        if isinstance(error, Conflict | InvalidParameter) and error.code in ("upload_not_pending", "part_missing"):
            # Another try may have come first, and have removed the parts that this one was reading.
            done = uploads.completed(tenant, upload_id, request.part_ids)
            if done is not None:
                return done
        raise
    if not won:
        remove_or_leave(objects, prefix)
        return _by_another(uploads, tenant, upload_id, request)
    discard(objects, tenant, upload_id)
    return uploads.get(tenant, upload_id)


def discard(objects: Objects, tenant: str, upload_id: str) -> None:
    """Removes the parts of an upload that has ended."""
    remove_or_leave(objects, upload_prefix(tenant, upload_id))


def _by_another(uploads: UploadStore, tenant: str, upload_id: str, request: UploadComplete) -> Upload:
    """What another try made meanwhile. Raises Conflict where none did."""
    done = uploads.completed(tenant, upload_id, request.part_ids)
    return uploads.require_pending(tenant, upload_id) if done is None else done


def _stitch(objects: Objects, tenant: str, parts: Sequence[UploadPart], prefix: str, request: UploadComplete) -> str:
    """Writes the file and returns its SHA-256."""
    source = Stitched(objects, tenant, parts, md5=request.md5 is not None)
    try:
        with ReadAhead(source) as ahead:
            objects.put(prefix, CONTENT, cast(BinaryIO, ahead))
    except Exception:
        if source.failure is not None:
            raise source.failure from None
        raise
    if not ahead.finished:
        raise StorageFault(f"{prefix} was not stored whole.")
    _compare("sha256", request.sha256, source.sha256.hexdigest())
    _compare("md5", request.md5, source.md5.hexdigest() if source.md5 else "")
    return source.sha256.hexdigest()


def _compare(name: str, wanted: str | None, found: str) -> None:
    if wanted is not None and wanted.lower().removeprefix("sha256-") != found:
        raise InvalidParameter(
            f"The stitched file has {name} {found}, not the announced one.",
            code="checksum_mismatch",
            param=name,
            hint="Check the order of the parts, and send again those whose sha256 differs.",
        )


class ReadAhead:
    """Reads in a thread of its own, one piece ahead, and closes the source at the end.

    A client of an object store cannot be called from within its own call, which is where a store that is written to
    reads its source. And so the bytes are fetched and hashed while those before them are written.
    """

    def __init__(self, source: "Stitched") -> None:
        self.finished = False  # everything was read by the store, not only by us
        self._source = source
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stitching")
        self._next = self._thread.submit(source.read, PIECE)
        self._rest = memoryview(b"")

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._source.close()

    def read(self, size: int = CHUNK) -> bytes:
        """At most `size` bytes, none at the end. Raises what the source raises."""
        if not self._rest:
            piece = self._next.result()
            if piece:
                self._next = self._thread.submit(self._source.read, PIECE)
            else:
                self.finished = True
            self._rest = memoryview(piece)
        part = self._rest[: size if size > 0 else CHUNK]
        self._rest = self._rest[len(part) :]
        return bytes(part)


class Stitched:
    """The parts one after another, as one file that is read once; each is checked against its record.

    `read` raises InvalidParameter (`part_missing`, `part_mismatch`); `failure` keeps what it raised, because a store
    may read in a thread of its own and tell only that reading failed.
    """

    def __init__(self, objects: Objects, tenant: str, parts: Sequence[UploadPart], *, md5: bool) -> None:
        self.sha256 = hashlib.sha256()
        self.md5 = hashlib.md5(usedforsecurity=False) if md5 else None
        self.failure: SafegraftError | None = None
        self._objects = objects
        self._tenant = tenant
        self._left = deque(parts)
        self._part: UploadPart | None = None
        self._file: BinaryIO | None = None
        self._seen = 0
        self._part_sha256 = hashlib.sha256()

    def read(self, size: int = CHUNK) -> bytes:
        """At most `size` bytes (CHUNK where it is negative), none at the end."""
        try:
            return self._read(size if size > 0 else CHUNK)
        except SafegraftError as error:
            self.failure = error
            raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, size: int) -> bytes:
        while True:
            if self._file is None:
                if not self._left:
                    return b""
                self._file = self._open(self._left.popleft())
            piece = self._file.read(size)
            if piece:
                self._count(piece)
                return piece
            self._end_part()

    def _open(self, part: UploadPart) -> BinaryIO:
        self._part, self._seen, self._part_sha256 = part, 0, hashlib.sha256()
        try:
            return self._objects.open(part_prefix(self._tenant, part.upload_id, part.id), PART)
        except NotFound as error:
            raise InvalidParameter(
                f"The bytes of {part.id} never arrived.",
                code="part_missing",
                param="part_ids",
                hint="Send the part again; it gets a new id.",
            ) from error

    def _count(self, piece: bytes) -> None:
        self._seen += len(piece)
        self._part_sha256.update(piece)
        self.sha256.update(piece)
        if self.md5 is not None:
            self.md5.update(piece)
        if self._part is not None and self._seen > self._part.bytes:
            self._differs(f"more than {self._part.bytes} bytes")

    def _end_part(self) -> None:
        self.close()
        if self._part is None:
            return
        if self._seen != self._part.bytes:
            self._differs(f"{self._seen} bytes instead of {self._part.bytes}")
        if self._part.sha256 is not None and self._part_sha256.hexdigest() != self._part.sha256:
            self._differs(f"SHA-256 {self._part_sha256.hexdigest()} instead of {self._part.sha256}")

    def _differs(self, how: str) -> NoReturn:
        name = "A part" if self._part is None else self._part.id
        raise InvalidParameter(
            f"{name} has {how}.",
            code="part_mismatch",
            param="part_ids",
            hint="Send the part again; it gets a new id.",
        )
