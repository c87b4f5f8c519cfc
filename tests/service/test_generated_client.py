"""A Python client that is generated from the API description uploads, realigns and downloads for real."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from safegraft.adapter import CONFIG, WEIGHTS
from tests.service.conftest import Running

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).parent / "generated_driver.py"
# The generator and what it needs, beside our own versions of the same packages; installed by `make setup`.
GENERATOR = Path(sys.executable).parent.parent / "generator"
# What this generator must be told: that a tar is bytes.
CONFIGURATION = "content_type_overrides: {application/x-tar: application/octet-stream}\npost_hooks: []\n"


def test_a_generated_client_does_the_whole_job(service: Running, fresh: Path, tmp_path: Path) -> None:
    assert GENERATOR.is_dir(), "the generator is missing: make setup"
    (tmp_path / "config.yaml").write_text(CONFIGURATION)
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"]
    command += ["--path", str(ROOT / "openapi" / "openapi.json"), "--config", str(tmp_path / "config.yaml")]
    command += ["--output-path", str(tmp_path / "safegraft_client")]
    made = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(GENERATOR)}, capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stdout + made.stderr
    told = [line for line in (made.stdout + made.stderr).splitlines() if line.startswith(("WARNING", "Unsupported"))]
    # One of three bodies of one operation: it knows no second kind of archive.
    assert told == ["WARNING parsing POST /v1/adapters within adapters.", "Unsupported content type application/zip"]

    out = tmp_path / "out"
    arguments = [service.url, "sgk_any", str(fresh), str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(GENERATOR)))}
    ended = subprocess.run(
        [sys.executable, str(DRIVER), *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    [folder] = out.iterdir()
    assert (folder / CONFIG).read_bytes() == (fresh / CONFIG).read_bytes()
    before, after = (hashlib.sha256((place / WEIGHTS).read_bytes()).hexdigest() for place in (fresh, folder))
    assert before != after
