"""Target: an uploaded tar or zip, from its first byte to the files that it leaves in a folder."""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safegraft.archive import unpack
from safegraft.ingest import is_wanted
from tests.fuzz.mutation import Blindly, archive_file
from tests.fuzz.oracle import only_user_errors

MODULES = ("safegraft.archive",)
SMALL = 2**14
LIMIT = 2**20
# Some thousand files a second: in memory where there is such a place.
PLACE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def check(raw: bytes) -> str:
    """Nothing but wanted, regular files may appear, in the given folder alone, of no more bytes than allowed."""
    folder = Path(tempfile.mkdtemp(prefix="safegraft-fuzz-", dir=PLACE))
    try:
        (folder / "archive").write_bytes(raw)
        (folder / "a" / "out").mkdir(parents=True)
        code = only_user_errors(lambda: unpack(folder / "archive", folder / "a" / "out", is_wanted, LIMIT))
        assert sorted(path.name for path in folder.iterdir()) == ["a", "archive"], "a file outside"
        assert [path.name for path in (folder / "a").iterdir()] == ["out"], "a file outside"
        assert (folder / "archive").read_bytes() == raw, "the archive was written to"
        total = 0
        for path in (folder / "a" / "out").iterdir():
            assert is_wanted(path.name), path.name
            assert path.is_file(), path.name
            assert not path.is_symlink(), path.name
            total += path.stat().st_size
        assert total <= LIMIT, "more than allowed"
        return code
    finally:
        shutil.rmtree(folder)


def seeds() -> Iterator[bytes]:
    from tests.hostile.corpus import archives

    return archives(SMALL)


def mutate(raw: bytes, most: int, rng: random.Random, blindly: Blindly) -> bytes:
    return archive_file(raw, most, rng, blindly)
