"""`safegraft provenance` and what `safegraft verify` says of what was signed, as a user starts them."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from safegraft.bundle import MAX_MANIFEST_BYTES
from safegraft.verification import MAX_DOCUMENT_BYTES
from tests.service.conftest import free_port
from tests.test_cli import refused, safegraft

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(fresh: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys, and with a result that was signed."""
    folder = tmp_path_factory.mktemp("made")
    safegraft("provenance", "keygen", "--out", folder / "keys")
    done = safegraft(
        "realign", fresh, "--reference", bundle, "--out", folder / "out", "--method", "gram",
        "--signing-key", folder / "keys" / "signing_key.pem", "--builder-id", "https://example.com/me",
    )  # fmt: skip
    assert f"Provenance (signed): {folder}/out.provenance.json\n" in done.stdout
    return folder


def test_keygen_makes_a_pair_once(tmp_path: Path) -> None:
    shown = json.loads(safegraft("provenance", "keygen", "--out", tmp_path / "keys", "--json").stdout)
    assert stat.S_IMODE(Path(shown["private"]).stat().st_mode) == 0o600
    assert Path(shown["public"]).is_file()
    assert len(shown["keyid"]) == 64
    refused("provenance", "keygen", "--out", tmp_path / "keys", code="key_exists")


def test_a_signed_result_is_verified(made: Path, fresh: Path, bundle: Path) -> None:
    files: list[str | Path] = ["verify", made / "out.provenance.json", "--adapter", made / "out", "--input", fresh]
    files += ["--reference", bundle, "--report", made / "out.report.json"]
    told = safegraft(*files, "--public-key", made / "keys" / "signing_key.pub.pem").stdout
    assert "Signature: valid, by the key " in told
    assert "As attested: adapter_model.safetensors\n" in told
    assert "As attested: reference/manifest.json\n" in told
    assert "Not checked: reference_source/" in told
    assert "The provenance holds for " in told
    assert "Signature not checked" in safegraft(*files).stdout
    with_environment = safegraft(
        "verify", made / "out.provenance.json", "--json",
        SAFEGRAFT_ADAPTER=str(made / "out"), SAFEGRAFT_PUBLIC_KEY=str(made / "keys" / "signing_key.pub.pem"),
    )  # fmt: skip
    found = json.loads(with_environment.stdout)
    assert set(found) == {"ok", "problems", "signature", "keyid", "checked", "not_checked"}
    assert found["ok"]
    assert "report.json" in found["not_checked"]


@pytest.mark.long
def test_what_differs_is_status_1_and_what_cannot_be_read_status_2(made: Path, aligned: Path, tmp_path: Path) -> None:
    provenance = made / "out.provenance.json"
    told = safegraft("verify", provenance, "--adapter", aligned, status=1).stdout
    assert "Differs: adapter_model.safetensors has the SHA-256 " in told
    assert "The provenance holds" not in told
    safegraft("provenance", "keygen", "--out", tmp_path)
    told = safegraft("verify", provenance, "--public-key", tmp_path / "signing_key.pub.pem", status=1).stdout
    assert "Signature: NOT of the key " in told
    private = tmp_path / "signing_key.pem"
    # A new pair, which `keygen` makes, would never fit.
    assert "of whoever signed" in refused("verify", provenance, "--public-key", private, code="bad_public_key")
    refused("verify", provenance, "--public-key", tmp_path / "nothing.pem", code="bad_public_key")
    refused("verify", provenance, code="invalid_parameter")
    (tmp_path / "half.json").write_bytes(provenance.read_bytes()[:-20])
    refused("verify", tmp_path / "half.json", "--adapter", made / "out", code="not_a_report")


@pytest.mark.long
def test_what_is_too_large_to_be_read_is_said_and_what_is_hashed_may_be_large(
    made: Path, bundle: Path, tmp_path: Path
) -> None:
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(MAX_DOCUMENT_BYTES + 1)
    refused("verify", large, "--adapter", made / "out", code="file_too_large")
    told = safegraft("verify", made / "out.provenance.json", "--report", large, status=1).stdout
    assert "Differs: report.json has the SHA-256 " in told
    reference = tmp_path / "reference"
    shutil.copytree(bundle, reference)
    with (reference / "manifest.json").open("r+b") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    told = safegraft("verify", made / "out.provenance.json", "--reference", reference, status=1).stdout
    assert f"manifest.json has more than {MAX_MANIFEST_BYTES} bytes" in told
    refused("verify", made / "out.report.json", "--adapter", made / "out", "--reference", reference,
        code="manifest_too_large", status=1)  # fmt: skip
    refused("reference", "show", reference, code="file_too_large")


def test_names_out_of_a_statement_cannot_write_on_the_terminal(made: Path, tmp_path: Path) -> None:
    evil = {"name": "\x1b[2J[bold]\nThe provenance holds", "digest": {"sha256": "0"}}
    safegraft("provenance", "keygen", "--out", tmp_path)
    body = json.loads(
        subprocess.run(
            ["base64", "-d"],
            input=json.loads((made / "out.provenance.json").read_text())["payload"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    body["subject"].append(evil)
    (tmp_path / "p.json").write_text(json.dumps(body))
    told = safegraft("verify", tmp_path / "p.json", "--adapter", made / "out", status=1).stdout
    assert "Differs: \ufffd[2J[bold]\ufffdThe provenance holds is missing." in told
    assert "\x1b" not in told


@pytest.mark.long
def test_without_a_key_it_is_said(fresh: Path, bundle: Path, tmp_path: Path) -> None:
    common: list[str | Path] = ["realign", fresh, "--reference", bundle, "--method", "gram", "--out"]
    assert "Provenance (not signed): " in safegraft(*common, tmp_path / "out").stdout
    told = safegraft("verify", tmp_path / "out.provenance.json", "--adapter", tmp_path / "out").stdout
    assert "Unsigned: nothing shows who made this statement." in told
    safegraft(*common, tmp_path / "measured", "--analyze")
    found = safegraft(
        "verify", tmp_path / "measured.provenance.json", "--report", tmp_path / "measured.report.json", "--json"
    )
    assert json.loads(found.stdout)["checked"] == ["report.json"]
    # A key that cannot be used is said before anything is done.
    refused(*common, tmp_path / "other", "--signing-key", tmp_path / "nothing.pem", code="bad_signing_key")
    assert not (tmp_path / "other").exists()


@pytest.mark.long
def test_a_report_is_still_run_again_and_needs_its_adapter(made: Path, fresh: Path, bundle: Path) -> None:
    report = made / "out.report.json"
    told = safegraft("verify", report, "--adapter", fresh, "--reference", bundle).stdout
    assert "The report is reproduced" in told
    assert "Note:" not in told  # the versions are those of this environment
    assert "--adapter" in refused("verify", report, "--reference", bundle, code="usage_error")


def test_a_key_that_cannot_be_used_stops_service_and_worker_in_one_line(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("no key")
    serve: list[str | Path] = ["serve", "--dev", "--data", tmp_path / "data", "--port", str(free_port())]
    refused(*serve, code="bad_signing_key", SAFEGRAFT_SIGNING_KEY=str(key))
    assert not (tmp_path / "data").exists()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SAFEGRAFT_")}
    for wrong in (key, tmp_path / "nothing.pem"):
        ended = subprocess.run(
            [sys.executable, "-m", "celery", "-A", "worker.main", "worker"],
            env=clean | {"SAFEGRAFT_SIGNING_KEY": str(wrong), "SAFEGRAFT_DATA": str(tmp_path / "data")},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode != 0
        lines = ended.stderr.strip().splitlines()
        assert len(lines) == 1, ended.stderr
        assert lines[0].startswith(f"bad_signing_key: {wrong} is no key")
