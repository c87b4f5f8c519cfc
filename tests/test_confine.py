"""What a process gives up is given up: asked by a real process, by Python's ways and by machine code's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safegraft import confine

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's filter is Linux's")
# Tries what is forbidden, past the interpreter's hooks where it says `raw`; prints what came of each.
PROGRAM = """
import ctypes, json, os, socket, threading
from safegraft import confine
libc = ctypes.CDLL(None)
errno = libc.__errno_location; errno.restype = ctypes.POINTER(ctypes.c_int)
socket_, fork, open_, execv, ptrace, syscall = libc.socket, libc.fork, libc.open, libc.execv, libc.ptrace, libc.syscall
words, empty = ctypes.c_char_p(b"/bin/true"), (ctypes.c_char_p * 2)(b"true", None)
kept, other = socket.socketpair()
begun, confined, tried = threading.Event(), threading.Event(), []
def wait():
    begun.set(); confined.wait(); tried.append(raw(socket_, 2, 1, 0))
def raw(call, *given):
    return call(*given), errno()[0]
def hooked(act):
    try:
        return str(act())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
thread = threading.Thread(target=wait); thread.start(); begun.wait()
boundary = confine.confine()
confined.set(); thread.join()
found = {
    "boundary": boundary,
    "inet": raw(socket_, 2, 1, 0), "inet6": raw(socket_, 10, 2, 0), "unix": raw(socket_, 1, 1, 0),
    "exec": raw(execv, words, empty), "ptrace": raw(ptrace, 0, 0, 0, 0), "io_uring": raw(syscall, 425, 1, 0),
    "older thread": tried[0],
    "python socket": hooked(socket.socket), "python fork": hooked(os.fork),
    "python program": hooked(lambda: os.execv("/bin/true", ["true"])),
    "reading": hooked(lambda: len(open("/proc/self/status").read()) > 0),
}
kept.send(b"x"); found["pipes"] = other.recv(1).decode()
print(json.dumps(found))
"""


def run(program: str) -> Any:
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout)


@linux
def test_the_kernel_refuses_connections_and_programs_to_all_threads() -> None:
    found = run(PROGRAM)
    assert found["boundary"] == "kernel"
    for name in ("inet", "inet6", "unix", "exec", "ptrace", "io_uring", "older thread"):
        assert found[name] == [-1, 13], name
    for name in ("python socket", "python fork", "python program"):
        assert "in a process that reads what strangers sent" in found[name], name
    # What it lives by still works.
    assert (found["reading"], found["pipes"]) == ("True", "x")


def test_where_the_kernel_knows_no_filter_the_interpreter_refuses() -> None:
    found = run(PROGRAM.replace("boundary = confine", "confine.FORBIDDEN_CALLS.clear(); boundary = confine", 1).replace(
        '"exec": raw(execv, words, empty),', ""
    ))  # fmt: skip
    assert found["boundary"] == "python"
    assert "in a process that reads what strangers sent" in found["python socket"]
    assert found["inet"][0] > 0


@linux
def test_memory_is_told() -> None:
    assert confine.address_space() > confine.resident_memory() > 2**20
    assert confine.resident_memory(os.getpid()) == pytest.approx(confine.resident_memory(), rel=0.5)
    assert confine.address_space(2**22) == 0
    assert 2**20 < confine.machine_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert confine.killed_for_memory() >= 0
    assert Path("/proc/vmstat").read_text().count("oom_kill ") == 1
