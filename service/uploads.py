"""Receiving an adapter: the request's bytes go to disk as they come, and are checked and hashed before 201.

Never `UploadFile` in a signature: FastAPI would read a whole gigabyte before the key is looked at.
"""

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import multipart
from starlette.requests import ClientDisconnect, Request

from safegraft.adapter import CONFIG, WEIGHTS, describe, is_companion
from safegraft.archive import unpack
from safegraft.contracts.adapter import Adapter, Origin
from safegraft.errors import InvalidAdapter, InvalidParameter, StorageFault, TooLarge, UserError
from safegraft.finite import check_finite
from safegraft.ids import new_id
from safegraft.records import adapter_record

FILES = ("files", "files[]", "file")
# Compressed tars too: whoever sends one is to read that it must not be compressed, not that a file is missing.
ARCHIVES = (".tar", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# Weights hardly compress. What grows beyond this much and this many times over is a bomb.
ROOM, GROWTH = 2**26, 20
MAX_FIELD_BYTES = 1024
MAX_PARTS = 64
# A client that keeps its connection open, or all but, would keep one of the few upload slots as well.
IDLE_SECONDS, MIN_RATE = 60.0, 2**13
MAX_COMPANION_BYTES = 2**26
MAX_DROPPED = 100
NO_SPACE = (28, 122)  # ENOSPC, EDQUOT


@dataclass
class Received:
    """What one upload left in its scratch folder. `folder` holds wanted files only, under their own names."""

    folder: Path
    fields: dict[str, str] = field(default_factory=dict)
    archive: Path | None = None
    dropped: list[str] = field(default_factory=list)


def is_wanted(name: str) -> bool:
    """Adapter files and companions; pickles, checkpoints and code are not."""
    return name in (CONFIG, WEIGHTS) or is_companion(name)


async def receive(request: Request, scratch: Path, max_bytes: int) -> Received:
    """Streams a multipart request into a new folder below `scratch`, which is the caller's to remove.

    Raises InvalidParameter, TooLarge (before a byte is read where the length is announced), StorageFault.
    """
    kind, options = multipart.parse_options_header(request.headers.get("content-type", ""))
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise InvalidParameter(
            "Send the adapter as multipart/form-data with parts named `files`.",
            code="unsupported_media_type",
            param="Content-Type",
        )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise TooLarge(f"The upload has {announced} bytes; at most {max_bytes} are accepted.", code="upload_too_large")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=scratch, prefix="upload-"))
        (folder / "adapter").mkdir()
    except OSError as error:
        raise _storage(error) from error
    try:
        received = Received(folder / "adapter")
        parser = _Parts(received, options["boundary"], max_bytes)
        try:
            async for piece in _pieces(request):
                # In a thread: the disk must not hold up other requests.
                await asyncio.to_thread(parser.feed, piece)
            await asyncio.to_thread(parser.end)
        finally:
            parser.close()
        return received
    except ClientDisconnect as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise InvalidParameter("The upload was cut off.", code="upload_interrupted") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


async def _pieces(request: Request, size: int = 2**20) -> AsyncIterator[bytes]:
    """The body in pieces of about a mebibyte, so that switching to a thread costs little."""
    waiting: list[bytes] = []
    length = total = 0
    began = time.monotonic()
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                chunk = await anext(stream)
        except StopAsyncIteration:
            break
        except TimeoutError as error:
            raise InvalidParameter(f"Nothing arrived for {IDLE_SECONDS:g} s.", code="upload_stalled") from error
        waiting.append(chunk)
        length += len(chunk)
        total += len(chunk)
        elapsed = time.monotonic() - began
        if elapsed > IDLE_SECONDS and total < MIN_RATE * elapsed:
            raise InvalidParameter(f"Less than {MIN_RATE} bytes/s arrived.", code="upload_stalled")
        if length >= size:
            yield b"".join(waiting)
            waiting, length = [], 0
    if waiting:
        yield b"".join(waiting)


class _Parts:
    """Writes each part of a multipart body where it belongs."""

    def __init__(self, received: Received, boundary: str, max_bytes: int) -> None:
        self._received = received
        self._parser = multipart.PushMultipartParser(boundary, max_segment_count=MAX_PARTS)
        self._room = max_bytes
        self._file: BinaryIO | None = None
        self._file_room = 0
        self._field: tuple[str, bytearray] | None = None

    def feed(self, piece: bytes) -> None:
        self._room -= len(piece)
        if self._room < 0:
            raise TooLarge("The upload is larger than what is accepted.", code="upload_too_large")
        try:
            for event in self._parser.parse(piece):
                if isinstance(event, multipart.MultipartSegment):
                    self._begin(event.name, event.filename)
                elif event is None:
                    self._finish()
                else:
                    self._write(event)
        except multipart.MultipartError as error:
            raise InvalidParameter(f"The multipart body is broken ({error}).", code="invalid_multipart") from error
        except OSError as error:
            raise _storage(error) from error

    def end(self) -> None:
        """Raises InvalidParameter where the last boundary never came."""
        try:
            self._parser.close()
        except multipart.MultipartError as error:
            raise InvalidParameter("The multipart body ends too early.", code="invalid_multipart") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _begin(self, name: str, filename: str | None) -> None:
        if name in FILES and not filename:
            raise InvalidParameter("A part `files` has no file name.", code="missing_filename", param="files")
        if filename is None:
            if name not in ("name", "sha256"):
                raise InvalidParameter(
                    f"Unknown field {name[:60]!r}.",
                    code="unknown_field",
                    param=name[:60],
                    hint="Known: files, name, sha256.",
                )
            self._field = (name, bytearray())
            return
        if name not in FILES:
            raise InvalidParameter(
                f"Unknown part {name[:60]!r}; files go into `files`.", code="unknown_field", param=name[:60]
            )
        # Browsers send `folder/name` for folders; only the last part is used, and only if it is a known name.
        plain = filename.replace("\\", "/").rpartition("/")[2]
        if plain.lower().endswith(ARCHIVES):
            if self._received.archive is not None:
                raise InvalidParameter("Two archives in one upload.", code="two_archives", param="files")
            self._received.archive = self._received.folder.parent / "archive"
            self._file = self._received.archive.open("xb")
            self._file_room = self._room
        elif is_wanted(plain):
            try:
                self._file = (self._received.folder / plain).open("xb")
                self._file_room = self._room if plain == WEIGHTS else MAX_COMPANION_BYTES
            except FileExistsError as error:
                raise InvalidParameter(f"{plain} was sent twice.", code="duplicate_file", param=plain) from error
        else:
            self._received.dropped.append((plain if plain.isprintable() else ascii(plain)[1:-1])[:200])

    def _write(self, data: bytes | bytearray) -> None:
        if self._field is not None:
            if len(self._field[1]) + len(data) > MAX_FIELD_BYTES:
                raise InvalidParameter(
                    f"The field {self._field[0]} is too long.", code="field_too_long", param=self._field[0]
                )
            self._field[1].extend(data)
        elif self._file is not None:
            self._file_room -= len(data)
            if self._file_room < 0:
                raise TooLarge("A companion file is too large.", code="companion_too_large", param="files")
            self._file.write(data)

    def _finish(self) -> None:
        if self._field is not None:
            name, raw = self._field
            try:
                self._received.fields[name] = raw.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise InvalidParameter(f"The field {name} is not UTF-8.", code="invalid_field", param=name) from error
            self._field = None
        if self._file is not None:
            self._file.close()
            self._file = None


def check(received: Received, max_bytes: int) -> tuple[Adapter, Path]:
    """Unpacks, reads and judges what was received; returns the record and the folder to be published.

    Runs in a thread. Raises InvalidAdapter, UnsupportedAdapter, InvalidArchive, InvalidParameter.
    """
    try:
        if received.archive is not None:
            if any(received.folder.iterdir()):
                raise InvalidParameter(
                    "Send either an archive or files, not both.", code="archive_and_files", param="files"
                )
            room = min(max_bytes, ROOM + GROWTH * received.archive.stat().st_size)
            received.dropped += unpack(received.archive, received.folder, is_wanted, room)
    except OSError as error:
        raise _storage(error) from error
    name = received.fields.get("name", "")
    if not name.isprintable() or len(name) > 200:
        raise InvalidParameter("`name` must be at most 200 printable characters.", code="invalid_name", param="name")
    description = describe(received.folder)
    check_finite(received.folder / WEIGHTS, description.header)
    dropped = sorted({name[:200] for name in received.dropped})
    if len(dropped) > MAX_DROPPED:
        dropped = [*dropped[:MAX_DROPPED], f"… and {len(dropped) - MAX_DROPPED} more"]
    adapter = adapter_record(new_id("adp"), name, received.folder, description, dropped=dropped, origin=Origin())
    wanted = received.fields.get("sha256", "").lower().removeprefix("sha256-")
    if wanted and wanted != adapter.sha256:
        raise InvalidAdapter(
            f"{WEIGHTS} arrived with SHA-256 {adapter.sha256}, not with the announced one.",
            code="checksum_mismatch",
            param="sha256",
            hint="Upload it again.",
        )
    return adapter, received.folder


def _storage(error: OSError) -> UserError | StorageFault:
    if error.errno in NO_SPACE:
        return StorageFault("The disk is full; nothing was kept.", code="disk_full")
    return StorageFault(f"The upload could not be written ({error.strerror}).")
