"""The main job over HTTP, on real processes: upload → queue → worker → patched adapter and report."""

import hashlib
import io
import json
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load
from transformers import LlamaForCausalLM

from safegraft.contracts.methods import METHOD_PARAMETERS, MODELS
from safegraft.contracts.report import Report
from safegraft.engine.pipeline import realign as realign_here
from safegraft.engine.reference import LoadedReference
from tests import tiny
from tests.service.answers import refused
from tests.service.conftest import Running, files_of, finished, realign, upload

METHODS: list[dict[str, Any]] = [
    {"type": "nlsr"},
    {"type": "nlsr", "form": "neuron", "skip_share": 0.0},
    {"type": "gram"},
    {"type": "gram", "general_weight": 3.0},
]


def result_folder(client: httpx.Client, job: dict[str, Any], target: Path) -> Path:
    raw = client.get(f"/v1/adapters/{job['result']['adapter_id']}/download").content
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        tar.extractall(target, filter="data")
    return next(target.iterdir())


@pytest.mark.parametrize("method", METHODS, ids=json.dumps)
@pytest.mark.parametrize("lineage", ["fresh", "continued"])
def test_a_patched_adapter_loads_wherever_the_customers_loaded(
    client: httpx.Client,
    base: Path,
    lineage: str,
    method: dict[str, Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    customer: Path = request.getfixturevalue(lineage)
    adapter = upload(client, customer, name="a customer's")
    job = realign(client, adapter["id"], method=method, metadata={"ticket": "7"})
    assert job["status"] == "succeeded", job["error"]
    assert job["progress"] == {"stage": "done", "done": 14, "total": 14}
    assert job["metadata"] == {"ticket": "7"}
    folder = result_folder(client, job, tmp_path)

    assert (folder / "adapter_config.json").read_bytes() == (customer / "adapter_config.json").read_bytes()
    assert [path.name for path in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
    with (
        safe_open(customer / "adapter_model.safetensors", "pt") as before,
        safe_open(folder / "adapter_model.safetensors", "pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        assert after.metadata() == {"format": "pt"}
        for key in before.keys():  # noqa: SIM118 - not a dict
            assert before.get_tensor(key).shape == after.get_tensor(key).shape
            assert before.get_tensor(key).dtype == after.get_tensor(key).dtype
    model: Any = LlamaForCausalLM.from_pretrained(base)
    wrapped = PeftModel(model, LoraConfig.from_pretrained(str(folder)))
    loaded = wrapped.load_adapter(str(folder), "patched")
    assert [key for key in loaded.missing_keys if "patched" in key] == []
    assert loaded.unexpected_keys == []

    report = Report.model_validate(client.get(job["result"]["report_url"]).json())
    patched = client.get(f"/v1/adapters/{job['result']['adapter_id']}").json()
    assert report.input.sha256 == adapter["sha256"]
    assert report.output is not None
    assert report.output.sha256 == patched["sha256"]
    assert patched["sha256"] == hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert patched["origin"] == {"realignment_id": job["id"], "unchanged": False}
    assert report.lineage == lineage
    assert report.summary.repaired > 0


def test_a_job_that_repairs_nothing_returns_the_inputs_bytes(client: httpx.Client, fresh: Path, tmp_path: Path) -> None:
    adapter = upload(client, fresh)
    job = realign(client, adapter["id"], method={"type": "nlsr", "skip_share": 1.0})
    patched = client.get(f"/v1/adapters/{job['result']['adapter_id']}").json()
    assert patched["sha256"] == adapter["sha256"]
    assert patched["origin"] == {"realignment_id": job["id"], "unchanged": True}
    assert client.get(f"{job['result']['report_url']}").json()["summary"]["repaired"] == 0


def test_analyze_reports_without_a_patch(client: httpx.Client, fresh: Path) -> None:
    job = realign(client, upload(client, fresh)["id"], mode="analyze", method={"type": "gram"})
    assert job["status"] == "succeeded"
    assert job["result"]["adapter_id"] is None
    report = client.get(job["result"]["report_url"]).json()
    assert report["output"] is None
    assert report["summary"]["repaired"] == 0


def test_without_a_method_the_recommended_one_runs(client: httpx.Client, fresh: Path) -> None:
    adapter = upload(client, fresh)
    job = realign(client, adapter["id"])
    assert job["status"] == "succeeded", job["error"]
    assert job["method"] == {"type": "auto"}
    report = Report.model_validate(client.get(job["result"]["report_url"]).json())
    assert report.method.type == report.recommendation.method == job["result"]["method"] == "gram"
    assert report.recommendation.reason.endswith(".")


def test_several_strengths_are_downloaded_one_by_one(client: httpx.Client, fresh: Path) -> None:
    adapter = upload(client, fresh)
    job = realign(client, adapter["id"], method={"type": "gram"}, strengths=[0.1, 1])
    variants = job["result"]["variants"]
    assert [variant["strength"] for variant in variants] == [0.1, 1]
    report = client.get(job["result"]["report_url"]).json()
    hashes = [client.get(f"/v1/adapters/{variant['adapter_id']}").json()["sha256"] for variant in variants]
    assert hashes == [variant["output"]["sha256"] for variant in report["variants"]]
    assert len({adapter["sha256"], *hashes}) == 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"strengths": [1.0]}, "method"),
        ({"method": {"type": "gram"}, "strengths": [1.0, 1.0]}, "strengths"),
        ({"method": {"type": "gram"}, "strengths": [0.0]}, "strengths"),
        ({"method": {"type": "none"}, "strengths": [1.0]}, "strengths"),
    ],
)
def test_strengths_that_cannot_be_are_refused_before_a_job_is_queued(
    client: httpx.Client, fresh: Path, body: dict[str, Any], param: str
) -> None:
    answer = client.post("/v1/realignments", json={"adapter_id": upload(client, fresh)["id"], **body})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("bad_strengths", param)


def test_a_side_car_can_be_downloaded(client: httpx.Client, fresh: Path) -> None:
    method = {"type": "safetylock", "heads": 2, "output": "side_car"}
    job = realign(client, upload(client, fresh)["id"], method=method)
    (url,) = job["result"]["side_car_urls"]
    answer = client.get(url)
    assert answer.status_code == 200
    assert load(answer.content)
    assert client.get(url.replace("side_car.safetensors", "other.safetensors")).status_code == 404
    plain = realign(client, upload(client, fresh)["id"], method={"type": "gram"})
    assert plain["result"]["side_car_urls"] == []
    assert client.get(f"/v1/realignments/{plain['id']}/side_car/side_car.safetensors").status_code == 404


def test_two_workers_and_twenty_jobs_at_once_all_end_each_exactly_once(
    service: Running, client: httpx.Client, fresh: Path, continued: Path, bundle: Path, tmp_path: Path
) -> None:
    wanted = {}
    reference = LoadedReference(bundle)
    for folder in (fresh, continued):
        for number, method in enumerate(METHODS):
            out = tmp_path / f"{folder.name}-{number}"
            report = realign_here(folder, reference, METHOD_PARAMETERS.validate_python(method), out)
            assert report.output is not None
            wanted[folder.name, number] = report.output.sha256
    adapters = {folder.name: upload(client, folder)["id"] for folder in (fresh, continued)}
    cases = [(name, number) for name in adapters for number in range(len(METHODS))] * 3
    cases = cases[:20]

    def post(case: tuple[str, int]) -> str:
        body = {"adapter_id": adapters[case[0]], "method": METHODS[case[1]]}
        answer = httpx.post(f"{service.url}/v1/realignments", json=body, trust_env=False, timeout=30)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    with ThreadPoolExecutor(20) as pool:
        ids = list(pool.map(post, cases))
    assert len(set(ids)) == 20
    for job_id, case in zip(ids, cases, strict=True):
        job = finished(client, job_id, 120)
        assert job["status"] == "succeeded", job["error"]
        assert job["attempt"] == 1
        patched = client.get(f"/v1/adapters/{job['result']['adapter_id']}").json()
        assert patched["sha256"] == wanted[case]
        kinds = [event["type"] for event in client.get(f"/v1/realignments/{job_id}/events").json()["data"]]
        assert kinds == ["created", "started", "succeeded"]
    logs = "".join((service.data / "logs" / f"worker{n}.log").read_text() for n in (1, 2))
    for job_id in ids:
        assert logs.count(f"{job_id}: attempt 1") == 1
    assert all(
        any(f"{i}: attempt" in (service.data / "logs" / f"worker{n}.log").read_text() for i in ids) for n in (1, 2)
    )


def test_a_retry_of_openais_client_makes_no_second_job(client: httpx.Client, fresh: Path) -> None:
    """It sends no key of idempotency, but says how often it has sent this before."""
    body = {"adapter_id": upload(client, fresh)["id"], "method": {"type": "gram"}}
    first = client.post("/v1/realignments", json=body, headers={"x-stainless-retry-count": "0"})
    again = client.post("/v1/realignments", json=body, headers={"x-stainless-retry-count": "1"})
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    # Asked for on purpose it is another job; and so is another request.
    second = client.post("/v1/realignments", json=body).json()["id"]
    other = client.post(
        "/v1/realignments", json={**body, "metadata": {"a": "b"}}, headers={"x-stainless-retry-count": "2"}
    )
    assert len({first.json()["id"], second, other.json()["id"]}) == 3
    for given in ("-1", "many", "1.5"):
        answer = client.post("/v1/realignments", json=body, headers={"x-stainless-retry-count": given})
        assert answer.status_code == 422
    # With a key it is the key that tells.
    keyed = {"x-stainless-retry-count": "1", "idempotency-key": f"order-{second}"}
    assert client.post("/v1/realignments", json=body, headers=keyed).json()["id"] not in {first.json()["id"], second}


def test_twenty_retries_of_ten_requests_at_once_make_ten_jobs(
    service: Running, client: httpx.Client, fresh: Path
) -> None:
    adapter = upload(client, fresh)["id"]

    def post(number: int) -> tuple[int, str]:
        body = {"adapter_id": adapter, "mode": "analyze", "metadata": {"race": str(number % 10)}}
        answer = client.post("/v1/realignments", json=body, headers={"x-stainless-retry-count": "1"})
        assert answer.status_code == 202, answer.text
        return number % 10, str(answer.json()["id"])

    with ThreadPoolExecutor(20) as pool:
        answers = set(pool.map(post, range(200)))
    assert len(answers) == 10
    found = client.get("/v1/realignments", params={"adapter_id": adapter, "limit": 100}).json()["data"]
    assert {(int(job["metadata"]["race"]), job["id"]) for job in found} == answers
    for job in found:
        client.post(f"/v1/realignments/{job['id']}/cancel")


def test_lists_are_narrowed(client: httpx.Client, fresh: Path) -> None:
    adapter, other = upload(client, fresh)["id"], upload(client, fresh)["id"]
    patched = realign(client, adapter, metadata={"team": "a", 'o"d,d': "ü {}"})
    bad = realign(client, adapter, method={"type": "nlsr", "form": "factor"}, metadata={"team": "a"})
    elsewhere = realign(client, other, mode="analyze", metadata={"team": "b"})
    assert (patched["status"], bad["status"], elsewhere["status"]) == ("succeeded", "failed", "succeeded")

    def found(**params: str) -> list[str]:
        answer = client.get("/v1/realignments", params={**params, "limit": "100"})
        assert answer.status_code == 200, answer.text
        mine = {patched["id"], bad["id"], elsewhere["id"]}
        return sorted(job["id"] for job in answer.json()["data"] if job["id"] in mine)

    assert found() == sorted([patched["id"], bad["id"], elsewhere["id"]])
    assert found(adapter_id=adapter) == sorted([patched["id"], bad["id"]])
    assert found(adapter_id=adapter, status="failed") == [bad["id"]]
    assert found(status="running") == []
    assert found(reference_id=patched["reference_id"]) == found()
    assert found(reference_id="ref_nothing") == []
    assert found(**{"metadata[team]": "a"}) == found(adapter_id=adapter)
    assert found(**{"metadata[team]": "a", 'metadata[o"d,d]': "ü {}"}) == [patched["id"]]
    assert found(**{"metadata[team]": "a", "metadata[run]": ""}) == []
    assert found(**{"metadata[a]b]": "a"}) == []


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("status=done", "invalid_request"),
        ("status=dead", "invalid_request"),
        ("adapter_id=%00", "invalid_request"),
        ("reference_id=%ff", "invalid_request"),
        ("metadata[a]=b&metadata[a]=c", "duplicate_filter"),
        ("metadata[a]=%00", "bad_filter"),
        ("metadata[%00]=a", "bad_filter"),
        ("metadata=a", "bad_filter"),
        ("metadata[]=a", "bad_filter"),
        ("metadata.a=b", "bad_filter"),
        (f"metadata[{'k' * 65}]=a", "bad_filter"),
        ("&".join(f"metadata[{number}]=a" for number in range(17)), "bad_filter"),
    ],
    ids=lambda text: text[:40],
)
def test_filters_that_cannot_be_are_refused(client: httpx.Client, query: str, code: str) -> None:
    """Never ignored: the answer would be everything."""
    answer = client.get(f"/v1/realignments?{query}")
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["code"] == code


def test_the_same_idempotency_key_makes_one_job(client: httpx.Client, fresh: Path) -> None:
    body = {"adapter_id": upload(client, fresh)["id"], "method": {"type": "gram"}}
    first = client.post("/v1/realignments", json=body, headers={"Idempotency-Key": "order-1"})
    again = client.post("/v1/realignments", json=body, headers={"Idempotency-Key": "order-1"})
    assert first.status_code == again.status_code == 202
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["idempotent-replayed"] == "true"
    other = client.post(
        "/v1/realignments", json={**body, "method": {"type": "nlsr"}}, headers={"Idempotency-Key": "order-1"}
    )
    assert other.status_code == 422
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    finished(client, first.json()["id"])


def test_events_stream_until_the_end_and_resume(client: httpx.Client, fresh: Path) -> None:
    job = client.post("/v1/realignments", json={"adapter_id": upload(client, fresh)["id"]}).json()

    def stream(**headers: str) -> list[tuple[str, str]]:
        found, kind = [], ""
        request = {"accept": "text/event-stream", **headers}
        with client.stream("GET", f"/v1/realignments/{job['id']}/events", headers=request) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    found.append((kind, value))
        return found

    seen = stream()
    kinds = [kind for kind, _ in seen if kind != "progress"]
    assert kinds == ["created", "started", "succeeded"]
    assert json.loads(seen[-1][1])["status"] == "succeeded"
    second = json.loads(next(value for kind, value in seen if kind == "started"))["id"]
    assert [kind for kind, _ in stream(**{"last-event-id": second}) if kind != "progress"] == ["succeeded"]


def test_every_form_of_the_report_is_served(client: httpx.Client, fresh: Path) -> None:
    job = realign(client, upload(client, fresh)["id"], method={"type": "gram"})
    url = job["result"]["report_url"]
    for form, kind, start in (
        ("json", "application/json", b"{"),
        ("csv", "text/csv", b"name,"),
        ("html", "text/html", b"<!doctype html>"),
        ("png", "image/png", b"\x89PNG"),
    ):
        answer = client.get(f"{url}.{form}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.content.lower().startswith(start.lower())
    assert "default-src 'none'" in client.get(f"{url}.html").headers["content-security-policy"]
    assert client.get(f"{url}.exe").status_code == 422


def test_a_report_is_a_conflict_until_there_is_one(client: httpx.Client, fresh: Path) -> None:
    job = client.post("/v1/realignments", json={"adapter_id": upload(client, fresh)["id"]}).json()
    client.post(f"/v1/realignments/{job['id']}/cancel")
    ended = finished(client, job["id"])
    answer = client.get(f"/v1/realignments/{job['id']}/report")
    if ended["status"] == "cancelled":
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "no_report"
    else:  # it was faster than the cancellation
        assert answer.status_code == 200
    again = client.post(f"/v1/realignments/{job['id']}/cancel").json()
    assert again["status"] == ended["status"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (
            lambda tensors: {
                f"base_model.model.{name.removeprefix('base_model.model.')}": t for name, t in tensors.items()
            },
            "",
        ),
        (
            lambda tensors: {name.replace("layers.1.", "layers.9."): t for name, t in tensors.items()},
            "module_not_in_base",
        ),
        (
            lambda tensors: {name: t[:, : t.shape[1] - 1] if "lora_A" in name else t for name, t in tensors.items()},
            "base_mismatch",
        ),
        (
            lambda tensors: {
                name.replace("base_model.model.", "base_model.model.base_model.model."): t
                for name, t in tensors.items()
            },
            "module_not_in_base",
        ),
    ],
    ids=["unchanged", "another layer", "another width", "wrapped twice"],
)
def test_an_adapter_of_another_base_model_is_refused_before_it_is_queued(
    client: httpx.Client, fresh: Path, tmp_path: Path, change: Any, code: str
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in fresh.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tiny.change_tensors(folder, change)
    tiny.change_config(folder, target_modules=tiny.TARGETS)
    answer = client.post("/v1/realignments", json={"adapter_id": upload(client, folder)["id"]})
    if not code:
        assert answer.status_code == 202
        return
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == code
    assert "layers" in answer.json()["error"]["param"]


@pytest.mark.parametrize("form", ["factor", "paper"])
def test_a_rank_that_masks_cannot_fit_is_refused_by_name(
    client: httpx.Client, base: Path, tmp_path: Path, form: str
) -> None:
    adapter = upload(client, tiny.save_adapter(base, tmp_path / "rank2", rank=2, seed=9))
    answer = client.post(
        "/v1/realignments", json={"adapter_id": adapter["id"], "method": {"type": "nlsr", "form": form}}
    )
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "rank_mismatch"
    # The other form and the other method serve it.
    assert realign(client, adapter["id"], method={"type": "nlsr"})["status"] == "succeeded"
    assert realign(client, adapter["id"], method={"type": "gram"})["status"] == "succeeded"


def test_a_lineage_that_a_form_cannot_treat_fails_the_job_with_its_code(client: httpx.Client, fresh: Path) -> None:
    job = realign(client, upload(client, fresh)["id"], method={"type": "nlsr", "form": "factor"})
    assert job["status"] == "failed"
    assert job["error"]["code"] == "lineage_mismatch"
    assert job["error"]["class"] == "user"
    assert job["attempt"] == 1


def test_unknown_things_are_refused_in_one_shape(client: httpx.Client, fresh: Path) -> None:
    adapter = upload(client, fresh)["id"]
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"adapter_id": "adp_nothing"}, 404, "adapter_not_found"),
        ({"adapter_id": adapter, "reference_id": "ref_nothing"}, 404, "reference_not_found"),
        ({"adapter_id": adapter, "reference_id": "../../etc"}, 404, "reference_not_found"),
        ({"adapter_id": adapter, "method": {"type": "magic"}}, 422, "invalid_request"),
        ({"adapter_id": adapter, "method": {"type": "gram", "general_weight": -1}}, 422, "invalid_request"),
        ({"adapter_id": adapter, "metod": {}}, 422, "invalid_request"),
        ({}, 422, "invalid_request"),
    ]
    for body, status, code in cases:
        answer = client.post("/v1/realignments", json=body)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["status"] == status
        assert problem["error"]["code"] == code
        assert problem["error"]["message"] == problem["detail"]
        assert answer.headers["x-request-id"].startswith("req_")
    assert client.post("/v1/realignments", content=b"{").json()["error"]["code"] == "unsupported_media_type"
    assert client.get("/v1/nothing").json()["error"]["code"] == "route_not_found"
    assert client.delete("/v1/realignments").json()["error"]["code"] == "method_not_allowed"
    assert client.get("/v1/realignments/rlg_nothing").json()["error"]["code"] == "realignment_not_found"


def test_lists_page_newest_first(client: httpx.Client, fresh: Path) -> None:
    mine = [upload(client, fresh)["id"] for _ in range(3)]
    first = client.get("/v1/adapters", params={"limit": 2}).json()
    assert [item["id"] for item in first["data"]] == [mine[2], mine[1]]
    assert first["has_more"] is True
    second = client.get("/v1/adapters", params={"limit": 2, "after": first["last_id"]}).json()
    assert second["data"][0]["id"] == mine[0]
    assert client.get("/v1/adapters", params={"limit": 1000}).status_code == 422
    # An id of another kind, or none, would give a list that looks like the end of this one.
    for wrong in ("", "rlg_0", mine[0].removeprefix("adp_"), "adp_"):
        answer = client.get("/v1/adapters", params={"after": wrong})
        assert refused(answer, 422, "invalid_request")["param"] == "after"
    assert client.get("/v1/realignments", params={"after": "adp_0"}).status_code == 422
    # That of a record which was deleted goes on where it was.
    assert client.delete(f"/v1/adapters/{mine[1]}").status_code in (200, 204)
    rest = client.get("/v1/adapters", params={"limit": 1, "after": mine[1]}).json()
    assert [item["id"] for item in rest["data"]] == [mine[0]]


def test_the_catalogue_says_what_is_installed(client: httpx.Client, bundle: Path) -> None:
    found = client.get("/v1/references").json()["data"]
    assert [item["name"] for item in found] == ["tiny"]
    assert client.get(f"/v1/references/{found[0]['id']}").json() == found[0]
    methods = {item["id"]: item for item in client.get("/v1/methods").json()["data"]}
    assert set(methods) == set(MODELS)
    assert [name for name, method in methods.items() if method["default"]] == ["gram"]
    assert methods["gram"]["strength_parameter"] == "general_weight"
    assert methods["none"]["strength_parameter"] is None
    assert methods["gram"]["parameters"]["properties"]["general_weight"]["default"] == 0.2


def test_a_dead_worker_process_costs_one_attempt_and_nothing_else(
    service: Running, client: httpx.Client, base: Path, tmp_path: Path
) -> None:
    """SIGKILL for every pool process while jobs run: all jobs still end, published once."""
    import os
    import signal
    import subprocess

    adapter = upload(client, tiny.save_adapter(base, tmp_path / "a", seed=4))["id"]
    ids = [
        client.post("/v1/realignments", json={"adapter_id": adapter, "method": {"type": "gram"}}).json()["id"]
        for _ in range(6)
    ]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if any(client.get(f"/v1/realignments/{i}").json()["status"] == "running" for i in ids):
            break
    workers = subprocess.run(["pgrep", "-P", str(service.process.pid), "-f", "celery"], capture_output=True, text=True)
    killed = 0
    for worker in workers.stdout.split():
        for child in subprocess.run(["pgrep", "-P", worker], capture_output=True, text=True).stdout.split():
            os.kill(int(child), signal.SIGKILL)
            killed += 1
    assert killed >= 2
    for job_id in ids:
        job = finished(client, job_id, 120)
        assert job["status"] == "succeeded", job["error"]
        kinds = [event["type"] for event in client.get(f"/v1/realignments/{job_id}/events").json()["data"]]
        assert kinds.count("succeeded") == 1


def test_torch_seeds_do_not_matter(client: httpx.Client, fresh: Path) -> None:
    adapter = upload(client, fresh)["id"]
    torch.manual_seed(123)
    digests = set()
    for _ in range(2):
        job = realign(client, adapter, method={"type": "nlsr", "selection": "bernoulli", "seed": 5})
        digests.add(client.get(f"/v1/adapters/{job['result']['adapter_id']}").json()["sha256"])
    assert len(digests) == 1


def test_files_of_an_upload_are_kept_or_dropped_by_name(client: httpx.Client, fresh: Path) -> None:
    extra = [
        ("files", ("tokenizer.json", b"{}")),
        ("files", ("training_args.bin", b"\x80\x04pickle")),
        ("files", ("run.py", b"print(1)")),
    ]
    answer = client.post("/v1/adapters", files=[*files_of(fresh), *extra])
    adapter = answer.json()
    assert [file["name"] for file in adapter["files"]] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]
    assert adapter["dropped_files"] == ["run.py", "training_args.bin"]
    job = realign(client, adapter["id"], method={"type": "gram"})
    report = client.get(job["result"]["report_url"]).json()
    assert report["dropped_files"] == ["run.py", "training_args.bin"]
    url = f"/v1/adapters/{job['result']['adapter_id']}/files/tokenizer.json"
    assert client.get(url).content == b"{}"
