"""Sending bytes: one file with its digest, or a folder as a tar that is written while it is sent.

A file of this machine is sent from its disk. One in an object store is not sent by us at all: the client is sent to a
presigned address. Reports are small, and their headers must be ours: they are read and sent on both.
"""

import base64
import hashlib
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, BinaryIO
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import FileResponse, RedirectResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from safegraft.contracts.adapter import AdapterFile
from safegraft.errors import NotFound, StorageFault
from safegraft.files import CHUNK
from safegraft.stores.objects import Objects

CONDITIONS: dict[int | str, dict[str, Any]] = {304: {"description": "If-None-Match names what would be sent."}}
FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
    206: {"description": "The part that Range asked for."},
    **CONDITIONS,
    307: {"description": "Where bytes lie in an object store: the file is at Location, for a few minutes."},
}
OCTETS = "application/octet-stream"
# 14.1.2 of RFC 9110; numbers of more digits than any file has bytes are not read.
RANGES = re.compile(rb"(?i:bytes)=\s*(\d{1,18}-\d{0,18}|-\d{1,18})(\s*,\s*(\d{1,18}-\d{0,18}|-\d{1,18}))*")
PIECE = 4 * CHUNK  # of a tar; in an object store each is one request
END = b"\0" * (2 * tarfile.BLOCKSIZE)


def tar_schema() -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}}, **CONDITIONS}


class StoredFile(FileResponse):
    """A file of this machine: Starlette answers Range, If-Range and HEAD; refusals have the shape of all errors."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def checked(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                kept = {k.decode(): v.decode() for k, v in message["headers"] if k == b"content-range"}
                raise HTTPException(message["status"], "The Range cannot be served", headers=kept)
            await send(message)

        try:
            await super().__call__(_without_invalid_range(scope), receive, checked)
        except RuntimeError as error:
            # Starlette's word for a file that was deleted after it was looked up.
            if "does not exist" not in str(error):
                raise
            raise NotFound("The file was deleted.", code="file_not_found") from error


def stored_file(
    request: Request, objects: Objects, prefix: str, name: str, sha256: str, *, filename: str = ""
) -> Response:
    """A file whose bytes never change, named by their hash; filename: under which it is to be saved, if not `name`.

    Raises NotFound.
    """
    headers = {**_named_by(sha256), "cache-control": "private, immutable", "x-content-type-options": "nosniff"}
    headers["content-disposition"] = attachment(filename or name)
    path = objects.local(prefix, name)
    if answer := _condition(request, headers):
        return answer
    if path is not None:
        return StoredFile(path, media_type=OCTETS, headers=headers)
    if request.method == "HEAD" or _store_would_misjudge(request, headers["etag"]):
        headers |= {
            "content-length": str(objects.size(prefix, name)),
            "accept-ranges": "bytes",
        }
        if request.method == "HEAD":
            return Response(media_type=OCTETS, headers=headers)
        return StreamingResponse(_whole(objects.open(prefix, name)), media_type=OCTETS, headers=headers)
    url = objects.url(prefix, name, filename=filename or name, media_type=OCTETS)
    if url is None:
        raise StorageFault(f"{prefix} is neither on this machine nor at an address.")
    # Neither ETag nor digest: they would be those of this empty answer. The address ends, so that nobody may keep it.
    return RedirectResponse(url, status_code=307, headers={"cache-control": "no-store"})


def attachment(filename: str) -> str:
    """A Content-Disposition (RFC 6266) for any name."""
    quoted = quote(filename, safe="")
    return f'attachment; filename="{filename}"' if quoted == filename else f"attachment; filename*=utf-8''{quoted}"


def small_file(request: Request, data: bytes, *, media_type: str, headers: Mapping[str, str]) -> Response:
    """Bytes that are at hand, whole: no Range."""
    named = {**_named_by(hashlib.sha256(data).hexdigest()), "cache-control": "private, no-cache", **headers}
    if answer := _condition(request, named):
        return answer
    if request.method == "HEAD":
        return Response(media_type=media_type, headers=named | {"content-length": str(len(data))})
    return Response(data, media_type=media_type, headers=named)


def read(objects: Objects, prefix: str, name: str) -> bytes:
    """A small file, whole. Raises NotFound."""
    with objects.open(prefix, name) as file:
        return file.read()


def tar_file(
    request: Request, objects: Objects, prefix: str, files: list[AdapterFile], folder: str, modified: int
) -> Response:
    """The files as an uncompressed tar below `folder`; modified: Unix seconds. Raises NotFound."""
    # Files never change, so that what makes the tar names it.
    parts = [folder, str(modified), *(f"{file.name} {file.sha256}" for file in files)]
    named = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    headers = {"etag": f'"tar-{named}"', "cache-control": "private, no-cache"}
    if answer := _condition(request, headers):
        return answer
    tar = Tar(objects, prefix, files, folder, modified)
    headers |= {
        "content-disposition": f'attachment; filename="{folder}.tar"',
        "content-length": str(tar.size),
        "accept-ranges": "none",
    }
    if request.method == "HEAD":
        tar.close()
        return Response(media_type="application/x-tar", headers=headers)
    return StreamingResponse(tar.stream(), media_type="application/x-tar", headers=headers)


def _named_by(sha256: str) -> dict[str, str]:
    """RFC 9110's ETag and RFC 9530's Repr-Digest, both of the whole file."""
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    return {"etag": f'"sha256-{sha256}"', "repr-digest": f"sha-256=:{digest}:"}


def _condition(request: Request, headers: Mapping[str, str]) -> Response | None:
    """The answer to If-Match and If-None-Match (RFC 9110, 13.2.2); None where the file is to be sent."""
    wanted = request.headers.getlist("if-match")
    if wanted and not _matches(wanted, headers["etag"], weak=False):
        raise HTTPException(412, "The file is not the one that If-Match names")
    known = request.headers.getlist("if-none-match")
    if known and _matches(known, headers["etag"], weak=True):
        return Response(status_code=304, headers=dict(headers))
    return None


def _store_would_misjudge(request: Request, etag: str) -> bool:
    """Clients send their conditions to the address too, and an object store knows files by other tags than ours.

    If-Match would fail there. An If-Range that names another file asks for all of this one; some stores ignore it.
    """
    if_range = request.headers.get("if-range")
    return "if-match" in request.headers or ("range" in request.headers and if_range not in (None, etag))


def _whole(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(PIECE):
            yield piece


def _matches(values: list[str], etag: str, *, weak: bool) -> bool:
    given = [item.strip() for value in values for item in value.split(",")]
    return "*" in given or etag in ([item.removeprefix("W/") for item in given] if weak else given)


def _without_invalid_range(scope: Scope) -> Scope:
    """A Range of another unit than bytes is to be ignored, and one that is none may be (RFC 9110, 14.2)."""
    kept = [(key, value) for key, value in scope["headers"] if key != b"range" or _is_range(value)]
    return {**scope, "headers": kept}


def _is_range(value: bytes) -> bool:
    if not RANGES.fullmatch(value.strip()):
        return False
    pairs = [part.strip().split(b"-") for part in value.partition(b"=")[2].split(b",")]
    return all(not first or not last or int(first) <= int(last) for first, last in pairs)


class Tar:
    """An uncompressed tar of files below `folder`, without an index in memory or a copy on disk.

    All files are opened first: a local one that is deleted meanwhile is still sent whole. Raises NotFound.
    """

    def __init__(self, objects: Objects, prefix: str, files: list[AdapterFile], folder: str, modified: int) -> None:
        self._open = ExitStack()
        self._members: list[tuple[bytes, BinaryIO, int]] = []
        try:
            for item in files:
                file = self._open.enter_context(objects.open(prefix, item.name))
                info = tarfile.TarInfo(f"{folder}/{item.name}")
                info.size, info.mtime = item.bytes, modified
                # One block, or three where the name is long.
                self._members.append((info.tobuf(tarfile.GNU_FORMAT), file, item.bytes))
        except NotFound as error:
            self.close()
            raise NotFound("The adapter was deleted.", code="adapter_not_found") from error

    @property
    def size(self) -> int:
        """How many bytes `stream` yields."""
        return sum(len(header) + size + _padding(size) for header, _, size in self._members) + len(END)

    def stream(self) -> Iterator[bytes]:
        with self._open:
            for header, file, size in self._members:
                yield header
                left = size
                while piece := file.read(min(PIECE, left)):
                    left -= len(piece)
                    yield piece
                if left:
                    # The connection is cut: its length was announced, so that nobody takes this for a whole tar.
                    raise StorageFault("A file is shorter than its record says.")
                yield b"\0" * _padding(size)
            yield END

    def close(self) -> None:
        self._open.close()


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
