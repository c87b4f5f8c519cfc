"""What was delivered as an adapter: unpacked, read, judged, hashed. Paths only; no HTTP, no database.

Everything here touches bytes that a stranger sent; the gateway runs it in a process of its own
(`service/validation.py`).
"""

import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from safegraft.adapter import CONFIG, WEIGHTS, describe, is_companion, refuse_missing
from safegraft.archive import unpack
from safegraft.contracts.adapter import Adapter, Origin
from safegraft.errors import InvalidAdapter, InvalidParameter, StorageFault, TooLarge
from safegraft.files import NO_SPACE
from safegraft.finite import check_finite
from safegraft.records import adapter_record

# Compressed tars too: whoever sends one is to read that it must not be compressed, not that a file is missing.
ARCHIVES = (".tar", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# Weights hardly compress. What grows beyond this much and this many times over is a bomb.
ROOM, GROWTH = 2**26, 20
MAX_COMPANION_BYTES = 2**26
MAX_DROPPED = 100


@dataclass
class Delivery:
    """What arrived: wanted files under their own names in `folder`, and an archive beside it where one was sent."""

    folder: Path
    archive: Path | None = None
    name: str = ""
    sha256: str = ""
    dropped: list[str] = field(default_factory=list)

    def place(self, filename: str) -> Path | None:
        """Where a file of this name belongs, so far as nothing lies there yet; None where it is not kept.

        Raises InvalidParameter (`two_archives`, `duplicate_file`).
        """
        # Browsers send `folder/name` for folders; only the last part is used, and only if it is a known name.
        plain = filename.replace("\\", "/").rpartition("/")[2]
        if plain.lower().endswith(ARCHIVES):
            if self.archive is not None:
                raise InvalidParameter("Two archives in one upload.", code="two_archives", param="files")
            self.archive = self.folder.parent / "archive"
            return self.archive
        if not is_wanted(plain):
            self.dropped.append((plain if plain.isprintable() else ascii(plain)[1:-1])[:200])
            return None
        if (self.folder / plain).exists():
            raise InvalidParameter(f"{plain} was sent twice.", code="duplicate_file", param=plain)
        return self.folder / plain


def is_wanted(name: str) -> bool:
    """Adapter files and companions; pickles, checkpoints and code are not."""
    return name in (CONFIG, WEIGHTS) or is_companion(name)


def ingest(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    """Judges a delivery and returns its record; `delivery.folder` then holds exactly the adapter's files.

    Raises InvalidAdapter, UnsupportedAdapter, InvalidArchive, InvalidParameter, TooLarge, StorageFault.
    """
    folder, dropped = delivery.folder, delivery.dropped
    name = _checked_name(delivery.name)
    if delivery.archive is not None:
        dropped = dropped + _unpacked(delivery.archive, folder, max_bytes)
    description = describe(folder)
    check_finite(folder / WEIGHTS, description.header)
    adapter = adapter_record(adapter_id, name, folder, description, dropped=_listed(dropped), origin=Origin())
    wanted = delivery.sha256.strip().lower().removeprefix("sha256-")
    if wanted and wanted != adapter.sha256:
        raise InvalidAdapter(
            f"{WEIGHTS} arrived with SHA-256 {adapter.sha256}, not with the announced one.",
            code="checksum_mismatch",
            param="sha256",
            hint="Upload it again.",
        )
    return adapter


def _checked_name(given: str) -> str:
    name = given.strip()
    if not name.isprintable() or len(name) > 200:
        raise InvalidParameter("`name` must be at most 200 printable characters.", code="invalid_name", param="name")
    return name


def _unpacked(archive: Path, folder: Path, max_bytes: int) -> list[str]:
    if any(folder.iterdir()):
        raise InvalidParameter("Send either an archive or files, not both.", code="archive_and_files", param="files")
    room = min(max_bytes, ROOM + GROWTH * archive.stat().st_size)
    try:
        dropped = unpack(archive, folder, is_wanted, room)
        _refuse_large_companions(folder)
        return dropped
    except OSError as error:
        if error.errno in NO_SPACE:
            raise StorageFault("The disk is full; nothing was kept.", code="disk_full") from error
        if error.errno == errno.EFBIG:  # this process may not write larger files
            raise TooLarge("The archive unpacks to more than is accepted.", code="archive_too_large") from error
        raise StorageFault(f"The archive could not be unpacked ({error.strerror}).") from error


def _refuse_large_companions(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != WEIGHTS:
            check_companion(path.stat().st_size)


def check_companion(size: int) -> None:
    """Raises TooLarge (`companion_too_large`) for a file beside the weights that no tokenizer is as large as."""
    if size > MAX_COMPANION_BYTES:
        raise TooLarge("A companion file is too large.", code="companion_too_large", param="files")


def companions_of(folder: Path) -> list[str]:
    """Names of the files that are kept byte for byte, of a folder on a disk that a stranger may have made: files of the
    folder itself, reached by links or not, or of the Hugging Face cache that it is a snapshot of.

    Raises InvalidAdapter (`missing_config`, `missing_weights`, `not_a_file`, `link_leaves_folder`) and TooLarge
    (`companion_too_large`), which name the file.
    """
    refuse_missing(folder)
    home = Path(os.path.realpath(folder))
    names = sorted(path.name for path in folder.iterdir() if is_companion(path.name))
    for name in (CONFIG, WEIGHTS, *names):
        _refuse_foreign(name, home)
        if name in names:
            _refuse_large_or_endless(name, home)
    return names


def _refuse_foreign(name: str, home: Path) -> None:
    """A link to another place would bring a file of whoever runs this into a result that is handed on."""
    target = Path(os.path.realpath(home / name))
    cached = _blobs(home)
    if target.is_relative_to(home) or (cached is not None and target.is_relative_to(cached)):
        return
    raise InvalidAdapter(
        f"{name} is a link that leads out of its folder, to {target}.",
        code="link_leaves_folder",
        param=name,
        hint="If that file belongs to the adapter, put a copy of it in the place of the link.",
    )


def _blobs(home: Path) -> Path | None:
    """Where the files of a snapshot in a Hugging Face cache lie: `models--…/snapshots/<revision>` links to
    `models--…/blobs`, and to nothing else."""
    for folder in home.parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return folder.parent / "blobs"
    return None


def _refuse_large_or_endless(name: str, home: Path) -> None:
    try:
        found = (home / name).stat()
    except OSError as error:
        raise InvalidAdapter(
            f"{name} cannot be read ({error.strerror}).",
            code="not_a_file",
            param=name,
            hint="Remove it, or put the file there that it stands for.",
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise InvalidAdapter(
            f"{name} is no regular file.",
            code="not_a_file",
            param=name,
            hint="Remove the folder, pipe or device of that name, or what links to it.",
        )
    if found.st_size > MAX_COMPANION_BYTES:
        raise TooLarge(
            f"{name} has {found.st_size} bytes; a file beside the weights may have {MAX_COMPANION_BYTES}.",
            code="companion_too_large",
            param=name,
            hint="Remove it; no tokenizer is as large.",
        )


def _listed(names: list[str]) -> list[str]:
    found = sorted({name[:200] for name in names})
    return found if len(found) <= MAX_DROPPED else [*found[:MAX_DROPPED], f"… and {len(found) - MAX_DROPPED} more"]
