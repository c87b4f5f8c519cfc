"""The application as a whole: what it loads, what it documents, whom it lets in."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from safegraft.contracts.methods import DEFAULT_METHOD, MODELS, STRENGTH, MethodParameters
from safegraft.engine.methods import METHODS
from safegraft.stores.database import open_database
from safegraft.stores.keys import KeyStore
from safegraft.vault import open_vault
from service import export
from service.app import create_app
from service.settings import GatewaySettings
from tests.scaled import SCALED
from tests.service.answers import refused
from tests.service.conftest import free_port, realign, upload

ROOT = Path(__file__).parents[2]
UNDOCUMENTED = {"/docs/assets", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc", "/", "/console/{name}"}
OPEN = {"/livez", "/readyz"}


def operations() -> list[tuple[str, str, dict[str, Any]]]:
    paths = json.loads(export.document())["paths"]
    return [(method, path, operation) for path, item in paths.items() for method, operation in item.items()]


def test_the_gateway_loads_no_engine() -> None:
    program = "import json, sys; import service.app, service.main; print(json.dumps(sorted(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = json.loads(ended.stdout)
    heavy = ("torch", "transformers", "peft", "safetensors", "matplotlib", "worker", "safegraft.engine")
    assert [name for name in loaded if name in heavy or name.startswith(tuple(f"{h}." for h in heavy))] == []


def test_the_committed_document_is_the_codes() -> None:
    assert (ROOT / "openapi" / "openapi.json").read_text(encoding="utf-8") == export.document(), "run `make openapi`"


def test_every_operation_has_a_name_and_documents_its_errors() -> None:
    found = operations()
    names = [operation["operationId"] for _, _, operation in found]
    assert len(set(names)) == len(names) >= 16
    assert all(name.isidentifier() and name[0].islower() for name in names)
    for method, path, operation in found:
        codes = set(operation["responses"])
        assert any(code.startswith("2") for code in codes), (method, path)
        for code in ("4XX", "5XX"):
            schema = operation["responses"][code]["content"]["application/problem+json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Problem"}, (method, path)
        assert operation.get("description"), (method, path)


def test_every_route_is_documented_or_a_head_of_one_that_is() -> None:
    app = create_app(GatewaySettings(dev=True))
    documented = {(method.upper(), path) for method, path, _ in operations()}
    for route in iter_route_contexts(app.routes):
        if route.path in UNDOCUMENTED:
            continue
        for method in route.methods or ():
            assert ("GET" if method == "HEAD" else method, route.path) in documented


def test_every_route_under_v1_wants_a_key(tmp_path: Path) -> None:
    settings = GatewaySettings(
        dev=False,
        data=tmp_path,
        redis_url=f"redis://127.0.0.1:{free_port()}/0",
        max_requests_per_second=0,
    )
    _, key = KeyStore(open_database(settings.database), open_vault(settings)).create("default", scopes=["admin"])
    app = create_app(settings)
    asked = 0
    with TestClient(app, client=("127.0.0.1", 50000), base_url="http://127.0.0.1") as client:
        for route in iter_route_contexts(app.routes):
            assert route.path is not None
            if route.path in UNDOCUMENTED | OPEN:
                continue
            assert route.path.startswith("/v1/") or route.path == "/metrics"
            for method in route.methods or ():
                asked += 1
                path = route.path.replace("{form}", "json").replace("{", "").replace("}", "")
                answer = client.request(method, path)
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    refused(answer, 401, "unauthorized")
                right = client.request(method, path, headers={"authorization": f"Bearer {key}"})
                assert right.status_code != 401, (method, path)
    assert asked >= 16


def test_the_methods_are_the_same_everywhere(client: httpx.Client) -> None:
    union = {model.model_fields["type"].default for model in get_args(get_args(MethodParameters)[0])}
    assert set(METHODS) == set(MODELS) == union - {"auto"}
    assert set(STRENGTH) == set(MODELS) - {"none"}
    assert all(parameter in MODELS[name].model_fields for name, parameter in STRENGTH.items())
    assert all(MODELS[name].model_fields["type"].default == name for name in MODELS)
    assert all(method.type == name for name, method in METHODS.items())
    assert DEFAULT_METHOD in union
    assert {item["id"] for item in client.get("/v1/methods").json()["data"]} == set(MODELS)


@pytest.mark.parametrize(
    "body",
    [
        b'{"adapter_id": "\\ud800"}',
        b'{"adapter_id": "adp_\\u0000"}',
        b'{"adapter_id": "%s", "reference_id": "\\udfff"}',
        b'{"adapter_id": "%s", "metadata": {"\\ud800": "x"}}',
        b'{"adapter_id": "%s", "metadata": {"x": "\\ud800"}}',
        b'{"adapter_id": "%s", "\\ud800": 1}',
        b'{"adapter_id": "%s", "metadata": {"x": "' + b"y" * 513 + b'"}}',
        b'{"adapter_id": "%s", "metadata": {"": "x"}}',
        b'{"adapter_id": "%s", "metadata": {"x": 1}}',
        b'{"adapter_id": "%s", "metadata": {"x": "a\\u0000b"}}',
        b'{"adapter_id": "%s", "metadata": {"\\u0000": "x"}}',
        b'{"adapter_id": "%s", "mode": NaN}',
        b"[]",
        b"null",
        b"",
        b'"text"',
        b"\xff\xfe",
    ],
    ids=lambda body: body[:60],
)
def test_text_that_no_answer_could_hold_is_refused(client: httpx.Client, fresh: Path, body: bytes) -> None:
    if b"%s" in body:
        body = body % upload(client, fresh)["id"].encode()
    before = client.get("/v1/realignments").json()["data"]
    answer = client.post("/v1/realignments", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    refused(answer, answer.status_code, answer.json()["error"]["code"])
    assert client.get("/v1/realignments").json()["data"] == before


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("realignments", {"adapter_id": "adp_0"}),
        ("fine_tuning/jobs", {"model": "auto", "training_file": "adp_0"}),
        ("realignment_batches", {"reference_id": "ref_0", "adapter_ids": ["adp_0"]}),
    ],
)
def test_an_idempotency_key_is_one_and_not_empty(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    def send(*keys: str) -> httpx.Response:
        return client.post(f"/v1/{path}", json=body, headers=[("Idempotency-Key", key) for key in keys])

    assert refused(send(""), 422, "invalid_request")["param"] == "Idempotency-Key"
    assert refused(send("x" * 256), 422, "invalid_request")["param"] == "Idempotency-Key"
    assert refused(send("a", "b"), 422, "invalid_request")["param"] == "Idempotency-Key"
    for keys in ((), ("a",), ("a", "a")):
        assert send(*keys).status_code == 404  # what it names is not there


def test_metadata_comes_back_as_it_was_sent(client: httpx.Client, fresh: Path) -> None:
    metadata = {"ticket": "ü 漢 🙂 \u202e <script>", "k" * 64: "v" * 512}
    job = realign(client, upload(client, fresh)["id"], method={"type": "gram"}, metadata=metadata)
    assert job["metadata"] == metadata


def test_our_own_failures_are_named_by_the_request_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = GatewaySettings(dev=True, data=tmp_path, redis_url=f"redis://127.0.0.1:{free_port()}/0")
    app = create_app(settings)
    with TestClient(
        app, client=("127.0.0.1", 50000), base_url="http://127.0.0.1", raise_server_exceptions=False
    ) as client:

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("a secret of ours")

        monkeypatch.setattr(app.state.services.adapters, "page", fail)
        answer = client.get("/v1/adapters")
        refused(answer, 500, "internal_error")
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] in caplog.text
        assert "a secret of ours" in caplog.text


@pytest.mark.skipif(SCALED, reason="of SQLite")
def test_a_full_disk_of_the_database_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(GatewaySettings(dev=True, data=tmp_path, redis_url=f"redis://127.0.0.1:{free_port()}/0"))
    with TestClient(app, client=("127.0.0.1", 50000), base_url="http://127.0.0.1") as client:
        # To SQLite a file that may not grow is a disk that is full.
        database = app.state.services.database
        event.listen(database, "connect", lambda connection, _: connection.execute("PRAGMA max_page_count = 1"))
        database.dispose()
        given = {"purpose": "fine-tune", "filename": "x" * 255, "bytes": 3, "mime_type": "x"}
        answer = client.post("/v1/uploads", json=given)
        while answer.status_code == 200:  # there is room in the last page
            answer = client.post("/v1/uploads", json=given)
        assert refused(answer, 507, "disk_full")["message"] == "The disk is full; nothing was kept."
        assert "database or disk is full" in caplog.text
        assert client.get("/v1/uploads/upload_0").status_code == 404  # reading needs no room


@pytest.mark.parametrize(
    ("state", "status", "code"), [("53100", 507, "disk_full"), ("57P01", 503, "database_unavailable")]
)
def test_what_postgres_says_of_its_disk_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, status: int, code: str
) -> None:
    class Said(Exception):
        sqlstate = state

    def fail(*_: object, **__: object) -> None:
        raise OperationalError("INSERT", {}, Said())

    app = create_app(GatewaySettings(dev=True, data=tmp_path, redis_url=f"redis://127.0.0.1:{free_port()}/0"))
    with TestClient(app, client=("127.0.0.1", 50000), base_url="http://127.0.0.1") as client:
        monkeypatch.setattr(app.state.services.adapters, "page", fail)
        refused(client.get("/v1/adapters"), status, code)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/", "GET, HEAD"),
        ("POST", "/livez", "GET, HEAD"),
        ("OPTIONS", "/v1/adapters", "GET, POST"),
        ("HEAD", "/v1/adapters", "GET, POST"),
        ("PATCH", "/v1/adapters/adp_0", "DELETE, GET"),
        ("PUT", "/v1/adapters/adp_0/files/x", "GET, HEAD"),
        ("PUT", "/v1/webhook_endpoints/we_0", "DELETE, GET, POST"),
        ("PUT", "/v1/uploads/upload_0/parts", "GET, POST"),  # of two routers, one within the other
        ("GET", "/v1/uploads/upload_0/complete", "POST"),
        ("POST", "/openapi.json", "GET, HEAD"),
        ("POST", "/docs/assets/swagger-ui.css", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_answered_with_the_right_ones(
    client: httpx.Client, method: str, path: str, allowed: str
) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        refused(answer, 405, "method_not_allowed")


def test_the_page_of_the_description_loads_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/docs").text
    used = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(used) >= 3
    for path in used:
        assert path.startswith("/docs/assets/")
        assert client.get(path).status_code == 200


def test_the_description_names_the_key(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert document["paths"]["/v1/adapters"]["post"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in document["paths"]["/livez"]["get"]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"method": "gram"}, "method", 'An object is needed. Write {"type": "gram"}'),
        ({"method": {"general_weight": 0.1}}, "method", "An object that has 'type' is needed. Write"),
        ({"method": {"type": "x" * 9000}}, "method", "x, not one of 'auto', 'nlsr', 'gram'"),
        ({"methd": {"type": "gram"}}, "methd", "There is no such field. Did you mean method?"),
        ({"x": 1}, "x", "There is no such field. Known are adapter_id,"),
        ({"method": {"type": "gram", "general_wieght": 0.1}}, "method.general_wieght", "Did you mean general_weight?"),
        ({"method": {"type": "gram", "gram": {}}}, "method.gram", "There is no such field. Known are amplification,"),
        ({"method": {"type": "none", "none": 1}}, "method.none", "There is no such field. Known are type."),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"strengths": [0.1, 0.2]}, "method", 'Add "method": {"type": "gram"}'),
    ],
    ids=str,
)
def test_a_body_at_fault_is_told_with_what_to_write(
    client: httpx.Client, fresh: Path, body: dict[str, Any], param: str, says: str
) -> None:
    answer = client.post("/v1/realignments", json={"adapter_id": upload(client, fresh)["id"], **body})
    code = "bad_strengths" if "strengths" in body else "invalid_request"
    error = refused(answer, 422, code)
    assert error["param"] == param
    assert says in error["message"]


def test_a_path_that_is_none_is_told_with_a_way_on(client: httpx.Client) -> None:
    for path in ("/files", "/v1/adapters/", "/v1/adapter"):
        assert "GET /openapi.json has all paths" in refused(client.get(path), 404, "route_not_found")["message"]
    wrong = refused(client.put("/v1/adapters"), 405, "method_not_allowed")
    assert wrong["message"].endswith("This path takes GET, POST.")
