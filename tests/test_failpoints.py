"""Failpoints: they do what they say, so often as they say, and nothing where nobody asked."""

import errno
import os
import re
import signal
import subprocess
import sys
import timeit
from collections.abc import Iterator
from pathlib import Path

import pytest

from safegraft import failpoints
from safegraft.errors import InvalidParameter

ROOT = Path(__file__).parent.parent
DEV = {"SAFEGRAFT_DEV": "1"}
HIT = "from safegraft import failpoints; failpoints.arm(); failpoints.hit('worker.claimed'); print('went on')"


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm({})


def run(spec: str, folder: Path | None = None, code: str = HIT, **more: str) -> subprocess.CompletedProcess[str]:
    given = {**DEV, failpoints.VARIABLE: spec, **({failpoints.FOLDER: str(folder)} if folder else {}), **more}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | given,
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=60,
    )


def test_unset_nothing_is_armed_and_a_hit_costs_next_to_nothing() -> None:
    failpoints.arm({})
    assert failpoints._armed is None
    rounds = 100_000
    seconds = min(timeit.repeat(lambda: failpoints.hit("worker.claimed"), number=rounds, repeat=5)) / rounds
    assert seconds < 5e-6  # some 0.1 µs; a job passes a few dozen of them


def test_every_point_is_hit_in_one_place_and_no_other_is() -> None:
    found: dict[str, int] = {}
    for folder in ("safegraft", "service", "worker"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"failpoints\.hit\(\"([^\"]+)\"\)", path.read_text(encoding="utf-8")):
                found[name] = found.get(name, 0) + 1
    # Two kinds of places for bytes.
    assert found == {name: 2 if name == "store.publish" else 1 for name in failpoints.POINTS}


def test_kill_happens_once_and_not_to_the_next_process(tmp_path: Path) -> None:
    assert run("worker.claimed=kill@1", tmp_path).returncode == -signal.SIGKILL
    assert failpoints.mark(tmp_path, "worker.claimed", "kill").exists()
    second = run("worker.claimed=kill@1", tmp_path)
    assert (second.returncode, second.stdout) == (0, "went on\n")
    # Who removes the mark arms it again; who makes it beforehand disarms it.
    failpoints.mark(tmp_path, "worker.claimed", "kill").unlink()
    assert run("worker.claimed=kill@1", tmp_path).returncode == -signal.SIGKILL


def test_a_whole_group_dies(tmp_path: Path) -> None:
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    done = run("worker.claimed=kill-group@1", tmp_path, code=child + HIT)  # returns when both have closed its output
    assert done.returncode == -signal.SIGKILL


def test_stop_waits_for_a_signal(tmp_path: Path) -> None:
    given = {**DEV, failpoints.VARIABLE: "worker.claimed=stop@1", failpoints.FOLDER: str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", HIT], env=os.environ | given, stdout=subprocess.PIPE)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=30)
    assert out == b"went on\n"


def test_an_error_of_the_disk_n_times(tmp_path: Path) -> None:
    failpoints.arm({**DEV, failpoints.VARIABLE: "store.publish=error:ENOSPC@2", failpoints.FOLDER: str(tmp_path)})
    for _ in range(2):
        with pytest.raises(OSError, match="No space") as full:
            failpoints.hit("store.publish")
        assert full.value.errno == errno.ENOSPC
    failpoints.hit("store.publish")
    failpoints.hit("worker.claimed")


def test_without_a_number_it_happens_always() -> None:
    failpoints.arm({**DEV, failpoints.VARIABLE: "store.publish=error:EIO; worker.claimed=sleep:0.001"})
    for _ in range(3):
        failpoints.hit("worker.claimed")
        with pytest.raises(OSError, match="Input/output"):
            failpoints.hit("store.publish")


def test_outside_of_development_nothing_is_armed(caplog: pytest.LogCaptureFixture) -> None:
    for given in ({}, {"SAFEGRAFT_DEV": "0"}, {"SAFEGRAFT_DEV": ""}):
        failpoints.arm({failpoints.VARIABLE: "worker.claimed=kill", **given})
        assert failpoints._armed is None
        assert caplog.records[-1].levelname == "ERROR"
        assert "nothing is armed" in caplog.text
        failpoints.hit("worker.claimed")
    caplog.clear()
    failpoints.arm({failpoints.VARIABLE: "worker.claimed=error:EIO", failpoints.ALLOWED: "1"})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "worker.claimed=error:EIO" in caplog.text
    with pytest.raises(OSError, match="Input/output"):
        failpoints.hit("worker.claimed")


@pytest.mark.parametrize(
    "spec",
    ["worker.nowhere=kill", "worker.claimed", "worker.claimed=explode", "worker.claimed=kill@x",
     "worker.claimed=kill@0", "worker.claimed=error:ENOTHING", "worker.claimed=sleep:soon", "worker.claimed=kill@1"],
)  # fmt: skip
def test_a_wrong_specification_is_refused(spec: str) -> None:
    with pytest.raises(InvalidParameter) as bad:  # the last one lacks its folder
        failpoints.arm({**DEV, failpoints.VARIABLE: spec})
    assert bad.value.code == "bad_failpoint"
