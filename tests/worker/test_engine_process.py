"""What the engine's process tells while it works."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from worker import engine_process
from worker.engine_process import PROGRESS_SECONDS, Bench, Stopped

# Four steps are a little more.
STEP = PROGRESS_SECONDS / 3.9


class Pipe:
    """Both ends: keeps what is told, and answers."""

    def __init__(self, answer: bytes = b'"go"') -> None:
        self.told: list[Any] = []
        self._answer = answer

    def send_bytes(self, data: bytes) -> None:
        self.told.append(json.loads(data)["progress"])

    def recv_bytes(self) -> bytes:
        return self._answer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(engine_process, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_progress_is_told_at_first_at_last_and_now_and_then(clock: list[float]) -> None:
    pipe: Any = Pipe()
    bench = Bench(pipe, pipe, "cpu")
    for stage, total in (("score", 3), ("patch", 10), ("publish", 1)):
        for done in range(1, total + 1):
            bench._progress(stage, done, total)
            clock[0] += STEP
    assert pipe.told == [
        ["score", 1, 3],
        ["score", 3, 3],
        ["patch", 1, 10],
        ["patch", 5, 10],
        ["patch", 9, 10],
        ["patch", 10, 10],
        ["publish", 1, 1],
    ]


def test_whoever_asked_may_stop_it(clock: list[float]) -> None:
    pipe: Any = Pipe(b'"stop"')
    with pytest.raises(Stopped):
        Bench(pipe, pipe, "cpu")._progress("patch", 1, 2)
