"""The pictures of docs/report.md, from the reports that `make demo` left: `make pictures`.

The slide is the report's own PNG, the page a screenshot by the Chromium of this machine. The page has 256 colours,
which grey text is content with; the slide has all of them, because fewer would bend its scales.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
RESULTS, PICTURES = ROOT / ".demo" / "results", ROOT / "docs" / "pictures"
# Half of what nlsr measures it repairs, so that its map shows both; gram is the page that most people will see.
SLIDE, PAGE = RESULTS / "nlsr.report.png", RESULTS / "gram.report.html"
WIDTH, HEIGHT = 1200, 1020


def main() -> None:
    for path in (SLIDE, PAGE):
        if not path.is_file():
            raise SystemExit(f"{path.relative_to(ROOT)} is not there: run `make demo` first, which makes it.")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("There is no Chromium on this machine, which draws the page.")
    PICTURES.mkdir(exist_ok=True)
    save(Image.open(SLIDE).convert("RGB"), "slide.png")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        subprocess.run(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}",
                PAGE.as_uri(),
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        page = Image.open(shot).convert("RGB")
        save(page.quantize(256, dither=Image.Dither.NONE), "page.png")


def save(image: Image.Image, name: str) -> None:
    path = PICTURES / name
    image.save(path, optimize=True)
    sys.stdout.write(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB\n")


if __name__ == "__main__":
    main()
