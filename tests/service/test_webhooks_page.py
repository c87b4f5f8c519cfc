"""docs/webhooks.md, followed from top to bottom as its reader would: every command and the receiver."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.settings import GatewaySettings
from tests.service.conftest import free_port

PAGE = Path(__file__).parents[2] / "docs" / "webhooks.md"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.long
def test_the_page_can_be_followed(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    gateway, hook = free_port(), free_port()
    ports = {"localhost:8000": f"localhost:{gateway}", "localhost:9000": f"localhost:{hook}"}
    ports |= {
        "safegraft serve &": f"safegraft serve --port {gateway} &",
        '("localhost", 9000)': f'("localhost", {hook})',
    }
    for written, here in ports.items():
        assert written in page
        page = page.replace(written, here)
    (receiver,) = blocks(page, "python")
    (tmp_path / "receiver.py").write_text(receiver, encoding="utf-8")
    script = "set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n" + "\n".join(
        blocks(page, "bash")
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SAFEGRAFT_") and key != "REDIS_URL"}
    ended = subprocess.run(
        ["bash", "-mc", script], cwd=tmp_path, env=kept | {"PATH": path}, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert '"state": "delivered"' in ended.stdout
    assert '"status": 204' in ended.stdout
    assert re.search(r"^ping we_[0-9a-f]+$", ended.stdout, flags=re.MULTILINE)
    assert ended.stdout.rstrip().endswith("true")


def test_the_page_names_every_setting_with_its_default() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`SAFEGRAFT_(WEBHOOK_[A-Z_]+)`", page))
    assert named == {name.upper() for name in GatewaySettings.model_fields if name.startswith("webhook_")}
    table = "5 s, 5 min, 30 min, 2 h, 5 h, 10 h, 14 h, 20 h and 24 h"
    assert table in page.replace("\n", " ")
    units = {"s": 1, "min": 60, "h": 3600}
    seconds = [int(count) * units[unit] for count, unit in re.findall(r"(\d+) (s|min|h)\b", table)]
    assert seconds == GatewaySettings().webhook_retry_seconds
