"""The collector on real files and rows: what is due goes, with its bytes; everything else stays."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.engine import Engine

from safegraft.errors import StorageFault
from safegraft.ids import new_id
from safegraft.stores import options
from safegraft.stores.adapters import AdapterStore
from safegraft.stores.database import (
    adapters,
    batch_adapters,
    batches,
    events,
    files,
    now,
    realignments,
    upload_parts,
    uploads,
    webhook_deliveries,
)
from safegraft.stores.garbage import DAY, GarbageCollector, Removed, clear, weight
from safegraft.stores.jobs import JobStore
from safegraft.stores.objects import LocalObjects, adapter_prefix, file_prefix, result_prefix, upload_prefix
from tests.stores.records import REFERENCE, adapter, claimed, request


class Attic:
    """Records and bytes of one tenant, some of them old."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.objects = LocalObjects(folder / "objects")
        self.root = folder / "objects"
        self.jobs = JobStore(engine, lease_seconds=30, max_attempts=3)
        self.collector = GarbageCollector(engine, self.objects)

    def put(self, prefix: str, size: int, *, old: bool = False) -> Path:
        folder = self.objects.scratch / new_id("made")
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(size))
        self.objects.publish(folder, prefix)
        if old:
            self.age(self.root / prefix)
        return self.root / prefix

    def age(self, path: Path) -> None:
        """As if it, what is in it, and what it is in had been written two days ago."""
        then = time.time() - 2 * DAY
        for item in (path, *path.rglob("*"), *path.parents):
            if self.root in item.parents:
                os.utime(item, (then, then))

    def adapter(self, size: int, *, expired: bool) -> str:
        made = adapter()
        prefix = adapter_prefix("t", made.id)
        self.put(prefix, size, old=True)
        AdapterStore(self.engine).add(made, "t", prefix)
        self.expire(adapters, made.id, expired)
        return made.id

    def job(self, *, expired: bool) -> tuple[str, str]:
        """A job that has succeeded, and the adapter it made."""
        claim = claimed(self.jobs)
        result = result_prefix("t", claim.id, 1)
        made = adapter()
        self.put(f"{result}/adapter/{made.id}", 100)
        self.put(f"{result}/report", 10)
        self.put(f"{result}/side_car", 3)
        self.jobs.succeed(claim.id, 1, [(made, "t", f"{result}/adapter/{made.id}")])
        self.age(self.root / "tenants/t/realignments" / claim.id)
        self.expire(realignments, claim.id, expired)
        return claim.id, made.id

    def expire(self, table: Any, identity: str, expired: bool) -> None:
        at = now() + (-5 if expired else 500)
        with self.engine.begin() as connection:
            connection.execute(update(table).where(table.c.id == identity).values(expires_at=at))

    def ids(self, table: Any) -> set[str]:
        with self.engine.connect() as connection:
            return set(connection.execute(select(table.c.id)).scalars())

    def left(self) -> set[str]:
        """Folders that hold files."""
        return {str(path.parent.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()}

    def folders(self) -> set[str]:
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_dir()}


@pytest.fixture
def attic(engine: Engine, tmp_path: Path) -> Attic:
    return Attic(engine, tmp_path)


def upload(attic: Attic, state: str, expires: float) -> str:
    upload_id = new_id("upload")
    prefix = upload_prefix("t", upload_id)
    row = {"tenant": "t", "state": state, "prefix": prefix, "filename": "f", "purpose": "p", "mime_type": "m"}
    with attic.engine.begin() as connection:
        connection.execute(
            insert(uploads).values(
                id=upload_id, **row, bytes=1, request={}, created_at=now(), expires_at=now() + expires
            )
        )
        part = new_id("part")
        connection.execute(
            insert(upload_parts).values(id=part, upload_id=upload_id, tenant="t", bytes=7, created_at=now())
        )
    attic.put(f"{prefix}/{part}", 7, old=True)
    return upload_id


def file(attic: Attic, expires: float) -> str:
    file_id = new_id("file")
    prefix = file_prefix("t", file_id)
    attic.put(prefix, 5, old=True)
    row = {"tenant": "t", "prefix": prefix, "filename": "f", "purpose": "p", "bytes": 5, "sha256": "0" * 64}
    with attic.engine.begin() as connection:
        connection.execute(insert(files).values(id=file_id, **row, created_at=now(), expires_at=now() + expires))
    return file_id


def test_what_has_expired_goes_with_its_bytes_and_the_rest_stays(attic: Attic) -> None:
    gone, kept = attic.adapter(20, expired=True), attic.adapter(30, expired=False)
    old_file, new_file = file(attic, -5), file(attic, 500)
    ended, made = attic.job(expired=True)
    fresh, also_made = attic.job(expired=False)
    expected = {
        "adapters": Removed(1, 20),
        "files": Removed(1, 5),
        "realignments": Removed(1, 13),
    }
    before = attic.left()
    dry = attic.collector.collect(dry_run=True)
    assert dry.kinds == expected
    assert attic.left() == before
    assert attic.ids(adapters) == {gone, kept, made, also_made}
    assert attic.collector.collect().kinds == expected
    assert attic.ids(adapters) == {kept, made, also_made}
    assert attic.ids(files) == {new_file}
    assert attic.ids(realignments) == {fresh}
    with attic.engine.connect() as connection:
        assert set(connection.execute(select(events.c.realignment_id)).scalars()) == {fresh}
    root = "tenants/t"
    assert attic.left() == {
        f"{root}/adapters/{kept}",
        f"{root}/files/{new_file}",
        f"{root}/realignments/{ended}/1/adapter/{made}",
        f"{root}/realignments/{fresh}/1/adapter/{also_made}",
        f"{root}/realignments/{fresh}/1/report",
        f"{root}/realignments/{fresh}/1/side_car",
    }
    assert attic.collector.collect().kinds == {}
    assert old_file not in str(attic.left())
    # The last adapter of a deleted job takes the empty folders along.
    attic.expire(adapters, made, True)
    assert attic.collector.collect().kinds == {"adapters": Removed(1, 100)}
    assert not any(ended in folder for folder in attic.folders())


def test_an_adapter_that_is_needed_outlives_its_time(attic: Attic) -> None:
    read, waiting = attic.adapter(1, expired=True), attic.adapter(2, expired=True)
    job = attic.jobs.create("t", REFERENCE, request(read)).job.id
    batch = {"tenant": "t", "state": "canary", "request": {}}
    member = {"batch_id": "batch_1", "adapter_id": waiting, "position": 0, "canary": 1, "state": "waiting"}
    with attic.engine.begin() as connection:
        connection.execute(insert(batches).values(id="batch_1", **batch, created_at=now()))
        connection.execute(insert(batch_adapters).values(**member))
    assert attic.collector.collect().kinds == {}
    assert attic.ids(adapters) == {read, waiting}
    attic.jobs.cancel("t", job)
    with attic.engine.begin() as connection:
        connection.execute(update(batches).values(state="succeeded"))
    assert attic.collector.collect().kinds == {"adapters": Removed(2, 3)}


def test_bytes_without_a_record_go_after_a_day(attic: Attic) -> None:
    root = "tenants/t"
    known = attic.adapter(1, expired=False)
    job, made = attic.job(expired=False)
    orphans = [
        f"{root}/adapters/adp_lost",
        f"{root}/files/file_lost",
        f"{root}/uploads/upload_lost/part_1",
        f"{root}/realignments/rlg_lost/1/report",
        f"{root}/realignments/rlg_lost/2/adapter/adp_lost",
        "tenants/default/adapters/adp_lost",
    ]
    for prefix in orphans:
        attic.put(prefix, 10, old=True)
    # What an attempt left that had lost its lease, beside the one whose result it is.
    orphans.append(f"{root}/realignments/{job}/9/report")
    attic.put(orphans[-1], 10)
    attic.age(attic.root / root / "realignments" / job)
    young = f"{root}/adapters/adp_young"
    attic.put(young, 10)
    before = attic.left()
    assert attic.collector.collect(dry_run=True).kinds == {"orphans": Removed(6, 70)}
    assert attic.left() == before
    assert attic.collector.collect().kinds == {"orphans": Removed(6, 70)}
    assert attic.left() == before - set(orphans)
    clear(attic.objects, attic.jobs.delete("t", job))
    assert attic.left() == {f"{root}/adapters/{known}", young, f"{root}/realignments/{job}/1/adapter/{made}"}


def test_a_deleted_adapter_whose_bytes_were_left_behind_is_found_below_its_job(attic: Attic) -> None:
    job, made = attic.job(expired=False)
    prefix = AdapterStore(attic.engine).delete("t", made)  # and the process was killed here
    assert attic.collector.collect().kinds == {"orphans": Removed(1, 100)}
    assert prefix not in attic.left()
    assert f"tenants/t/realignments/{job}/1/report" in attic.left()


def test_an_attempt_that_is_being_written_is_no_orphan(attic: Attic) -> None:
    claim = claimed(attic.jobs)
    prefix = f"{result_prefix('t', claim.id, 1)}/report"
    attic.put(prefix, 10, old=True)
    assert attic.collector.collect().kinds == {}
    assert prefix in attic.left()


def test_uploads_that_came_to_nothing(attic: Attic) -> None:
    late, pending = upload(attic, "pending", -5), upload(attic, "pending", 500)
    done, ancient = upload(attic, "completed", -5), upload(attic, "cancelled", -31 * DAY)
    # Nothing but a real run knows that the parts of the last one are gone, and then its record goes as well.
    expected = {"uploads": Removed(3, 21)}
    before = attic.left()
    assert attic.collector.collect(dry_run=True).kinds == expected
    assert attic.left() == before
    assert attic.collector.collect().kinds == expected | {"upload_records": Removed(1, 0)}
    with attic.engine.connect() as connection:
        states = dict(connection.execute(select(uploads.c.id, uploads.c.state)).all())
        parts = set(connection.execute(select(upload_parts.c.upload_id)).scalars())
    assert states == {late: "expired", pending: "pending", done: "completed"}
    assert pending in parts
    assert late not in parts
    assert [folder for folder in attic.left() if "uploads" in folder] == [
        folder for folder in before if pending in folder
    ]
    assert ancient not in str(attic.left())
    assert attic.collector.collect().kinds == {}


def test_old_messages_and_events_of_nothing(attic: Attic) -> None:
    row = {"tenant": "t", "endpoint_id": "e", "type": "x", "payload": {}, "attempts": 1, "created_at": now()}
    with attic.engine.begin() as connection:
        for name, state, finished in (
            ("old", "delivered", -31), ("bad", "failed", -31), ("new", "delivered", -29), ("due", "pending", None),
        ):  # fmt: skip
            at = None if finished is None else now() + finished * DAY
            connection.execute(insert(webhook_deliveries).values(id=name, **row, state=state, finished_at=at))
        connection.execute(
            insert(events).values(realignment_id="rlg_gone", created_at=now(), type="x", message="x", data={})
        )
    expected = {"webhook_deliveries": Removed(2), "events": Removed(1)}
    assert attic.collector.collect(dry_run=True).kinds == expected
    assert attic.collector.collect().kinds == expected
    assert attic.ids(webhook_deliveries) == {"new", "due"}


def test_old_scratch(attic: Attic) -> None:
    old, new = attic.objects.scratch / "old", attic.objects.scratch / "new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "x").write_bytes(bytes(9))
    attic.age(old)
    assert attic.collector.collect(dry_run=True).kinds == {"scratch": Removed(1, 9)}
    assert old.exists()
    assert attic.collector.collect().kinds == {"scratch": Removed(1, 9)}
    assert (old.exists(), new.exists()) == (False, True)


def test_scratch_in_which_something_is_still_written_stays(attic: Attic) -> None:
    long = attic.objects.scratch / "upload-1"
    (long / "adapter").mkdir(parents=True)
    (long / "adapter" / "weights").write_bytes(bytes(9))
    attic.age(long)
    os.utime(long / "adapter" / "weights")
    assert attic.collector.collect().kinds == {}
    assert (long / "adapter" / "weights").exists()


def test_every_gateway_sweeps_its_own_scratch(attic: Attic) -> None:
    """Where several have one database, each machine has a scratch folder of its own."""
    assert attic.collector.turn() is not None
    old = attic.objects.scratch / "old"
    old.mkdir(parents=True)
    attic.age(old)
    assert attic.collector.turn() is None
    assert not old.exists()


class Stubborn(LocalObjects):
    """A place that cannot remove what lies under some prefixes, and not list others."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.stuck: set[str] = set()
        self.mute: set[str] = set()

    def remove(self, prefix: str) -> None:
        self._ensure(prefix not in self.stuck)
        super().remove(prefix)

    def prefixes(self, root: str) -> Iterator[tuple[str, float]]:
        self._ensure(root not in self.mute)
        return super().prefixes(root)

    def _ensure(self, works: bool) -> None:
        if not works:
            raise StorageFault("The object store does not answer as it should.", code="storage_unavailable")


def test_one_thing_that_cannot_be_removed_does_not_keep_the_others(
    attic: Attic, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objects = Stubborn(tmp_path / "objects")
    collector = GarbageCollector(attic.engine, objects)
    stuck_adapter, other_adapter = attic.adapter(20, expired=True), attic.adapter(30, expired=True)
    stuck_file, other_file = file(attic, -9), file(attic, -5)
    stuck_upload, other_upload = upload(attic, "pending", -9), upload(attic, "pending", -5)
    stuck_job, _ = attic.job(expired=True)
    other_job, _ = attic.job(expired=True)
    attic.put("tenants/t/adapters/adp_stuck", 3, old=True)
    attic.put("tenants/t/adapters/adp_orphan", 4, old=True)
    attic.put("tenants/default/files/file_1", 5, old=True)
    objects.stuck = {
        adapter_prefix("t", stuck_adapter),
        file_prefix("t", stuck_file),
        upload_prefix("t", stuck_upload),
        f"{result_prefix('t', stuck_job, 1)}/report",
        "tenants/t/adapters/adp_stuck",
    }
    objects.mute = {"tenants/default/files"}
    with caplog.at_level("ERROR"):
        collected = collector.collect()
    # Adapter, file and upload twice: as what they were, and as the orphans that they are now.
    assert collected.failed == 3 * 2 + 3
    assert {kind: removed.count for kind, removed in collected.kinds.items()} == {
        "adapters": 1,
        "files": 1,
        "uploads": 1,
        "realignments": 2,
        "orphans": 1,
    }
    for prefix in objects.stuck | objects.mute:
        assert prefix in caplog.text
    left = str(attic.left())
    for gone in (other_adapter, other_file, other_upload, "adp_orphan"):
        assert gone not in left
    for kept in (stuck_adapter, stuck_file, stuck_upload, f"{stuck_job}/1/report", "adp_stuck", "file_1"):
        assert kept in left
    assert f"{other_job}/1/report" not in left
    assert attic.ids(adapters).isdisjoint({stuck_adapter, other_adapter})
    # A later turn, when the place works again.
    attic.age(attic.root / "tenants/t/realignments" / stuck_job)
    objects.stuck = objects.mute = set()
    assert collector.collect().kinds == {"orphans": Removed(6, 20 + 5 + 7 + 10 + 3 + 5)}


def test_of_several_gateways_one_collects_in_an_hour(attic: Attic) -> None:
    attic.adapter(20, expired=True)
    first = attic.collector.turn()
    assert first is not None
    assert first.kinds == {"adapters": Removed(1, 20)}
    attic.adapter(20, expired=True)
    assert GarbageCollector(attic.engine, attic.objects).turn() is None
    options.put(attic.engine, "garbage_collected_at", time.time() - 3700)
    again = attic.collector.turn()
    assert again is not None
    assert again.kinds == {"adapters": Removed(1, 20)}


def test_options_are_kept_changed_and_taken_back(engine: Engine) -> None:
    assert options.get(engine, "x") is None
    for value in ("a", {"b": [1]}):
        options.put(engine, "x", value)
        assert options.get(engine, "x") == value
    options.put(engine, "x", None)
    assert options.get(engine, "x") is None


def test_weight_counts_what_lies_below(attic: Attic) -> None:
    attic.put("tenants/t/adapters/a/b", 3)
    attic.put("tenants/t/adapters/a/c", 4)
    assert weight(attic.objects, "tenants/t/adapters/a") == 7
    assert weight(attic.objects, "tenants/t/adapters/none") == 0
