"""Sending bytes: one file with its digest, or a folder as a tar that is written while it is sent."""

import base64
import contextlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from safegraft.errors import NotFound, StorageFault
from safegraft.files import CHUNK
from safegraft.stores.objects import Objects

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

        try:
            await super().__call__(scope, receive, checked)
        except RuntimeError as error:
            # Starlette's word for a file that was deleted after it was looked up.
            if "does not exist" not in str(error):
                raise
            raise NotFound("The file was deleted.", code="file_not_found") from error


def file_response(path: Path, sha256: str) -> FileResponse:
    """A file whose bytes never change, named by their hash; Starlette answers Range, If-Range and HEAD."""
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    headers = {
        "etag": f'"sha256-{sha256}"',
        "repr-digest": f"sha-256=:{digest}:",
        "cache-control": "private, immutable",
    }
    return StoredFile(path, media_type="application/octet-stream", filename=path.name, headers=headers)


def local_path(objects: Objects, prefix: str, name: str) -> Path:
    """Raises NotFound."""
    path = objects.local(prefix, name)
    if path is None:
        raise StorageFault(f"{prefix} is not on this machine.")
    return path


class Tar:
    """An uncompressed tar of files below `folder`, without an index in memory or a copy on disk.

    All files are opened first, so that one that is deleted meanwhile is still sent whole. Raises NotFound.
    """

    def __init__(self, paths: list[Path], folder: str, modified: int) -> None:
        self._open = contextlib.ExitStack()
        self._members: list[tuple[bytes, BinaryIO, int]] = []
        try:
            for path in paths:
                file = self._open.enter_context(path.open("rb"))
                size = os.fstat(file.fileno()).st_size
                info = tarfile.TarInfo(f"{folder}/{path.name}")
                info.size, info.mtime = size, modified
                # One block, or three where the name is long.
                self._members.append((info.tobuf(tarfile.GNU_FORMAT), file, size))
        except FileNotFoundError as error:
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
                while piece := file.read(CHUNK):
                    yield piece
                yield b"\0" * _padding(size)
            yield END

    def close(self) -> None:
        self._open.close()


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
