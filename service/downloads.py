"""Sending bytes: one file with its digest, or a folder as a tar that is written while it is sent."""

import base64
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from safegraft.files import CHUNK

BINARY: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
    206: {"description": "The part that Range asked for."},
}
END = b"\0" * (2 * tarfile.BLOCKSIZE)


def tar_schema() -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}}}


class StoredFile(FileResponse):
    """A file whose refusals of a Range have the shape of all errors; Starlette's own are plain text."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def checked(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                kept = {k.decode(): v.decode() for k, v in message["headers"] if k == b"content-range"}
                raise HTTPException(message["status"], "The Range cannot be served", headers=kept)
            await send(message)

        await super().__call__(scope, receive, checked)


def file_response(path: Path, sha256: str) -> FileResponse:
    """A file whose bytes never change, named by their hash; Starlette answers Range, If-Range and HEAD."""
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    headers = {
        "etag": f'"sha256-{sha256}"',
        "repr-digest": f"sha-256=:{digest}:",
        "cache-control": "private, immutable",
    }
    return StoredFile(path, media_type="application/octet-stream", filename=path.name, headers=headers)


def tar_size(paths: list[Path], folder: str, modified: int) -> int:
    """How many bytes `tar_stream` will yield for these files."""
    sizes = [(len(_header(path, folder, modified)), path.stat().st_size) for path in paths]
    return sum(header + size + _padding(size) for header, size in sizes) + len(END)


def tar_stream(paths: list[Path], folder: str, modified: int) -> Iterator[bytes]:
    """An uncompressed tar of the files below `folder`, without an index in memory or a copy on disk."""
    for path in paths:
        yield _header(path, folder, modified)
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                yield piece
        yield b"\0" * _padding(path.stat().st_size)
    yield END


def _header(path: Path, folder: str, modified: int) -> bytes:
    """One block, or three where the name is long."""
    info = tarfile.TarInfo(f"{folder}/{path.name}")
    info.size, info.mtime = path.stat().st_size, modified
    return info.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
