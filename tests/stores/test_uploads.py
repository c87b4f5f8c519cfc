"""Uploads in parts, files and quotas, on the records and on real bytes."""

import hashlib
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.engine import Engine

from safegraft.contracts.files import Upload, UploadComplete, UploadCreate, UploadPart
from safegraft.errors import Conflict, NotFound, QuotaExceeded, SafegraftError, StorageFault, TooLarge
from safegraft.ids import new_id
from safegraft.stores import quotas, stitching, totals
from safegraft.stores import uploads as uploads_module
from safegraft.stores.adapters import AdapterStore
from safegraft.stores.database import files, now, reading, uploads
from safegraft.stores.files import CONTENT, FileStore, NewFile
from safegraft.stores.jobs import JobStore
from safegraft.stores.objects import LocalObjects, file_prefix, upload_prefix
from safegraft.stores.uploads import PART, UploadStore, part_prefix
from tests.stores.records import adapter, claimed

TENANT = "t"


@pytest.fixture
def store(engine: Engine) -> UploadStore:
    return UploadStore(engine, seconds=3600)


@pytest.fixture
def kept(engine: Engine) -> FileStore:
    return FileStore(engine)


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "objects")


def begun(store: UploadStore, size: int, **values: Any) -> Upload:
    request = {"purpose": "fine-tune", "filename": "a.tar", "bytes": size, "mime_type": "application/x-tar", **values}
    return store.create(TENANT, UploadCreate.model_validate(request))


def sent(store: UploadStore, objects: LocalObjects, upload: Upload, data: bytes, **values: Any) -> UploadPart:
    part_id = new_id("part")
    objects.put(part_prefix(TENANT, upload.id, part_id), PART, io.BytesIO(data))
    given = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), **values}
    return store.add_part(TENANT, upload.id, part_id, **given)


def completed(store: UploadStore, objects: LocalObjects, upload: Upload, *parts: UploadPart, **values: Any) -> Upload:
    request = UploadComplete(part_ids=[part.id for part in parts], **values)
    return stitching.complete(store, objects, TENANT, upload.id, request)


def content(objects: LocalObjects, kept: FileStore, upload: Upload) -> bytes:
    assert upload.file is not None
    with objects.open(kept.get(TENANT, upload.file.id).prefix, CONTENT) as file:
        return file.read()


def stored(objects: LocalObjects) -> list[Path]:
    return sorted(path for path in (objects.scratch.parent / "tenants").rglob("*") if path.is_file())


def refused(code: str) -> Any:
    return pytest.raises(SafegraftError, check=lambda error: error.code == code)


def test_parts_become_a_file_in_the_order_that_complete_names(
    store: UploadStore, kept: FileStore, objects: LocalObjects
) -> None:
    upload = begun(store, 6)
    assert (upload.status, upload.file, upload.expires_at - upload.created_at) == ("pending", None, 3600)
    first, second, wrong = (sent(store, objects, upload, data) for data in (b"abc", b"def", b"unused"))
    assert [part.id for part in store.parts(TENANT, upload.id, limit=10)[0]] == [first.id, second.id, wrong.id]
    done = completed(
        store,
        objects,
        upload,
        second,
        first,
        md5=hashlib.md5(b"defabc").hexdigest().upper(),
        sha256=f"sha256-{hashlib.sha256(b'defabc').hexdigest()}",
    )
    assert done.status == "completed"
    assert done.file is not None
    assert (done.file.bytes, done.file.filename, done.file.purpose) == (6, "a.tar", "fine-tune")
    assert content(objects, kept, done) == b"defabc"
    assert kept.get(TENANT, done.file.id).sha256 == hashlib.sha256(b"defabc").hexdigest()
    # Its parts are gone, records and bytes.
    assert store.parts(TENANT, upload.id, limit=10) == ([], False)
    assert len(stored(objects)) == 1


def test_completing_again_changes_nothing(store: UploadStore, objects: LocalObjects) -> None:
    upload = begun(store, 6)
    first, second = sent(store, objects, upload, b"abc"), sent(store, objects, upload, b"def")
    done = completed(store, objects, upload, first, second)
    assert completed(store, objects, upload, first, second) == done == store.get(TENANT, upload.id)
    # Not with other parts: whoever sends them means another file.
    with refused("upload_not_pending"):
        completed(store, objects, upload, second, first)
    assert len(stored(objects)) == 1


def test_completing_at_the_same_time_makes_one_file(store: UploadStore, objects: LocalObjects, engine: Engine) -> None:
    upload = begun(store, 2**21)
    parts = [sent(store, objects, upload, bytes([n]) * 2**18) for n in range(8)]
    together = threading.Barrier(4)

    def complete(_: int) -> Upload:
        together.wait()
        return completed(store, objects, upload, *parts)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(complete, range(4)))
    assert len({answer.model_dump_json() for answer in answers}) == 1
    with reading(engine) as connection:
        assert connection.execute(select(func.count()).select_from(files)).scalar_one() == 1
    assert len(stored(objects)) == 1


def test_what_does_not_fit_together_is_refused_and_can_be_completed_yet(
    store: UploadStore, kept: FileStore, objects: LocalObjects
) -> None:
    upload, other = begun(store, 6), begun(store, 3)
    first, second = sent(store, objects, upload, b"abc"), sent(store, objects, upload, b"def")
    foreign = sent(store, objects, other, b"ghi")
    for code, parts, values in (
        ("upload_incomplete", [first], {}),
        ("upload_incomplete", [first, second, sent(store, objects, upload, b"x")], {}),
        ("duplicate_part", [first, first], {}),
        ("part_not_found", [first, foreign], {}),
        ("checksum_mismatch", [second, first], {"md5": hashlib.md5(b"abcdef").hexdigest()}),
        ("checksum_mismatch", [second, first], {"sha256": hashlib.sha256(b"abcdef").hexdigest()}),
    ):
        with refused(code):
            completed(store, objects, upload, *parts, **values)
        assert store.get(TENANT, upload.id).status == "pending"
    assert not list((objects.scratch.parent / "tenants" / TENANT).glob("files/*"))
    assert content(objects, kept, completed(store, objects, upload, first, second)) == b"abcdef"


def test_bytes_that_are_not_the_recorded_ones_are_refused(store: UploadStore, objects: LocalObjects) -> None:
    for code, data, record in (
        ("part_mismatch", b"abX", {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}),
        ("part_mismatch", b"ab", {"size": 3, "sha256": None}),
        ("part_too_large", b"abcd", {"size": 3, "sha256": None}),
    ):
        upload = begun(store, 3)
        part = sent(store, objects, upload, data, **record)
        with refused(code):
            completed(store, objects, upload, part)
    # Sent past us, so to say: a record, and no bytes.
    upload = begun(store, 3)
    part = store.add_part(TENANT, upload.id, new_id("part"), 3, None)
    with refused("part_missing"):
        completed(store, objects, upload, part)
    objects.put(part_prefix(TENANT, upload.id, part.id), PART, io.BytesIO(b"abc"))
    assert completed(store, objects, upload, part).status == "completed"


class Failing(LocalObjects):
    """A store that breaks while a file is put, in one of two ways."""

    def __init__(self, root: Path, *, after: bool) -> None:
        super().__init__(root)
        self.broken = True
        self._after = after

    def put(self, prefix: str, name: str, source: Any) -> None:
        if self.broken and "/files/" in prefix:
            if self._after:
                super().put(prefix, name, source)
            else:
                source.read(2)
            raise StorageFault("The disk is full.", code="disk_full")
        super().put(prefix, name, source)


@pytest.mark.parametrize("after", [False, True])
def test_a_store_that_fails_leaves_the_upload_pending(
    store: UploadStore, kept: FileStore, tmp_path: Path, after: bool
) -> None:
    objects = Failing(tmp_path / "objects", after=after)
    upload = begun(store, 6)
    parts = [sent(store, objects, upload, b"abc"), sent(store, objects, upload, b"def")]
    with refused("disk_full"):
        completed(store, objects, upload, *parts)
    assert len(stored(objects)) == 2
    objects.broken = False
    assert content(objects, kept, completed(store, objects, upload, *parts)) == b"abcdef"


def test_an_upload_that_was_ended_takes_nothing_more(store: UploadStore, objects: LocalObjects) -> None:
    upload = begun(store, 3)
    part = sent(store, objects, upload, b"abc")
    assert store.cancel(TENANT, upload.id).status == store.cancel(TENANT, upload.id).status == "cancelled"
    for again in (
        lambda: store.require_pending(TENANT, upload.id),
        lambda: store.add_part(TENANT, upload.id, new_id("part"), 1, None),
        lambda: completed(store, objects, upload, part),
    ):
        with pytest.raises(Conflict):
            again()
    done = begun(store, 3)
    completed(store, objects, done, sent(store, objects, done, b"abc"))
    with pytest.raises(Conflict):
        store.cancel(TENANT, done.id)


def test_one_tenants_uploads_are_no_other_ones(store: UploadStore, kept: FileStore, objects: LocalObjects) -> None:
    upload = begun(store, 3)
    part = sent(store, objects, upload, b"abc")
    done = begun(store, 3)
    file = completed(store, objects, done, sent(store, objects, done, b"abc")).file
    assert file is not None
    for ask in (
        lambda: store.get("other", upload.id),
        lambda: store.require_pending("other", upload.id),
        lambda: store.add_part("other", upload.id, new_id("part"), 1, None),
        lambda: store.parts("other", upload.id, limit=1),
        lambda: store.chosen("other", upload.id, [part.id]),
        lambda: store.completed("other", upload.id, [part.id]),
        lambda: store.cancel("other", upload.id),
        lambda: kept.get("other", file.id),
        lambda: kept.delete("other", file.id),
    ):
        with pytest.raises(NotFound):
            ask()
    assert kept.page("other", limit=10) == ([], False)


def test_an_upload_expires_with_its_parts(engine: Engine, objects: LocalObjects) -> None:
    brief, store = UploadStore(engine, seconds=-1), UploadStore(engine, seconds=3600)
    late, alive = begun(brief, 3), begun(store, 3)
    assert late.status == "expired"
    with pytest.raises(Conflict):
        brief.add_part(TENANT, late.id, new_id("part"), 1, None)
    sent(store, objects, alive, b"abc")
    over = begun(store, 3)
    sent(store, objects, over, b"abc")
    _let_expire(engine, over)
    assert sorted(store.expire()) == sorted([upload_prefix(TENANT, late.id), upload_prefix(TENANT, over.id)])
    # Until it is told that the bytes are gone: a collector may be killed in between.
    assert len(store.expire()) == 2
    store.emptied(store.expire())
    assert store.expire() == []
    assert store.get(TENANT, over.id).status == "expired"
    assert store.parts(TENANT, over.id, limit=10) == ([], False)
    assert len(store.parts(TENANT, alive.id, limit=10)[0]) == 1


def test_what_a_crash_left_of_ended_uploads_is_named_when_their_time_is_over(
    engine: Engine, store: UploadStore, objects: LocalObjects
) -> None:
    done = begun(store, 3)
    completed(store, objects, done, sent(store, objects, done, b"abc"))
    assert store.expire() == []
    _let_expire(engine, done)
    assert store.expire() == [upload_prefix(TENANT, done.id)]
    assert store.get(TENANT, done.id).status == "completed"


def test_an_upload_whose_time_is_over_takes_nothing_more(
    engine: Engine, store: UploadStore, objects: LocalObjects
) -> None:
    """Whether or not the garbage collector has been there."""
    upload = begun(store, 3)
    part = sent(store, objects, upload, b"abc")
    _let_expire(engine, upload)
    assert store.get(TENANT, upload.id).status == "expired"
    for again in (
        lambda: store.require_pending(TENANT, upload.id),
        lambda: store.add_part(TENANT, upload.id, new_id("part"), 1, None),
        lambda: completed(store, objects, upload, part),
        lambda: store.cancel(TENANT, upload.id),
    ):
        with refused("upload_not_pending"):
            again()
    done = begun(store, 3)
    part = sent(store, objects, done, b"abc")
    completed(store, objects, done, part)
    _let_expire(engine, done)
    assert completed(store, objects, done, part).status == "completed"


@pytest.mark.parametrize("end", ["cancel", "expire"])
def test_an_upload_that_ends_while_it_is_stitched_makes_no_file(
    engine: Engine, store: UploadStore, kept: FileStore, tmp_path: Path, end: str
) -> None:
    class Interrupted(LocalObjects):
        def put(self, prefix: str, name: str, source: Any) -> None:
            super().put(prefix, name, source)
            if "/files/" not in prefix:
                return
            if end == "cancel":
                store.cancel(TENANT, upload.id)
            else:
                _let_expire(engine, upload)

    objects = Interrupted(tmp_path / "objects")
    upload = begun(store, 3)
    part = sent(store, objects, upload, b"abc")
    with refused("upload_not_pending"):
        completed(store, objects, upload, part)
    assert kept.page(TENANT, limit=9) == ([], False)
    assert not [path for path in stored(objects) if "files" in path.parts]


class Ending(LocalObjects):
    """Somebody ends the upload when its parts are opened, or when the second piece of one is read."""

    def __init__(self, root: Path, end: Callable[[], object], *, reading: bool) -> None:
        super().__init__(root)
        self._end, self._reading = end, reading

    def open(self, prefix: str, name: str) -> BinaryIO:
        if self._reading:
            return cast(BinaryIO, Ended(super().open(prefix, name), self._end))
        self._end()
        return super().open(prefix, name)


class Ended(io.RawIOBase):
    """As objects in S3 are read: each piece is a request, and the object may be gone by the next."""

    def __init__(self, file: BinaryIO, end: Callable[[], object]) -> None:
        self._file, self._end = file, end

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1, /) -> bytes:
        self._end()
        raise NotFound("There is no such file.", code="file_not_found")

    def close(self) -> None:
        self._file.close()


@pytest.mark.parametrize("reading", [False, True])
@pytest.mark.parametrize("winner", ["cancel", "complete"])
def test_who_completes_while_another_ends_the_upload_is_told_that_it_has_ended(
    store: UploadStore, kept: FileStore, objects: LocalObjects, tmp_path: Path, reading: bool, winner: str
) -> None:
    """And not that bytes are missing, which the other one has removed."""
    upload = begun(store, 6)
    parts = [sent(store, objects, upload, data) for data in (b"abc", b"def")]
    order = parts if winner == "cancel" else parts[::-1]

    def end() -> None:
        if store.get(TENANT, upload.id).status != "pending":
            return
        if winner == "complete":
            completed(store, objects, upload, *order)
        else:
            store.cancel(TENANT, upload.id)
            stitching.discard(objects, TENANT, upload.id)

    with refused("upload_not_pending"):
        completed(store, Ending(tmp_path / "objects", end, reading=reading), upload, *parts)
    assert len(kept.page(TENANT, limit=9)[0]) == (winner == "complete")


def _let_expire(engine: Engine, upload: Upload) -> None:
    with engine.begin() as connection:
        connection.execute(update(uploads).where(uploads.c.id == upload.id).values(expires_at=now() - 1))


def test_an_upload_has_a_limit_of_parts(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "MAX_PARTS", 3)
    upload = begun(store, 3)
    for _ in range(3):
        store.add_part(TENANT, upload.id, new_id("part"), 1, None)
    with pytest.raises(TooLarge):
        store.add_part(TENANT, upload.id, new_id("part"), 1, None)


def test_sizes_are_no_small_integers(store: UploadStore, engine: Engine) -> None:
    upload = begun(store, 2**33)
    for _ in range(128):
        store.add_part(TENANT, upload.id, new_id("part"), 2**26, None)
    assert store.get(TENANT, upload.id).bytes == 2**33
    found = store.parts(TENANT, upload.id, limit=1000)[0]
    assert len(store.chosen(TENANT, upload.id, [part.id for part in found])) == 128
    with reading(engine) as connection:
        assert quotas.stored_bytes(connection, TENANT) == 2**33


# Files


def file(kept: FileStore, size: int = 3, **values: Any) -> str:
    file_id = new_id("file")
    given = {"filename": "x", "purpose": "batch", "sha256": "0" * 64, "max_bytes": 0, **values}
    max_bytes = given.pop("max_bytes")
    new = NewFile(id=file_id, prefix=file_prefix(TENANT, file_id), bytes=size, **given)
    return kept.add(TENANT, new, max_bytes=max_bytes).id


def test_files_are_listed_by_age_and_purpose(kept: FileStore) -> None:
    ids = [file(kept, purpose=purpose) for purpose in ("batch", "evals", "batch", "evals", "batch")]
    ids.sort()
    listed, more = kept.page(TENANT, limit=2)
    assert ([item.id for item in listed], more) == ([ids[4], ids[3]], True)
    listed, more = kept.page(TENANT, limit=3, after=ids[3])
    assert ([item.id for item in listed], more) == ([ids[2], ids[1], ids[0]], False)
    listed, _ = kept.page(TENANT, limit=9, order="asc", after=ids[0])
    assert [item.id for item in listed] == ids[1:]
    listed, _ = kept.page(TENANT, limit=9, purpose="evals")
    assert {item.purpose for item in listed} == {"evals"}
    assert len(listed) == 2


def test_a_file_expires(engine: Engine, kept: FileStore) -> None:
    stays, goes = file(kept, seconds=3600), file(kept, seconds=3600)
    assert kept.get(TENANT, stays).shown.expires_at == kept.get(TENANT, stays).shown.created_at + 3600
    with engine.begin() as connection:
        connection.execute(update(files).where(files.c.id == goes).values(expires_at=now() - 1))
    for ask in (lambda: kept.get(TENANT, goes), lambda: kept.delete(TENANT, goes)):
        with pytest.raises(NotFound):
            ask()
    assert [item.id for item in kept.page(TENANT, limit=9)[0]] == [stays]
    assert kept.expire() == [file_prefix(TENANT, goes)]
    assert kept.expire() == []


def test_what_the_client_wanted_of_the_file_outlives_the_upload(
    store: UploadStore, kept: FileStore, objects: LocalObjects
) -> None:
    upload = begun(store, 3, expires_after={"anchor": "created_at", "seconds": 7200})
    done = completed(store, objects, upload, sent(store, objects, upload, b"abc"))
    assert done.file is not None
    assert done.file.expires_at is not None
    assert abs(done.file.expires_at - done.file.created_at - 7200) <= 1


# Quotas


def test_adapters_files_and_parts_count(
    engine: Engine, store: UploadStore, kept: FileStore, adapters: AdapterStore, objects: LocalObjects
) -> None:
    assert quotas.room(engine, TENANT, 0) is None
    assert quotas.room(engine, TENANT, 5000) == 5000
    adapters.add(adapter(), TENANT, "p", max_bytes=5000)  # 1024 bytes
    file(kept, 1000, max_bytes=5000)
    upload = begun(store, 1000)
    part = sent(store, objects, upload, bytes(1000), max_bytes=5000)
    assert quotas.room(engine, TENANT, 5000) == 5000 - 3024
    assert quotas.room(engine, "other", 5000) == 5000
    for add in (
        lambda: file(kept, 1977, max_bytes=5000),
        lambda: sent(store, objects, begun(store, 2000), bytes(1977), max_bytes=5000),
        lambda: adapters.add(adapter(), TENANT, "p", max_bytes=4000),
    ):
        with pytest.raises(QuotaExceeded) as full:
            add()
        assert full.value.code == "storage_quota_exceeded"
    # Completing needs no room: the file takes the parts' place.
    completed(store, objects, upload, part)
    assert quotas.room(engine, TENANT, 5000) == 5000 - 3024
    file(kept, 1976, max_bytes=5000)
    assert quotas.room(engine, TENANT, 5000) == 0
    assert quotas.room(engine, TENANT, 10) == 0


def test_reports_and_side_cars_count_until_their_job_is_deleted(
    engine: Engine, adapters: AdapterStore, kept: FileStore
) -> None:
    jobs = JobStore(engine, lease_seconds=30, max_attempts=3)
    first, second = claimed(jobs, tenant=TENANT), claimed(jobs, tenant=TENANT)
    made = adapter()  # 1024 bytes
    assert jobs.succeed(first.id, 1, [(made, TENANT, "p")], side_cars=["x"], own_bytes=2**33)
    assert quotas.room(engine, TENANT, 2**34) == 2**33 - 1024
    assert quotas.room(engine, "other", 2**34) == 2**34
    assert jobs.succeed(second.id, 1, own_bytes=100)
    assert not jobs.succeed(second.id, 1, own_bytes=100)
    with pytest.raises(QuotaExceeded):
        file(kept, 1, max_bytes=2**33 + 1124)
    jobs.delete(TENANT, first.id)
    assert quotas.room(engine, TENANT, 2**34) == 2**34 - 1124
    published = {name: value for name, _, _, value in totals.read(engine)}["bytes_published"]
    assert published == 2**33 + 1124


def test_uploads_that_end_together_do_not_exceed_a_quota(engine: Engine, kept: FileStore) -> None:
    together = threading.Barrier(8)

    def add(_: int) -> bool:
        together.wait()
        try:
            file(kept, 100, max_bytes=350)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(add, range(8))) == 3
    assert quotas.room(engine, TENANT, 350) == 50


def test_the_pieces_are_those_of_the_parts(objects: LocalObjects) -> None:
    parts = []
    for number, data in enumerate((b"a" * 10, b"", b"b" * 5)):
        part = UploadPart(id=f"part_{number}", upload_id="upload_1", bytes=len(data), sha256=None, created_at=0)
        objects.put(part_prefix(TENANT, part.upload_id, part.id), PART, io.BytesIO(data))
        parts.append(part)

    source = stitching.Stitched(objects, TENANT, parts, md5=True)
    with stitching.ReadAhead(source) as ahead:
        found = []
        while piece := ahead.read(4):
            assert not ahead.finished
            assert len(piece) <= 4
            found.append(piece)
        assert ahead.finished
        assert ahead.read(4) == b""
    assert b"".join(found) == b"a" * 10 + b"b" * 5
    assert source.sha256.digest() == hashlib.sha256(b"a" * 10 + b"b" * 5).digest()


def test_a_store_that_stops_reading_makes_no_file(store: UploadStore, tmp_path: Path) -> None:
    class Lazy(LocalObjects):
        def put(self, prefix: str, name: str, source: Any) -> None:
            super().put(prefix, name, io.BytesIO(source.read(2)) if "/files/" in prefix else source)

    objects = Lazy(tmp_path / "objects")
    upload = begun(store, 3)
    part = sent(store, objects, upload, b"abc")
    with refused("storage_fault"):
        completed(store, objects, upload, part)
    assert store.get(TENANT, upload.id).status == "pending"
