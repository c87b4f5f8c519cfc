"""Provenance from a real service, signed by its worker and checked offline by whoever got the adapter."""

import base64
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

import service.main
from safegraft.contracts.realignment import RealignmentCreate
from safegraft.dsse import load_public_key, make_keys
from safegraft.stores.objects import result_prefix
from service.app import create_app
from service.settings import GatewaySettings
from tests.service.answers import refused
from tests.service.conftest import SAFEGRAFT, Running, free_port, objects_of, realign, start, upload

ENVELOPE, STATEMENT = "application/vnd.dsse.envelope.v1+json", "application/vnd.in-toto+json"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_keys(tmp_path_factory.mktemp("keys"))[:2]


@pytest.fixture(scope="module")
def signing(bundle: Path, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service whose worker signs and whose gateway shows the public key."""
    data = tmp_path_factory.mktemp("signing") / "data"
    subprocess.run([SAFEGRAFT, "reference", "add", str(bundle), "--data", str(data)], check=True, capture_output=True)
    running = start(
        data,
        workers=1,
        log=data / "serve.log",
        SAFEGRAFT_SIGNING_KEY=str(keys[0]),
        SAFEGRAFT_PROVENANCE_KEYS=str(keys[1]),
        SAFEGRAFT_BUILDER_ID="https://example.com/safegraft",
    )
    yield running
    running.process.terminate()
    assert running.process.wait(60) == 0


def verify(*arguments: str | Path, status: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [SAFEGRAFT, "verify", *map(str, arguments), "--json"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def download(client: httpx.Client, adapter_id: str, folder: Path) -> Path:
    with tarfile.open(fileobj=io.BytesIO(client.get(f"/v1/adapters/{adapter_id}/download").content)) as tar:
        tar.extractall(folder, filter="data")
    return folder / adapter_id


def test_what_a_service_hands_out_is_checked_offline(
    signing: Running, keys: tuple[Path, Path], bundle: Path, fresh: Path, tmp_path: Path
) -> None:
    with signing.client() as client:
        sent = upload(client, fresh)["id"]
        job = realign(client, sent, method={"type": "gram"}, strengths=[0.1, 1])
        address = f"/v1/realignments/{job['id']}/provenance"
        answer = client.get(address)
        assert (answer.status_code, answer.headers["content-type"]) == (200, ENVELOPE)
        head = client.head(address)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == ENVELOPE
        assert head.headers["content-length"] == str(len(answer.content))
        given = download(client, sent, tmp_path)
        patched = [download(client, item["adapter_id"], tmp_path) for item in job["result"]["variants"]]
        (tmp_path / "r.json").write_bytes(client.get(f"/v1/realignments/{job['id']}/report.json").content)
        (shown,) = client.get("/v1/provenance_keys").json()["data"]
    (tmp_path / "p.json").write_bytes(answer.content)
    (tmp_path / "shown.pem").write_text(shown["pem"])
    assert shown["id"] == answer.json()["signatures"][0]["keyid"] == load_public_key(keys[1]).keyid
    common: list[str | Path] = [tmp_path / "p.json", "--report", tmp_path / "r.json", "--input", given]
    common += ["--reference", bundle, "--public-key", tmp_path / "shown.pem"]
    for folder, name in zip(patched, ("0.1", "1"), strict=True):
        found = verify(*common, "--adapter", folder)
        assert (found["ok"], found["problems"], found["signature"]) == (True, [], "valid")
        assert {f"{name}/adapter_model.safetensors", f"{name}/adapter_config.json", "report.json"} <= set(
            found["checked"]
        )
        assert "adapter/adapter_model.safetensors" in found["checked"]
    weights = patched[1] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert not verify(*common, "--adapter", patched[1], status=1)["ok"]
    statement = statement_in(answer.json())
    run = statement["predicate"]["runDetails"]
    assert run["builder"]["id"] == "https://example.com/safegraft"
    assert run["metadata"]["invocationId"] == f"{job['id']}/1"


def statement_in(envelope: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))
    return found


def test_without_a_key_the_statement_is_bare(client: httpx.Client, fresh: Path, tmp_path: Path) -> None:
    job = realign(client, upload(client, fresh)["id"], method={"type": "gram"})
    answer = client.get(f"/v1/realignments/{job['id']}/provenance")
    assert (answer.status_code, answer.headers["content-type"]) == (200, STATEMENT)
    assert answer.json()["predicateType"] == "https://slsa.dev/provenance/v1"
    (tmp_path / "p.json").write_bytes(answer.content)
    patched = download(client, job["result"]["adapter_id"], tmp_path)
    found = verify(tmp_path / "p.json", "--adapter", patched)
    assert (found["ok"], found["signature"], found["keyid"]) == (True, "unsigned", None)
    assert client.get("/v1/provenance_keys").json()["data"] == []


def test_a_measurement_attests_its_report(client: httpx.Client, fresh: Path) -> None:
    job = realign(client, upload(client, fresh)["id"], method={"type": "gram"}, mode="analyze")
    body = client.get(f"/v1/realignments/{job['id']}/provenance").json()
    assert [item["name"] for item in body["subject"]] == ["report.json"]


def test_what_has_no_provenance_says_so(client: httpx.Client, service: Running, fresh: Path, tmp_path: Path) -> None:
    answer = client.get("/v1/realignments/rlg_nothing/provenance")
    refused(answer, 404, "realignment_not_found")
    adapter_id = upload(client, fresh)["id"]
    failed = realign(client, adapter_id, method={"type": "nlsr", "form": "factor"})
    refused(client.get(f"/v1/realignments/{failed['id']}/provenance"), 409, "no_provenance")
    # A result from before there was any.
    job = realign(client, adapter_id, method={"type": "gram"})
    objects, prefix = objects_of(service.data), f"{result_prefix('default', job['id'], job['attempt'])}/report"
    objects.fetch(prefix, tmp_path / "report")
    (tmp_path / "report" / "provenance.json").unlink()
    objects.remove(prefix)
    objects.publish(tmp_path / "report", prefix)
    refused(client.get(f"/v1/realignments/{job['id']}/provenance"), 404, "no_provenance")


def test_other_tenants_see_nothing(tmp_path: Path) -> None:
    app = create_app(GatewaySettings(data=tmp_path, redis_url=f"redis://127.0.0.1:{free_port()}/0"))
    with TestClient(app) as client:
        here = app.state.services
        job = here.jobs.create("acme", "ref_1", RealignmentCreate(adapter_id="adp_1")).job
        address = f"/v1/realignments/{job.id}/provenance"
        headers = {}
        for tenant in ("acme", "other"):
            _, given = here.keys.create(tenant, scopes=["read"])
            headers[tenant] = {"authorization": f"Bearer {given}"}
        refused(client.get(address, headers=headers["acme"]), 409, "no_provenance")
        refused(client.get(address, headers=headers["other"]), 404, "realignment_not_found")
        here.jobs.claim(job.id, "w1")
        (tmp_path / "report").mkdir()
        (tmp_path / "report" / "provenance.json").write_text('{"predicateType": ""}')
        here.objects.publish(tmp_path / "report", f"{result_prefix('acme', job.id, 1)}/report")
        assert here.jobs.succeed(job.id, 1)
        assert client.get(address, headers=headers["acme"]).status_code == 200
        refused(client.get(address, headers=headers["other"]), 404, "realignment_not_found")
        refused(client.get(address), 401, "unauthorized")


def test_published_keys_are_listed_and_bad_ones_stop_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_keys(tmp_path / "a"), make_keys(tmp_path / "b")
    monkeypatch.setenv("SAFEGRAFT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SAFEGRAFT_DEV", "1")
    monkeypatch.setenv("SAFEGRAFT_PROVENANCE_KEYS", f"{first[1]}, {second[1]}")
    app = service.main.app()
    with TestClient(app, client=("127.0.0.1", 1), base_url="http://localhost:8000") as client:
        listed = client.get("/v1/provenance_keys").json()
    assert [item["id"] for item in listed["data"]] == [first[2], second[2]]
    assert all("PRIVATE" not in item["pem"] for item in listed["data"])
    for wrong in (str(tmp_path / "nothing.pem"), str(first[0])):  # the private one least of all
        monkeypatch.setenv("SAFEGRAFT_PROVENANCE_KEYS", wrong)
        with pytest.raises(SystemExit, match=r"provenance_keys cannot be used: .*is no key") as raised:
            service.main.app()
        assert "\n" not in str(raised.value)
    monkeypatch.setenv("SAFEGRAFT_PROVENANCE_KEYS", "")
    assert GatewaySettings().provenance_keys == []
