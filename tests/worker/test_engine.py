"""The engine's process: what it may not do, what comes of it when it does, and that the next job does not notice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safegraft import confine
from safegraft.contracts.methods import GramParameters
from safegraft.errors import CorruptReference, OverLimit, SafegraftError, SystemFault, UserError
from worker.engine import Engine, limits_of
from worker.offline import OFFLINE
from worker.settings import WorkerSettings

HOSTILE = "tests.worker.hostile"
LIMITS: dict[str, Any] = {"job_memory_bytes": 2**30, "job_cpu_seconds": 3, "job_file_bytes": 2**23}
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have other boundaries, or none")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(WorkerSettings(**LIMITS), HOSTILE)
    yield engine
    engine.close()


def attempt(engine: Engine, bundle: Path, folder: Path, act: str = "", out: Path | None = None) -> Any:
    engine.load(bundle, keep=1)
    return engine.realign(
        bundle, folder, GramParameters(), out,
        strengths=[], output_rank="customer", dropped_files=[act] if act else [], progress=lambda *_: None,
    )  # fmt: skip


def gone(pid: int | None) -> bool:
    return not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@pytest.mark.parametrize(
    ("act", "kind", "code"),
    [
        ("eat_a_tensor", OverLimit, "out_of_memory"),
        ("eat_in_a_thread", OverLimit, "out_of_memory"),
        ("eat_slowly", OverLimit, "out_of_memory"),
        ("spin", OverLimit, "time_limit"),
        ("write", OverLimit, "file_limit"),
        ("crash", SystemFault, "worker_lost"),
        ("connect", SystemFault, "internal_error"),
        ("run", SystemFault, "internal_error"),
    ],
)
@linux
def test_a_limit_that_is_met_has_its_code_and_the_next_job_a_new_process(
    engine: Engine, bundle: Path, fresh: Path, tmp_path: Path, act: str, kind: type[SafegraftError], code: str
) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(kind) as raised:
        attempt(engine, bundle, tmp_path / "adapter", act)
    assert (raised.value.code, raised.value.fault) == (code, "system")
    assert (engine.pid, engine.loaded) == (None, {})
    assert attempt(engine, bundle, fresh, out=tmp_path / "out").output is not None


@pytest.mark.parametrize("act", ["connect_by_machine_code", "connect_to_the_broker"])
@linux
def test_the_kernel_keeps_even_machine_code_off_the_network(
    engine: Engine, bundle: Path, fresh: Path, act: str
) -> None:
    with pytest.raises(UserError) as raised:
        attempt(engine, bundle, fresh, act)
    assert raised.value.message == "-1 Permission denied"


def test_no_secret_is_in_its_environment_and_every_hub_is_offline(
    bundle: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SAFEGRAFT_DATABASE_URL", "SAFEGRAFT_KEY_PEPPER", "AWS_SECRET_ACCESS_KEY", "REDIS_URL", "OTHER"):
        monkeypatch.setenv(name, "a-secret-of-ours")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    engine = Engine(WorkerSettings(redis_url="redis://:a-secret-of-ours@nowhere/0"), HOSTILE)
    with pytest.raises(UserError) as raised:
        attempt(engine, bundle, fresh, "environment")
    found = json.loads(raised.value.message)
    assert "a-secret-of-ours" not in raised.value.message
    assert OFFLINE.items() <= found.items()
    assert b"a-secret-of-ours" not in Path(f"/proc/{engine.pid}/environ").read_bytes()
    engine.close()


@linux
def test_where_a_driver_needs_address_space_the_memory_in_use_is_watched(bundle: Path, fresh: Path) -> None:
    """On a device that is not the CPU; `meta` is one that every machine has."""
    engine = Engine(WorkerSettings(**LIMITS, device="meta"), HOSTILE)
    with pytest.raises(OverLimit) as raised:
        attempt(engine, bundle, fresh, "eat_slowly")
    assert raised.value.code == "out_of_memory"
    assert engine.pid is None


def test_whoever_waits_can_be_interrupted_and_no_process_stays(engine: Engine, bundle: Path, fresh: Path) -> None:
    """As by Celery's time limit, whose signal arrives while the engine computes."""
    engine.load(bundle, keep=1)
    pid = engine.pid

    def too_long(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(TimeoutError):
            attempt(engine, bundle, fresh, "sleep")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert engine.pid is None
    assert gone(pid)


def test_what_progress_raises_stops_the_work_and_keeps_the_process(
    engine: Engine, bundle: Path, fresh: Path, tmp_path: Path
) -> None:
    engine.load(bundle, keep=1)
    pid = engine.pid

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "patch":
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        engine.realign(
            bundle, fresh, GramParameters(), tmp_path / "out",
            strengths=[], output_rank="customer", dropped_files=[], progress=stop,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    assert attempt(engine, bundle, fresh, out=tmp_path / "out").output is not None
    assert engine.pid == pid


def test_a_broken_reference_is_told_as_it_is_and_costs_no_process(engine: Engine, bundle: Path, tmp_path: Path) -> None:
    engine.load(bundle, keep=1)
    pid = engine.pid
    with pytest.raises(CorruptReference) as raised:
        engine.load(tmp_path, keep=2)
    assert raised.value.param == str(tmp_path / "manifest.json")
    assert engine.pid == pid
    assert list(engine.loaded) == [str(bundle)]


@linux
def test_it_ends_with_the_process_that_started_it(tmp_path: Path, bundle: Path) -> None:
    program = (
        "import os, sys, time; from pathlib import Path; from worker.engine import Engine\n"
        "from worker.settings import WorkerSettings\n"
        "engine = Engine(WorkerSettings()); engine.load(Path(sys.argv[1]), keep=1)\n"
        "print(engine.pid, flush=True); time.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", program, str(bundle)], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    assert not gone(pid)
    starter.kill()
    starter.wait()
    starter.stdout.close()
    deadline = time.monotonic() + 20
    while not gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_limits_come_from_the_settings_or_from_the_machine() -> None:
    given = limits_of(WorkerSettings(**LIMITS))
    assert (given.memory, given.seconds, given.file_bytes) == (2**30, 3.0, 2**23)
    left = limits_of(WorkerSettings(job_seconds=100))
    assert left.memory == confine.machine_memory() * 3 // 4
    assert left.seconds == 100.0 * len(os.sched_getaffinity(0))


def test_the_pool_process_imports_no_torch() -> None:
    """What reads customers' bytes is the engine's process; this one has connections."""
    code = "import worker.main, worker.tasks, sys, os; print('torch' in sys.modules, os.environ['HF_DATASETS_OFFLINE'])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "1"]
