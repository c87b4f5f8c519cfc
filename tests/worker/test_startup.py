"""A worker starts on whole references, or not at all; then it says in one line what is to be done."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from safegraft.bundle import GRAM, MANIFEST, NLSR, reference_id
from safegraft.contracts.queue import NOT_STARTED
from safegraft.files import sha256_file
from safegraft.settings import SharedSettings
from safegraft.stores.references import ReferenceRegistry
from tests.scaled import free_port
from tests.service.conftest import SAFEGRAFT, environment_of

pytestmark = pytest.mark.skipif(
    os.environ.get("SAFEGRAFT_TEST_BACKEND") == "scaled", reason="where copies are kept, broken ones are replaced"
)


def flip(folder: Path) -> tuple[str, str, str]:
    raw = bytearray((folder / GRAM).read_bytes())
    before = sha256_file(folder / GRAM)
    raw[len(raw) // 2] ^= 1
    (folder / GRAM).write_bytes(raw)
    return str(folder / GRAM), before, sha256_file(folder / GRAM)


def lose(folder: Path) -> tuple[str, str, str]:
    before = sha256_file(folder / NLSR)
    (folder / NLSR).unlink()
    return str(folder / NLSR), before, "is missing"


def add(folder: Path) -> tuple[str, str, str]:
    (folder / "extra.safetensors").write_bytes(b"whatever")
    return str(folder / "extra.safetensors"), "is no file of this bundle", "Remove it"


def edit_manifest(folder: Path) -> tuple[str, str, str]:
    """It names another file's hash, and so is no longer the manifest of that id."""
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text().replace(sha256_file(folder / GRAM), "0" * 64))
    return str(manifest), folder.name.removeprefix("ref_"), sha256_file(manifest)


def forge_manifest(folder: Path) -> tuple[str, str, str]:
    """The same, with the id that belongs to it."""
    found = sha256_file(folder / GRAM)
    edit_manifest(folder)
    forged = folder.with_name(reference_id(sha256_file(folder / MANIFEST)))
    folder.rename(forged)
    return str(forged / GRAM), "0" * 64, found


def lose_manifest(folder: Path) -> tuple[str, str, str]:
    (folder / MANIFEST).unlink()
    return str(folder / MANIFEST), folder.name.removeprefix("ref_"), "is missing"


def lines(text: str) -> list[str]:
    """But for what Celery tells whoever runs it as root, as some test machines do."""
    return [line for line in text.splitlines() if line.strip() and "superuser privileges" not in line]


@pytest.fixture
def data(tmp_path: Path, bundle: Path) -> Path:
    ReferenceRegistry(SharedSettings(data=tmp_path).references).add(bundle)
    return tmp_path


def installed(data: Path) -> Path:
    [folder] = (data / "references").glob("ref_*")
    return folder


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("harm", [flip, lose, add, edit_manifest, forge_manifest, lose_manifest])
def test_a_broken_reference_stops_the_worker_with_one_line(
    data: Path, harm: Callable[[Path], tuple[str, str, str]], form: str
) -> None:
    told = harm(installed(data))
    environment = environment_of(data) | {"SAFEGRAFT_DATA": str(data), "SAFEGRAFT_LOG_FORMAT": form}
    environment |= {"SAFEGRAFT_REDIS_URL": "redis://127.0.0.1:1/0"}
    command = [sys.executable, "-m", "celery", "-A", "worker.main", "worker", "--loglevel", "INFO"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == NOT_STARTED
    [line] = lines(ended.stdout + ended.stderr)
    said = json.loads(line)["message"] if form == "json" else line
    assert "not started: corrupt_reference: " in said
    assert all(part in said for part in told), said
    assert "Restore it from a copy" in said or "Remove it" in said


def test_a_reference_of_another_version_and_one_that_is_being_removed_stop_nobody(data: Path) -> None:
    registry = ReferenceRegistry(data / "references")
    folder = installed(data)
    other = Path(shutil.copytree(folder, folder.with_name("ref_" + "0" * 24)))
    (other / MANIFEST).write_text((other / MANIFEST).read_text().replace('"schema_version": ', '"schema_version": 9'))
    shutil.copytree(folder, folder.with_name(".removed-ref_1"))
    registry.check()
    assert [item.id for item in registry.installed()] == [folder.name]


@pytest.mark.long
def test_serve_says_so_too_and_does_not_try_again_and_again(data: Path) -> None:
    path, expected, found = flip(installed(data))
    port = free_port()
    command = [SAFEGRAFT, "serve", "--dev", "--data", str(data), "--port", str(port)]
    with (data / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment_of(data), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while "cannot start" not in (data / "serve.log").read_text():
            assert time.monotonic() < deadline, (data / "serve.log").read_text()
            time.sleep(0.2)
        time.sleep(6)  # a crash would have been followed by three more starts by now
        [line] = [line for line in (data / "serve.log").read_text().splitlines() if "worker1" in line]
        assert "worker1 cannot start; tried again in 60 s" in line
        assert all(part in line for part in (path, expected, found, "Restore it from a copy"))
        assert len(lines((data / "logs" / "worker1.log").read_text())) == 1
        # Jobs are taken and wait.
        assert httpx.get(f"http://127.0.0.1:{port}/livez", trust_env=False).is_success
    finally:
        process.terminate()
        assert process.wait(60) == 0
