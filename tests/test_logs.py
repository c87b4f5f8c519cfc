"""Log lines of both forms, as a program writes them: in a process of its own, because the setup is the process's."""

import json
import subprocess
import sys
from typing import Any

PROGRAM = """
import logging, sys, warnings
from safegraft import logs
logs.setup(sys.argv[1])
log = logging.getLogger("safegraft.gateway")
with logs.bound(request_id="req_1", trace_id=None):
    with logs.bound(job_id="rlg_1", attempt=2):
        log.info("a %s", "line\\nthat is two")
    log.warning("about", extra={"fields": {"route": "/v1/x", "status": 200}})
log.info("\\x1b[31mred\\x00 \\ud800")
try:
    raise ValueError("broken")
except ValueError:
    log.exception("failed")
log.debug("nobody wants this")
logging.getLogger("uvicorn.access").info("GET /v1/x?secret=1")
logging.getLogger("uvicorn.error").info("started")
logging.getLogger("httpx").info("chatter")
warnings.warn("old")
"""


def lines(form: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, form], capture_output=True, check=True)
    assert done.stdout == b""
    return done.stderr.decode("utf-8").splitlines()


def test_json_is_one_object_a_line() -> None:
    found: list[dict[str, Any]] = [json.loads(line) for line in lines("json")]
    assert all(list(line)[:4] == ["time", "level", "logger", "message"] for line in found)
    assert all(line["time"].endswith("+00:00") and len(line["time"]) == 29 for line in found)
    first, second, third, failed, started, warned = found
    del first["time"]
    assert first == {
        "level": "info",
        "logger": "safegraft.gateway",
        "message": "a line\nthat is two",
        "request_id": "req_1",
        "job_id": "rlg_1",
        "attempt": 2,
    }
    assert (second["level"], second["route"], second["status"], second["request_id"]) == (
        "warning", "/v1/x", 200, "req_1",
    )  # fmt: skip
    assert "job_id" not in second
    assert "request_id" not in third
    assert failed["exception"].endswith("ValueError: broken")
    assert started["logger"] == "uvicorn.error"
    assert "old" in warned["message"]


def test_text_is_one_line_a_record_whatever_was_sent() -> None:
    found = lines("text")
    assert found[0].endswith("INFO safegraft.gateway: a line\\nthat is two [request_id=req_1 job_id=rlg_1 attempt=2]")
    assert found[1].endswith("WARNING safegraft.gateway: about [request_id=req_1]")
    assert found[2].endswith(r"INFO safegraft.gateway: \x1b[31mred\x00 \ud800")
    assert "ValueError: broken" in found
    assert not any("secret" in line or "chatter" in line or "nobody" in line for line in found)
