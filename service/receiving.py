"""Bytes on their way in: from the request to the disk as they come, counted, and hashed where asked.

Never `UploadFile` in a signature: FastAPI would read a whole gigabyte before the key is looked at. Routes that use this
ask for `Asking` and declare no body, so that nothing is read before the key was.
"""

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import multipart
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from safegraft import failpoints
from safegraft.errors import InvalidParameter, StorageFault, TooLarge
from safegraft.files import NO_SPACE
from safegraft.stores import quotas
from safegraft.stores.uploads import check_part
from service.auth import Principal
from service.body import cut_off, limited, object_of, paced, unsupported_kind
from service.dependencies import Services

MAX_FIELD_BYTES = 1024
MAX_SEGMENTS = 64
# What boundaries, headers and fields of a multipart body may take beside its files.
FRAMING = 2**16

Body = TypeVar("Body", bound=BaseModel)


@asynccontextmanager
async def scratch(here: Services) -> AsyncIterator[Path]:
    """A new folder on the store's disk; whatever is still in it at the end is removed. Raises StorageFault."""
    try:
        here.objects.scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=here.objects.scratch, prefix="upload-"))
    except OSError as error:
        raise storage_fault(error) from error
    try:
        yield folder
    except ClientDisconnect as error:
        raise cut_off() from error
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, True)


@dataclass
class Allowance:
    """How much a request may bring: `most`, and `room`, what is left of the tenant's `quota` bytes (None: no quota).
    whole: bytes of the upload that it brings a part of."""

    most: int
    room: int | None = None
    quota: int = 0
    whole: int | None = None

    def announced(self, request: Request, *, framing: int = 0) -> None:
        """Before a byte is read. Raises TooLarge (`upload_too_large`, `part_too_large`), QuotaExceeded
        (`storage_quota_exceeded`)."""
        length = request.headers.get("content-length", "")
        # A number of many digits would take long to read.
        if length.isdecimal() and len(length) < 20:
            self.check(int(length) - framing)

    def check(self, size: int) -> None:
        if size > self.most:
            raise TooLarge(f"The body has {size} bytes; at most {self.most} are accepted.", code="upload_too_large")
        if self.whole is not None:
            check_part(size, self.whole)
        if self.room is not None and size > self.room:
            raise quotas.no_room(size, self.room, self.quota)


def quota_of(here: Services, asking: Principal) -> int:
    """Bytes that the tenant may store; 0: no limit."""
    own = asking.limits.max_bytes
    return here.settings.max_bytes_per_tenant if own is None else own


def allowance(here: Services, asking: Principal, most: int) -> Allowance:
    """Asks the database; of a coroutine, in a thread."""
    quota = quota_of(here, asking)
    return Allowance(most, quotas.room(here.database, asking.tenant, quota), quota)


async def pieces(request: Request, size: int = 2**20) -> AsyncIterator[bytes]:
    """The body in pieces of about a mebibyte, so that switching to a thread costs little. Raises InvalidParameter."""
    waiting: list[bytes] = []
    length = 0
    async for chunk in Request(request.scope, paced(request)).stream():
        waiting.append(chunk)
        length += len(chunk)
        if length >= size:
            yield b"".join(waiting)
            waiting, length = [], 0
    if waiting:
        yield b"".join(waiting)


class Sink:
    """A new file that grows; `check` is asked with every new size, before it is reached. Raises OSError."""

    def __init__(self, path: Path, check: Callable[[int], None], *, hashed: bool = False) -> None:
        self.path = path
        self.size = 0
        self._sha256 = hashlib.sha256() if hashed else None
        self._check = check
        self._file: BinaryIO = path.open("xb")

    def write(self, data: bytes | bytearray) -> None:
        self.size += len(data)
        self._check(self.size)
        if self._sha256 is not None:
            self._sha256.update(data)
        failpoints.hit("gateway.receiving")
        self._file.write(data)

    def digest(self) -> str:
        """Hex SHA-256 of what was written. Only of a sink that hashes."""
        assert self._sha256 is not None
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._file.close()


async def receive_raw(request: Request, sink: Sink) -> None:
    """The whole body into one file, which is closed then. Raises like `Sink.write`, and StorageFault."""

    def write(piece: bytes) -> None:
        try:
            sink.write(piece)
        except OSError as error:
            raise storage_fault(error) from error

    try:
        async for piece in pieces(request):
            # In a thread: the disk must not hold up other requests.
            await asyncio.to_thread(write, piece)
    finally:
        close(sink)


async def receive_json(request: Request, model: type[Body], max_bytes: int) -> Body:
    """A small body. Raises RequestValidationError, InvalidParameter, TooLarge (`request_too_large`)."""
    try:
        raw = await Request(request.scope, limited(request, max_bytes)).body()
    except ClientDisconnect as error:
        raise cut_off() from error
    try:
        return model.model_validate(object_of(raw))
    except ValidationError as error:
        raise _invalid(error) from error


def validated(model: type[Body], given: dict[str, Any]) -> Body:
    """The fields of a form, which are all text. Raises RequestValidationError."""
    try:
        return model.model_validate(given, strict=False)
    except ValidationError as error:
        raise _invalid(error) from error


def _invalid(error: ValidationError) -> RequestValidationError:
    return RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in error.errors(include_url=False)])


class Form(Protocol):
    """Who takes a multipart body's parts. Both may raise InvalidParameter."""

    fields: Collection[str]
    """Names of parts that are text."""
    files: Collection[str]
    """Names of parts that are files."""

    def field(self, name: str, value: str) -> None: ...

    def file(self, name: str, filename: str) -> Sink | None:
        """Where it goes; None where it is not kept."""


async def receive_form(request: Request, form: Form, check: Callable[[int], None]) -> None:
    """A multipart body; `check` is asked with its size as it grows.

    Raises InvalidParameter, StorageFault, and what `check` and the sinks raise.
    """
    kind, options = multipart.parse_options_header(request.headers.get("content-type", ""))
    if kind != "multipart/form-data":
        raise unsupported_kind(request, "Send multipart/form-data.")
    if not options.get("boundary"):
        raise InvalidParameter(
            "The Content-Type multipart/form-data names no boundary.",
            code="unsupported_media_type",
            param="Content-Type",
            hint="Let your HTTP client write this header by itself.",
        )
    parser = _Parts(form, options["boundary"], check)
    try:
        async for piece in pieces(request):
            await asyncio.to_thread(parser.feed, piece)
        await asyncio.to_thread(parser.end)
    finally:
        parser.close()


class _Parts:
    """Writes each part of a multipart body where the form says."""

    def __init__(self, form: Form, boundary: str, check: Callable[[int], None]) -> None:
        self._form = form
        self._check = check
        self._parser = multipart.PushMultipartParser(boundary, max_segment_count=MAX_SEGMENTS)
        self._size = 0
        self._sink: Sink | None = None
        self._field: tuple[str, bytearray] | None = None

    def feed(self, piece: bytes) -> None:
        self._size += len(piece)
        self._check(self._size - FRAMING)
        try:
            for event in self._parser.parse(piece):
                if isinstance(event, multipart.MultipartSegment):
                    self._begin(event.name, event.filename)
                elif event is None:
                    self._finish()
                else:
                    self._write(event)
        except multipart.MultipartError as error:
            # What it says first is a sentence; what may follow is Python's own error.
            said = "a part's header is not UTF-8" if isinstance(error.args[-1], UnicodeError) else error.args[0]
            raise InvalidParameter(f"The multipart body is broken ({said}).", code="invalid_multipart") from error
        except OSError as error:
            raise storage_fault(error) from error

    def end(self) -> None:
        """Raises InvalidParameter where the last boundary never came."""
        try:
            self._parser.close()
        except multipart.MultipartError as error:
            raise InvalidParameter("The multipart body ends too early.", code="invalid_multipart") from error

    def close(self) -> None:
        if self._sink is not None:
            close(self._sink)

    def _begin(self, name: str, filename: str | None) -> None:
        if filename is not None:
            if name not in self._form.files:
                raise InvalidParameter(
                    f"Unknown part {name[:60]!r}; files go into `{min(self._form.files, key=len)}`.",
                    code="unknown_field",
                    param=name[:60],
                )
            if not filename:
                raise InvalidParameter(f"A part `{name}` has no file name.", code="missing_filename", param=name)
            self._sink = self._form.file(name, filename)
        elif name in self._form.files:
            raise InvalidParameter(f"A part `{name}` has no file name.", code="missing_filename", param=name)
        elif name not in self._form.fields:
            known = ", ".join(sorted({*self._form.fields, *self._form.files}))
            raise InvalidParameter(
                f"Unknown field {name[:60]!r}.", code="unknown_field", param=name[:60], hint=f"Known: {known}."
            )
        else:
            self._field = (name, bytearray())

    def _write(self, data: bytes | bytearray) -> None:
        if self._field is not None:
            if len(self._field[1]) + len(data) > MAX_FIELD_BYTES:
                raise InvalidParameter(
                    f"The field {self._field[0]} is too long.", code="field_too_long", param=self._field[0]
                )
            self._field[1].extend(data)
        elif self._sink is not None:
            self._sink.write(data)

    def _finish(self) -> None:
        if self._field is not None:
            name, raw = self._field
            try:
                value = raw.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise InvalidParameter(f"The field {name} is not UTF-8.", code="invalid_field", param=name) from error
            self._field = None
            self._form.field(name, value)
        if self._sink is not None:
            self._sink.close()
            self._sink = None


def close(sink: Sink) -> None:
    """Closes a file that may have failed already: what its buffer still holds can then not be written either."""
    try:
        sink.close()
    except OSError as error:
        raise storage_fault(error) from error


def storage_fault(error: OSError) -> StorageFault:
    if error.errno in NO_SPACE:
        return StorageFault("The disk is full; nothing was kept.", code="disk_full")
    return StorageFault(f"The upload could not be written ({error.strerror}).")
