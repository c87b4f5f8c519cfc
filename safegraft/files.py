"""Writing files so that a reader never sees half of one, and hashing them.

A file appears under its name by `os.replace` after its bytes are on the disk; the folder is synced too, else the name
could be lost in a power cut.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from safegraft.errors import TooLarge

CHUNK = 2**20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Below it, no upload and no result of any use fits, and SQLite soon cannot even write that something was deleted.
MIN_FREE_BYTES = 2**25


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_room(*folders: Path) -> bool:
    """Whether the disks of these folders have MIN_FREE_BYTES left. Raises OSError."""
    return min(shutil.disk_usage(folder).free for folder in folders) >= MIN_FREE_BYTES


def folder_bytes(folder: Path) -> int:
    """Of all files below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_bounded(path: Path, most: int) -> bytes:
    """A file that is small by its nature. Raises TooLarge (`file_too_large`) where it has more than `most` bytes."""
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise TooLarge(
            f"{path} has more than {most} bytes, which no such file has.", code="file_too_large", param=str(path)
        )
    return data


def side_car_folder(out: Path) -> Path:
    """Where a method's side-car lies: beside the adapter, because servers want one .safetensors in an adapter's."""
    return out.with_name(f"{out.name}.side_car")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """An open file that becomes `path` when the block ends without an error, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "w+b") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        sync_folder(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Brings a folder's files and their names to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the block ends without an error.

    Raises FileExistsError where `target` exists already: nothing is ever overwritten.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already.")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".writing-"))
    try:
        yield beside
        beside.chmod(0o755)
        sync_tree(beside)
        try:
            os.rename(beside, target)
        except OSError as error:
            if target.exists():
                raise FileExistsError(f"{target} exists already.") from error
            raise
        sync_folder(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
