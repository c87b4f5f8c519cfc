"""Folders of files under a prefix: what every place for bytes does, and what is only one's own."""

import io
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from safegraft.errors import InvalidParameter, NotFound, StorageFault
from safegraft.settings import SharedSettings
from safegraft.stores.objects import LocalObjects, Objects, open_objects, remove_or_leave
from tests.scaled import free_port

LARGE = 20 * 2**20 + 12345


@pytest.fixture(params=["local", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    """Every place for bytes in turn. The S3 server is a real process."""
    url = request.getfixturevalue("storage_url")() if request.param == "s3" else ""
    return open_objects(SharedSettings(data=tmp_path / "data", storage_url=url))


@pytest.fixture
def s3(storage_url: Callable[[], str], tmp_path: Path) -> Callable[..., Objects]:
    """Opens a new place in S3 with other settings."""
    return lambda **settings: open_objects(
        SharedSettings(data=tmp_path / "data", **({"storage_url": storage_url()} | settings))
    )


def folder(path: Path, **files: bytes) -> Path:
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def read(objects: Objects, prefix: str, name: str) -> bytes:
    with objects.open(prefix, name) as file:
        return file.read()


class Slow(io.RawIOBase):
    """A source that gives less than it is asked for, as sockets do, and may break off."""

    def __init__(self, data: bytes, fault: Exception | None = None) -> None:
        self._data, self._fault = io.BytesIO(data), fault

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        piece = self._data.read(min(size, 700_001) if size >= 0 else 700_001)
        if not piece and self._fault is not None:
            raise self._fault
        return piece


# Folders


def test_what_is_published_can_be_read_and_fetched(objects: Objects, tmp_path: Path) -> None:
    objects.publish(folder(tmp_path / "made", one=b"1", two=b"22"), "adapters/adp_1")
    assert read(objects, "adapters/adp_1", "one") == b"1"
    objects.fetch("adapters/adp_1", tmp_path / "desk" / "adapter")
    assert contents(tmp_path / "desk" / "adapter") == {"one": b"1", "two": b"22"}
    # Removing what was fetched leaves the object alone, and the other way round.
    (tmp_path / "desk" / "adapter" / "one").unlink()
    assert read(objects, "adapters/adp_1", "one") == b"1"
    objects.remove("adapters/adp_1")
    assert contents(tmp_path / "desk" / "adapter") == {"two": b"22"}


def test_publishing_replaces_a_leftover_whole(objects: Objects, tmp_path: Path) -> None:
    objects.publish(folder(tmp_path / "first", one=b"1", old=b"1"), "realignments/rlg_1/1/report")
    objects.publish(folder(tmp_path / "second", one=b"2"), "realignments/rlg_1/1/report")
    objects.fetch("realignments/rlg_1/1/report", tmp_path / "out")
    assert contents(tmp_path / "out") == {"one": b"2"}


def test_folders_in_a_folder_are_prefixes_below(objects: Objects, tmp_path: Path) -> None:
    made = folder(tmp_path / "made", one=b"1")
    folder(made / "sub", two=b"22")
    objects.publish(made, "realignments/rlg_1/1")
    assert read(objects, "realignments/rlg_1/1/sub", "two") == b"22"
    assert objects.names("realignments/rlg_1/1") == ["one"]
    objects.fetch("realignments/rlg_1/1", tmp_path / "out")
    assert contents(tmp_path / "out") == {"one": b"1"}


def test_removing_takes_all_below_and_nothing_beside(objects: Objects, tmp_path: Path) -> None:
    places = ("rlg_1/1/adapter", "rlg_1/1/report", "rlg_1/2/report", "rlg_1/11/report", "rlg_1/1-x/report")
    for place in places:
        folder(tmp_path / "made", one=b"1")
        objects.publish(tmp_path / "made", f"realignments/{place}")
        subprocess.run(["rm", "-rf", str(tmp_path / "made")], check=True)
    objects.remove("realignments/rlg_1/1")
    objects.remove("realignments/rlg_1/1")
    for place in places[:2]:
        with pytest.raises(NotFound):
            objects.open(f"realignments/{place}", "one")
    for place in places[2:]:
        assert read(objects, f"realignments/{place}", "one") == b"1"


def test_what_is_gone_is_our_fault_for_a_job_and_no_such_file_for_a_reader(objects: Objects, tmp_path: Path) -> None:
    with pytest.raises(StorageFault) as missing:
        objects.fetch("adapters/adp_1", tmp_path / "out")
    assert missing.value.code == "object_missing"
    for ask in (objects.open, objects.size, objects.local):
        with pytest.raises(NotFound) as gone:
            ask("adapters/adp_1", "one")
        assert gone.value.code == "file_not_found"
    with pytest.raises(StorageFault) as failed:
        objects.publish(tmp_path / "nothing", "adapters/adp_2")
    assert failed.value.code == "storage_fault"


@pytest.mark.parametrize(
    "name",
    ["../secret", "../../secret", "..", ".", "", "sub/inner", "sub", "/etc/passwd", "../adp_1/../secret", "one\x00",
     "%2e%2e", "one ", "ONE"],
)  # fmt: skip
def test_names_reach_no_other_folder(objects: Objects, tmp_path: Path, name: str) -> None:
    made = folder(tmp_path / "made", one=b"1")
    folder(made / "sub", inner=b"secret")
    objects.publish(made, "adapters/adp_1")
    objects.put("adapters", "secret", io.BytesIO(b"secret"))
    for ask in (objects.open, objects.size, objects.local):
        with pytest.raises(NotFound):
            ask("adapters/adp_1", name)


@pytest.mark.parametrize(
    "prefix", ["", "/", "..", "../x", "a/../b", "a//b", "/a", "a/", "A", "a.b", "a b", "a\n", "a/\x00", "ä"]
)
def test_prefixes_are_ids_and_slashes_only(objects: Objects, tmp_path: Path, prefix: str) -> None:
    source = folder(tmp_path / "made", one=b"1")
    asked: list[Callable[[], Any]] = [
        lambda: objects.publish(source, prefix),
        lambda: objects.put(prefix, "one", io.BytesIO(b"1")),
        lambda: objects.fetch(prefix, tmp_path / "out"),
        lambda: objects.open(prefix, "one"),
        lambda: objects.names(prefix),
        lambda: list(objects.prefixes(prefix)),
        lambda: objects.remove(prefix),
    ]
    for ask in asked:
        with pytest.raises(ValueError, match="not a prefix"):
            ask()
    assert source.is_dir()


# Files


def test_single_files_are_put_measured_and_listed(objects: Objects) -> None:
    prefix = "tenants/t/uploads/upl_1"
    assert objects.names(prefix) == []
    objects.put(prefix, "part_b", io.BytesIO(b"first"))
    objects.put(prefix, "part_b", io.BytesIO(b"second"))
    objects.put(prefix, "part_a", io.BytesIO(b""))
    objects.put(prefix, "side+car_1e-05.safetensors", io.BytesIO(b"odd"))
    assert objects.names(prefix) == ["part_a", "part_b", "side+car_1e-05.safetensors"]
    assert (objects.size(prefix, "part_a"), objects.size(prefix, "part_b")) == (0, 6)
    assert [read(objects, prefix, name) for name in objects.names(prefix)] == [b"", b"second", b"odd"]
    for missing in ("part_c", "..", ""):
        with pytest.raises(NotFound):
            objects.size(prefix, missing)
    for wrong in ("", "..", ".hidden", "a/b", "a\0", "ä"):
        with pytest.raises(ValueError, match="not a file's name"):
            objects.put(prefix, wrong, io.BytesIO(b"x"))


@pytest.mark.parametrize("size", [8 * 2**20 - 1, 8 * 2**20, 16 * 2**20, LARGE])
def test_large_files_arrive_whole(objects: Objects, tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    objects.put("large", "one", Slow(data))  # type: ignore[arg-type]
    assert objects.size("large", "one") == size
    objects.fetch("large", tmp_path / "out")
    assert (tmp_path / "out" / "one").read_bytes() == data


def test_a_file_can_be_read_from_anywhere(objects: Objects) -> None:
    data = random.Random(1).randbytes(LARGE)
    objects.put("large", "one", io.BytesIO(data))
    with objects.open("large", "one") as file:
        assert file.seekable()
        assert file.read(10) == data[:10]
        assert file.seek(-7, os.SEEK_END) == LARGE - 7
        assert file.read() == data[-7:]
        assert file.read(5) == b""
        file.seek(9_000_000)
        assert file.read(3_000_000) == data[9_000_000:12_000_000]
        file.seek(-1_000_000, os.SEEK_CUR)
        assert file.tell() == 11_000_000
        assert file.read(1) == data[11_000_000:11_000_001]
        file.seek(LARGE + 10)
        assert file.read() == b""
        file.seek(0)
        assert file.read() == data


@pytest.mark.parametrize("size", [1000, LARGE])
def test_a_source_that_breaks_off_leaves_what_was_there(objects: Objects, size: int) -> None:
    objects.put("place", "one", io.BytesIO(b"before"))
    with pytest.raises(ZeroDivisionError):
        objects.put("place", "one", Slow(b"x" * size, ZeroDivisionError()))  # type: ignore[arg-type]
    with pytest.raises(StorageFault) as full:
        objects.put("place", "two", Slow(b"x" * size, OSError(28, "No space left on device")))  # type: ignore[arg-type]
    assert full.value.code == "disk_full"
    assert objects.names("place") == ["one"]
    assert read(objects, "place", "one") == b"before"


def test_prefixes_tell_when_something_was_written_last(objects: Objects, tmp_path: Path) -> None:
    old = folder(tmp_path / "made", one=b"1")
    os.utime(old / "one", (1000, 1000))
    os.utime(old, (1000, 1000))
    began = time.time() - 2
    objects.publish(old, "tenants/t/adapters/adp_1")
    objects.put("tenants/t/adapters/adp_2/deep", "two", io.BytesIO(b"2"))
    found = dict(objects.prefixes("tenants/t/adapters"))
    assert list(found) == ["tenants/t/adapters/adp_1", "tenants/t/adapters/adp_2"]
    assert all(began <= changed <= time.time() + 2 for changed in found.values())
    assert [name for name, _ in objects.prefixes("tenants")] == ["tenants/t"]
    assert list(objects.prefixes("nothing")) == []


def test_a_thousand_files_are_listed_and_removed(objects: Objects) -> None:
    for number in range(1100):
        objects.put("many", f"part_{number:04}", io.BytesIO(b""))
    objects.put("many-more", "one", io.BytesIO(b""))
    assert len(objects.names("many")) == 1100
    objects.remove("many")
    assert objects.names("many") == []
    assert objects.names("many-more") == ["one"]


def test_a_place_says_that_it_works(objects: Objects) -> None:
    assert objects.ping()
    assert objects.scratch.is_dir()


def test_what_killed_processes_left_is_swept(objects: Objects) -> None:
    assert objects.sweep() == []
    folder(objects.scratch / "new", one=b"1")
    folder(objects.scratch / "old", one=b"1")
    # An upload in its second day: its folder was made yesterday, and a byte arrives now.
    folder(objects.scratch / "long" / "adapter", one=b"22")
    (objects.scratch / "file").write_bytes(b"333")
    for path in objects.scratch.rglob("*"):
        if "new" not in path.parts:
            os.utime(path, (1000, 1000))
    os.utime(objects.scratch / "long" / "adapter" / "one")
    assert sorted(objects.sweep(dry_run=True)) == [1, 3]
    assert len(list(objects.scratch.iterdir())) == 4
    assert sorted(objects.sweep()) == [1, 3]
    assert sorted(path.name for path in objects.scratch.iterdir()) == ["long", "new"]


# One's own


def test_local_files_are_files_and_have_no_address(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path / "objects")
    source = folder(tmp_path / "made", one=b"1")
    objects.publish(source, "adapters/adp_1")
    assert not source.exists()
    assert objects.local("adapters/adp_1", "one") == tmp_path / "objects" / "adapters" / "adp_1" / "one"
    assert objects.url("adapters/adp_1", "one", filename="one", media_type="a/b") is None
    assert objects.put_url("adapters/adp_1", "one") is None


def test_bytes_that_cannot_be_removed_are_no_success(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    objects = LocalObjects(tmp_path / "objects")
    objects.put("adapters/adp_1", "one", io.BytesIO(b"1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rmdir", _refuse)  # which shutil.rmtree ends with
        with pytest.raises(StorageFault):
            objects.remove("adapters/adp_1")
        remove_or_leave(objects, "adapters/adp_1")
    assert "adapters/adp_1 could not be removed" in caplog.text
    objects.remove("adapters/adp_1")
    objects.remove("adapters/adp_1")


def _refuse(*_: object, **__: object) -> None:
    raise PermissionError(1, "not permitted")


def test_clients_fetch_past_us_by_an_address_that_is_signed(s3: Callable[..., Objects]) -> None:
    objects = s3(presign_seconds=60)
    objects.put("adapters/adp_1", "one", io.BytesIO(b"0123456789"))
    assert objects.local("adapters/adp_1", "one") is None
    url = objects.url("adapters/adp_1", "one", filename="one", media_type="application/octet-stream")
    assert url is not None
    assert "X-Amz-Expires=60&" in url
    answer = httpx.get(url, trust_env=False)
    assert answer.content == b"0123456789"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == 'attachment; filename="one"'
    assert httpx.get(url, headers={"range": "bytes=2-3"}, trust_env=False).content == b"23"


def test_clients_put_past_us_by_an_address_that_is_signed(s3: Callable[..., Objects]) -> None:
    objects = s3()
    url = objects.put_url("tenants/t/uploads/upl_1", "part_1")
    assert url is not None
    assert httpx.put(url, content=b"bytes", trust_env=False).is_success
    assert read(objects, "tenants/t/uploads/upl_1", "part_1") == b"bytes"
    with pytest.raises(ValueError, match="not a file's name"):
        objects.put_url("tenants/t/uploads/upl_1", "../part")


def test_addresses_for_clients_may_name_another_host(s3: Callable[..., Objects]) -> None:
    objects = s3(storage_public_url="https://bytes.example.com")
    objects.put("a", "one", io.BytesIO(b"1"))
    for url in (objects.url("a", "one", filename="one", media_type="a/b"), objects.put_url("a", "two")):
        assert url is not None
        assert url.startswith("https://bytes.example.com/")
        assert "X-Amz-Signature=" in url
    assert read(objects, "a", "one") == b"1"


def test_a_server_that_is_silent_is_our_fault_and_told_without_its_address(
    s3: Callable[..., Objects], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from safegraft.stores import s3 as module

    monkeypatch.setattr(module, "PATIENT", module.IMPATIENT)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    objects = s3()
    asked: list[Callable[[], Any]] = [
        lambda: objects.publish(folder(tmp_path / "made", one=b"1"), "a"),
        lambda: objects.put("a", "one", io.BytesIO(b"1")),
        lambda: objects.fetch("a", tmp_path / "out"),
        lambda: objects.open("a", "one"),
        lambda: objects.size("a", "one"),
        lambda: objects.names("a"),
        lambda: list(objects.prefixes("a")),
        lambda: objects.remove("a"),
    ]
    for ask in asked:
        with pytest.raises(StorageFault) as silent:
            ask()
        assert silent.value.code == "storage_unavailable"
        assert "127.0.0.1" not in str(silent.value)
    assert not objects.ping()


def test_a_bucket_that_is_missing_is_our_fault(s3: Callable[..., Objects], tmp_path: Path) -> None:
    objects = s3(storage_url="s3://no-such-bucket/x")
    assert not objects.ping()
    for ask in (
        lambda: objects.put("a", "one", io.BytesIO(b"1")),
        lambda: objects.put("a", "one", io.BytesIO(b"1" * LARGE)),
        lambda: objects.publish(folder(tmp_path / "made", one=b"1"), "a"),
        lambda: objects.fetch("a", tmp_path / "out"),
        lambda: objects.names("a"),
        lambda: list(objects.prefixes("a")),
        lambda: objects.remove("a"),
    ):
        with pytest.raises(StorageFault) as missing:
            ask()
        assert missing.value.code == "storage_unavailable"


@pytest.mark.parametrize(
    "url", ["s3:/bucket", "s3://", "gs://bucket/x", "bucket/x", "s3://bucket/a//b", "s3://b/x?y=1"]
)
def test_addresses_that_are_none_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter) as wrong:
        open_objects(SharedSettings(data=tmp_path, storage_url=url))
    assert (wrong.value.code, wrong.value.param) == ("bad_storage_url", "SAFEGRAFT_STORAGE_URL")


def test_without_obstore_the_local_install_works_and_the_other_says_what_is_missing(tmp_path: Path) -> None:
    program = f"""
import sys
sys.modules["obstore"] = None
from safegraft.errors import InvalidParameter
from safegraft.settings import SharedSettings
from safegraft.stores.objects import open_objects
assert open_objects(SharedSettings(data={str(tmp_path)!r}, storage_url="")).ping()
try:
    open_objects(SharedSettings(data={str(tmp_path)!r}, storage_url="s3://bucket"))
except InvalidParameter as error:
    print(error.code, error)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("no_object_store ")
    assert "pip install 'safegraft[scaled]'" in ended.stdout
