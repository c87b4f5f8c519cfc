"""Bytes: folders of files under a prefix, written once and never changed. Local files; S3 comes behind the same verbs.

Prefixes and names are made by this program from ids, never from what a customer sent.
"""

import os
import re
import shutil
import time
from pathlib import Path

from safegraft.errors import NotFound, StorageFault
from safegraft.files import sync_folder, sync_tree

PREFIX = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)*")


class LocalObjects:
    """Objects in a folder. Everything below `root` belongs to this store."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self.scratch = self._root / "scratch"  # on the same disk, so that publishing is a rename

    def publish(self, folder: Path, prefix: str) -> None:
        """Moves a finished folder to its prefix, in one step. A leftover of an earlier try is replaced."""
        target = self._folder(prefix)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                shutil.rmtree(target)
            # Before the record that will name them: a power cut must not leave a record of empty files.
            sync_tree(folder)
            os.rename(folder, target)
            sync_folder(target.parent)
        except OSError as error:
            raise StorageFault(f"Could not store {prefix} ({error.strerror}).", code="storage_fault") from error

    def fetch(self, prefix: str, folder: Path) -> None:
        """Brings all files of a prefix into a new folder, by hard links where the disk is the same."""
        source = self._folder(prefix)
        if not source.is_dir():
            raise StorageFault(f"The files of {prefix} are gone.", code="object_missing")
        folder.mkdir(parents=True)
        for path in source.iterdir():
            if path.is_file():
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

    def remove(self, prefix: str) -> None:
        """Deletes the bytes. Nothing happens where there are none."""
        shutil.rmtree(self._folder(prefix), ignore_errors=True)

    def sweep(self, age: float) -> None:
        """Deletes what killed processes left in scratch more than `age` seconds ago."""
        if not self.scratch.is_dir():
            return
        for path in self.scratch.iterdir():
            if time.time() - path.stat().st_mtime > age:
                shutil.rmtree(path, ignore_errors=True)

    def _folder(self, prefix: str) -> Path:
        if not PREFIX.fullmatch(prefix):
            raise ValueError(f"not a prefix: {prefix!r}")
        return self._root / prefix
