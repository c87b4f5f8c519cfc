"""A reader sees the old file, the new one or none, never half of one."""

import hashlib
from pathlib import Path

import pytest

from safegraft.errors import TooLarge
from safegraft.files import CHUNK, atomic_file, atomic_folder, folder_bytes, read_bounded, sha256_file, write_atomic


class Broken(Exception):
    pass


def test_a_written_file_has_its_bytes_and_can_be_read_by_all(tmp_path: Path) -> None:
    write_atomic(tmp_path / "new" / "x", b"data")
    assert (tmp_path / "new" / "x").read_bytes() == b"data"
    assert (tmp_path / "new" / "x").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x"]


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "x") as file:
        file.write(b"half")
        file.flush()
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_bytes() == b"half"


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(error), atomic_file(tmp_path / "x") as file:  # noqa: PT012
        file.write(b"new")
        raise error
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 1])
def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "x").write_bytes(data[:size])
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data[:size]).hexdigest()


def test_a_folder_appears_whole_and_can_be_read_by_all(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new" / "x") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "new" / "x").exists()
    assert (tmp_path / "new" / "x" / "a").read_text() == "a"
    assert (tmp_path / "new" / "x").stat().st_mode & 0o777 == 0o755
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x"]


def test_an_error_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(Broken), atomic_folder(tmp_path / "x") as folder:  # noqa: PT012
        (folder / "a").write_text("a")
        raise Broken
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "x"):
        pytest.fail("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_appeared_meanwhile_is_refused_and_kept(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "x") as folder:  # noqa: PT012
        (folder / "a").write_text("mine")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "a").write_text("theirs")
    assert (tmp_path / "x" / "a").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_small_file_is_read_and_a_large_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bounded(tmp_path / "x", 5) == b"12345"
    with pytest.raises(TooLarge) as refused:
        read_bounded(tmp_path / "x", 4)
    assert refused.value.code == "file_too_large"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "y").write_bytes(b"12")
    assert folder_bytes(tmp_path) == 7
