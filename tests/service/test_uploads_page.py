"""docs/uploads.md: every command and program on it, run as it stands there, on a service that keeps its bytes in S3."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from safegraft.adapter import COMPANIONS
from safegraft.archive import MAX_MEMBERS
from safegraft.contracts.files import MAX_PART_BYTES, MAX_PARTS
from safegraft.ingest import GROWTH, MAX_COMPANION_BYTES, ROOM
from service.body import IDLE_SECONDS, MAX_BRACKETS, MAX_COLONS, MIN_RATE
from service.receiving import MAX_SEGMENTS
from service.settings import GatewaySettings
from tests.service.conftest import SAFEGRAFT, Running, environment_of, start

PAGE = (Path(__file__).parents[2] / "docs" / "uploads.md").read_text(encoding="utf-8")
PIECE = 8_000


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.M | re.S)


@pytest.fixture(scope="module")
def running(
    bundle: Path, storage_url: Callable[[], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    data = tmp_path_factory.mktemp("page") / "data"
    place = storage_url()
    subprocess.run(
        [SAFEGRAFT, "reference", "add", str(bundle), "--data", str(data)],
        check=True,
        capture_output=True,
        env=environment_of(data) | {"SAFEGRAFT_STORAGE_URL": place},
    )
    running = start(data, workers=1, log=data / "serve.log", SAFEGRAFT_STORAGE_URL=place)
    yield running
    running.process.terminate()
    assert running.process.wait(60) == 0


@pytest.mark.long
def test_every_command_of_the_page(running: Running, fresh: Path, tmp_path: Path) -> None:
    key = "any, in development"
    shutil.copytree(fresh, tmp_path / "reviews")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    environment |= {"URL": running.url, "KEY": key}
    plain, presigned = blocks("bash")
    chunked, resumed = blocks("python")

    def run(*command: str) -> list[str]:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.split("\n")[:-1]

    def shell(script: str) -> list[str]:
        (tmp_path / "commands.sh").write_text("set -euo pipefail\n" + script, encoding="utf-8")
        return run("bash", "commands.sh")

    with running.client() as client:
        # One request.
        form, raw = (client.get(f"/v1/adapters/{name}").json() for name in shell(plain))
        assert form["name"] == raw["name"] == "reviews"
        assert form["sha256"] == raw["sha256"]
        # OpenAI's client.
        (made,) = run(sys.executable, "-c", chunked)
        assert client.get(f"/v1/adapters/{made}").json()["sha256"] == form["sha256"]
        assert client.get("/v1/files").json()["data"] == []
        # After a crash: an upload with a part is there, and a note of its id.
        assert f"PART = {MAX_PART_BYTES // 2**20} * 2**20" in resumed
        program = resumed.replace("PART = 64 * 2**20", f"PART = {PIECE}")
        tar = (tmp_path / "adapter.tar").read_bytes()
        given = {"purpose": "fine-tune", "filename": "adapter.tar", "bytes": len(tar), "mime_type": "application/x-tar"}
        upload = client.post("/v1/uploads", json=given).json()["id"]
        octets = {"content-type": "application/octet-stream"}
        client.post(f"/v1/uploads/{upload}/parts", content=tar[PIECE : 2 * PIECE], headers=octets).raise_for_status()
        (tmp_path / "adapter.upload").write_text(upload)
        *said, file_id = run(sys.executable, "-c", program)
        assert [line.rpartition(" ")[0] for line in said[:3]] == ["sent", "there already", "sent"]
        assert len(said) == -(-len(tar) // PIECE)
        assert client.get(f"/v1/files/{file_id}").json()["bytes"] == len(tar)
        assert not (tmp_path / "adapter.upload").exists()
        *_, again = run(sys.executable, "-c", program)  # from the beginning
        assert again != file_id
        # Past the gateway, and what its files are called there.
        assert "split --bytes=64M" in presigned
        defined = plain.partition("\n")[0] + "\n"
        (made,) = shell(defined + presigned.replace("--bytes=64M", f"--bytes={PIECE}"))
        assert client.get(f"/v1/adapters/{made}").json()["sha256"] == form["sha256"]
        assert len(list(tmp_path.glob("part.*"))) == len(said)
        answer = client.get(f"/v1/files/{file_id}/content", follow_redirects=True)
        assert answer.headers["content-disposition"] == 'attachment; filename="content"'
        assert hashlib.sha256(answer.content).digest() == hashlib.sha256(tar).digest()


def test_the_page_names_every_limit() -> None:
    page = PAGE.replace("\n", " ")
    settings = GatewaySettings()
    for text in (
        f"`SAFEGRAFT_MAX_UPLOAD_BYTES` ({settings.max_upload_bytes // 2**30} GiB)",
        f"`SAFEGRAFT_MAX_ACTIVE_UPLOADS` ({settings.max_active_uploads})",
        f"`SAFEGRAFT_VALIDATION_SECONDS` ({settings.validation_seconds:g})",
        f"`SAFEGRAFT_VALIDATION_MEMORY_BYTES` ({settings.validation_memory_bytes // 2**30} GiB)",
        f"`SAFEGRAFT_MAX_BYTES_PER_TENANT` ({settings.max_bytes_per_tenant // 2**40} TiB)",
        f"| {MAX_PART_BYTES // 2**20} MiB; {MAX_PARTS:,} |".replace(",", " "),
        f"| {MAX_COMPANION_BYTES // 2**20} MiB; 1 MiB |",
        f"| {MAX_MEMBERS}; {MAX_SEGMENTS} |",
        f"`SAFEGRAFT_MAX_JSON_BYTES` ({settings.max_json_bytes // 2**20} MiB); {MAX_COLONS}; {MAX_BRACKETS:,} |",
        f"| {IDLE_SECONDS:g} s; {MIN_RATE // 1024} KiB/s |",
        f"beyond {ROOM // 2**20} MiB and {GROWTH} times its size",
    ):
        assert text in page, text
    assert settings.upload_expiry_seconds == 24 * 3600
    for name in COMPANIONS:
        assert f"`{name}`" in page, name
