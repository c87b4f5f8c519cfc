"""/docs as a browser shows it."""

import json
from typing import TYPE_CHECKING

from service import export
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
