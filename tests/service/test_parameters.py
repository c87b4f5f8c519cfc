"""Query parameters that no route knows."""

import re
from pathlib import Path

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import GatewaySettings
from tests.service.answers import refused
from tests.service.conftest import free_port


@pytest.mark.parametrize(
    ("method", "path", "param", "hint"),
    [
        ("GET", "/v1/adapters?limt=5", "limt", "Did you mean limit?"),
        ("GET", "/v1/adapters?limit=5&limt=5", "limt", "Did you mean limit?"),
        ("GET", "/v1/adapters?metadata[a]=b", "metadata[a]", "Known are"),
        ("GET", "/v1/realignments?limit[a]=5", "limit[a]", "Did you mean limit?"),
        ("GET", "/v1/realignments?x=1", "x", "Known are adapter_id, after, batch_id, limit, metadata"),
        ("GET", "/v1/methods?x=1", "x", "It has none."),
        ("POST", "/v1/realignments?mode=analyze", "mode", "It has none."),
        ("DELETE", "/v1/realignments/rlg_0?adapter=true", "adapter", "Did you mean adapters?"),
        ("GET", "/v1/adapters?%00=1", "\\x00", "Known are"),
        ("GET", f"/v1/adapters?{'x' * 500}=1", "x" * 80, "Known are"),
    ],
)
def test_what_no_route_knows_is_refused(client: httpx.Client, method: str, path: str, param: str, hint: str) -> None:
    error = refused(client.request(method, path, json={} if method == "POST" else None), 422, "unknown_parameter")
    assert error["param"] == param
    assert hint in error["message"]


def test_a_query_that_is_no_text_is_refused(client: httpx.Client) -> None:
    """Read as U+FFFD it would become a part of what is kept."""
    for path in ("/v1/adapters?name=%ff", "/v1/adapters?%c3=1"):
        assert refused(client.get(path), 422, "invalid_request")["param"] == "query"
    assert client.get("/v1/adapters?name=%C3%BC").status_code == 200


def test_what_is_given_twice_is_refused(client: httpx.Client) -> None:
    for query in ("limit=1&limit=2", "limit=1&limit=1", "name=a&name=b"):
        refused(client.get(f"/v1/adapters?{query}"), 422, "duplicate_parameter")
    refused(client.get("/v1/realignments?metadata[a]=b&metadata[a]=c"), 422, "duplicate_filter")


def test_a_probe_that_is_mistyped_is_refused(client: httpx.Client) -> None:
    refused(client.get("/readyz?ignor=worker"), 422, "unknown_parameter")


def test_strangers_hear_of_their_key_first(tmp_path: Path) -> None:
    app = create_app(GatewaySettings(data=tmp_path, redis_url=f"redis://127.0.0.1:{free_port()}/0"))
    routes = [route for route in iter_route_contexts(app.routes) if (route.path or "").startswith("/v1/")]
    assert len(routes) > 30
    with TestClient(app) as client:
        for route in routes:
            for method in route.methods or set():
                path = re.sub(r"\{[^}]*\}", "x", str(route.path))
                answer = client.request(method, path, params={"limt": "5"})
                assert answer.status_code == 401, (method, path)


def test_every_route_below_v1_asks(client: httpx.Client) -> None:
    """Of those that answer a key; also where the ids in the path are nobody's."""
    document = client.get("/openapi.json").json()
    asked = 0
    for path, operations in document["paths"].items():
        for method in operations.keys() & {"get", "delete", "post", "put"}:
            if path.startswith("/v1/"):
                url = re.sub(r"\{[^}]*\}", "x", path)
                answer = client.request(method, url, params={"limt": "5"}, json={} if method != "get" else None)
                refused(answer, 422, "unknown_parameter")
                asked += 1
    assert asked > 30
