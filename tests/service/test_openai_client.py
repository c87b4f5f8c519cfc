"""Every documented step with OpenAI's own client, the newest and one that is a year older, against a real service."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.service.conftest import Running, operate, start

DRIVER = Path(__file__).parent / "openai_driver.py"
# Installed beside the newest one by `make setup`.
OLDER = Path(sys.executable).parent.parent / "older"


@dataclass
class Platform:
    running: Running
    keys: dict[str, str]


@pytest.fixture(scope="module")
def platform(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A service that asks for keys."""
    data = tmp_path_factory.mktemp("platform") / "data"

    operate(data, "reference", "add", str(bundle))
    keys = {
        "all": operate(data, "keys", "create", "--tenant", "acme", "--scopes", "admin"),
        "read": operate(data, "keys", "create", "--tenant", "acme", "--name", "reader", "--scopes", "read"),
        "limited": operate(data, "keys", "create", "--tenant", "hasty"),
    }
    operate(data, "admin", "limits", "hasty", "--max-requests-per-second", "5")
    running = start(data, workers=1, log=data / "serve.log", dev=False, SAFEGRAFT_WEBHOOK_ALLOW_PRIVATE="1")
    yield Platform(running, keys)
    running.process.terminate()
    assert running.process.wait(60) == 0


@pytest.fixture(scope="module")
def archive(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "reviews.tar"
    with tarfile.open(path, "w") as tar:
        for file in sorted(fresh.iterdir()):
            tar.add(file, f"reviews/{file.name}")
    return path


@pytest.mark.parametrize("version", ["newest", pytest.param("a year older", marks=pytest.mark.long)])
def test_openais_client_does_every_step(platform: Platform, archive: Path, tmp_path: Path, version: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENAI_")}
    if version != "newest":
        assert OLDER.is_dir(), "the older client is missing: make setup"
        environment["PYTHONPATH"] = f"{OLDER}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    keys = platform.keys
    arguments = [f"{platform.running.url}/v1", keys["all"], keys["read"], keys["limited"], str(archive), str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, str(DRIVER), *arguments], env=environment, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    newest = subprocess.run(
        [sys.executable, "-c", "import openai; print(openai.__version__)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert (found["openai"] == newest) == (version == "newest")
