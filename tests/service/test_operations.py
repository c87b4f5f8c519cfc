"""A real service as an operator watches and handles it: numbers, log lines, traces, draining, deletion."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import MetaData

from safegraft.stores.jobs import JobStore
from tests.scaled import SCALED
from tests.service.answers import refused
from tests.service.conftest import (
    SAFEGRAFT,
    Running,
    database_of,
    environment_of,
    finished,
    objects_of,
    realign,
    start,
    upload,
)
from tests.service.otlp import Receiver, receiver

ROOT = Path(__file__).parents[2]
ANALYZE = {"method": {"type": "gram"}, "mode": "analyze"}


@pytest.fixture(scope="module")
def traces() -> Iterator[Receiver]:
    with receiver() as found:
        yield found


@pytest.fixture(scope="module")
def watched(bundle: Path, traces: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One worker, JSON logs, traces, and a short lease, so that what a worker says and hears comes soon."""
    data = tmp_path_factory.mktemp("operations") / "data"
    subprocess.run([SAFEGRAFT, "reference", "add", str(bundle), "--data", str(data)], check=True, capture_output=True)
    running = start(
        data,
        workers=1,
        log=data / "serve.log",
        SAFEGRAFT_LOG_FORMAT="json",
        SAFEGRAFT_LEASE_SECONDS="6",
        OTEL_EXPORTER_OTLP_ENDPOINT=traces.url,
        OTEL_BSP_SCHEDULE_DELAY="100",
    )
    yield running
    running.process.terminate()
    assert running.process.wait(60) == 0


@pytest.fixture
def http(watched: Running) -> Iterator[httpx.Client]:
    with watched.client() as client:
        yield client


@pytest.fixture
def admin(watched: Running) -> Callable[..., Any]:
    """`safegraft admin …` on this service, as JSON."""

    def run(*arguments: str, status: int = 0) -> Any:
        environment = environment_of(watched.data)
        environment |= {"SAFEGRAFT_LEASE_SECONDS": "6", "SAFEGRAFT_DATA": str(watched.data)}
        done = subprocess.run(
            [SAFEGRAFT, "admin", *arguments, "--json"], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status, done.stdout + done.stderr
        return json.loads(done.stdout)

    return run


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def numbers(client: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def log_lines(data: Path, name: str) -> list[dict[str, Any]]:
    found = []
    for line in (data / "logs" / f"{name}.log").read_text().splitlines():
        # Celery itself says this one sentence past all logging, when it is asked to stop.
        if line and not line.startswith("worker: "):
            found.append(json.loads(line))
    return found


def test_what_is_counted(watched: Running, http: httpx.Client, fresh: Path) -> None:
    before = numbers(http)
    adapter = upload(http, fresh)
    job = realign(http, adapter["id"], method={"type": "gram"})
    assert job["status"] == "succeeded"
    failed = realign(http, adapter["id"], method={"type": "nlsr", "form": "factor"})
    assert failed["error"]["code"] == "lineage_mismatch"
    for _ in range(3):
        http.get(f"/v1/adapters/{adapter['id']}")
    http.get("/v1/adapters/adp_nobody")
    http.get("/no/such/path?x=1")
    http.request("TRACE", "/v1/adapters")
    after = numbers(http)

    def more(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0.0)

    assert more("safegraft_jobs_ended_total", status="succeeded", method="gram") == 1
    assert more("safegraft_jobs_ended_total", status="failed", method="nlsr") == 1
    assert more("safegraft_job_failures_total", **{"code": "lineage_mismatch", "class": "user"}) == 1
    for stage in ("fetch", "open", "patch", "check", "render", "publish"):
        assert more("safegraft_job_stage_seconds_count", stage=stage, method="gram") == 1
        assert more("safegraft_job_stage_seconds_sum", stage=stage, method="gram") > 0
    # gram treats every module and reads none beforehand.
    scored = ("safegraft_job_stage_seconds_count", (("method", "gram"), ("stage", "score")))
    assert after.get(scored) == before.get(scored)
    assert more("safegraft_received_bytes_total") == adapter["bytes"]
    # Reports and all.
    assert more("safegraft_published_bytes_total") == sum(
        objects_of(watched.data).size(*place.rsplit("/", 1)) for place in places(watched.data, job["id"])
    )
    route = "/v1/adapters/{adapter_id}"
    assert more("safegraft_http_requests_total", route=route, method="GET", status="200") == 3
    assert more("safegraft_http_requests_total", route=route, method="GET", status="404") == 1
    assert more("safegraft_http_request_duration_seconds_count", route=route, method="GET") == 4
    assert more("safegraft_http_requests_total", route="other", method="GET", status="404") == 1
    assert more("safegraft_http_requests_total", route="/v1/adapters", method="other", status="405") == 1
    assert after["safegraft_database_up", ()] == 1
    assert after["safegraft_active_uploads", ()] == 0
    assert after["safegraft_workers", (("state", "live"),)] == 1
    assert after["safegraft_jobs", (("state", "queued"),)] == 0
    [silence] = [value for (name, _), value in after.items() if name == "safegraft_worker_silence_seconds"]
    assert 0 <= silence < 6
    assert after["process_resident_memory_bytes", ()] > 1e6


def test_no_number_is_about_a_tenant_an_id_or_a_path(http: httpx.Client) -> None:
    text = http.get("/metrics").text
    assert "default" not in text
    assert not re.search(r"\b(adp|rlg|req|key|ref)_[0-9a-f]{8}", text)
    assert "/no/such" not in text
    labels = {label for _, pairs in numbers(http) for label, _ in pairs}
    assert labels == {"route", "method", "status", "le", "version", "state", "worker", "code", "class", "stage"}
    # Units and kinds as Prometheus has them.
    for family in text_string_to_metric_families(text):
        if family.name.startswith("safegraft_"):
            assert family.documentation
            assert not family.name.endswith("_total") or family.type == "counter"
    answer = http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_the_examples_of_the_page_name_what_there_is(http: httpx.Client, fresh: Path) -> None:
    realign(http, upload(http, fresh)["id"], method={"type": "nlsr", "form": "factor"})
    known = {name for name, _ in numbers(http)} | {"up", "safegraft_http_request_duration_seconds_bucket"}
    folder = ROOT / "docs" / "prometheus"
    alerts = yaml.safe_load((folder / "alerts.yml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    assert len(rules) >= 5
    assert any("safegraft_queue_oldest_age_seconds" in rule["expr"] for rule in rules)
    for rule in rules:
        used = set(re.findall(r"\b(?:safegraft|process)_[a-z_]+", rule["expr"]))
        assert used <= known | {"safegraft_gateway"}, rule["alert"]
        assert rule["annotations"]["summary"]
    scrape = yaml.safe_load((folder / "scrape.yml").read_text())
    assert scrape["scrape_configs"][0]["metrics_path"] == "/metrics"
    page = (ROOT / "docs" / "operations.md").read_text()
    documented = set(re.findall(r"`(safegraft_[a-z_]+)", page))
    for name in known - {"up"}:
        if name.startswith("safegraft_"):
            assert re.sub(r"_(total|count|sum|bucket|created)$", "", name) in {
                re.sub(r"_(total|count|sum|bucket)$", "", item) for item in documented
            }, name


def test_log_lines_of_one_request_and_its_job(watched: Running, http: httpx.Client, fresh: Path) -> None:
    adapter_id = upload(http, fresh)["id"]
    # Keys in queries are refused, and are in no log for all that.
    refused(http.get("/v1/adapters?token=very-secret"), 422, "unknown_parameter")
    answer = http.post("/v1/realignments", json={"adapter_id": adapter_id, **ANALYZE})
    request_id, job_id = answer.headers["x-request-id"], answer.json()["id"]
    finished(http, job_id)
    http.get("/livez")
    gateway = [line for line in log_lines(watched.data, "gateway") if line.get("request_id") == request_id]
    queued, access = gateway
    assert (queued["message"], queued["job_id"]) == ("queued", job_id)
    assert access["logger"] == "safegraft.access"
    assert (access["route"], access["method"], access["status"]) == ("/v1/realignments", "POST", 202)
    assert 0 < access["duration_seconds"] < 30
    until(lambda: any("succeeded in" in line["message"] for line in about(watched, job_id)))
    for line in about(watched, job_id):
        assert (line["attempt"], line["trace_id"]) == (1, access["trace_id"])
    for path in (watched.data / "logs").glob("*.log"):
        text = path.read_text()
        assert "very-secret" not in text
        assert "Traceback" not in text
        if path.stem == "gateway":
            assert "/livez" not in text
    served = [json.loads(line) for line in (watched.data / "serve.log").read_text().splitlines()]
    assert any(line["logger"] == "safegraft.serve" for line in served)
    assert {line["logger"] for line in log_lines(watched.data, "worker1")} >= {"safegraft.worker", "celery.apps.worker"}
    assert {line["logger"] for line in log_lines(watched.data, "gateway")} >= {"safegraft.access", "uvicorn.error"}


def about(running: Running, job_id: str) -> list[dict[str, Any]]:
    return [line for line in log_lines(running.data, "worker1") if line.get("job_id") == job_id]


def test_one_trace_from_the_client_through_the_gateway_to_the_worker(
    http: httpx.Client, traces: Receiver, fresh: Path
) -> None:
    adapter_id = upload(http, fresh)["id"]
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    header = {"traceparent": f"00-{trace}-{parent}-01"}
    job = http.post("/v1/realignments", json={"adapter_id": adapter_id, **ANALYZE}, headers=header).json()
    finished(http, job["id"])
    until(lambda: {"safegraft-gateway", "safegraft-worker"} <= {span.service for span in traces.of(trace)})
    until(lambda: any(span.name == "realignment attempt" for span in traces.of(trace)))
    spans = traces.of(trace)
    [request] = [span for span in spans if span.service == "safegraft-gateway"]
    assert (request.name, request.parent) == ("POST /v1/realignments", parent)
    [attempt] = [span for span in spans if span.name == "realignment attempt"]
    assert attempt.parent == request.id
    assert attempt.attributes == {"safegraft.job.id": job["id"], "safegraft.job.attempt": 1}
    stages = [span for span in spans if span.parent == attempt.id]
    assert [span.name for span in stages] == ["fetch", "compare", "score", "publish"]
    assert len(spans) == 2 + len(stages)
    assert not any(span.error for span in spans)


def test_a_request_without_a_trace_begins_one_and_a_fault_of_the_input_is_no_error(
    http: httpx.Client, traces: Receiver, watched: Running, fresh: Path
) -> None:
    adapter_id = upload(http, fresh)["id"]
    request = {"adapter_id": adapter_id, "method": {"type": "nlsr", "form": "factor"}}
    answer = http.post("/v1/realignments", json=request, headers={"traceparent": "00-nonsense"})
    finished(http, answer.json()["id"])

    def attempts() -> list[Any]:
        return [s for s in traces.spans if s.attributes.get("safegraft.job.id") == answer.json()["id"]]

    until(lambda: bool(attempts()))
    [attempt] = attempts()
    assert attempt.attributes["error.type"] == "lineage_mismatch"
    assert not attempt.error
    access = [x for x in log_lines(watched.data, "gateway") if x.get("request_id") == answer.headers["x-request-id"]]
    assert access[-1]["trace_id"] == attempt.trace
    # Probes are asked all day long.
    assert not any(span.name.endswith(("/livez", "/readyz", "/metrics")) for span in traces.spans)


@pytest.mark.long
def test_a_draining_worker_ends_its_job_and_takes_no_other(
    http: httpx.Client, admin: Callable[..., Any], watched: Running, fresh: Path
) -> None:
    adapter_id = upload(http, fresh)["id"]
    [worker] = admin("workers")
    assert (worker["state"], worker["device"]) == ("live", "cpu")
    many = {"method": {"type": "gram"}, "strengths": [0.1 * number for number in range(1, 15)]}
    running = http.post("/v1/realignments", json={"adapter_id": adapter_id, **many}).json()["id"]
    until(lambda: http.get(f"/v1/realignments/{running}").json()["status"] != "queued")
    assert admin("drain", worker["name"]) == {"workers": [worker["name"]], "draining": True}
    waiting = http.post("/v1/realignments", json={"adapter_id": adapter_id, **ANALYZE}).json()["id"]
    assert finished(http, running)["status"] == "succeeded"
    until(lambda: "draining: no new jobs are taken" in (watched.data / "logs" / "worker1.log").read_text())
    time.sleep(3)  # some turns of the dispatcher
    assert http.get(f"/v1/realignments/{waiting}").json()["status"] == "queued"
    assert [job["id"] for job in admin("jobs")] == [waiting]
    assert admin("workers")[0]["state"] == "draining"
    assert http.get("/readyz").status_code == 200
    counted = numbers(http)
    assert counted["safegraft_workers", (("state", "draining"),)] == 1
    assert counted["safegraft_jobs", (("state", "queued"),)] == 1
    assert counted["safegraft_queue_oldest_age_seconds", ()] >= 3
    assert admin("drain", "--all", "--undo") == {"workers": [worker["name"]], "draining": False}
    assert finished(http, waiting)["status"] == "succeeded"
    assert admin("workers")[0]["state"] == "live"


@pytest.mark.skipif(SCALED, reason="the broker is not this service's own to be killed")
@pytest.mark.long
def test_a_drained_worker_stays_so_when_the_broker_comes_back(
    http: httpx.Client, admin: Callable[..., Any], watched: Running, fresh: Path
) -> None:
    adapter_id = upload(http, fresh)["id"]
    admin("drain", "--all")
    log = watched.data / "logs" / "worker1.log"
    said = log.read_text().count("draining: no new jobs are taken")
    until(lambda: log.read_text().count("draining: no new jobs are taken") >= max(1, said))
    found = [path for path in Path("/proc").glob("[0-9]*/cwd") if _links_to(path, watched.data / "broker")]
    assert len(found) == 1
    os.kill(int(found[0].parent.name), 9)
    until(lambda: http.get("/readyz").status_code == 200)
    job_id = http.post("/v1/realignments", json={"adapter_id": adapter_id, **ANALYZE}).json()["id"]
    time.sleep(3)
    assert http.get(f"/v1/realignments/{job_id}").json()["status"] == "queued"
    admin("drain", "--all", "--undo")
    assert finished(http, job_id)["status"] == "succeeded"


def _links_to(path: Path, folder: Path) -> bool:
    try:
        return path.readlink() == folder
    except OSError:
        return False


@pytest.mark.long
def test_a_dead_job_is_queued_again_by_the_operator(
    http: httpx.Client, admin: Callable[..., Any], watched: Running, fresh: Path
) -> None:
    adapter_id = upload(http, fresh)["id"]
    admin("drain", "--all")
    job_id = http.post("/v1/realignments", json={"adapter_id": adapter_id, **ANALYZE}).json()["id"]
    engine = database_of(watched.data)
    store = JobStore(engine, lease_seconds=30, max_attempts=1)
    assert store.claim(job_id, "somebody") is not None
    store.release(job_id, 1, "It failed on our side.", code="internal_error")
    engine.dispose()
    assert http.get(f"/v1/realignments/{job_id}").json()["error"]["class"] == "system"
    [dead] = [job for job in admin("jobs", "--dead") if job["id"] == job_id]
    assert (dead["error"], dead["attempt"], dead["state"]) == ("internal_error", 1, "dead")
    assert admin("requeue", job_id) == {"id": job_id, "state": "queued", "attempts_before": 1}
    admin("drain", "--all", "--undo")
    done = finished(http, job_id)
    assert (done["status"], done["attempt"]) == ("succeeded", 2)
    assert admin("requeue", job_id, status=2)["error"]["code"] == "not_dead"


@pytest.mark.parametrize("adapters", [False, True])
def test_nothing_of_a_deleted_job_is_left(http: httpx.Client, watched: Running, fresh: Path, adapters: bool) -> None:
    adapter_id = upload(http, fresh)["id"]
    method = {"type": "safetylock", "heads": 3, "output": "side_car"}
    job = realign(http, adapter_id, method=method)
    made = job["result"]["adapter_id"]
    files = {path.rpartition("/")[2] for path in places(watched.data, job["id"])}
    assert {"report.json", "side_car.safetensors", "adapter_model.safetensors"} <= files
    answer = http.delete(f"/v1/realignments/{job['id']}", params={"adapters": adapters})
    assert answer.status_code == 200
    assert answer.json() == {"id": job["id"], "object": "realignment", "deleted": True}
    for path in ("", "/events", "/report", "/side_car/side_car.safetensors"):
        refused(http.get(f"/v1/realignments/{job['id']}{path}"), 404, "realignment_not_found")
    refused(http.delete(f"/v1/realignments/{job['id']}"), 404, "realignment_not_found")
    assert job["id"] not in http.get("/v1/realignments").text
    if adapters:
        refused(http.get(f"/v1/adapters/{made}"), 404, "adapter_not_found")
    else:
        weights = http.get(f"/v1/adapters/{made}/files/adapter_model.safetensors")
        assert weights.status_code == 200
        left = {path.rpartition("/")[2] for path in places(watched.data, job["id"])}
        assert left == {"adapter_config.json", "adapter_model.safetensors"}
        assert http.delete(f"/v1/adapters/{made}").status_code == 200
    assert places(watched.data, job["id"]) == []
    assert http.get(f"/v1/adapters/{adapter_id}").status_code == 200
    rows = everything_but_the_audit(watched.data)
    assert adapter_id in rows
    assert job["id"] not in rows


def everything_but_the_audit(data: Path) -> str:
    """All rows: who deleted something is noted for ever, and nothing else may name it."""
    engine, tables = database_of(data), MetaData()
    tables.reflect(engine)
    with engine.connect() as connection:
        rows = [
            str(row) for table in tables.sorted_tables if table.name != "audit"
            for row in connection.execute(table.select())
        ]  # fmt: skip
    engine.dispose()
    return "\n".join(rows)


def places(data: Path, word: str) -> list[str]:
    """Every object and everything in the data folder whose path has the word; logs are no data of a customer's."""
    objects, waiting, found = objects_of(data), ["tenants"], []
    while waiting:
        prefix = waiting.pop()
        found += [f"{prefix}/{name}" for name in objects.names(prefix)]
        waiting += [inner for inner, _ in objects.prefixes(prefix)]
    local = [str(path) for path in (data / "objects").rglob("*") if path.is_file() and not SCALED]
    assert SCALED or len(found) == len([path for path in local if "/tenants/" in path])
    local = [path for path in local if "/tenants/" not in path]
    return [path for path in found + local if word in path]


def test_a_job_that_has_not_ended_is_not_deleted(http: httpx.Client, admin: Callable[..., Any], fresh: Path) -> None:
    adapter_id = upload(http, fresh)["id"]
    admin("drain", "--all")
    job_id = http.post("/v1/realignments", json={"adapter_id": adapter_id, **ANALYZE}).json()["id"]
    try:
        refused(http.delete(f"/v1/realignments/{job_id}"), 409, "realignment_not_ended")
        refused(http.delete("/v1/realignments/rlg_nobody"), 404, "realignment_not_found")
        refused(http.delete(f"/v1/realignments/{job_id}?adapters=perhaps"), 422, "invalid_request")
        http.post(f"/v1/realignments/{job_id}/cancel")
        assert http.delete(f"/v1/realignments/{job_id}").status_code == 200
    finally:
        admin("drain", "--all", "--undo")


@pytest.mark.long
def test_a_worker_that_stops_leaves_the_list(watched: Running, http: httpx.Client) -> None:
    """Last, because it takes the worker away for a moment; the supervisor starts it again."""
    found = [
        path for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"celery" in (command := _read(path)) and b"worker1@" in command and b"spawn_main" not in command
        and f"SAFEGRAFT_DATA={watched.data}".encode() in _read(path.with_name("environ"))
    ]  # fmt: skip
    assert len(found) == 1
    os.kill(int(found[0].parent.name), 15)
    answers: list[httpx.Response] = []

    def gone() -> bool:
        answers.append(http.get("/readyz"))
        return answers[-1].status_code == 503

    # Over HTTP, which takes milliseconds: until a command has started, there may be another worker.
    until(gone)
    assert numbers(http)["safegraft_workers", (("state", "live"),)] == 0
    assert [name for name, there in answers[-1].json()["checks"].items() if not there] == ["worker"]
    until(lambda: http.get("/readyz").status_code == 200, 60)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
