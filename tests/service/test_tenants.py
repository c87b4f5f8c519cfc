"""A foreign id answers exactly like a missing one: every route × the ids of another tenant, over HTTP."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts

from safegraft.adapter import CONFIG, WEIGHTS
from service.app import create_app
from service.settings import GatewaySettings
from tests.service.conftest import Running, finished, operate, realign, start, upload

METHODS = ("get", "head", "post", "put", "patch", "delete")
# Ids that belong to the installation and not to a tenant.
SHARED = {"reference_id"}
# Parameters that name no record.
VALUES = {"name": WEIGHTS, "form": "json"}
# Bodies that their operations accept; those without one take none, or anything.
BODIES: dict[str, dict[str, Any]] = {
    "completeUpload": {"part_ids": ["part_1"]},
    "putEvaluation": {
        "judge": "words",
        "before": {"harm_score": {"hits": 1, "total": 1}},
        "after": {"harm_score": {"hits": 0, "total": 1}},
    },
    "updateWebhookEndpoint": {"event_types": ["realignment.failed"]},
}
RAW = {"addUploadPart": (b"0123456789", "application/octet-stream")}


@dataclass
class Two:
    running: Running
    owner: httpx.Client
    stranger: httpx.Client
    ids: dict[str, str]
    """Parameter → an id of the owner's."""


@pytest.fixture(scope="module")
def two(bundle: Path, fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """A service with two tenants, of whom one has something of everything."""
    data = tmp_path_factory.mktemp("tenants") / "data"

    operate(data, "reference", "add", str(bundle))
    keys = [
        operate(data, "keys", "create", "--tenant", tenant, "--scopes", "admin") for tenant in ("owner", "stranger")
    ]
    running = start(
        data,
        workers=1,
        log=data / "serve.log",
        dev=False,
        SAFEGRAFT_WEBHOOK_ALLOW_PRIVATE="1",
        SAFEGRAFT_MAX_REQUESTS_PER_SECOND="0",
    )
    owner, stranger = running.client(), running.client()
    for client, key in zip((owner, stranger), keys, strict=True):
        client.headers["authorization"] = f"Bearer {key}"
    yield Two(running, owner, stranger, belongings(owner, fresh))
    owner.close()
    stranger.close()
    running.process.terminate()
    assert running.process.wait(60) == 0


def belongings(owner: httpx.Client, fresh: Path) -> dict[str, str]:
    def made(answer: httpx.Response) -> dict[str, Any]:
        assert answer.is_success, answer.text
        body: dict[str, Any] = answer.json()
        return body

    adapter = upload(owner, fresh)
    job = realign(owner, adapter["id"], method={"type": "gram"})
    assert job["status"] == "succeeded"
    file = made(owner.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("a.txt", b"hello")}))
    new = {"purpose": "fine-tune", "filename": "a.tar", "bytes": 10, "mime_type": "application/x-tar"}
    pending = made(owner.post("/v1/uploads", json=new))
    made(owner.post(f"/v1/uploads/{pending['id']}/parts", files={"data": ("a", b"01234")}))
    hook = {"url": "http://127.0.0.1:9/hook", "name": "ends", "event_types": ["realignment.succeeded"]}
    endpoint = made(owner.post("/v1/webhook_endpoints", json=hook))
    made(owner.post(f"/v1/webhook_endpoints/{endpoint['id']}/test"))
    deliveries = made(owner.get("/v1/webhook_deliveries"))["data"]
    batch = made(
        owner.post(
            "/v1/realignment_batches",
            json={
                "reference_id": job["reference_id"],
                "adapter_ids": [adapter["id"]],
                "method": {"type": "none"},
            },
        )
    )
    tuned = made(owner.post("/v1/fine_tuning/jobs", json={"model": "auto", "training_file": adapter["id"]}))
    finished(owner, tuned["id"])
    return {
        "adapter_id": adapter["id"],
        "realignment_id": job["id"],
        "file_id": file["id"],
        "upload_id": pending["id"],
        "endpoint_id": endpoint["id"],
        "delivery_id": deliveries[0]["id"],
        "batch_id": batch["id"],
        "job_id": tuned["id"],
    }


def operations() -> list[tuple[str, str, str]]:
    """(method, path, operation id) of every operation whose path names a record."""
    app = create_app(GatewaySettings(dev=True))
    document = app.openapi()
    heads = {route.path for route in iter_route_contexts(app.routes) if "HEAD" in (route.methods or ())}
    found = []
    for path, methods in document["paths"].items():
        if not set(re.findall(r"{(\w+)}", path)) - SHARED - set(VALUES):
            continue
        for method, operation in methods.items():
            if method in METHODS:
                found.append((method, path, operation["operationId"]))
                if method == "get" and path in heads:
                    found.append(("head", path, operation["operationId"]))
    return found


def nobodys(ids: dict[str, str]) -> dict[str, str]:
    """Ids of the same forms that nobody has, each another."""
    return {
        name: f"{own.partition('_')[0]}_{number:0{len(own.partition('_')[2])}d}"
        for number, (name, own) in enumerate(ids.items())
    }


def ask(client: httpx.Client, method: str, path: str, operation: str, ids: dict[str, str]) -> httpx.Response:
    address = path.format(**ids, **VALUES)
    if operation in RAW:
        content, kind = RAW[operation]
        return client.request(method, address, content=content, headers={"content-type": kind})
    return client.request(method, address, json=BODIES.get(operation))


def told(answer: httpx.Response, ids: dict[str, str]) -> tuple[int, Any, dict[str, str]]:
    """Everything that an answer tells, but the ids themselves and what differs between any two answers."""
    text = answer.text
    for name, value in ids.items():
        text = text.replace(value, f"<{name}>")
    changing = {"x-request-id", "date", "content-length"}
    headers = {k: v for k, v in answer.headers.items() if k not in changing and "ratelimit" not in k}
    return answer.status_code, text, headers


@pytest.mark.parametrize(("method", "path", "operation"), operations(), ids=lambda value: str(value))
def test_a_foreign_id_answers_like_a_missing_one(two: Two, method: str, path: str, operation: str) -> None:
    others = nobodys(two.ids)
    foreign = ask(two.stranger, method, path, operation, two.ids)
    nothing = ask(two.stranger, method, path, operation, others)
    assert nothing.status_code == 404, nothing.text
    if method != "head":
        assert nothing.json()["error"]["code"].endswith("_not_found")
    assert told(foreign, two.ids) == told(nothing, others)


def cases(ids: dict[str, str]) -> list[tuple[str, str, dict[str, Any]]]:
    """Requests that name a record in their body."""
    adapter, file, batch = ids["adapter_id"], ids["file_id"], {"reference_id": ids["reference_id"]}
    return [
        ("post", "/v1/realignments", {"adapter_id": adapter}),
        ("post", "/v1/adapters", {"file_ids": [file]}),
        ("post", "/v1/fine_tuning/jobs", {"model": "auto", "training_file": adapter}),
        ("post", "/v1/fine_tuning/jobs", {"model": "auto", "training_file": file}),
        ("post", "/v1/realignment_batches", {**batch, "adapter_ids": [adapter]}),
    ]


def test_a_foreign_id_in_a_body_answers_like_a_missing_one(two: Two) -> None:
    reference = two.owner.get("/v1/references").json()["data"][0]["id"]
    own = {**two.ids, "reference_id": reference}
    others = {**nobodys(two.ids), "reference_id": reference}
    for (method, path, foreign), (_, _, nothing) in zip(cases(own), cases(others), strict=True):
        first, second = (two.stranger.request(method, path, json=body) for body in (foreign, nothing))
        assert second.status_code in (404, 422), (path, second.text)
        assert told(first, own) == told(second, others), path


def test_lists_show_only_what_is_ones_own(two: Two) -> None:
    document = create_app(GatewaySettings(dev=True)).openapi()
    shared = {"/v1/references", "/v1/methods", "/v1/provenance_keys"}
    lists = [
        path
        for path, methods in document["paths"].items()
        if path.startswith("/v1/") and "get" in methods and "{" not in path and path not in shared
    ]
    assert len(lists) >= 7
    for path in lists:
        answer = two.stranger.get(path)
        assert answer.status_code == 200, (path, answer.text)
        text = json.dumps([item for item in answer.json()["data"] if item["object"] != "audit_event"])
        for own in two.ids.values():
            assert own not in text, path
        # Filters and cursors are no way round.
        for name, own in two.ids.items():
            assert own not in two.stranger.get(path, params={"after": own}).text.replace("last_id", ""), (path, name)
            narrowed = two.stranger.get(path, params={name: own})
            if narrowed.is_success:
                assert narrowed.json()["data"] == [] or path == "/v1/audit_events", (path, name)


def test_the_owner_still_has_everything(two: Two) -> None:
    """After all that the stranger tried above."""
    for path in (
        "/v1/adapters/{adapter_id}",
        f"/v1/adapters/{{adapter_id}}/files/{CONFIG}",
        "/v1/realignments/{realignment_id}/report",
        "/v1/files/{file_id}/content",
        "/v1/webhook_endpoints/{endpoint_id}",
        "/v1/webhook_deliveries/{delivery_id}",
        "/v1/realignment_batches/{batch_id}",
        "/v1/fine_tuning/jobs/{job_id}",
    ):
        assert two.owner.get(path.format(**two.ids)).status_code == 200, path
    assert two.owner.get(f"/v1/uploads/{two.ids['upload_id']}").json()["status"] == "pending"
    assert two.owner.get(f"/v1/webhook_endpoints/{two.ids['endpoint_id']}").json()["event_types"] == [
        "realignment.succeeded"
    ]
