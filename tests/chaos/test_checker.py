"""The checker itself: a healthy service passes, and one broken thing at a time turns it red, under its own name."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from safegraft.adapter import WEIGHTS, describe
from safegraft.contracts.adapter import Origin
from safegraft.contracts.realignment import RealignmentCreate
from safegraft.contracts.webhooks import WebhookEndpointCreate
from safegraft.errors import InvalidAdapter
from safegraft.ids import new_id
from safegraft.records import adapter_record
from safegraft.stores.objects import adapter_prefix
from safegraft.stores.webhooks import WebhookStore
from safegraft.vault import open_vault
from tests.chaos.invariants import KINDS, Accepted, Ledger, Verdict, check, digests
from worker.settings import WorkerSettings
from worker.tasks import Bench, run_job

MADE_UP = "adp_0123456789abcdef0123456789ab"


@dataclass
class World:
    """An installation after a few jobs of two tenants, and what their clients know of it."""

    data: Path
    ledger: Ledger
    jobs: list[str]  # of acme: succeeded, failed because of its input; of bolt: succeeded

    def __post_init__(self) -> None:
        self.bench = Bench(WorkerSettings(data=self.data, max_attempts=2, database_url="", storage_url=""))
        self.engine = self.bench.jobs._engine
        self.objects = self.data / "objects"

    def sql(self, statement: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            assert connection.execute(text(statement), values).rowcount > 0

    def one(self, statement: str, **values: Any) -> Any:
        with self.engine.connect() as connection:
            return connection.execute(text(statement), values).scalar_one()

    def made(self, job_id: str) -> str:
        """The adapter that a job made."""
        return str(json.loads(self.one("SELECT result FROM realignments WHERE id = :id", id=job_id))["adapter_id"])

    def folder(self, adapter_id: str) -> Path:
        return self.objects / str(self.one("SELECT prefix FROM adapters WHERE id = :id", id=adapter_id))

    def upload(self, tenant: str, source: Path) -> str:
        made = self.data / "upload"
        shutil.copytree(source, made)
        record = adapter_record(new_id("adp"), "mine", made, describe(made), dropped=[], origin=Origin())
        self.ledger.uploads[record.id] = (tenant, digests(made))
        self.bench.objects.publish(made, adapter_prefix(tenant, record.id))
        self.bench.adapters.add(record, tenant, adapter_prefix(tenant, record.id))
        return record.id

    def hear(self, tenant: str, status: int, body: Any) -> None:
        request = httpx.Request("GET", "http://x/v1/realignments")
        self.ledger.hear(tenant, httpx.Response(status, json=body, request=request))

    def verdict(self) -> Verdict:
        return check(self.ledger, self.engine, self.objects)


@pytest.fixture(scope="module")
def healthy(bundle: Path, fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("checker") / "data", Ledger(), [])
    reference = world.bench.registry.add(bundle).id
    hooks = WebhookStore(world.engine, open_vault(world.bench.settings), lease_seconds=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEGRAFT_WORKER_NAME", "w1")
        for number, tenant in enumerate(("acme", "acme", "bolt")):
            if tenant not in world.ledger.hooks:
                endpoint, _ = hooks.create(tenant, WebhookEndpointCreate(url="https://example.com/ends"))
                world.ledger.hooks[tenant] = endpoint.id
            adapter_id = world.upload(tenant, fresh)
            request = RealignmentCreate.model_validate({"adapter_id": adapter_id, "method": {"type": "gram"}})
            job_id = world.bench.jobs.create(tenant, reference, request, f"key-{number}").job.id
            world.jobs.append(job_id)
            job = Accepted(job_id, tenant, adapter_id, key=f"key-{number}")
            if number == 1:
                assert world.bench.jobs.claim(job_id, "w1") is not None
                world.bench.jobs.fail(job_id, 1, InvalidAdapter("No.", code="invalid_adapter"))
                world.ledger.jobs[job_id] = replace(job, outcomes=frozenset({"failed"}))
            else:
                run_job(world.bench, job_id)
                world.ledger.jobs[job_id] = replace(job, twin=(digests(world.folder(world.made(job_id))),))
    world.hear("acme", 200, {"data": [{"id": world.jobs[0]}, {"id": world.jobs[1]}]})
    world.hear("bolt", 503, {"status": 503, "error": {"code": "database_unavailable"}})
    world.engine.dispose()
    return world


@pytest.fixture
def world(healthy: World, tmp_path: Path) -> Iterator[World]:
    """A copy to break."""
    shutil.copytree(healthy.data, tmp_path / "data")
    world = World(tmp_path / "data", copy.deepcopy(healthy.ledger), healthy.jobs)
    yield world
    world.engine.dispose()


def test_a_healthy_service_passes(world: World) -> None:
    verdict = world.verdict()
    assert verdict.faults == []
    assert (verdict.tried, verdict.answers) == (3, 2)
    assert [verdict.count(kind) for kind in KINDS] == [0] * len(KINDS)


def no_record(world: World) -> None:
    world.sql("DELETE FROM realignments WHERE id = :id", id=world.jobs[1])


def not_ended(world: World) -> None:
    world.sql("UPDATE realignments SET state = 'queued' WHERE id = :id", id=world.jobs[1])


def still_running(world: World) -> None:
    world.sql("UPDATE realignments SET state = 'running' WHERE id = :id", id=world.jobs[0])


def no_message(world: World) -> None:
    world.sql("DELETE FROM webhook_deliveries WHERE payload LIKE :id", id=f"%{world.jobs[0]}%")


def upload_forgotten(world: World) -> None:
    world.sql("DELETE FROM adapters WHERE id = :id", id=next(iter(world.ledger.uploads)))


def result_forgotten(world: World) -> None:
    world.sql("DELETE FROM adapters WHERE id = :id", id=world.made(world.jobs[0]))


def second_publish(world: World) -> None:
    copied = (
        f"INSERT INTO adapters SELECT '{MADE_UP}', tenant, prefix, bytes, created_at, expires_at, body FROM adapters"
    )
    world.sql(f"{copied} WHERE id = :id", id=world.made(world.jobs[0]))


def second_end(world: World) -> None:
    copied = "INSERT INTO events (realignment_id, created_at, type, message, data)"
    copied += " SELECT realignment_id, created_at, type, message, data FROM events WHERE type = 'succeeded'"
    world.sql(f"{copied} AND realignment_id = :id", id=world.jobs[0])


def end_counted_twice(world: World) -> None:
    world.sql("UPDATE totals SET value = value + 1 WHERE name = 'jobs' AND first = 'succeeded'")


def second_message(world: World) -> None:
    names = "tenant, endpoint_id, type, payload, state, attempts, step, created_at"
    copied = f"INSERT INTO webhook_deliveries (id, {names}) SELECT 'msg_2', {names} FROM webhook_deliveries"
    world.sql(f"{copied} WHERE payload LIKE :id", id=f"%{world.jobs[0]}%")


def two_jobs_for_a_key(world: World) -> None:
    with world.engine.begin() as connection:
        rows = connection.execute(text("SELECT * FROM realignments WHERE id = :id"), {"id": world.jobs[0]})
        row = dict(rows.mappings().one())
        # Without the constraint that keeps it from happening.
        connection.execute(text("CREATE TABLE loose AS SELECT * FROM realignments"))
        connection.execute(text("DROP TABLE realignments"))
        connection.execute(text("ALTER TABLE loose RENAME TO realignments"))
        row |= {"id": "rlg_second", "state": "cancelled", "result": None, "result_attempt": None}
        names = ", ".join(row)
        values = ", ".join(f":{name}" for name in row)
        connection.execute(text(f"INSERT INTO realignments ({names}) VALUES ({values})"), row)


def changed_byte(world: World) -> None:
    path = world.folder(world.made(world.jobs[0])) / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncated_file(world: World) -> None:
    path = world.folder(world.made(world.jobs[0])) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])


def customers_byte(world: World) -> None:
    path = world.folder(next(iter(world.ledger.uploads))) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def no_twin(world: World) -> None:
    """The bytes fit their record, and are still not what the same job makes without faults."""
    job = world.ledger.jobs[world.jobs[0]]
    other = {name: "0" * 64 if name == WEIGHTS else digest for name, digest in job.twin[0].items()}
    world.ledger.jobs[job.id] = replace(job, twin=(other,))


def file_too_many(world: World) -> None:
    (world.folder(world.made(world.jobs[0])) / "half.safetensors").write_bytes(b"half")


def attempts_mixed(world: World) -> None:
    """The record follows an attempt that did not write the result."""
    world.sql("UPDATE realignments SET result_attempt = 2 WHERE id = :id", id=world.jobs[0])


def other_outcome(world: World) -> None:
    world.sql("UPDATE realignments SET state = 'dead' WHERE id = :id", id=world.jobs[1])


def result_of_a_failure(world: World) -> None:
    world.sql("UPDATE realignments SET result_attempt = 1 WHERE id = :id", id=world.jobs[1])


def state_without_its_event(world: World) -> None:
    world.sql("DELETE FROM events WHERE type = 'succeeded' AND realignment_id = :id", id=world.jobs[0])


def reports_another_output(world: World) -> None:
    path = world.objects / f"tenants/acme/realignments/{world.jobs[0]}/1/report/report.json"
    report = json.loads(path.read_text())
    report["output"]["sha256"] = "0" * 64
    path.write_text(json.dumps(report))


def foreign_job(world: World) -> None:
    world.sql("UPDATE realignments SET tenant = 'bolt' WHERE id = :id", id=world.jobs[1])


def foreign_object(world: World) -> None:
    """A result that lies where another tenant's files are."""
    foreign = str(world.folder(world.made(world.jobs[2])).relative_to(world.objects))
    world.sql("UPDATE adapters SET prefix = :prefix WHERE id = :id", prefix=foreign, id=world.made(world.jobs[0]))


def foreign_adapter(world: World) -> None:
    world.sql("UPDATE adapters SET tenant = 'bolt' WHERE id = :id", id=next(iter(world.ledger.uploads)))


def foreign_id_told(world: World) -> None:
    world.hear("bolt", 200, {"data": [{"id": world.jobs[2]}, {"id": world.jobs[0]}]})


def no_code(world: World) -> None:
    world.hear("acme", 500, {"detail": "Internal Server Error"})


def code_of_another_status(world: World) -> None:
    world.hear("acme", 502, {"status": 500, "error": {"code": "internal_error"}})


def orphan(world: World) -> None:
    """Bytes that the collector does not see, because it looks elsewhere."""
    lost = world.objects / "tenants" / "acme" / "elsewhere"
    lost.mkdir()
    (lost / WEIGHTS).write_bytes(b"left")


def half_written(world: World) -> None:
    (world.folder(world.made(world.jobs[0])).parent.parent.parent / ".writing-x").write_bytes(b"left")


MUTATIONS: dict[Callable[[World], None], str] = {
    no_record: "lost",
    not_ended: "lost",
    still_running: "lost",
    no_message: "lost",
    upload_forgotten: "lost",
    result_forgotten: "lost",
    second_publish: "doubled",
    second_end: "doubled",
    end_counted_twice: "doubled",
    second_message: "doubled",
    two_jobs_for_a_key: "doubled",
    changed_byte: "wrong",
    truncated_file: "wrong",
    customers_byte: "wrong",
    no_twin: "wrong",
    file_too_many: "wrong",
    attempts_mixed: "wrong",
    other_outcome: "wrong",
    result_of_a_failure: "wrong",
    state_without_its_event: "wrong",
    reports_another_output: "wrong",
    foreign_job: "foreign",
    foreign_object: "foreign",
    foreign_adapter: "foreign",
    foreign_id_told: "foreign",
    no_code: "uncoded",
    code_of_another_status: "uncoded",
    orphan: "leftover",
    half_written: "leftover",
}


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_what_is_broken_is_found(world: World, mutate: Callable[[World], None]) -> None:
    mutate(world)
    verdict = world.verdict()
    assert verdict.count(MUTATIONS[mutate]) > 0, verdict.faults  # type: ignore[arg-type]


def test_every_invariant_is_broken_at_least_once() -> None:
    assert set(MUTATIONS.values()) == set(KINDS)


def test_what_the_collector_takes_away_is_no_leftover(world: World) -> None:
    """Attempts of killed workers, cut uploads: orphans until the collector comes."""
    killed = world.objects / f"tenants/acme/realignments/{world.jobs[0]}/7/adapter/{MADE_UP}"
    unrecorded = world.objects / f"tenants/acme/adapters/{MADE_UP}"
    for folder in (killed, unrecorded, world.objects / "scratch" / "upload-x"):
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_bytes(b"left")
    assert world.verdict().faults == []
    assert not killed.exists()
    assert not unrecorded.exists()
