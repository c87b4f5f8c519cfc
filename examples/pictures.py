"""The pictures of docs/report.md and docs/console.md, from what `make demo` left: `make pictures`.

The slide is the report's own PNG, the others are screenshots by the Chromium of this machine; those of the console are
of a real service, to which the demo's adapter is given. Screenshots have 256 colours, which grey text is content with;
the slide has all of them, because fewer would bend its scales.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import demo  # type: ignore[import-not-found] # the module beside this one
import httpx
from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
RESULTS, PICTURES = ROOT / ".demo" / "results", ROOT / "docs" / "pictures"
# Half of what nlsr measures it repairs, so that its map shows both; gram is the page that most people will see.
SLIDE, PAGE = RESULTS / "nlsr.report.png", RESULTS / "gram.report.html"
WIDTH, HEIGHT = 1200, 1020
CONSOLE, REFERENCE, ADAPTER = ROOT / "docs" / "console", ROOT / ".demo" / "smollm2-aligned", ROOT / "examples" / "fresh"
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)


def main() -> None:
    for path in (SLIDE, PAGE):
        if not path.is_file():
            raise SystemExit(f"{path.relative_to(ROOT)} is not there: run `make demo` first, which makes it.")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("There is no Chromium on this machine, which draws the page.")
    PICTURES.mkdir(exist_ok=True)
    save(Image.open(SLIDE).convert("RGB"), PICTURES / "slide.png", colours=None)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(PAGE.as_uri())
        shoot(page, PICTURES / "page.png")
        port = demo.free_port()
        service = demo.start_service(REFERENCE, port, Path(folder) / "data")
        try:
            console(browser.new_page(viewport={"width": 1120, "height": 1300}), f"http://127.0.0.1:{port}")
        finally:
            service.terminate()
            service.wait(60)
        browser.close()


def console(page: Page, url: str) -> None:
    """An adapter with the form that starts a realignment, and strengths of one method side by side."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        files = [("files", (path.name, path.read_bytes())) for path in sorted(ADAPTER.iterdir())]
        adapter = http.post("/v1/adapters", data={"name": "fresh"}, files=files).raise_for_status().json()
        page.goto(f"{url}/#/adapters/{adapter['id']}")
        page.get_by_role("heading", name="fresh").wait_for()
        page.wait_for_load_state("networkidle")
        shoot(page, CONSOLE / "adapter.png", height=1240)
        job = http.post(
            "/v1/realignments",
            json={"adapter_id": adapter["id"], "method": {"type": "gram"}, "strengths": STRENGTHS},
        ).raise_for_status().json()  # fmt: skip
        demo.follow(http, job["id"], "gram")
    page.goto(f"{url}/#/realignments/{job['id']}")
    page.locator(".curve .stripe").first.wait_for()
    shoot(page, CONSOLE / "strengths.png")


def shoot(page: Page, path: Path, height: int | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        if height is not None:
            page.set_viewport_size({"width": page.evaluate("innerWidth"), "height": height})
        page.screenshot(path=shot)
        save(Image.open(shot).convert("RGB"), path, colours=256)


def save(image: Image.Image, path: Path, colours: int | None) -> None:
    if colours is not None:
        image = image.quantize(colours, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
    sys.stdout.write(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB\n")


if __name__ == "__main__":
    main()
