"""Query parameters that no route knows."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from service.app import create_app
from service.parameters import known_parameters
from service.settings import GatewaySettings
from tests.service.answers import refused


@pytest.mark.parametrize(
    ("method", "path", "param", "hint"),
    [
        ("GET", "/v1/adapters?limt=5", "limt", "Did you mean limit?"),
        ("GET", "/v1/adapters?limit=5&limt=5", "limt", "Did you mean limit?"),
        ("GET", "/v1/adapters?metadata[a]=b", "metadata[a]", "This route knows"),
        ("GET", "/v1/realignments?limit[a]=5", "limit[a]", "Did you mean limit?"),
        ("GET", "/v1/realignments?x=1", "x", "This route knows adapter_id, after, batch_id, limit, metadata"),
        ("GET", "/v1/methods?x=1", "x", "This route knows none."),
        ("POST", "/v1/realignments?mode=analyze", "mode", "This route knows none."),
        ("DELETE", "/v1/realignments/rlg_0?adapter=true", "adapter", "Did you mean adapters?"),
        ("GET", "/v1/adapters?%00=1", "\\x00", "This route knows"),
        ("GET", f"/v1/adapters?{'x' * 500}=1", "x" * 80, "This route knows"),
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


def test_every_route_below_v1_asks(tmp_path: Path) -> None:
    app: FastAPI = create_app(GatewaySettings(dev=True, data=tmp_path))
    routes: list[Any] = [route for route in iter_route_contexts(app.routes) if (route.path or "").startswith("/v1/")]
    assert len(routes) > 30
    for route in routes:
        assert known_parameters in {inner.call for inner in route.dependant.dependencies}, route.path
