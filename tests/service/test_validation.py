"""Judging in processes of their own: each limit by its own code, and nobody outlives the gateway."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safegraft.errors import InvalidAdapter, InvalidTensors, SafegraftError, SystemFault
from safegraft.ingest import Delivery
from service.errors import status_of
from service.validation import Judge, Limits, Validator
from tests.service import judges

LIMITS = Limits(memory=2**30, seconds=30, file_bytes=2**23)
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems know fewer limits")


@pytest.fixture
def judged(tmp_path: Path) -> Iterator[Any]:
    made: list[Validator] = []

    def judge(how: Judge, limits: Limits = LIMITS) -> str:
        validator = Validator(limits, 2, how)
        made.append(validator)
        validator.start()
        return asyncio.run(validator.judge("t", "adp_1", Delivery(tmp_path, name="mine"))).name

    yield judge
    for validator in made:
        validator.close()


def test_an_answer_comes_back(judged: Any) -> None:
    assert judged(judges.name_back) == f"adp_1 mine {2**23}"


def test_a_refusal_comes_back_with_all_it_says(judged: Any) -> None:
    with pytest.raises(InvalidTensors) as refused:
        judged(judges.refuse)
    error = refused.value
    assert (error.message, error.code, error.param, error.hint) == ("Said why.", "non_finite", "a.b", "Do this.")
    with pytest.raises(InvalidAdapter) as other:
        judged(judges.refuse_by_a_class_of_its_own)
    assert (type(other.value), other.value.code) == (InvalidAdapter, "unknown_to_others")


@linux
@pytest.mark.parametrize(
    ("how", "code", "status"),
    [
        (judges.eat_memory, "validation_too_large", 413),
        (judges.eat_memory_at_once, "validation_too_large", 413),
        (judges.be_killed, "validation_too_large", 413),
        (judges.crash, "validation_crashed", 422),
        (judges.leave, "validation_crashed", 422),
        (judges.sleep, "validation_timeout", 422),
        (judges.compute, "validation_timeout", 422),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_costs_too_much_or_crashes_is_refused_by_its_own_code(
    judged: Any, how: Judge, code: str, status: int
) -> None:
    limits = Limits(memory=2**30, seconds=1, file_bytes=2**23) if code == "validation_timeout" else LIMITS
    began = time.monotonic()
    with pytest.raises(SafegraftError) as refused:
        judged(how, limits)
    assert time.monotonic() - began < 60, "it was left to its own devices"
    assert (refused.value.code, status_of(refused.value), refused.value.fault) == (code, status, "user")
    assert refused.value.hint
    assert judged(judges.name_back)


def test_a_bug_of_ours_is_logged_and_not_told(judged: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(SystemFault) as failed:
        judged(judges.err)
    assert failed.value.code == "validation_failed"
    assert "secret" not in str(failed.value)
    assert "a secret of ours" in caplog.text


@pytest.mark.parametrize("how", [judges.open_connection, judges.run_program])
def test_nothing_in_there_reaches_out(judged: Any, how: Judge, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(SystemFault):
        judged(how)
    assert "in a process that reads what strangers sent" in caplog.text


def test_no_file_grows_beyond_what_may_be_uploaded(judged: Any) -> None:
    assert judged(judges.write_much) == f"{2**23} File too large"


@linux
def test_it_carries_no_load(judged: Any) -> None:
    """One thread beside its own, whatever numpy would like, and nothing of the gateway."""
    assert judged(judges.see) == "2 []"


def test_so_many_at_a_time_and_the_rest_waits(tmp_path: Path) -> None:
    async def all_of_them(validator: Validator) -> list[int]:
        found = await asyncio.gather(
            *(validator.judge(f"t{turn % 2}", "adp_1", Delivery(tmp_path)) for turn in range(6))
        )
        return [int(adapter.name) for adapter in found]

    validator = Validator(LIMITS, 2, judges.take_turns)
    try:
        together = asyncio.run(all_of_them(validator))
    finally:
        validator.close()
    assert max(together) == 2


@pytest.mark.parametrize("at_once", [2, 3])
def test_one_tenants_slow_uploads_do_not_hold_up_another_ones(tmp_path: Path, at_once: int) -> None:
    validator = Validator(LIMITS, at_once, judges.be_slow_if_asked)

    async def all_of_them() -> None:
        slow = [
            asyncio.create_task(validator.judge("mallory", f"adp_{number}", Delivery(tmp_path, name="slow")))
            for number in range(5)
        ]
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            quick = [validator.judge("alice", f"adp_{number}", Delivery(tmp_path)) for number in range(3)]
            assert [adapter.name for adapter in await asyncio.gather(*quick)] == ["adp_0", "adp_1", "adp_2"]
        assert not any(task.done() for task in slow)
        # One whose client has gone while it waited is not judged any more, and takes nobody's place.
        slow.pop().cancel()
        (tmp_path / "go").touch()
        assert len(await asyncio.gather(*slow)) == 4

    try:
        asyncio.run(all_of_them())
    finally:
        validator.close()


PROGRAM = """
import asyncio, sys
from pathlib import Path
from safegraft.ingest import Delivery
from service.validation import Limits, Validator
from tests.service import judges

if __name__ == "__main__":
    validator = Validator(Limits(2**30, 600, 2**23), 2, getattr(judges, sys.argv[1]))
    validator.start()
    asyncio.run(validator.judge("t", "adp_1", Delivery(Path(sys.argv[2]))))
"""


@linux
@pytest.mark.parametrize("how", ["sleep", "compute"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_none_outlives_the_gateway(tmp_path: Path, how: str, end: signal.Signals) -> None:
    program, folder = tmp_path / "program.py", tmp_path / "folder"
    program.write_text(PROGRAM)
    folder.mkdir()
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen([sys.executable, str(program), how, str(folder)], env={**os.environ, "PYTHONPATH": root})
    deadline = time.monotonic() + 30
    while not list(folder.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child = int(next(folder.iterdir()).name)
    server = _parent_of(child)
    parent.send_signal(end)
    parent.wait(30)
    deadline = time.monotonic() + 5
    while _alive(child) or _alive(server):
        assert time.monotonic() < deadline, "it outlived the one who asked"
        time.sleep(0.02)


def _parent_of(number: int) -> int:
    lines = Path(f"/proc/{number}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("PPid:")))


def _alive(number: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{number}/status").read_text()
    except OSError:
        return False
