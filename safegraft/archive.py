"""Takes an adapter folder out of an uploaded .tar or .zip: regular files by known names, nothing else.

A member's name decides only *whether* it is taken; where it is written is decided here. Links, devices, absolute
names and `..` refuse the whole archive, because an honest tool never writes them.
"""

import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from safegraft.errors import InvalidArchive, TooLarge
from safegraft.files import CHUNK

MAX_MEMBERS = 1000


def unpack(archive: Path, folder: Path, wanted: Callable[[str], bool], max_bytes: int) -> list[str]:
    """Writes the wanted files of `archive` flat into `folder`, returns the names that were left out.

    All taken files must lie in one folder of the archive. Raises InvalidArchive or TooLarge; `folder` may then hold a
    part of the files and is the caller's to remove.
    """
    dropped: list[str] = []
    parents: set[PurePosixPath] = set()
    room = max_bytes
    for name, opened in _members(archive):
        path = _safe_name(name)
        if not wanted(path.name):
            dropped.append(str(path))
            continue
        if path.parent not in parents and parents:
            raise InvalidArchive(
                f"The archive holds adapter files in two folders ({min(parents)} and {path.parent}).",
                code="archive_ambiguous",
                param=str(path),
            )
        parents.add(path.parent)
        target = folder / path.name
        if target.exists():
            raise InvalidArchive(f"{path} stands twice in the archive.", code="archive_duplicate", param=str(path))
        with opened() as source, target.open("xb") as out:
            while piece := _read(source):
                room -= len(piece)
                if room < 0:
                    raise TooLarge(f"The archive unpacks to more than {max_bytes} bytes.", code="archive_too_large")
                out.write(piece)
    return dropped


def _read(source: IO[bytes]) -> bytes:
    try:
        return source.read(CHUNK)
    except (zipfile.BadZipFile, zlib.error, tarfile.TarError, EOFError) as error:
        raise InvalidArchive(f"A member cannot be read ({error}).", code="archive_unreadable") from error


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    if zipfile.is_zipfile(archive):
        yield from _zip_members(archive)
    elif tarfile.is_tarfile(archive):
        yield from _tar_members(archive)
    else:
        raise InvalidArchive("The file is neither a readable zip nor an uncompressed tar.", code="archive_unreadable")


def _zip_members(archive: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    try:
        with zipfile.ZipFile(archive) as file:
            infos = file.infolist()
            _count(len(infos))
            for info in infos:
                mode = info.external_attr >> 16
                if info.is_dir():
                    _safe_name(info.filename)
                    continue
                if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
                    _refuse_kind(info.filename)
                if info.flag_bits & 1:
                    raise InvalidArchive("The zip is encrypted.", code="archive_encrypted", param=info.filename)
                yield info.filename, lambda info=info: file.open(info)  # type: ignore[misc]
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        raise InvalidArchive(f"The zip cannot be read ({error}).", code="archive_unreadable") from error


def _tar_members(archive: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    try:
        with tarfile.open(archive, mode="r:") as file:
            for number, info in enumerate(file):
                _count(number + 1)
                if info.isdir():
                    _safe_name(info.name)
                    continue
                if not info.isreg():
                    _refuse_kind(info.name)
                source = file.extractfile(info)
                assert source is not None
                yield info.name, lambda source=source: source  # type: ignore[misc]
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise InvalidArchive(
            f"The tar cannot be read ({error}).",
            code="archive_unreadable",
            hint="Send an uncompressed .tar or a .zip; weights do not compress.",
        ) from error


def _count(members: int) -> None:
    if members > MAX_MEMBERS:
        raise InvalidArchive(f"The archive has more than {MAX_MEMBERS} members.", code="archive_too_many_members")


def _safe_name(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    printable = name.isprintable() and len(name) <= 512
    if not printable or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise InvalidArchive(
            f"The archive names a path outside its folder: {ascii(name)[:120]}.",
            code="archive_unsafe_path",
            param=ascii(name)[:120],
        )
    return path


def _refuse_kind(name: str) -> None:
    raise InvalidArchive(
        f"{ascii(name)[:120]} is a link or a device; only regular files are taken.",
        code="archive_unsafe_member",
        param=ascii(name)[:120],
    )
