"""OpenAI's official client against the real service: the fine-tuning API over our jobs."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from openai.types.fine_tuning import FineTuningJob

from safegraft.bundle import MANIFEST
from safegraft.contracts.adapter import Adapter
from safegraft.stores import options
from service.app import create_app
from service.auth import Principal
from service.dependencies import Services
from service.settings import GatewaySettings
from service.uploads import adapter_from_files
from tests.service.answers import refused
from tests.service.conftest import Running, free_port, realign, upload

ROOT = Path(__file__).parents[2]
GRAM: Any = {"type": "gram", "general_weight": 0.5}


@pytest.fixture
def ai(service: Running) -> Iterator[openai.OpenAI]:
    """As its users make it: the address and a key, of which development mode asks none."""
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def ended(ai: openai.OpenAI, job_id: str, seconds: float = 60) -> FineTuningJob:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job = ai.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.1)
    raise AssertionError(job)


def test_a_job_from_its_creation_to_its_result(ai: openai.OpenAI, client: httpx.Client, fresh: Path) -> None:
    adapter = upload(client, fresh, name="customer's")
    reference = client.get("/v1/references").json()["data"][0]["id"]
    job = ai.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=adapter["id"],
        method=GRAM,
        suffix="reviews-safe",
        metadata={"ticket": "7"},
        hyperparameters={"n_epochs": "auto"},
        integrations=None,
        seed=None,
        validation_file=None,
    )
    assert job.id.startswith("rlg_")
    assert (job.object, job.model, job.training_file) == ("fine_tuning.job", reference, adapter["id"])
    assert job.status in ("queued", "running")
    assert (job.fine_tuned_model, job.result_files, job.finished_at, job.error) == (None, [], None, None)
    assert job.organization_id == "default"
    assert (job.seed, job.trained_tokens, job.validation_file, job.integrations) == (0, None, None, [])
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (None, None)

    job = ended(ai, job.id)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.metadata == {"ticket": "7"}
    assert job.method is not None
    assert (job.method.type, job.method.general_weight) == ("gram", 0.5)  # type: ignore[attr-defined]
    assert job.finished_at is not None
    assert job.finished_at >= job.created_at
    assert job.result_files == [job.fine_tuned_model, job.id]
    patched = client.get(f"/v1/adapters/{job.fine_tuned_model}").json()
    assert patched["name"] == "reviews-safe"
    assert patched["origin"] == {"realignment_id": job.id, "unchanged": False}
    # The same job in our own words.
    own = client.get(f"/v1/realignments/{job.id}").json()
    assert (own["status"], own["adapter_id"], own["result"]["adapter_id"]) == (
        "succeeded",
        adapter["id"],
        job.fine_tuned_model,
    )


def test_every_field_of_the_clients_models_is_sent(ai: openai.OpenAI, client: httpx.Client, fresh: Path) -> None:
    """Strictly validated but for `method.type`, whose values are ours."""
    job_id = realign(client, upload(client, fresh)["id"], method=GRAM, strengths=[0.5, 1])["id"]
    raw = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
    assert set(FineTuningJob.model_fields) == set(raw)
    FineTuningJob.model_validate(raw | {"method": None}, strict=True)
    for path, page in (
        ("events", ai.fine_tuning.jobs.list_events(job_id)),
        ("checkpoints", ai.fine_tuning.jobs.checkpoints.list(job_id)),
    ):
        item = client.get(f"/v1/fine_tuning/jobs/{job_id}/{path}").json()["data"][0]
        model = type(page.data[0])
        assert set(model.model_fields) == set(item)
        model.model_validate(item, strict=True)


def test_events_come_newest_first_and_in_pages(ai: openai.OpenAI, client: httpx.Client, fresh: Path) -> None:
    job_id = realign(client, upload(client, fresh)["id"], method=GRAM)["id"]
    page = ai.fine_tuning.jobs.list_events(job_id, limit=2)
    assert [event.data["event"] for event in page.data] == ["succeeded", "started"]  # type: ignore[index]
    assert page.has_next_page()
    everything = list(ai.fine_tuning.jobs.list_events(job_id, limit=1))
    assert [event.data["event"] for event in everything] == ["succeeded", "started", "created"]  # type: ignore[index]
    assert {(event.object, event.level, event.type) for event in everything} == {
        ("fine_tuning.job.event", "info", "message")
    }
    assert everything[0].message == "The result is ready."


def test_strengths_become_checkpoints(ai: openai.OpenAI, client: httpx.Client, fresh: Path) -> None:
    adapter = upload(client, fresh)
    job = ai.fine_tuning.jobs.create(
        model="auto",
        training_file=adapter["id"],
        suffix="curve",
        method=GRAM,
        extra_body={"strengths": [0.1, 0.3, 1], "output_rank": "customer"},
    )
    assert ai.fine_tuning.jobs.checkpoints.list(job.id).data == [] or ended(ai, job.id)
    job = ended(ai, job.id)
    found = list(ai.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    assert [item.step_number for item in found] == [3, 2, 1]
    assert [item.metrics.strength for item in found] == [1, 0.3, 0.1]  # type: ignore[attr-defined]
    assert [item.metrics.step for item in found] == [3, 2, 1]
    assert {item.fine_tuning_job_id for item in found} == {job.id}
    assert job.fine_tuned_model == found[-1].fine_tuned_model_checkpoint
    assert job.result_files == [*(item.fine_tuned_model_checkpoint for item in found[::-1]), job.id]
    report = client.get(f"/v1/realignments/{job.id}/report").json()
    assert [item.metrics.edit for item in found[::-1]] == [  # type: ignore[attr-defined]
        variant["summary"]["edit"] for variant in report["variants"]
    ]
    names = {client.get(f"/v1/adapters/{item.id}").json()["name"] for item in found}
    assert names == {"curve (gram 0.1)", "curve (gram 0.3)", "curve (gram 1)"}


def test_a_failed_job_tells_code_and_message(ai: openai.OpenAI, client: httpx.Client, fresh: Path) -> None:
    factor: Any = {"type": "nlsr", "form": "factor"}
    adapter = upload(client, fresh)["id"]
    job = ended(ai, ai.fine_tuning.jobs.create(model="auto", training_file=adapter, method=factor).id)
    assert (job.status, job.fine_tuned_model, job.result_files) == ("failed", None, [])
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("lineage_mismatch", None)
    assert "continued" in job.error.message
    assert ai.fine_tuning.jobs.list_events(job.id, limit=1).data[0].level == "error"
    assert ai.fine_tuning.jobs.checkpoints.list(job.id).data == []


def test_an_analysis_has_no_model_and_one_result_file(ai: openai.OpenAI, client: httpx.Client, fresh: Path) -> None:
    job_id = realign(client, upload(client, fresh)["id"], mode="analyze", method=GRAM)["id"]
    job = ai.fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.fine_tuned_model, job.result_files) == ("succeeded", None, [job_id])
    assert ai.fine_tuning.jobs.checkpoints.list(job_id).data == []


def test_the_list_shows_what_was_made_here(ai: openai.OpenAI, client: httpx.Client, fresh: Path) -> None:
    adapter = upload(client, fresh)["id"]
    other = client.post("/v1/realignments", json={"adapter_id": adapter, "metadata": {"list": "1"}}).json()["id"]
    made = []
    for metadata in ({"list": "1", "n": "ü & ="}, {"list": "1", "n": ""}, {"list": "2"}, None):
        # Not the same request twice: the service would not mind, but the client's retries must not matter here.
        job = ai.fine_tuning.jobs.create(model="auto", training_file=adapter, method=GRAM, metadata=metadata)
        made.append(job.id)

    def listed(**query: Any) -> list[str]:
        return [job.id for job in ai.fine_tuning.jobs.list(limit=2, **query) if job.id in [*made, other]]

    assert listed() == made[::-1]
    assert listed(metadata={"list": "1"}) == made[1::-1]
    assert listed(metadata={"list": "1", "n": "ü & ="}) == made[:1]
    assert listed(metadata={"n": ""}) == made[1:2]
    assert listed(metadata={"list": "3"}) == []
    assert listed(metadata={}) == made[::-1]
    assert listed(extra_query={"metadata": "null"}) == made[3:]
    assert listed(after=made[2]) == made[1::-1]
    refused(client.get("/v1/fine_tuning/jobs?metadata=other"), 422, "bad_filter")
    refused(client.get("/v1/fine_tuning/jobs?metadata=null&metadata[a]=b"), 422, "bad_filter")
    for job_id in [*made, other]:
        ai.fine_tuning.jobs.cancel(job_id)


def test_cancelling(ai: openai.OpenAI, client: httpx.Client, fresh: Path) -> None:
    adapter = upload(client, fresh)["id"]
    jobs = [ai.fine_tuning.jobs.create(model="auto", training_file=adapter, method=GRAM).id for _ in range(6)]
    answers = [ai.fine_tuning.jobs.cancel(job_id) for job_id in reversed(jobs)]
    assert {job.status for job in answers} <= {"cancelled", "running", "succeeded"}
    assert answers[0].status == "cancelled"
    assert ended(ai, jobs[-1]).status == "cancelled"
    levels = {event.message: event.level for event in ai.fine_tuning.jobs.list_events(jobs[-1])}
    assert levels == {"Queued.": "info", "Cancelled before it started.": "warn"}


# What is refused, and how


def create(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/fine_tuning/jobs", json={"model": "auto", "training_file": "adp_0", **body})


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"method": {"type": "supervised"}}, "method", "nothing is trained here; leave method out or use one of auto"),
        ({"method": {"type": "dpo", "dpo": {}}}, "method", "dpo is a way of training"),
        ({"method": {"type": "reinforcement"}}, "method", "reinforcement is a way of training"),
        ({"method": {"type": "magic"}}, "method", "magic"),
        ({"method": {"type": "gram", "general_weight": -1}}, "method.general_weight", "0.01"),
        ({"hyperparameters": {"n_epochs": 3}}, "hyperparameters.n_epochs", "belong into method"),
        ({"hyperparameters": {"beta": "auto"}}, "hyperparameters.beta", "no such field"),
        ({"seed": 0}, "seed", "method.seed"),
        ({"seed": 7}, "seed", "method.seed"),
        ({"validation_file": "file_1"}, "validation_file", "nothing is trained"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "not offered"),
        ({"suffix": "x" * 65}, "suffix", "64"),
        ({"suffix": "a\nb"}, "suffix", "printable"),
        ({"metadata": {"a": "\0"}}, "metadata.a", "pattern"),
        ({"n_epochs": 3}, "n_epochs", "no such field"),
        ({"model": ""}, "model", "1 character"),
        ({"training_file": "\0"}, "training_file", "pattern"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_means_training_is_refused_by_name(
    client: httpx.Client, body: dict[str, Any], param: str, says: str
) -> None:
    error = refused(create(client, **body), 422, "invalid_request")
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize(
    "body", [{"hyperparameters": {}}, {"hyperparameters": None, "integrations": []}, {"metadata": None}, {"suffix": ""}]
)
def test_what_asks_for_nothing_is_accepted(client: httpx.Client, fresh: Path, body: dict[str, Any]) -> None:
    answer = create(client, training_file=upload(client, fresh)["id"], **body)
    assert answer.status_code == 200, answer.text
    client.post(f"/v1/fine_tuning/jobs/{answer.json()['id']}/cancel")


def test_the_client_shows_our_code_and_sentence(ai: openai.OpenAI, client: httpx.Client, fresh: Path) -> None:
    adapter = upload(client, fresh)["id"]
    with pytest.raises(openai.NotFoundError) as missing:
        ai.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=adapter)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert "tiny-llama" in str(missing.value)
    with pytest.raises(openai.NotFoundError) as missing:
        ai.fine_tuning.jobs.create(model="auto", training_file="adp_0")
    assert (missing.value.code, missing.value.param) == ("adapter_not_found", "training_file")
    for job_id in ("ftjob-1", "rlg_0"):
        with pytest.raises(openai.NotFoundError) as missing:
            ai.fine_tuning.jobs.retrieve(job_id)
        assert missing.value.code == "realignment_not_found"
    with pytest.raises(openai.UnprocessableEntityError) as wrong:
        ai.fine_tuning.jobs.create(model="auto", training_file=adapter, method={"type": "supervised", "supervised": {}})
    assert wrong.value.param == "method"


def test_pause_resume_and_permissions_are_not_offered(ai: openai.OpenAI, client: httpx.Client) -> None:
    for call in (
        lambda: ai.fine_tuning.jobs.pause("rlg_1"),
        lambda: ai.fine_tuning.jobs.resume("rlg_1"),
        lambda: ai.fine_tuning.checkpoints.permissions.list("adp_1"),
    ):
        with pytest.raises(openai.NotFoundError) as missing:
            call()
        assert missing.value.code == "route_not_found"
    refused(client.delete("/v1/fine_tuning/jobs/rlg_1"), 405, "method_not_allowed")


# Once, however often it is sent


def test_a_repeat_is_the_same_job(ai: openai.OpenAI, client: httpx.Client, fresh: Path) -> None:
    body = {"training_file": upload(client, fresh)["id"], "method": GRAM}
    first = create(client, **body).json()["id"]
    assert create(client, **body).json()["id"] != first
    last = create(client, **body).json()["id"]
    again = client.post(
        "/v1/fine_tuning/jobs", json={"model": "auto", **body}, headers={"x-stainless-retry-count": "1"}
    )
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (last, "true")
    key = {"Idempotency-Key": f"ft-{first}"}
    keyed = [
        client.post("/v1/fine_tuning/jobs", json={"model": "auto", **body}, headers=key).json()["id"] for _ in "ab"
    ]
    assert keyed[0] == keyed[1] not in (first, last)
    other = client.post("/v1/fine_tuning/jobs", json={"model": "tiny-llama", **body}, headers=key)
    refused(other, 422, "idempotency_key_reused")


# Files: an adapter is made of one, as by POST /v1/adapters


@pytest.fixture
def gateway(bundle: Path, tmp_path: Path) -> Iterator[TestClient]:
    """A gateway in this process, without broker and workers."""
    app = create_app(GatewaySettings(dev=True, data=tmp_path / "data", redis_url=f"redis://127.0.0.1:{free_port()}/0"))
    with TestClient(app, client=("127.0.0.1", 50000), base_url="http://127.0.0.1") as client:
        app.state.services.references.add(bundle)
        yield client


def here_of(gateway: TestClient) -> Services:
    here: Services = gateway.app.state.services  # type: ignore[attr-defined]
    return here


class Ingest:
    """The real way from a file to an adapter, with a note of what it made."""

    def __init__(self, gateway: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
        sent = {"file": ("adapter.tar", archive.getvalue())}
        self.file = gateway.post("/v1/files", data={"purpose": "fine-tune"}, files=sent).json()["id"]
        self.made: list[str] = []
        monkeypatch.setattr("service.fine_tuning.adapter_from_files", self)

    async def __call__(self, here: Services, asking: Principal, file_ids: list[str], name: str) -> Adapter:
        adapter = await adapter_from_files(here, asking, file_ids, name)
        self.made.append(adapter.id)
        return adapter


@pytest.fixture
def ingest(gateway: TestClient, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Ingest:
    return Ingest(gateway, fresh, monkeypatch)


def test_a_file_becomes_an_adapter_and_stays_the_training_file(gateway: TestClient, ingest: Ingest) -> None:
    here = here_of(gateway)
    body = {"model": "auto", "training_file": ingest.file, "suffix": "mine"}
    job = gateway.post("/v1/fine_tuning/jobs", json=body).json()
    assert job["training_file"] == ingest.file
    own = gateway.get(f"/v1/realignments/{job['id']}").json()
    assert [own["adapter_id"]] == ingest.made
    assert own["training_file"] == ingest.file
    # The suffix is the patched adapter's name, under which nobody is to find this one.
    assert here.adapters.get("default", own["adapter_id"]).name == own["adapter_id"]
    assert gateway.get("/v1/fine_tuning/jobs").json()["data"] == [job]
    answer = gateway.post("/v1/fine_tuning/jobs", json={"model": "auto", "training_file": "file_2"})
    assert refused(answer, 404, "file_not_found")["param"] == "training_file"


@pytest.mark.parametrize("headers", [{"Idempotency-Key": "k"}, {"x-stainless-retry-count": "1"}], ids=lambda h: min(h))
def test_a_repeat_makes_no_second_adapter(gateway: TestClient, ingest: Ingest, headers: dict[str, str]) -> None:
    body = {"model": "auto", "training_file": ingest.file}
    jobs = {gateway.post("/v1/fine_tuning/jobs", json=body, headers=headers).json()["id"] for _ in range(3)}
    assert len(jobs) == len(ingest.made) == 1
    # The file is what was sent, not the adapter that it became.
    if "Idempotency-Key" in headers:
        other = gateway.post("/v1/fine_tuning/jobs", json={**body, "training_file": "file_2"}, headers=headers)
        refused(other, 422, "idempotency_key_reused")


def test_of_repeats_at_the_same_time_one_adapter_is_kept(gateway: TestClient, ingest: Ingest) -> None:
    here = here_of(gateway)

    def post(_: int) -> str:
        body = {"model": "auto", "training_file": ingest.file}
        answer = gateway.post("/v1/fine_tuning/jobs", json=body, headers={"Idempotency-Key": "k"})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(post, range(8)))) == 1
    kept, _ = here.adapters.page("default", limit=100)
    assert len(kept) == 1
    assert kept[0].id in ingest.made
    assert [place.rpartition("/")[2] for place, _ in here.objects.prefixes("tenants/default/adapters")] == [kept[0].id]


def test_a_refused_job_leaves_no_adapter(gateway: TestClient, ingest: Ingest) -> None:
    here = here_of(gateway)
    for body, code in (
        ({"method": {"type": "nlsr", "scorer": "snip"}}, "scorer_not_offered"),
        ({"method": {"type": "none"}, "strengths": [1.0]}, "bad_strengths"),
    ):
        answer = gateway.post("/v1/fine_tuning/jobs", json={"model": "auto", "training_file": ingest.file, **body})
        refused(answer, 422, code)
    assert len(ingest.made) == 2
    assert here.adapters.page("default", limit=100) == ([], False)
    assert not list(here.objects.prefixes("tenants/default/adapters"))
    # What can be told from the request alone costs no adapter.
    refused(
        gateway.post("/v1/fine_tuning/jobs", json={"model": "gpt", "training_file": ingest.file}),
        404,
        "model_not_found",
    )
    assert len(ingest.made) == 2


def test_of_two_references_that_know_a_label_the_preferred_one_is_meant(
    gateway: TestClient, ingest: Ingest, bundle: Path, tmp_path: Path
) -> None:
    here = here_of(gateway)
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    manifest = json.loads((other / MANIFEST).read_text(encoding="utf-8"))
    (other / MANIFEST).write_text(json.dumps(manifest | {"name": "other"}), encoding="utf-8")
    ids = {here.references.add(other).id, *(item.id for item in here.references.installed())}
    assert len(ids) == 2
    body = {"model": "tiny-llama", "training_file": ingest.file}
    answer = gateway.post("/v1/fine_tuning/jobs", json=body)
    assert refused(answer, 422, "reference_ambiguous")["message"].endswith("Name one as model.")
    for reference in ids:
        options.put(here.database, options.DEFAULT_REFERENCE, reference)
        assert gateway.post("/v1/fine_tuning/jobs", json=body).json()["model"] == reference
        # An id says it all, whatever is preferred.
        for named in ids:
            job = gateway.post("/v1/fine_tuning/jobs", json={**body, "model": named}).json()
            assert job["model"] == named


# The page that shows how


def blocks() -> list[str]:
    page = (ROOT / "docs" / "fine_tuning.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_the_pages_snippet_runs(service: Running, client: httpx.Client, fresh: Path, tmp_path: Path) -> None:
    """As it stands there, in a process of its own, as soon as files can be uploaded; until then with an adapter."""
    (program,) = blocks()
    with tarfile.open(tmp_path / "adapter.tar", "w") as tar:
        for path in fresh.iterdir():
            tar.add(path, path.name)
    program = program.replace("http://localhost:8000", service.url)
    uploading = [line for line in program.splitlines() if "client.files.create" in line]
    fetching = "client.files.content(job.id)"
    assert len(uploading) == 1
    assert fetching in program
    if "/v1/files" not in client.get("/openapi.json").json()["paths"]:
        adapter = upload(client, fresh)["id"]
        program = program.replace(uploading[0], f"upload = client.get('/adapters/{adapter}', cast_to=FileObject)")
        for asked, route in (
            (fetching, "/realignments/{job.id}/report"),
            ("client.files.content(job.fine_tuned_model)", "/adapters/{job.fine_tuned_model}/download"),
        ):
            program = program.replace(asked, f'client.get(f"{route}", cast_to=HttpxBinaryResponseContent)')
        names = "from openai._legacy_response import HttpxBinaryResponseContent\nfrom openai.types import FileObject\n"
        program = names + program
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OPENAI")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The result is ready." in done.stdout
    assert (tmp_path / "report.json").is_file()
    with tarfile.open(tmp_path / "patched.tar") as tar:
        assert any(name.endswith("adapter_model.safetensors") for name in tar.getnames())
