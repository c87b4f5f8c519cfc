"""Who did what: every request that changes something leaves one row, whatever came of it, and reading leaves none."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import func, select, text

from safegraft.contracts.keys import Scope
from safegraft.stores.database import audit
from service.app import create_app
from service.settings import GatewaySettings
from tests.service.answers import refused
from tests.service.conftest import files_of, free_port

JSON = {"content-type": "application/json"}


@dataclass
class Gateway:
    """A gateway with keys, without broker and workers."""

    app: FastAPI
    client: TestClient

    def key(self, tenant: str = "acme", scope: Scope = "write", **options: Any) -> tuple[str, dict[str, str]]:
        """A new key's id, and the headers that carry it."""
        key, given = self.app.state.services.keys.create(tenant, name=scope, scopes=[scope], **options)
        return key.id, {"authorization": f"Bearer {given}"}

    def rows(self) -> int:
        with self.app.state.services.database.connect() as connection:
            return int(connection.execute(select(func.count()).select_from(audit)).scalar_one())

    def last(self) -> dict[str, Any]:
        with self.app.state.services.database.connect() as connection:
            row = connection.execute(select(audit).order_by(audit.c.sequence.desc()).limit(1)).one()
        return dict(row._mapping)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    settings = GatewaySettings(data=tmp_path, redis_url=f"redis://127.0.0.1:{free_port()}/0")
    app = create_app(settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield Gateway(app, client)


def test_what_a_key_does_is_noted_with_its_target(gateway: Gateway, fresh: Path) -> None:
    key_id, headers = gateway.key()
    made = gateway.client.post("/v1/adapters", files=files_of(fresh), headers=headers)
    assert made.status_code == 201
    adapter_id = made.json()["id"]
    row = gateway.last()
    assert (row["tenant"], row["actor"], row["action"]) == ("acme", key_id, "createAdapter")
    assert (row["target"], row["status"]) == (adapter_id, 201)
    assert row["request_id"] == made.headers["x-request-id"]
    gone = gateway.client.delete(f"/v1/adapters/{adapter_id}", headers=headers)
    row = gateway.last()
    assert (row["action"], row["target"], row["status"]) == ("deleteAdapter", adapter_id, 200)
    assert row["request_id"] == gone.headers["x-request-id"]
    assert gateway.rows() == 2


def test_what_was_refused_is_noted_too(gateway: Gateway) -> None:
    key_id, headers = gateway.key()
    _, reading = gateway.key(scope="read")
    tries: list[tuple[str, str, dict[str, Any], int, str, str | None]] = [
        ("DELETE", "/v1/adapters/adp_nothing", {}, 404, "deleteAdapter", "adp_nothing"),
        ("POST", "/v1/realignments", {"json": {"adapter_id": "adp_nothing"}}, 404, "createRealignment", None),
        ("POST", "/v1/realignments", {"content": b"{"}, 415, "createRealignment", None),
        ("POST", "/v1/realignments", {"content": b"{", "headers": JSON}, 422, "createRealignment", None),
        ("POST", "/v1/adapters", {"content": b"{"}, 415, "createAdapter", None),
        ("POST", "/v1/realignments/rlg_x/cancel", {}, 404, "cancelRealignment", "rlg_x"),
        ("POST", "/v1/realignments/%00/cancel", {}, 422, "cancelRealignment", "?"),
    ]
    for number, (method, path, options, status, action, target) in enumerate(tries, start=1):
        answer = gateway.client.request(method, path, **{**options, "headers": headers | options.get("headers", {})})
        assert answer.status_code == status, answer.text
        row = gateway.last()
        assert (row["actor"], row["action"], row["target"], row["status"]) == (key_id, action, target, status)
        assert gateway.rows() == number
    answer = gateway.client.delete("/v1/adapters/adp_1", headers=reading)
    refused(answer, 403, "insufficient_scope")
    assert (gateway.last()["action"], gateway.last()["status"]) == ("deleteAdapter", 403)


def test_reading_and_strangers_leave_no_row(gateway: Gateway) -> None:
    _, headers = gateway.key()
    for path in ("/v1/adapters", "/v1/adapters/adp_1", "/v1/realignments", "/v1/realignments/rlg_1/report", "/livez"):
        gateway.client.get(path, headers=headers)
        gateway.client.head(path, headers=headers)
    refused(gateway.client.delete("/v1/adapters/adp_1"), 401, "unauthorized")
    wrong = {"authorization": "Bearer sgk_" + "0" * 38}
    refused(gateway.client.post("/v1/realignments", json={}, headers=wrong), 401, "unauthorized")
    refused(gateway.client.post("/v1/nothing", headers=headers), 404, "route_not_found")
    refused(gateway.client.put("/v1/adapters", headers=headers), 405, "method_not_allowed")
    assert gateway.rows() == 0


def test_our_own_failures_are_noted(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    _, headers = gateway.key()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("of ours")

    monkeypatch.setattr(gateway.app.state.services.adapters, "delete", fail)
    answer = gateway.client.delete("/v1/adapters/adp_1", headers=headers)
    refused(answer, 500, "internal_error")
    row = gateway.last()
    assert (row["action"], row["target"], row["status"]) == ("deleteAdapter", "adp_1", 500)
    assert row["request_id"] == answer.headers["x-request-id"]
    assert gateway.rows() == 1


def test_a_row_that_cannot_be_written_is_in_the_log_and_the_answer_stands(
    gateway: Gateway, fresh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key_id, headers = gateway.key()
    with gateway.app.state.services.database.begin() as connection:
        connection.execute(text("DROP TABLE audit"))
    with caplog.at_level(logging.ERROR):
        made = gateway.client.post("/v1/adapters", files=files_of(fresh), headers=headers)
    assert made.status_code == 201
    (record,) = [item for item in caplog.records if "not in the audit log" in item.getMessage()]
    assert record.levelno == logging.ERROR
    for part in (key_id, "createAdapter", made.json()["id"], made.headers["x-request-id"]):
        assert part in record.getMessage()


def test_the_log_holds_no_key(gateway: Gateway, tmp_path: Path) -> None:
    _, headers = gateway.key()
    given = headers["authorization"].removeprefix("Bearer ")
    gateway.client.delete(f"/v1/adapters/{given}", headers=headers)
    gateway.client.post("/v1/realignments", json={"adapter_id": given}, headers=headers)
    assert gateway.rows() == 2
    with gateway.app.state.services.database.connect() as connection:
        rows = connection.execute(select(audit)).all()
    assert given not in str(rows)
    assert given[8:] not in str(rows)


def test_an_admin_reads_its_own_tenants_log(gateway: Gateway) -> None:
    key_id, headers = gateway.key()
    _, admin = gateway.key(scope="admin")
    other_id, other = gateway.key(tenant="other")
    for number in range(3):
        gateway.client.delete(f"/v1/adapters/adp_{number}", headers=headers)
    gateway.client.delete("/v1/adapters/adp_9", headers=other)
    gateway.client.post("/v1/realignments/rlg_1/cancel", headers=admin)

    def targets(**parameters: Any) -> list[str]:
        answer = gateway.client.get("/v1/audit_events", headers=admin, params=parameters)
        assert answer.status_code == 200, answer.text
        return [item["target"] for item in answer.json()["data"]]

    assert targets() == ["rlg_1", "adp_2", "adp_1", "adp_0"]
    assert targets(action="deleteAdapter", actor=key_id) == ["adp_2", "adp_1", "adp_0"]
    assert targets(actor=other_id) == []
    assert targets(since=2**40) == []
    assert len(targets(since=0)) == 4
    page = gateway.client.get("/v1/audit_events", headers=admin, params={"limit": 2}).json()
    assert page["has_more"]
    assert set(page["data"][0]) == {
        "id", "object", "actor", "action", "target", "status", "request_id", "created_at"
    }  # fmt: skip
    assert targets(limit=2, after=page["last_id"]) == ["adp_1", "adp_0"]
    for wrong in ({"after": "x"}, {"since": -1}, {"since": "x"}, {"action": "\0"}, {"limit": 0}):
        refused(gateway.client.get("/v1/audit_events", headers=admin, params=wrong), 422, "invalid_request")
    refused(gateway.client.get("/v1/audit_events", headers=headers), 403, "insufficient_scope")
    refused(gateway.client.get("/v1/audit_events"), 401, "unauthorized")


def test_a_route_may_name_what_it_made(gateway: Gateway) -> None:
    """Where its answer has no `location`, as in the APIs that OpenAI's client knows."""
    from fastapi import APIRouter, Request

    from service.dependencies import Tenant

    router = APIRouter()

    @router.post("/v1/things", operation_id="createThing")
    def create(request: Request, tenant: Tenant) -> None:
        request.state.audit_target = "thing_1"

    gateway.app.include_router(router)
    _, headers = gateway.key()
    assert gateway.client.post("/v1/things", headers=headers).status_code == 200
    assert (gateway.last()["action"], gateway.last()["target"]) == ("createThing", "thing_1")


def test_bodies_are_not_held_back(gateway: Gateway) -> None:
    """The row is written once, before the first byte of the answer."""
    from fastapi import APIRouter
    from fastapi.responses import StreamingResponse

    from service.dependencies import Tenant

    router, seen = APIRouter(), []

    @router.post("/v1/streams", operation_id="createStream")
    def create(tenant: Tenant) -> StreamingResponse:
        def pieces() -> Iterator[bytes]:
            for _ in range(3):
                seen.append(gateway.rows())
                yield b"x"

        return StreamingResponse(pieces())

    gateway.app.include_router(router)
    _, headers = gateway.key()
    assert gateway.client.post("/v1/streams", headers=headers).content == b"xxx"
    # The iterator runs a piece ahead of what is sent; the first one may be asked for before the start is noted.
    assert seen[-1] == 1
    assert gateway.rows() == 1


def test_requests_over_the_limit_are_not_written(tmp_path: Path) -> None:
    """They changed nothing, and a flood of them must not become a flood of writing."""
    settings = GatewaySettings(data=tmp_path, redis_url=f"redis://127.0.0.1:{free_port()}/0", max_requests_per_second=1)
    app = create_app(settings)
    with TestClient(app) as client:
        gateway = Gateway(app, client)
        _, headers = gateway.key()
        codes = [client.delete("/v1/adapters/adp_1", headers=headers).status_code for _ in range(10)]
        assert codes.count(429) >= 5
        assert gateway.rows() == codes.count(404)


def test_development_is_noted_as_such(tmp_path: Path) -> None:
    app = create_app(GatewaySettings(dev=True, data=tmp_path, redis_url=f"redis://127.0.0.1:{free_port()}/0"))
    with TestClient(app, client=("127.0.0.1", 1), base_url="http://localhost:8000") as client:
        client.delete("/v1/adapters/adp_1")
        events = client.get("/v1/audit_events").json()["data"]
    assert [(item["actor"], item["target"]) for item in events] == [("development", "adp_1")]
    assert json.dumps(events)
