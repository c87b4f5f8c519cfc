"""Bytes: folders of files under a prefix, written once and never changed.

Prefixes and names are made by this program from ids, never from what a customer sent; every prefix begins with the
tenant's.
"""

import errno
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from safegraft import failpoints
from safegraft.adapter import CONFIG, MAX_CONFIG_BYTES, WEIGHTS, AdapterDescription, pair_modules, parse_config
from safegraft.errors import InvalidParameter, NotFound, SafegraftError, StorageFault
from safegraft.files import CHUNK, atomic_file, sync_folder, sync_tree
from safegraft.header import header_of
from safegraft.settings import SharedSettings

log = logging.getLogger("safegraft.storage")
PREFIX = re.compile(r"[a-z0-9_][a-z0-9_-]*(/[a-z0-9_][a-z0-9_-]*)*")
# Names are the allow-list's for adapters, and otherwise made by this program.
NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,254}")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Longer than anything in scratch stays without a byte written to it: a job's longest stage, for one.
SCRATCH_SECONDS = 24 * 3600.0


def adapter_prefix(tenant: str, adapter_id: str) -> str:
    return f"tenants/{tenant}/adapters/{adapter_id}"


def job_prefix(tenant: str, job_id: str) -> str:
    """Everything of all attempts."""
    return f"tenants/{tenant}/realignments/{job_id}"


def result_prefix(tenant: str, job_id: str, attempt: int) -> str:
    """Results lie under job *and* attempt: a late zombie can leave an orphan, never a wrong result."""
    return f"tenants/{tenant}/realignments/{job_id}/{attempt}"


def file_prefix(tenant: str, file_id: str) -> str:
    return f"tenants/{tenant}/files/{file_id}"


def upload_prefix(tenant: str, upload_id: str) -> str:
    return f"tenants/{tenant}/uploads/{upload_id}"


class Objects(Protocol):
    """What gateway and worker need of a place for bytes. Raises StorageFault where that place fails."""

    scratch: Path
    """A local folder for what is being received or made."""

    def publish(self, folder: Path, prefix: str) -> None:
        """Puts all files of a finished folder under the prefix; `folder` may be gone afterwards."""

    def put(self, prefix: str, name: str, source: BinaryIO) -> None:
        """Stores what `source` still holds as one file, in one step: nobody ever reads half of it. Replaces."""

    def fetch(self, prefix: str, folder: Path) -> None:
        """Brings all files of a prefix into a new local folder."""

    def open(self, prefix: str, name: str) -> BinaryIO:
        """The file for reading and seeking. Raises NotFound."""

    def local(self, prefix: str, name: str) -> Path | None:
        """Its path, where it is a file of this machine; else None. Raises NotFound where it is neither."""

    def url(self, prefix: str, name: str, *, filename: str, media_type: str) -> str | None:
        """An address from which a client can fetch it for a while without us; None where there is no such thing."""

    def put_url(self, prefix: str, name: str) -> str | None:
        """An address to which a client can PUT the file for a while, past us; None where there is no such thing."""

    def size(self, prefix: str, name: str) -> int:
        """The file's bytes. Raises NotFound."""

    def names(self, prefix: str) -> list[str]:
        """The files directly below a prefix, sorted; none where there is no such prefix."""

    def prefixes(self, root: str) -> Iterator[tuple[str, float]]:
        """The prefixes directly below `root`, and when anything below each was written last, in Unix seconds.

        By the clock of the place itself. For example `tenants/acme/adapters` → (`tenants/acme/adapters/adp_1`, …).
        """

    def remove(self, prefix: str) -> None:
        """Deletes the bytes below a prefix. Nothing happens where there are none."""

    def sweep(self, *, dry_run: bool = False) -> list[int]:
        """Deletes what killed processes left in this machine's scratch. Returns the bytes of each thing there.

        With `dry_run` nothing is deleted.
        """

    def ping(self) -> bool:
        """Can it be written to?"""


class LocalObjects:
    """Objects in a folder. Everything below `root` belongs to this store."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self.scratch = self._root / "scratch"  # on the same disk, so that publishing is a rename

    def publish(self, folder: Path, prefix: str) -> None:
        """Moves a finished folder to its prefix, in one step. A leftover of an earlier try is replaced."""
        target = self._folder(prefix)
        try:
            failpoints.hit("store.publish")
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                shutil.rmtree(target)
            # Before the record that will name them: a power cut must not leave a record of empty files.
            sync_tree(folder)
            os.utime(folder)  # written now, however old its files are: `prefixes` tells so
            os.rename(folder, target)
            sync_folder(target.parent)
        except OSError as error:
            raise not_stored(prefix, error) from error

    def put(self, prefix: str, name: str, source: BinaryIO) -> None:
        path = self._folder(prefix) / checked_name(name)
        try:
            with atomic_file(path) as file:
                shutil.copyfileobj(source, file, CHUNK)
        except OSError as error:
            raise not_stored(prefix, error) from error

    def fetch(self, prefix: str, folder: Path) -> None:
        """Brings all files of a prefix into a new folder, by hard links where the disk is the same."""
        source = self._folder(prefix)
        if not source.is_dir():
            raise StorageFault(f"The files of {prefix} are gone.", code="object_missing")
        folder.mkdir(parents=True)
        for path in source.iterdir():
            if NAME.fullmatch(path.name) and path.is_file():  # others are still being written
                try:
                    os.link(path, folder / path.name)
                except OSError:
                    shutil.copyfile(path, folder / path.name)

    def path(self, prefix: str, name: str) -> Path:
        """The file `name` of a prefix, for reading. Raises NotFound."""
        path = self._folder(prefix) / name
        if path.parent != self._folder(prefix) or not path.is_file():
            raise NotFound(f"There is no file {name[:80]!r}.", code="file_not_found", param="name")
        return path

    def open(self, prefix: str, name: str) -> BinaryIO:
        try:
            return self.path(prefix, name).open("rb")
        except FileNotFoundError as error:
            raise NotFound("The file was deleted.", code="file_not_found") from error

    def local(self, prefix: str, name: str) -> Path | None:
        return self.path(prefix, name)

    def url(self, prefix: str, name: str, *, filename: str, media_type: str) -> str | None:
        return None

    def put_url(self, prefix: str, name: str) -> str | None:
        return None

    def size(self, prefix: str, name: str) -> int:
        try:
            return self.path(prefix, name).stat().st_size
        except FileNotFoundError as error:
            raise NotFound("The file was deleted.", code="file_not_found") from error

    def names(self, prefix: str) -> list[str]:
        try:
            found = list(self._folder(prefix).iterdir())
        except FileNotFoundError:
            return []
        return sorted(path.name for path in found if NAME.fullmatch(path.name) and path.is_file())

    def prefixes(self, root: str) -> Iterator[tuple[str, float]]:
        try:
            found = sorted(self._folder(root).iterdir())
        except FileNotFoundError:
            return
        for path in found:
            changed = _newest(path) if path.is_dir() else None
            if changed is not None:
                yield f"{root}/{path.name}", changed

    def ping(self) -> bool:
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
        except OSError:
            return False
        return os.access(self.scratch, os.W_OK)

    def remove(self, prefix: str) -> None:
        """Deletes the bytes. Nothing happens where there are none."""
        folder = self._folder(prefix)
        _delete(folder)
        if os.path.lexists(folder):
            raise StorageFault(f"The bytes of {prefix} could not be removed.")
        # Folders of a job that are empty now; `tenants/x/adapters` and the like stay, where others write.
        while len(folder.relative_to(self._root).parts) > 4:
            folder = folder.parent
            try:
                folder.rmdir()
            except OSError:
                break

    def sweep(self, *, dry_run: bool = False) -> list[int]:
        return sweep_folder(self.scratch, dry_run=dry_run)

    def _folder(self, prefix: str) -> Path:
        return self._root / checked_prefix(prefix)


def checked_prefix(prefix: str) -> str:
    """Raises ValueError for what is no prefix."""
    if not PREFIX.fullmatch(prefix):
        raise ValueError(f"not a prefix: {prefix!r}")
    return prefix


def checked_name(name: str) -> str:
    """Raises ValueError for what is no name of a single stored file."""
    if not NAME.fullmatch(name):
        raise ValueError(f"not a file's name: {name!r}")
    return name


def remove_or_leave(objects: Objects, prefix: str) -> None:
    """Removes bytes that no record names any more. Where that fails now, the garbage collector finds them."""
    try:
        objects.remove(prefix)
    except (SafegraftError, OSError):
        log.warning(
            "the bytes of %s could not be removed; they are left to the garbage collector", prefix, exc_info=True
        )


def not_stored(prefix: str, error: OSError) -> StorageFault:
    if error.errno in NO_SPACE:
        return StorageFault(f"The disk is full; {prefix} was not stored.", code="disk_full")
    return StorageFault(f"Could not store {prefix} ({error.strerror}).", code="storage_fault")


def sweep_folder(folder: Path, age: float = SCRATCH_SECONDS, *, dry_run: bool = False) -> list[int]:
    """Deletes what lies in a scratch folder and was written to last more than `age` seconds ago, in any depth.

    Returns the bytes of each thing that went (with `dry_run`: that would go). What cannot be deleted stays.
    """
    found: list[int] = []
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        changed = _newest(path)
        if changed is None or time.time() - changed <= age:
            continue
        size = sum(status.st_size for status in _statuses(path) if stat.S_ISREG(status.st_mode))
        if not dry_run:
            _delete(path)
            if os.path.lexists(path):
                log.warning("%s was left in scratch and cannot be removed", path)
                continue
        found.append(size)
    return found


def _newest(path: Path) -> float | None:
    """When a file, or a folder or anything below it, changed last; None where it is gone (by now)."""
    return max((status.st_mtime for status in _statuses(path)), default=None)


def _statuses(path: Path) -> Iterator[os.stat_result]:
    """Of a path and all that is below it. Others may remove some of it while we look."""
    names = [str(path)]
    for folder, folders, files in os.walk(path):  # which passes over what it cannot read
        names += [os.path.join(folder, name) for name in (*folders, *files)]
    for name in names:
        with suppress(FileNotFoundError, NotADirectoryError):
            yield os.lstat(name)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def open_objects(settings: SharedSettings) -> Objects:
    """The place that the settings name. Raises InvalidParameter for an address that is none."""
    if settings.storage_url:
        try:
            from safegraft.stores.s3 import S3Objects
        except ImportError as error:
            raise InvalidParameter(
                f"Bytes are to lie in {settings.storage_url}, but the package obstore is missing.",
                code="no_object_store",
                param="SAFEGRAFT_STORAGE_URL",
                hint="pip install 'safegraft[scaled]'",
            ) from error
        return S3Objects(settings)
    return LocalObjects(settings.objects)


def describe_stored(objects: Objects, prefix: str) -> AdapterDescription:
    """What a stored adapter's configuration and header say; its weights are not read."""
    with objects.open(prefix, CONFIG) as file:
        config = parse_config(file.read(MAX_CONFIG_BYTES + 1))
    with objects.open(prefix, WEIGHTS) as file:
        return pair_modules(config, header_of(file))
