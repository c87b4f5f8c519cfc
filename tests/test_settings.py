"""Settings that are misspelt."""

import logging
import re
from pathlib import Path

import pytest

from safegraft.settings import SharedSettings, mistyped, warn_of_mistyped
from service.settings import GatewaySettings
from worker.settings import WorkerSettings

PARTS: tuple[type[SharedSettings], ...] = (SharedSettings, GatewaySettings, WorkerSettings)
ROOT = Path(__file__).parent.parent


def test_what_is_nearly_a_setting_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    environment = ["SAFEGRAFT_MAX_UPLAOD_BYTES", "SAFEGRAFT_RETENTION_DAY", "SAFEGRAFT_LOG_FORMAT", "MAX_UPLAOD_BYTES"]
    assert mistyped(GatewaySettings, environment) == {
        "SAFEGRAFT_MAX_UPLAOD_BYTES": "SAFEGRAFT_MAX_UPLOAD_BYTES",
        "SAFEGRAFT_RETENTION_DAY": "SAFEGRAFT_RETENTION_DAYS",
    }
    monkeypatch.setenv("SAFEGRAFT_RETENTION_DAY", "30")
    with caplog.at_level(logging.WARNING):
        warn_of_mistyped(WorkerSettings)
    assert "SAFEGRAFT_RETENTION_DAY, which is no setting; did you mean SAFEGRAFT_RETENTION_DAYS?" in caplog.text


def test_no_part_complains_of_anothers_settings() -> None:
    """All of them may have one environment, and the command line's options are variables, too."""
    fields = {f"SAFEGRAFT_{name.upper()}" for part in PARTS for name in part.model_fields}
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "safegraft").rglob("*.py")]
    options = {name for text in sources for name in re.findall(r'envvar="(SAFEGRAFT_[A-Z_]+)"', text)}
    assert len(fields) > 30
    assert len(options) > 40
    for part in PARTS:
        assert mistyped(part, fields | options) == {}
