"""What a worker writes beside a report, and that its signature is made where it runs."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from safegraft.adapter import CONFIG, WEIGHTS
from safegraft.contracts.provenance import ENVELOPE_MEDIA, STATEMENT_MEDIA
from safegraft.dsse import load_public_key, make_keys
from safegraft.errors import InvalidParameter
from safegraft.provenance import media_type
from safegraft.verification import Evidence, check_provenance
from tests.worker.test_tasks import TENANT, Shop
from worker.settings import WorkerSettings
from worker.tasks import Bench, run_job


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return make_keys(tmp_path / "keys")[1]


@pytest.fixture
def shop(tmp_path: Path, bundle: Path, public: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setenv("SAFEGRAFT_WORKER_NAME", "w1")
    shop = Shop(tmp_path / "data", max_attempts=2, signing_key=public.with_name("signing_key.pem"))
    shop.reference = shop.bench.registry.add(bundle).id
    yield shop
    assert list((tmp_path / "data" / "objects" / "scratch").glob("*")) == []


def provenance(shop: Shop, job_id: str) -> Path:
    attempt = shop.job(job_id).attempt
    folder = shop.data / "delivered" / job_id
    for kind in ("report", "side_car"):
        prefix = f"tenants/{TENANT}/realignments/{job_id}/{attempt}/{kind}"
        if shop.bench.objects.names(prefix):
            shop.bench.objects.fetch(prefix, folder / kind)
    return folder / "report" / "provenance.json"


@pytest.mark.parametrize("strengths", [[], [0.3, 3.0]])
def test_every_delivered_file_is_attested(
    shop: Shop, fresh: Path, public: Path, bundle: Path, tmp_path: Path, strengths: list[float]
) -> None:
    sent = tmp_path / "sent"
    shutil.copytree(fresh, sent)
    (sent / "tokenizer_config.json").write_text("{}")
    job_id = shop.order(shop.upload(sent).id, strengths=strengths)
    run_job(shop.bench, job_id)
    result = shop.job(job_id).result
    assert result is not None
    path = provenance(shop, job_id)
    assert media_type(path.read_bytes()) == ENVELOPE_MEDIA
    assert result.adapter_id is not None
    made = {f"{variant.strength:g}": variant.adapter_id for variant in result.variants} or {"": result.adapter_id}
    for name, adapter_id in made.items():
        shop.bench.objects.fetch(shop.bench.adapters.prefix(TENANT, adapter_id), tmp_path / "out" / name)
    evidence = Evidence(
        adapter=tmp_path / "out",
        report=path.with_name("report.json"),
        given=sent,
        reference=bundle,
        key=load_public_key(public),
    )
    found = check_provenance(path.read_bytes(), evidence)
    assert (found.signature, found.problems) == ("valid", [])
    outputs = {f"{name}/{file}".lstrip("/") for name in made for file in (CONFIG, WEIGHTS, "tokenizer_config.json")}
    assert outputs | {"report.json", f"adapter/{WEIGHTS}", "adapter/tokenizer_config.json"} <= set(found.checked)


def test_side_cars_and_attempts_are_named(shop: Shop, fresh: Path, public: Path) -> None:
    job_id = shop.order(shop.upload(fresh).id, method={"type": "safetylock", "heads": 3, "output": "side_car"})
    assert shop.jobs.claim(job_id, "another") is not None
    shop.expire(job_id)
    run_job(shop.bench, job_id)
    path = provenance(shop, job_id)
    side_cars = path.parents[1] / "side_car"
    evidence = Evidence(side_cars=side_cars, key=load_public_key(public))
    found = check_provenance(path.read_bytes(), evidence)
    assert (found.problems, found.checked) == ([], ["side_car/side_car.safetensors"])


def test_without_a_key_the_statement_names_builder_and_attempt(tmp_path: Path, bundle: Path, fresh: Path) -> None:
    shop = Shop(tmp_path / "plain")
    shop.reference = shop.bench.registry.add(bundle).id
    job_id = shop.order(shop.upload(fresh).id)
    assert shop.jobs.claim(job_id, "another") is not None
    shop.expire(job_id)
    run_job(shop.bench, job_id)
    body = provenance(shop, job_id).read_bytes()
    assert media_type(body) == STATEMENT_MEDIA
    run = json.loads(body)["predicate"]["runDetails"]
    assert run["metadata"]["invocationId"] == f"{job_id}/2"
    assert run["builder"]["id"] == "urn:safegraft:worker"


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEGRAFT_SIGNING_KEY", "")
    assert WorkerSettings().signing_key is None
    for wrong in ("", "no uri", "x", "urn:ü"):
        with pytest.raises(ValueError, match="builder_id"):
            WorkerSettings(builder_id=wrong)
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(InvalidParameter, match="is no key"):
        Bench(WorkerSettings(data=tmp_path / "data", signing_key=tmp_path / "key.pem"))
