"""The engine's process, with realignments in it that do what they must not. Which one: the first of `dropped_files`."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from safegraft.contracts.report import Report
from safegraft.engine.pipeline import realign as run_engine
from safegraft.errors import UserError
from worker import engine_process

# Taken before the end of the network, as machine code would have it: no hook of the interpreter sees these calls.
LIBC = ctypes.CDLL(None)
SOCKET, ERRNO = LIBC.socket, LIBC.__errno_location
ERRNO.restype = ctypes.POINTER(ctypes.c_int)


def eat_a_tensor(folder: Path) -> str:
    return str(torch.ones(2**34).sum())


def eat_in_a_thread(folder: Path) -> str:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(eat_a_tensor, folder).result()


def eat_slowly(folder: Path) -> str:
    return str(len([bytearray(os.urandom(16)) * 2**20 for _ in range(10_000)]))


def spin(folder: Path) -> str:
    while True:
        pass


def sleep(folder: Path) -> str:
    time.sleep(600)
    return ""


def write(folder: Path) -> str:
    with (folder / "large").open("wb") as file:
        for _ in range(1000):
            file.write(bytes(2**20))
    return ""


def connect(folder: Path) -> str:
    socket.create_connection(("127.0.0.1", 1), 1)
    return ""


def connect_by_machine_code(folder: Path) -> str:
    found = SOCKET(socket.AF_INET, socket.SOCK_STREAM, 0)
    return f"{found} {os.strerror(ERRNO()[0])}"


def connect_to_the_broker(folder: Path) -> str:
    return f"{SOCKET(socket.AF_UNIX, socket.SOCK_STREAM, 0)} {os.strerror(ERRNO()[0])}"


def run(folder: Path) -> str:
    return str(subprocess.run(["true"]))


def crash(folder: Path) -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return ""


def environment(folder: Path) -> str:
    return json.dumps(dict(os.environ))


def realign(folder: Path, *given: Any, dropped_files: list[str], **options: Any) -> Report:
    act = globals().get(dropped_files[0]) if dropped_files else None
    if act is None:
        return run_engine(folder, *given, dropped_files=dropped_files, **options)
    options["progress"]("score", 1, 2)
    raise UserError(act(folder), code="went_through")


if __name__ == "__main__":
    vars(engine_process)["realign"] = realign
    engine_process.main(json.loads(sys.argv[1]))
