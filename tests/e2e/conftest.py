"""A service as the README starts it, with keys, the examples' model and one worker; and Debian's Chromium."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.reference import REFERENCE, ROOT, WORK
from tests.service.conftest import Running, files_of, operate, start

FRESH, CONTINUED = ROOT / "examples" / "fresh", ROOT / "examples" / "continued"
# Width, height, colour scheme: how each state is looked at.
LOOKS = {"light": (1280, 800, "light"), "dark": (1280, 800, "dark"), "phone": (360, 740, "light")}
IMPACTS = ("serious", "critical")

# Tests are only collected where they were asked for: `make test` needs neither browser nor Playwright.
ASKED = bool(os.environ.get("SAFEGRAFT_E2E"))
collect_ignore_glob = [] if ASKED else ["test_*.py"]


@pytest.fixture(scope="session")
def reference() -> Path:
    assert (REFERENCE / "manifest.json").is_file(), "There is no reference yet: python -m tests.e2e.reference"
    return REFERENCE


@dataclass
class Console:
    """The service, a key of the tenant `default`, and what the browser may be pointed at."""

    running: Running
    key: str
    warm: bool = False

    @property
    def url(self) -> str:
        return f"{self.running.url}/"

    def api(self, key: str = "") -> httpx.Client:
        return httpx.Client(
            base_url=self.running.url,
            headers={"authorization": f"Bearer {key or self.key}"},
            timeout=60,
            trust_env=False,
        )

    def new_key(self, *options: str) -> str:
        return new_key(self.running.data, *options)

    def upload(self, folder: Path, **fields: str) -> dict[str, Any]:
        with self.api() as client:
            answer = client.post("/v1/adapters", files=files_of(folder), data=fields)
        assert answer.status_code == 201, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def job(self, job_id: str) -> dict[str, Any]:
        with self.api() as client:
            body: dict[str, Any] = client.get(f"/v1/realignments/{job_id}").json()
        return body

    def warm_up(self) -> None:
        """One job of another tenant, ended: an engine that is held while it still imports torch takes no job at all."""
        if self.warm:
            return
        with self.api(self.new_key("--tenant", "warm-up")) as client:
            adapter = client.post("/v1/adapters", files=files_of(FRESH)).json()
            asked = {"adapter_id": adapter["id"], "mode": "analyze"}
            job = client.post("/v1/realignments", json=asked).json()
            # The stream ends with the job.
            client.get(f"/v1/realignments/{job['id']}/events", headers={"accept": "text/event-stream"}, timeout=240)
            assert client.get(f"/v1/realignments/{job['id']}").json()["status"] == "succeeded"
        self.warm = True

    @contextmanager
    def engine_stopped(self) -> Iterator[None]:
        """Jobs stay where they are: the engine's process is held by SIGSTOP, its worker's heart goes on beating."""
        self.warm_up()
        held = [number for number in descendants(self.running.process.pid) if b"engine_process" in command_of(number)]
        assert held
        for number in held:
            os.kill(number, signal.SIGSTOP)
        try:
            yield
        finally:
            for number in held:
                os.kill(number, signal.SIGCONT)


def new_key(data: Path, *options: str) -> str:
    return str(json.loads(operate(data, "keys", "create", "--json", *options))["key"])


def descendants(parent: int) -> set[int]:
    """The processes below one. Linux."""
    found: set[int] = set()
    waiting = [parent]
    while waiting:
        number = waiting.pop()
        for thread in Path(f"/proc/{number}/task").glob("*/children"):
            new = {int(child) for child in thread.read_text().split()} - found
            found |= new
            waiting += new
    return found


def command_of(number: int) -> bytes:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture(scope="session")
def console(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    data = tmp_path_factory.mktemp("service") / "data"
    operate(data, "reference", "add", str(reference))
    key = new_key(data)
    # A revoked key is noticed at once.
    running = start(data, workers=1, log=data.parent / "serve.log", dev=False, SAFEGRAFT_KEY_CACHE_SECONDS="0")
    yield Console(running, key)
    running.process.terminate()
    assert running.process.wait(90) == 0


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("SAFEGRAFT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "Chromium is needed: `apt-get install chromium`, or name one as SAFEGRAFT_CHROMIUM."
    with sync_playwright() as playwright:
        # Root, as in containers, has no sandbox.
        options = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


@dataclass
class Tab:
    """A tab that keeps what went wrong in it and where it sent requests."""

    page: Any
    console: Console
    axe: str
    asked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def open(self, path: str = "") -> None:
        self.page.goto(self.console.url + path)

    def sign_in(self, key: str = "") -> None:
        self.open()
        self.page.get_by_label("API key").fill(key or self.console.key)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.get_by_role("heading", name="Repair an adapter").wait_for()

    def choose(self, folder: Path) -> None:
        with self.page.expect_file_chooser() as asked:
            self.page.get_by_role("button", name="Choose a folder").click()
        asked.value.set_files(str(folder))

    def choose_archive(self, archive: Path) -> None:
        with self.page.expect_file_chooser() as asked:
            self.page.get_by_role("button", name="Choose an archive").click()
        asked.value.set_files(str(archive))

    def look(self, name: str) -> None:
        """In every look: a picture, what axe finds, and whether the page must be scrolled sideways."""
        self.page.evaluate(self.axe)
        for look, (width, height, scheme) in LOOKS.items():
            self.page.set_viewport_size({"width": width, "height": height})
            self.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            # Charts are drawn anew when their place has another width.
            self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            self.page.screenshot(path=WORK / f"{name}.{look}.png", full_page=True)
            found = self.page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
            for violation in found["violations"]:
                if violation["impact"] in IMPACTS:
                    targets = [node["target"] for node in violation["nodes"]][:3]
                    self.findings.append(f"{name}.{look}: {violation['impact']} {violation['id']} {targets}")
            wide = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            if wide > 0:
                self.findings.append(f"{name}.{look}: {wide} px too wide")
        width, height, scheme = LOOKS["light"]
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme=scheme, reduced_motion="no-preference")


@pytest.fixture
def new_tab(browser: Any, console: Console) -> Iterator[Callable[[], Tab]]:
    """Makes tabs; after the test, none may have met a fault of the page's, or asked anybody else for anything."""
    import axe_playwright_python

    axe = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    tabs: list[Tab] = []

    def make() -> Tab:
        page = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True).new_page()
        page.set_default_timeout(60_000)
        tab = Tab(page, console, axe)
        page.on("request", lambda request: tab.asked.append(request.url))
        page.on("pageerror", lambda error: tab.faults.append(f"uncaught: {error}"))
        page.on("console", lambda line: tab.faults.append(line.text) if _is_fault(line) else None)
        tabs.append(tab)
        return tab

    yield make
    for tab in tabs:
        tab.page.context.close()
    for tab in tabs:
        assert tab.faults == []
        assert tab.findings == []
        assert [url for url in tab.asked if not url.startswith((console.url, "blob:", "data:"))] == []
        assert [url for url in tab.asked if "sgk_" in url] == []


def _is_fault(line: Any) -> bool:
    """Chromium writes each refused request into the page's log; tests provoke those."""
    return line.type == "error" and "Failed to load resource" not in line.text


@pytest.fixture
def tab(new_tab: Callable[[], Tab]) -> Tab:
    return new_tab()
