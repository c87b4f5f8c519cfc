"""The application's pages in Chromium, without a server: this process answers what a page asks for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import GatewaySettings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

# Of no machine, and trusted as one with TLS is: what a page does on localhost alone would hide what it does elsewhere.
ORIGIN = "https://safegraft.test"


@contextmanager
def opened(browser: "Browser", path: str, width: int = 1280) -> "Iterator[Page]":
    """A page, as one without a key sees it. Fails where it logs anything, or asks for anything elsewhere."""
    # Without its lifespan: neither database nor broker is needed for pages.
    client = TestClient(create_app(GatewaySettings()))
    seen: list[str] = []

    def answer(route: "Route") -> None:
        url = route.request.url
        if not url.startswith(f"{ORIGIN}/"):
            seen.append(url)
            route.abort()
            return
        if url.startswith(f"{ORIGIN}/v1/"):
            route.fulfill(status=401, json={"error": {"code": "unauthorized", "message": "Whose request is this?"}})
            return
        found = client.get(url.removeprefix(ORIGIN), headers={"accept-encoding": "identity"})
        route.fulfill(status=found.status_code, headers=dict(found.headers), body=found.content)

    context = browser.new_context(viewport={"width": width, "height": 900})
    context.route("**/*", answer)
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.on("console", lambda message: None if "status of 401" in message.text else seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.goto(f"{ORIGIN}{path}")
    yield page
    assert seen == []
    context.close()
