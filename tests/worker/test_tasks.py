"""One attempt at a job, in this process, with real stores and a real reference: the record tells what happened."""

import hashlib
import io
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import create_engine, text

from safegraft.adapter import WEIGHTS, describe
from safegraft.bundle import GRAM
from safegraft.contracts.adapter import Adapter, Origin
from safegraft.contracts.realignment import Realignment, RealignmentCreate
from safegraft.contracts.report import Report
from safegraft.errors import StorageFault
from safegraft.files import MIN_FREE_BYTES
from safegraft.ids import new_id
from safegraft.records import adapter_record
from safegraft.report import render as report_files
from safegraft.settings import SharedSettings
from safegraft.stores import quotas
from safegraft.stores.garbage import weight
from safegraft.stores.references import LIST_SECONDS, SHARED, SharedReferences, open_references
from worker import tasks
from worker.engine import Engine
from worker.settings import WorkerSettings
from worker.tasks import Bench, run_job

TENANT = "t"


class Shop:
    """A bench with a customer."""

    def __init__(self, data: Path, engine: Engine | None = None, **settings: Any) -> None:
        self.data = data
        self.bench = Bench(WorkerSettings(data=data, **settings), engine)
        self.jobs = self.bench.jobs
        self.reference = ""

    def read(self, prefix: str, name: str) -> bytes:
        with self.bench.objects.open(prefix, name) as file:
            return file.read()

    def replace(self, name: str, data: bytes) -> None:
        """Changes a file of the installed reference where it lies, and wherever there is a copy of it."""
        registry = self.bench.registry
        if isinstance(registry, SharedReferences):
            self.bench.objects.put(f"{SHARED}/{self.reference}", name, io.BytesIO(data))
            registry.discard_copy(self.reference)
        else:
            path = registry.folder(self.reference) / name
            path.unlink()
            path.write_bytes(data)

    def uninstall(self) -> None:
        registry = self.bench.registry
        if isinstance(registry, SharedReferences):
            self.bench.objects.remove(f"{SHARED}/{self.reference}")
            time.sleep(LIST_SECONDS + 0.5)
        else:
            shutil.rmtree(registry.folder(self.reference))

    def upload(self, folder: Path, dropped: str = "run.py") -> Adapter:
        adapter_id = new_id("adp")
        made = self.data / "upload"
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(folder, made)
        record = adapter_record(adapter_id, "mine", made, describe(made), dropped=[dropped], origin=Origin())
        self.bench.objects.publish(made, f"adapters/{adapter_id}")
        self.bench.adapters.add(record, TENANT, f"adapters/{adapter_id}")
        return record

    def order(self, adapter_id: str, **request: Any) -> str:
        request = {"adapter_id": adapter_id, "method": {"type": "gram"}, **request}
        return self.jobs.create(TENANT, self.reference, RealignmentCreate.model_validate(request)).job.id

    def job(self, job_id: str) -> Realignment:
        return self.jobs.get(TENANT, job_id)

    def kinds(self, job_id: str) -> list[str]:
        return [event.type for event in self.jobs.events(TENANT, job_id)]

    def adapters(self) -> list[Adapter]:
        return self.bench.adapters.page(TENANT, limit=100)[0]

    def results(self, job_id: str) -> list[str]:
        """Attempts that left files."""
        return self.below(f"tenants/{TENANT}/realignments/{job_id}")

    def below(self, prefix: str) -> list[str]:
        return [place.rpartition("/")[2] for place, _ in self.bench.objects.prefixes(prefix)]

    def _an_hour_later(self, column: str, job_id: str) -> None:
        engine = create_engine(self.bench.settings.database)
        with engine.begin() as connection:
            connection.execute(
                text(f"UPDATE realignments SET {column} = {column} - 3600 WHERE id = :id"), {"id": job_id}
            )
        engine.dispose()

    def expire(self, job_id: str) -> None:
        """As if the worker had been silent for an hour, and the reaper came."""
        self._an_hour_later("lease_until", job_id)
        assert self.jobs.reap() == [job_id]

    def resume(self, job_id: str) -> None:
        """The next attempt after a fault of ours, which is given time."""
        run_job(self.bench, job_id)
        assert self.job(job_id).status == "queued", "too early"
        self._an_hour_later("next_at", job_id)
        run_job(self.bench, job_id)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """One process for all tests here: each has a reference in a folder of its own."""
    engine = Engine(WorkerSettings())
    yield engine
    engine.close()


@pytest.fixture
def shop(tmp_path: Path, bundle: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setenv("SAFEGRAFT_WORKER_NAME", "w1")
    shop = Shop(tmp_path / "data", engine, max_attempts=2)
    shop.reference = shop.bench.registry.add(bundle).id
    yield shop
    # Whatever happened: nothing of an attempt is left.
    assert list((tmp_path / "data" / "objects" / "scratch").glob("*")) == []


@pytest.fixture
def ordered(shop: Shop, fresh: Path) -> str:
    return shop.order(shop.upload(fresh).id)


def during(monkeypatch: pytest.MonkeyPatch, act: Callable[[str, int], None]) -> None:
    """Calls act(stage, done) before each progress report of the engine."""
    real = Engine.realign

    def realign(*args: Any, progress: Any, **options: Any) -> Report:
        def report(stage: str, done: int, total: int) -> None:
            act(stage, done)
            progress(stage, done, total)

        return real(*args, progress=report, **options)

    monkeypatch.setattr(Engine, "realign", realign)


def test_a_job_ends_with_an_adapter_and_a_report(shop: Shop, fresh: Path) -> None:
    customer = shop.upload(fresh)
    job_id = shop.order(customer.id)
    run_job(shop.bench, job_id)
    job = shop.job(job_id)
    assert (job.status, job.attempt, job.error) == ("succeeded", 1, None)
    assert (job.progress.stage, job.progress.done, job.progress.total) == ("done", 14, 14)
    assert job.result is not None
    assert job.result.adapter_id is not None
    made = shop.bench.adapters.get(TENANT, job.result.adapter_id)
    prefix = shop.bench.adapters.prefix(TENANT, made.id)
    assert made.origin.realignment_id == job_id
    assert made.name == "mine (gram 0.2)"
    assert made.sha256 != customer.sha256
    assert hashlib.sha256(shop.read(prefix, WEIGHTS)).hexdigest() == made.sha256
    text = shop.read(f"tenants/{TENANT}/realignments/{job_id}/1/report", "report.json")
    report = Report.model_validate_json(text)
    assert report.output is not None
    assert report.output.sha256 == made.sha256
    assert report.input.sha256 == customer.sha256
    assert report.dropped_files == ["run.py"]
    assert shop.kinds(job_id) == ["created", "started", "succeeded"]
    # The customer's own files are as they were.
    prefix = shop.bench.adapters.prefix(TENANT, customer.id)
    assert shop.read(prefix, WEIGHTS) == (fresh / WEIGHTS).read_bytes()


def test_analyze_makes_no_adapter(shop: Shop, fresh: Path) -> None:
    job_id = shop.order(shop.upload(fresh).id, mode="analyze")
    run_job(shop.bench, job_id)
    job = shop.job(job_id)
    assert job.status == "succeeded"
    assert job.result is not None
    assert job.result.adapter_id is None
    assert len(shop.adapters()) == 1
    assert shop.below(f"tenants/{TENANT}/realignments/{job_id}/1") == ["report"]


def test_a_fault_of_the_input_ends_the_job_with_its_code(shop: Shop, fresh: Path) -> None:
    job_id = shop.order(shop.upload(fresh).id, method={"type": "nlsr", "form": "factor"})
    run_job(shop.bench, job_id)
    job = shop.job(job_id)
    assert (job.status, job.attempt, job.result) == ("failed", 1, None)
    assert job.error is not None
    assert (job.error.code, job.error.fault) == ("lineage_mismatch", "user")
    assert shop.results(job_id) == []


def test_a_deleted_adapter_ends_the_job(shop: Shop) -> None:
    job_id = shop.order("adp_that_was_deleted")
    run_job(shop.bench, job_id)
    job = shop.job(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.fault) == ("adapter_not_found", "user")


def test_an_uninstalled_reference_is_tried_again_and_then_ours(shop: Shop, ordered: str) -> None:
    shop.uninstall()
    run_job(shop.bench, ordered)
    assert shop.job(ordered).status == "queued"
    shop.resume(ordered)
    error = shop.job(ordered).error
    assert error is not None
    assert (error.code, error.fault) == ("reference_missing", "system")


def test_a_corrupt_reference_is_tried_again_and_then_ours(shop: Shop, ordered: str, bundle: Path) -> None:
    raw = bytearray((bundle / GRAM).read_bytes())
    raw[-1] ^= 1
    shop.replace(GRAM, bytes(raw))
    run_job(shop.bench, ordered)
    assert (shop.job(ordered).status, shop.job(ordered).error) == ("queued", None)
    assert shop.jobs.due(10) == []  # it is given time
    shop.resume(ordered)
    job = shop.job(ordered)
    assert (job.status, job.attempt) == ("failed", 2)
    assert job.error is not None
    assert (job.error.code, job.error.fault) == ("corrupt_reference", "system")
    assert str(shop.data) not in job.error.message
    assert shop.kinds(ordered) == ["created", "started", "requeued", "started", "failed"]


def test_a_repaired_reference_serves_again(shop: Shop, ordered: str, bundle: Path) -> None:
    shop.replace(GRAM, b"cut off")
    run_job(shop.bench, ordered)
    shop.replace(GRAM, (bundle / GRAM).read_bytes())
    shop.resume(ordered)
    assert (shop.job(ordered).status, shop.job(ordered).attempt) == ("succeeded", 2)


@pytest.mark.long
def test_a_worker_brings_a_shared_reference_and_replaces_a_copy_that_broke(
    tmp_path: Path, storage_url: Callable[[], str], bundle: Path, fresh: Path
) -> None:
    url = storage_url()
    operator = SharedSettings(data=tmp_path / "operator", storage_url=url)
    shop = Shop(tmp_path / "worker", storage_url=url, max_attempts=2)
    shop.reference = open_references(operator).add(bundle).id
    copy = tmp_path / "worker" / "references" / shop.reference
    assert not copy.exists()
    shop.bench.warm()
    (copy / GRAM).write_bytes(b"broken")
    shop.bench = Bench(shop.bench.settings)  # another process, with nothing in memory
    job_id = shop.order(shop.upload(fresh).id)
    run_job(shop.bench, job_id)
    assert shop.job(job_id).status == "queued"
    shop.resume(job_id)
    assert (shop.job(job_id).status, shop.job(job_id).attempt) == ("succeeded", 2)
    assert (copy / GRAM).read_bytes() == (bundle / GRAM).read_bytes()
    assert shop.results(job_id) == ["2"]
    assert list((tmp_path / "worker" / "objects" / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (RuntimeError("secret detail"), "internal_error"),
        (MemoryError(), "internal_error"),
        (StorageFault("No space left.", code="storage_fault"), "storage_fault"),
        (SoftTimeLimitExceeded(), "time_limit"),
    ],
    ids=repr,
)
def test_a_fault_of_ours_is_tried_again_and_then_ours(
    shop: Shop, ordered: str, monkeypatch: pytest.MonkeyPatch, fault: Exception, code: str
) -> None:
    def fail(stage: str, done: int) -> None:
        if stage == "patch":
            raise fault

    during(monkeypatch, fail)
    run_job(shop.bench, ordered)
    assert shop.job(ordered).status == "queued"
    shop.resume(ordered)
    job = shop.job(ordered)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.fault) == (code, "system")
    assert "secret" not in job.error.message
    assert shop.results(ordered) == []


def test_a_fault_while_publishing_leaves_no_files(shop: Shop, ordered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shop.bench.objects.publish

    def publish(folder: Path, prefix: str) -> None:
        if prefix.endswith("report"):
            raise StorageFault("No space left.")
        real(folder, prefix)

    monkeypatch.setattr(shop.bench.objects, "publish", publish)
    run_job(shop.bench, ordered)
    assert shop.job(ordered).status == "queued"
    assert shop.results(ordered) == []
    monkeypatch.undo()
    shop.resume(ordered)
    assert shop.job(ordered).status == "succeeded"
    assert shop.results(ordered) == ["2"]


def test_a_running_job_is_cancelled_at_the_next_module(
    shop: Shop, ordered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[str] = []

    def slowly(stage: str, done: int) -> None:
        if not reports:
            assert shop.jobs.cancel(TENANT, ordered).status == "cancelling"
        reports.append(stage)
        time.sleep(0.2)

    during(monkeypatch, slowly)
    run_job(shop.bench, ordered)
    assert shop.job(ordered).status == "cancelled"
    assert len(reports) < 28
    assert shop.kinds(ordered) == ["created", "started", "cancelling", "cancelled"]
    assert shop.results(ordered) == []
    assert len(shop.adapters()) == 1


@pytest.mark.parametrize("moment", ["early", "last"])
def test_an_attempt_that_was_taken_over_publishes_nothing(
    shop: Shop, ordered: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """early: its next heartbeat tells it. last: it hears nothing until its own publishing is refused."""

    def take_over(*_: Any) -> None:
        shop.expire(ordered)
        claim = shop.jobs.claim(ordered, "w2")
        assert claim is not None
        assert claim.attempt == 2

    reports: list[str] = []
    if moment == "early":

        def slowly(stage: str, done: int) -> None:
            if not reports:
                take_over()
            reports.append(stage)
            time.sleep(0.2)

        during(monkeypatch, slowly)
    else:
        real = report_files

        def render(*args: Any) -> Any:
            take_over()
            return real(*args)

        monkeypatch.setattr(tasks, "render", render)
    run_job(shop.bench, ordered)
    if moment == "early":
        assert len(reports) < 28
    job = shop.job(ordered)
    assert (job.status, job.attempt, job.result, job.error) == ("running", 2, None, None)
    assert len(shop.adapters()) == 1
    assert shop.results(ordered) == []
    assert shop.kinds(ordered) == ["created", "started", "requeued", "started"]


def test_a_heartbeat_keeps_a_job_that_takes_longer_than_its_lease(
    tmp_path: Path, shop: Shop, ordered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one that reports nothing new for so long, while a reaper looks all the time."""
    short = Shop(shop.data, shop.bench.engine, lease_seconds=2.0, max_attempts=2)
    begun: list[str] = []

    def once_slowly(stage: str, done: int) -> None:
        if not begun:
            begun.append(stage)
            time.sleep(3.5)

    during(monkeypatch, once_slowly)
    ended = threading.Event()
    reaped = []

    def reap() -> None:
        while not ended.wait(0.1):
            reaped.extend(short.jobs.reap())

    reaper = threading.Thread(target=reap)
    reaper.start()
    try:
        run_job(short.bench, ordered)
    finally:
        ended.set()
        reaper.join()
    assert reaped == []
    assert (shop.job(ordered).status, shop.job(ordered).attempt) == ("succeeded", 1)


def test_progress_can_be_followed(shop: Shop, ordered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def slowly(stage: str, done: int) -> None:
        time.sleep(0.1)
        seen.add(shop.job(ordered).progress.stage)

    during(monkeypatch, slowly)
    run_job(shop.bench, ordered)
    assert {"compare", "patch"} <= seen


def test_messages_for_unknown_running_and_ended_jobs_are_dropped(shop: Shop, ordered: str) -> None:
    run_job(shop.bench, "rlg_nothing")
    run_job(shop.bench, ordered)
    before = shop.job(ordered)
    run_job(shop.bench, ordered)
    assert shop.job(ordered) == before
    held = shop.order(before.adapter_id)
    assert shop.jobs.claim(held, "w2") is not None
    run_job(shop.bench, held)
    assert (shop.job(held).status, shop.job(held).attempt) == ("running", 1)


def test_a_full_disk_spends_no_attempts(shop: Shop, ordered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, free = shutil.disk_usage(shop.data), MIN_FREE_BYTES - 1
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=free))
    for _ in range(5):
        run_job(shop.bench, ordered)
        assert (shop.job(ordered).status, shop.job(ordered).attempt) == ("queued", 0)
    free += 1
    run_job(shop.bench, ordered)
    assert (shop.job(ordered).status, shop.job(ordered).attempt) == ("succeeded", 1)


def test_references_stay_in_memory_up_to_the_limit(shop: Shop, bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name": "tiny"', '"name": "other"'))
    second = shop.bench.registry.add(other).id
    assert second != shop.reference
    shop.bench.settings.loaded_references = 1
    first, loaded = shop.bench.reference(shop.reference)
    assert shop.bench.reference(shop.reference)[1] is loaded
    assert shop.bench.reference(second)[1].name == "other"
    assert list(shop.bench.engine.loaded) == [str(shop.bench.registry.folder(second))]
    assert shop.bench.reference(shop.reference)[1] is not loaded
    assert list(shop.bench.engine.loaded) == [str(first)]
    shop.bench.settings.loaded_references = 2
    shop.bench.warm()
    assert set(shop.bench.engine.loaded) == {str(first), str(shop.bench.registry.folder(second))}


def test_a_dead_pool_process_gives_its_job_back(shop: Shop, ordered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the parent does when its child was killed: only for the job that this worker holds."""
    from billiard.exceptions import WorkerLostError

    monkeypatch.setenv("SAFEGRAFT_DATA", str(shop.data))
    monkeypatch.setenv("SAFEGRAFT_MAX_ATTEMPTS", "2")
    assert shop.jobs.claim(ordered, "w2") is not None
    tasks.lost(sender=tasks.realign_job, args=[ordered], exception=WorkerLostError("signal 9"))
    assert shop.job(ordered).status == "running"
    shop.jobs.release(ordered, 1, "It died.")
    assert shop.jobs.claim(ordered, "w1") is not None
    tasks.lost(sender=tasks.realign_job, args=[ordered], exception=ValueError("not a death"))
    assert shop.job(ordered).status == "running"
    tasks.lost(sender=tasks.realign_job, args=[ordered], exception=WorkerLostError("signal 9"))
    assert shop.job(ordered).status == "failed"  # it was the last attempt


@pytest.mark.parametrize(
    ("act", "code"), [("eat_a_tensor", "out_of_memory"), ("spin", "time_limit"), ("write", "file_limit")]
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other limits")
@pytest.mark.long
def test_a_job_that_takes_too_much_is_tried_again_and_then_ours(shop: Shop, fresh: Path, act: str, code: str) -> None:
    limits: dict[str, Any] = {
        "job_memory_bytes": 2**30,
        "job_cpu_seconds": 2,
        "job_file_bytes": 2**23,
        "max_attempts": 2,
    }
    engine = Engine(WorkerSettings(**limits), "tests.worker.hostile")
    hostile = Shop(shop.data, engine, **limits)
    hostile.reference = shop.reference
    job_id = hostile.order(hostile.upload(fresh, dropped=act).id)
    run_job(hostile.bench, job_id)
    assert hostile.job(job_id).status == "queued"
    hostile.resume(job_id)
    job = hostile.job(job_id)
    assert (job.status, job.attempt) == ("failed", 2)
    assert job.error is not None
    assert (job.error.code, job.error.fault) == (code, "system")
    # The next job is served.
    served = hostile.order(hostile.upload(fresh).id)
    run_job(hostile.bench, served)
    assert hostile.job(served).status == "succeeded"
    engine.close()


def test_several_strengths_become_several_adapters_and_one_report(shop: Shop, fresh: Path) -> None:
    customer = shop.upload(fresh)
    job_id = shop.order(customer.id, strengths=[0.3, 3.0])
    run_job(shop.bench, job_id)
    job = shop.job(job_id)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.strengths == [0.3, 3.0]
    assert job.result is not None
    assert [variant.strength for variant in job.result.variants] == [0.3, 3.0]
    assert job.result.adapter_id == job.result.variants[0].adapter_id
    report = Report.model_validate_json(shop.read(f"tenants/{TENANT}/realignments/{job_id}/1/report", "report.json"))
    for variant, shown in zip(job.result.variants, report.variants, strict=True):
        made = shop.bench.adapters.get(TENANT, variant.adapter_id)
        assert made.name == f"mine (gram {variant.strength:g})"
        assert shown.output is not None
        assert made.sha256 == shown.output.sha256
        weights = shop.read(shop.bench.adapters.prefix(TENANT, made.id), WEIGHTS)
        assert hashlib.sha256(weights).hexdigest() == made.sha256
    assert len({variant.adapter_id for variant in job.result.variants}) == 2


def test_biases_are_published_as_an_adapter_that_only_peft_loads(shop: Shop, fresh: Path) -> None:
    method = {"type": "safetylock", "heads": 3, "output": "lora_bias"}
    job_id = shop.order(shop.upload(fresh).id, method=method)
    run_job(shop.bench, job_id)
    job = shop.job(job_id)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.result is not None
    assert job.result.adapter_id is not None
    shown = shop.bench.adapters.get(TENANT, job.result.adapter_id).compatibility
    assert (shown.peft.ok, shown.vllm.ok, shown.lorax.ok, shown.tgi.ok) == (True, False, False, False)


def test_a_side_car_is_published_beside_the_unchanged_adapter(shop: Shop, fresh: Path) -> None:
    customer = shop.upload(fresh)
    job_id = shop.order(customer.id, method={"type": "safetylock", "heads": 3, "output": "side_car"})
    run_job(shop.bench, job_id)
    job = shop.job(job_id)
    assert job.result is not None
    assert job.result.adapter_id is not None
    assert shop.bench.adapters.get(TENANT, job.result.adapter_id).sha256 == customer.sha256
    assert job.result.side_car_urls == [f"/v1/realignments/{job_id}/side_car/side_car.safetensors"]
    assert shop.bench.objects.names(f"tenants/{TENANT}/realignments/{job_id}/1/side_car") == ["side_car.safetensors"]
    # All bytes that lie there are the tenant's: what was sent, what was made, side-cars and reports.
    engine = create_engine(shop.bench.settings.database)
    with engine.connect() as connection:
        counted = quotas.stored_bytes(connection, TENANT)
    assert counted == customer.bytes + weight(shop.bench.objects, f"tenants/{TENANT}")
    engine.dispose()
