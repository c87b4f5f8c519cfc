"""Takes an adapter folder out of an uploaded .tar or .zip: regular files by known names, nothing else.

A member's name decides only *whether* it is taken; where it is written is decided here. Links, devices, absolute
names and `..` refuse the whole archive, because an honest tool never writes them.

A tar is walked here, header by header, and not by `tarfile.open`: that reads headers of any claimed length into memory,
parses them with a pattern that backtracks (CVE-2024-6232) and can be led around in circles (CVE-2025-8194).
"""

import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from safegraft.errors import InvalidArchive, TooLarge
from safegraft.files import CHUNK

MAX_MEMBERS = 1000
# Most bytes of a zip's list of contents, and of one long-name or pax block of a tar.
MAX_DIRECTORY = 2**21
MAX_EXTENSION = 2**16
TAR_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
# Methods whose memory does not depend on what the archive claims.
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Bytes before a member's name and data, at the least.
ZIP_HEADER = 30
# What zipfile raises on broken or hostile bytes.
ZIP_FAULTS = (
    zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError, OSError, ValueError, OverflowError,
)  # fmt: skip


def unpack(archive: Path, folder: Path, wanted: Callable[[str], bool], max_bytes: int) -> list[str]:
    """Writes the wanted files of `archive` flat into `folder`, returns the names that were left out.

    All taken files must lie in one folder of the archive. Raises InvalidArchive or TooLarge; `folder` may then hold a
    part of the files and is the caller's to remove.
    """
    dropped: list[str] = []
    parents: set[PurePosixPath] = set()
    room = max_bytes
    for name, pieces in _members(archive):
        path = _safe_name(name)
        if not wanted(path.name):
            dropped.append(str(path))
            continue
        if path.parent not in parents and parents:
            raise InvalidArchive(
                f"The archive holds adapter files in two folders ({min(parents)} and {path.parent}).",
                code="archive_ambiguous",
                param=str(path),
                hint="Archive one adapter's folder, without those within it: tar --exclude='checkpoint-*' -cf …",
            )
        parents.add(path.parent)
        target = folder / path.name
        if target.exists():
            raise InvalidArchive(f"{path} stands twice in the archive.", code="archive_duplicate", param=str(path))
        with target.open("xb") as out:
            for piece in pieces:
                room -= len(piece)
                if room < 0:
                    raise TooLarge(f"The archive unpacks to more than {max_bytes} bytes.", code="archive_too_large")
                out.write(piece)
    return dropped


def _members(archive: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Each regular file's name and bytes; the bytes are read only if asked for, and before the next member."""
    with archive.open("rb") as file:
        # Not `zipfile.is_zipfile`: that finds a zip at the *end* of a file, such as a PyTorch pickle in a tar.
        is_zip = file.read(2) == b"PK"
    yield from _zip_members(archive) if is_zip else _tar_members(archive)


class _Bounded(io.BufferedReader):
    """Keeps zipfile from reading a list of contents of any claimed length into memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile("its list of contents is too long")
        return super().read(size)


def _zip_members(archive: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    with _Bounded(io.FileIO(archive)) as raw:
        try:
            file = zipfile.ZipFile(raw)
        except ZIP_FAULTS as error:
            raise InvalidArchive(f"The zip cannot be read ({_why(error)}).", code="archive_unreadable") from error
        infos = file.infolist()
        _count(len(infos))
        _refuse_shared_bytes(infos, file.start_dir)
        for info in infos:
            # zipfile ends a name at its first NUL and shows the rest to nobody.
            if "\0" in info.orig_filename:
                _safe_name(info.orig_filename)
            mode = info.external_attr >> 16
            if info.filename.endswith("/"):
                _safe_name(info.filename)
                continue
            if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
                _refuse_kind(info.filename)
            if info.flag_bits & 1:
                raise InvalidArchive(
                    "The zip is encrypted.", code="archive_encrypted", param=ascii(info.filename)[:120]
                )
            yield info.filename, _zip_pieces(file, info)


def _why(error: Exception) -> str:
    # zipfile quotes names, which may have 65,535 letters.
    return ascii(str(error)[:120])[1:-1]


def _refuse_shared_bytes(infos: list[zipfile.ZipInfo], end: int) -> None:
    """Members over the same bytes make small archives large (CVE-2024-0450). Not every Python 3.11 looks for that."""
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        if info.header_offset + ZIP_HEADER + info.compress_size > end:
            raise InvalidArchive(
                "The zip cannot be read (its members share bytes, or lie beyond its end).",
                code="archive_unreadable",
                param=ascii(info.filename)[:120],
            )
        end = info.header_offset


def _zip_pieces(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        if info.compress_type not in ZIP_METHODS:
            raise zipfile.BadZipFile("neither stored nor deflated")
        with file.open(info) as source:
            while piece := source.read(CHUNK):
                yield piece
    except ZIP_FAULTS as error:
        raise InvalidArchive(f"A member cannot be read ({_why(error)}).", code="archive_unreadable") from error


def _tar_members(archive: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    members = extensions = 0
    pax: dict[str, str] = {}
    end = archive.stat().st_size
    with archive.open("rb") as file:
        # Ends at a block of zeros, as every tool writes it, or with the file.
        while (block := file.read(tarfile.BLOCKSIZE)).strip(b"\0") or members + extensions == 0:
            info = _tar_header(block)
            extends = info.type in TAR_EXTENSIONS
            body, size = file.tell(), info.size if extends else int(pax.get("size", info.size))
            if not 0 <= size <= end - body:
                raise _unreadable_tar(f"{ascii(info.name)[:80]} claims {size} bytes")
            if extends:
                extensions += 1
                _count(extensions)
                pax |= _tar_extension(info.type, file.read(min(size, MAX_EXTENSION + 1)))
                file.seek(body + _padded(size))
                continue
            members += 1
            _count(members)
            name = pax.get("path", info.name)
            if info.isdir():
                _safe_name(name)
            elif info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or any("sparse" in key for key in pax):
                _refuse_kind(name)
            else:
                yield name, _tar_pieces(file, size)
            file.seek(body + _padded(size))
            pax = {}


def _tar_header(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        raise _unreadable_tar(_why(error)) from error


def _tar_extension(kind: bytes, raw: bytes) -> dict[str, str]:
    """What a GNU long-name or a pax block says about the next member, by pax's names."""
    if len(raw) > MAX_EXTENSION:
        raise _unreadable_tar("a header is too long")
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": raw.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    at = 0
    # Records of `length SPACE key=value NEWLINE`, where the length counts the whole record.
    while kind == tarfile.XHDTYPE and at < len(raw):
        space = raw.find(b" ", at, at + 12)
        length = int(raw[at:space]) if space > at and raw[at:space].isdigit() else 0
        if not 0 < space - at < length <= len(raw) - at:
            raise _unreadable_tar("a pax header is broken")
        key, _, value = raw[space + 1 : at + length - 1].partition(b"=")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at += length
    if not found.get("size", "0").isdecimal() or len(found.get("size", "")) > 19:
        raise _unreadable_tar("a pax header is broken")
    return found


def _tar_pieces(file: BinaryIO, left: int) -> Iterator[bytes]:
    while left:
        piece = file.read(min(CHUNK, left))
        if not piece:
            raise _unreadable_tar("it ends within a member")
        left -= len(piece)
        yield piece


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _unreadable_tar(why: str) -> InvalidArchive:
    return InvalidArchive(
        f"The file is neither a readable zip nor an uncompressed tar ({why}).",
        code="archive_unreadable",
        hint="Send an uncompressed .tar or a .zip; weights do not compress.",
    )


def _count(members: int) -> None:
    if members > MAX_MEMBERS:
        raise InvalidArchive(f"The archive has more than {MAX_MEMBERS} members.", code="archive_too_many_members")


def _safe_name(name: str) -> PurePosixPath:
    """Raises InvalidArchive also for names of files that would not be kept: what wrote them is not to be trusted."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        fault = "a path outside its folder"
    elif not name.isprintable():
        fault = "a path with a letter that cannot be printed"
    elif "\\" in name or ":" in name:
        fault = "a path with a backslash or a colon, which some systems take for another folder"
    elif len(name) > 512 or len(path.name.encode()) > 255:
        fault = "a path that is longer than 512 letters, or a file's name longer than 255 bytes"
    else:
        return path
    raise InvalidArchive(
        f"The archive names {fault}: {ascii(name)[:120]}.", code="archive_unsafe_path", param=ascii(name)[:120]
    )


def _refuse_kind(name: str) -> None:
    raise InvalidArchive(
        f"{ascii(name)[:120]} is a link or a device; only regular files are taken.",
        code="archive_unsafe_member",
        param=ascii(name)[:120],
    )
