"""Folders of files under a prefix."""

import io
import os
import time
from pathlib import Path

import pytest

from safegraft.errors import NotFound, StorageFault
from safegraft.stores.objects import LocalObjects


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "objects")


def folder(path: Path, **files: bytes) -> Path:
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_what_is_published_can_be_read_and_fetched(objects: LocalObjects, tmp_path: Path) -> None:
    source = folder(tmp_path / "made", one=b"1", two=b"22")
    objects.publish(source, "adapters/adp_1")
    assert not source.exists()
    assert objects.path("adapters/adp_1", "one").read_bytes() == b"1"
    objects.fetch("adapters/adp_1", tmp_path / "desk" / "adapter")
    assert contents(tmp_path / "desk" / "adapter") == {"one": b"1", "two": b"22"}
    # Removing what was fetched leaves the object alone, and the other way round.
    (tmp_path / "desk" / "adapter" / "one").unlink()
    assert objects.path("adapters/adp_1", "one").read_bytes() == b"1"
    objects.remove("adapters/adp_1")
    assert contents(tmp_path / "desk" / "adapter") == {"two": b"22"}


def test_publishing_replaces_a_leftover_whole(objects: LocalObjects, tmp_path: Path) -> None:
    objects.publish(folder(tmp_path / "first", one=b"1", old=b"1"), "realignments/rlg_1/1/report")
    objects.publish(folder(tmp_path / "second", one=b"2"), "realignments/rlg_1/1/report")
    objects.fetch("realignments/rlg_1/1/report", tmp_path / "out")
    assert contents(tmp_path / "out") == {"one": b"2"}


def test_removing_takes_all_below_and_nothing_beside(objects: LocalObjects, tmp_path: Path) -> None:
    for prefix in ("realignments/rlg_1/1/adapter", "realignments/rlg_1/1/report", "realignments/rlg_1/2/report"):
        objects.publish(folder(tmp_path / "made", one=b"1"), prefix)
    objects.remove("realignments/rlg_1/1")
    objects.remove("realignments/rlg_1/1")
    for prefix in ("realignments/rlg_1/1/adapter", "realignments/rlg_1/1/report"):
        with pytest.raises(NotFound):
            objects.path(prefix, "one")
    assert objects.path("realignments/rlg_1/2/report", "one").is_file()


def test_what_is_gone_is_our_fault_for_a_job_and_no_such_file_for_a_reader(
    objects: LocalObjects, tmp_path: Path
) -> None:
    with pytest.raises(StorageFault) as missing:
        objects.fetch("adapters/adp_1", tmp_path / "out")
    assert missing.value.code == "object_missing"
    with pytest.raises(NotFound):
        objects.path("adapters/adp_1", "one")
    with pytest.raises(StorageFault) as failed:
        objects.publish(tmp_path / "nothing", "adapters/adp_2")
    assert failed.value.code == "storage_fault"


@pytest.mark.parametrize(
    "name",
    ["../secret", "../../secret", "..", ".", "", "sub/inner", "sub", "/etc/passwd", "../adp_1/../secret", "one\x00"],
)
def test_names_reach_no_other_folder(objects: LocalObjects, tmp_path: Path, name: str) -> None:
    objects.publish(folder(tmp_path / "made", one=b"1"), "adapters/adp_1")
    root = tmp_path / "objects" / "adapters"
    (root / "secret").write_bytes(b"secret")
    (root.parent / "secret").write_bytes(b"secret")
    folder(root / "adp_1" / "sub", inner=b"secret")
    with pytest.raises(NotFound):
        objects.path("adapters/adp_1", name)


@pytest.mark.parametrize(
    "prefix", ["", "/", "..", "../x", "a/../b", "a//b", "/a", "a/", "A", "a.b", "a b", "a\n", "a/\x00", "ä"]
)
def test_prefixes_are_ids_and_slashes_only(objects: LocalObjects, tmp_path: Path, prefix: str) -> None:
    source = folder(tmp_path / "made", one=b"1")
    with pytest.raises(ValueError, match="not a prefix"):
        objects.publish(source, prefix)
    with pytest.raises(ValueError, match="not a prefix"):
        objects.fetch(prefix, tmp_path / "out")
    with pytest.raises(ValueError, match="not a prefix"):
        objects.path(prefix, "one")
    with pytest.raises(ValueError, match="not a prefix"):
        objects.remove(prefix)
    assert source.is_dir()


def test_single_files_are_put_measured_and_listed(objects: LocalObjects) -> None:
    prefix = "tenants/t/uploads/upl_1"
    assert objects.names(prefix) == []
    objects.put(prefix, "part_b", io.BytesIO(b"first"))
    objects.put(prefix, "part_b", io.BytesIO(b"second"))
    objects.put(prefix, "part_a", io.BytesIO(b""))
    assert objects.names(prefix) == ["part_a", "part_b"]
    assert (objects.size(prefix, "part_a"), objects.size(prefix, "part_b")) == (0, 6)
    with objects.open(prefix, "part_b") as file:
        assert file.read() == b"second"
    for missing in ("part_c", "..", ""):
        with pytest.raises(NotFound):
            objects.size(prefix, missing)
    for wrong in ("", "..", ".hidden", "a/b", "a\0", "ä"):
        with pytest.raises(ValueError, match="not a file's name"):
            objects.put(prefix, wrong, io.BytesIO(b"x"))


def test_prefixes_tell_when_something_was_written_last(objects: LocalObjects, tmp_path: Path) -> None:
    old = folder(tmp_path / "made", one=b"1")
    os.utime(old / "one", (1000, 1000))
    os.utime(old, (1000, 1000))
    began = time.time() - 1
    objects.publish(old, "tenants/t/adapters/adp_1")
    objects.put("tenants/t/adapters/adp_2/deep", "two", io.BytesIO(b"2"))
    found = dict(objects.prefixes("tenants/t/adapters"))
    assert list(found) == ["tenants/t/adapters/adp_1", "tenants/t/adapters/adp_2"]
    assert all(began <= changed <= time.time() + 1 for changed in found.values())
    assert [name for name, _ in objects.prefixes("tenants")] == ["tenants/t"]
    assert list(objects.prefixes("nothing")) == []
