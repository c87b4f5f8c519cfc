"""Judges that behave as a hostile upload might make ours behave; they run in the processes of `service.validation`."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from safegraft import errors
from safegraft.contracts.adapter import Adapter
from safegraft.ingest import Delivery
from tests.stores.records import adapter


def name_back(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    return adapter(f"{adapter_id} {delivery.name} {max_bytes}")


def eat_memory(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    return adapter(str(len([bytearray(2**24) for _ in range(1000)])))


def eat_memory_at_once(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    return adapter(str(np.ones(2**34).sum()))


def be_killed(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def crash(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def leave(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    os._exit(3)


def err(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    raise KeyError("a secret of ours")


def refuse(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    raise errors.InvalidTensors("Said why.", code="non_finite", param="a.b", hint="Do this.")


class _Unknown(errors.InvalidAdapter):
    default_code = "unknown_to_others"


def refuse_by_a_class_of_its_own(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    raise _Unknown("Said why.")


def sleep(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    (delivery.folder / f"{os.getpid()}").touch()
    time.sleep(600)
    raise AssertionError


def be_slow_if_asked(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    """Those whose delivery is named `slow` wait for a file."""
    while delivery.name == "slow" and not (delivery.folder / "go").exists():
        time.sleep(0.02)
    return adapter(adapter_id)


def compute(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    (delivery.folder / f"{os.getpid()}").touch()
    while True:
        pass


def take_turns(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    """Counts how many run at the same time. Until two have met once, each waits for another one: how long a
    child takes to start says nothing about how many may run."""
    running, met = delivery.folder / "running", delivery.folder / "met"
    running.mkdir(exist_ok=True)
    mine = running / f"{os.getpid()}"
    mine.touch()
    deadline = time.monotonic() + 15
    while not met.exists() and time.monotonic() < deadline:
        if len(list(running.iterdir())) > 1:
            met.touch()
        time.sleep(0.01)
    time.sleep(0.2)  # a third that should have waited comes into view
    together = len(list(running.iterdir()))
    if met.exists():
        together = max(together, 2)
    mine.unlink()
    return adapter(str(together))


def write_much(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    with (delivery.folder / "large").open("wb") as file:
        try:
            while True:
                file.write(bytes(2**20))
                file.flush()
        except OSError as error:
            return adapter(f"{os.fstat(file.fileno()).st_size} {error.strerror}")


def open_connection(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    socket.create_connection(("127.0.0.1", 1), timeout=1)
    raise AssertionError


def run_program(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    subprocess.run([sys.executable, "-c", ""], check=True)
    raise AssertionError


def see(adapter_id: str, delivery: Delivery, max_bytes: int) -> Adapter:
    """What it has loaded and where its threads are."""
    threads = len(list(Path("/proc/self/task").iterdir())) if sys.platform == "linux" else 2
    loaded = [name for name in ("torch", "fastapi", "celery") if name in sys.modules]
    return adapter(f"{threads} {loaded}")
