"""/docs as a browser shows it."""

import json
from typing import TYPE_CHECKING

from fastapi.testclient import TestClient

from service import export
from service.app import create_app
from service.routes.docs import policy
from service.settings import GatewaySettings
from tests.service.pages import opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_the_page_shows_every_operation(browser: "Browser") -> None:
    """Swagger UI 4 says of OpenAPI 3.1 that it is unable to render it."""
    document = json.loads(export.document())
    wanted = {
        (method.upper(), path)
        for path, item in document["paths"].items()
        for method in item.keys() - {"parameters", "summary"}
    }
    with opened(browser, "/docs") as page:
        page.locator(".opblock").first.wait_for()
        shown = page.evaluate(
            """() => [...document.querySelectorAll(".opblock")].map((block) => [
                block.querySelector(".opblock-summary-method").textContent,
                block.querySelector(".opblock-summary-path").dataset.path,
            ])"""
        )
        assert {(method, path) for method, path in shown} >= wanted
        assert "safegraft" in page.locator(".info .title").inner_text()
        first = page.locator(".opblock", has_text="/v1/realignments").first
        first.locator(".opblock-summary-control").click()
        first.get_by_text("Responses", exact=True).wait_for()


def test_the_page_runs_its_own_scripts_and_no_others() -> None:
    """That these do run is above: a browser logs what its policy forbids."""
    answer = TestClient(create_app(GatewaySettings())).get("/docs")
    directives = dict(item.strip().split(" ", 1) for item in answer.headers["content-security-policy"].split(";"))
    assert directives["default-src"] == "'none'"
    kind, own, *others = directives["script-src"].split()
    assert (kind, others) == ("'self'", [])
    assert own.startswith("'sha256-")
    assert policy(answer.content.replace(b"SwaggerUIBundle({", b"SwaggerUIBundle ({")) != policy(answer.content)
