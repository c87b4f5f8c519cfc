"""From an upload's parts to its file: one pass over the bytes, hashed on the way, memory flat."""

import hashlib
import io
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import BinaryIO, NoReturn, cast

from safegraft.contracts.files import Upload, UploadComplete, UploadPart
from safegraft.errors import Conflict, InvalidParameter, NotFound, SafegraftError, StorageFault, TooLarge
from safegraft.files import CHUNK
from safegraft.ids import new_id
from safegraft.stores.files import CONTENT
from safegraft.stores.objects import Objects, file_prefix, remove_or_leave, upload_prefix
from safegraft.stores.uploads import PART, UploadStore, part_prefix

# Of the parts: in an object store each piece is one request.
PIECE = 2**23
# What is found where an upload ended, by `cancel` or another `complete`, while this one read its parts.
GONE = ("upload_not_pending", "part_not_found", "part_missing")


def complete(uploads: UploadStore, objects: Objects, tenant: str, upload_id: str, request: UploadComplete) -> Upload:
    """Stitches the parts into a file. The upload stays pending if that fails, and can be completed again.

    Repeated with the same parts it returns what the first time made, or says that this has another hash. Raises
    NotFound, Conflict, InvalidParameter (`part_missing`, `checksum_mismatch`, …), TooLarge (`part_too_large`),
    StorageFault.
    """
    done = _done(uploads, tenant, upload_id, request)
    if done is not None:
        return done
    try:
        return _complete(uploads, objects, tenant, upload_id, request)
    except (Conflict, InvalidParameter) as error:
        if error.code in GONE:
            return _by_another(uploads, tenant, upload_id, request, error)
        raise


def _done(uploads: UploadStore, tenant: str, upload_id: str, request: UploadComplete) -> Upload | None:
    found = uploads.completed(tenant, upload_id, request.part_ids)
    if found is None:
        return None
    upload, hashes = found
    # Of those that the first try took: an MD5 only where it was asked for one.
    _compare(request, hashes)
    return upload


def _complete(uploads: UploadStore, objects: Objects, tenant: str, upload_id: str, request: UploadComplete) -> Upload:
    parts = uploads.chosen(tenant, upload_id, request.part_ids)
    # Of its own for every try: two tries at once, with parts in another order, must not write the same file.
    file_id = new_id("file")
    prefix = file_prefix(tenant, file_id)
    try:
        hashes = _stitch(objects, tenant, parts, prefix, request)
        won = uploads.complete(tenant, upload_id, request.part_ids, file_id=file_id, prefix=prefix, hashes=hashes)
    except BaseException as error:
        remove_or_leave(objects, prefix)
        if isinstance(error, TooLarge):
            _remove_surplus(objects, tenant, parts)
        raise
    if not won:
        remove_or_leave(objects, prefix)
        raise Conflict(f"{upload_id} was completed meanwhile.", code="upload_not_pending", param="upload_id")
    discard(objects, tenant, upload_id)
    return uploads.get(tenant, upload_id)


def _by_another(
    uploads: UploadStore, tenant: str, upload_id: str, request: UploadComplete, error: SafegraftError
) -> Upload:
    """What another try made meanwhile. Raises Conflict where the upload has ended otherwise, and else `error`."""
    done = _done(uploads, tenant, upload_id, request)
    if done is not None:
        return done
    uploads.require_pending(tenant, upload_id)
    raise error


def surplus(objects: Objects, prefix: str, announced: int) -> int:
    """How many bytes a part has, where these are more than were announced; else 0.

    Only what was sent to an address of the store can be more, and no quota counts those bytes: it was asked for as many
    as were announced.
    """
    try:
        size = objects.size(prefix, PART)
    except NotFound:
        return 0  # nothing was sent yet
    return size if size > announced else 0


def _remove_surplus(objects: Objects, tenant: str, parts: Sequence[UploadPart]) -> None:
    with suppress(StorageFault):  # the garbage collector looks for them too
        for part in parts:
            prefix = part_prefix(tenant, part.upload_id, part.id)
            if surplus(objects, prefix, part.bytes):
                objects.remove(prefix)


def discard(objects: Objects, tenant: str, upload_id: str) -> None:
    """Removes the parts of an upload that has ended."""
    remove_or_leave(objects, upload_prefix(tenant, upload_id))


def _stitch(
    objects: Objects, tenant: str, parts: Sequence[UploadPart], prefix: str, request: UploadComplete
) -> dict[str, str]:
    """Writes the file and returns its hashes by name: SHA-256, and MD5 where one was announced."""
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
    hashes = {"sha256": source.sha256.hexdigest()} | ({"md5": source.md5.hexdigest()} if source.md5 else {})
    _compare(request, hashes)
    return hashes


def _compare(request: UploadComplete, found: Mapping[str, str]) -> None:
    for name, wanted in (("sha256", request.sha256), ("md5", request.md5)):
        if wanted is not None and name in found and wanted.lower().removeprefix("sha256-") != found[name]:
            raise InvalidParameter(
                f"The stitched file has {name} {found[name]}, not the announced one.",
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

    `read` raises InvalidParameter (`part_missing`, `part_mismatch`) and TooLarge (`part_too_large`); `failure` keeps
    what it raised, because a store may read in a thread of its own and tell only that reading failed.
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
            try:
                piece = self._file.read(size)
            except NotFound as error:  # removed after it was opened: in an object store each piece is a request
                raise self._missing() from error
            if piece:
                self._count(piece)
                return piece
            self._end_part()

    def _open(self, part: UploadPart) -> BinaryIO:
        self._part, self._seen, self._part_sha256 = part, 0, hashlib.sha256()
        try:
            file = self._objects.open(part_prefix(self._tenant, part.upload_id, part.id), PART)
        except NotFound as error:
            raise self._missing() from error
        size = file.seek(0, io.SEEK_END)
        if size > part.bytes:
            file.close()
            self._exceeds(part, size)
        file.seek(0)
        return file

    def _missing(self) -> InvalidParameter:
        return InvalidParameter(
            f"The bytes of {'a part' if self._part is None else self._part.id} never arrived.",
            code="part_missing",
            param="part_ids",
            hint="Send the part again; it gets a new id.",
        )

    def _exceeds(self, part: UploadPart, size: int) -> NoReturn:
        raise TooLarge(
            f"{part.id} has {size} bytes; {part.bytes} were announced. They are removed.",
            code="part_too_large",
            param="part_ids",
            hint="Send the part again, with the size that it has.",
        )

    def _count(self, piece: bytes) -> None:
        self._seen += len(piece)
        self._part_sha256.update(piece)
        self.sha256.update(piece)
        if self.md5 is not None:
            self.md5.update(piece)
        if self._part is not None and self._seen > self._part.bytes:
            self._exceeds(self._part, self._seen)  # it was replaced while it was read

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
