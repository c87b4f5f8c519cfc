"""What a process gives up, from within and for good, before it reads what strangers sent: the network, other programs,
memory and disk without end. No sandbox against code of a stranger's: none is ever run.
"""

import ctypes
import errno
import logging
import os
import platform
import resource
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger("safegraft.confine")
# What such a process has no business to do, as Python's audit events name it.
REFUSED_EVENTS = ("socket.", "subprocess.", "os.exec", "os.system", "os.posix_spawn", "os.fork", "ctypes.", "pickle.")
# The same for the kernel, by its numbers: new sockets (also by way of io_uring), other programs, and other processes'
# memory and open files. The answer is EACCES.
FORBIDDEN_CALLS = {
    "x86_64": {
        "socket": 41, "connect": 42, "execve": 59, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
        "execveat": 322, "io_uring_setup": 425, "pidfd_getfd": 438,
    },
    "aarch64": {
        "ptrace": 117, "socket": 198, "connect": 203, "execve": 221, "process_vm_readv": 270, "process_vm_writev": 271,
        "execveat": 281, "io_uring_setup": 425, "pidfd_getfd": 438,
    },
}  # fmt: skip
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SECCOMP_CALL = {"x86_64": 317, "aarch64": 277}
X32_BIT = 0x40000000  # x86_64's second numbering of the same calls
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC = 1, 1
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES
NUMBER, ARCHITECTURE = 0, 4  # where they stand in what the kernel shows to the filter

Boundary = Literal["kernel", "python"]


def confine() -> Boundary:
    """From now on no thread of this process opens a connection or starts a program; nor does what it forks.

    `kernel`: by a seccomp filter, which holds for all code. `python`: only by a hook in the interpreter, where the
    system knows no such filter; it stops mistakes, and not machine code. Never undone.
    """
    boundary: Boundary = "kernel" if _filter_calls() else "python"
    sys.addaudithook(_refuse)
    return boundary


def limit(limits: Mapping[int, tuple[int, int]]) -> None:
    """Sets `resource` limits: which → (soft, hard). Some systems know not all of them, or have set less already."""
    for which, pair in limits.items():
        with suppress(ValueError, OSError):
            resource.setrlimit(which, pair)


def end_with_parent(signal_number: int) -> None:
    """Linux: the kernel sends this process the signal when its parent ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number)


def die_first() -> None:
    """Linux: where memory runs out the kernel ends this process, and not one that it would take for larger."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("900")


def address_space(pid: int | Literal["self"] = "self") -> int:
    """Bytes; 0 where the system does not tell."""
    return _pages(pid, 0)


def resident_memory(pid: int | Literal["self"] = "self") -> int:
    """Bytes; 0 where the system does not tell."""
    return _pages(pid, 1)


def killed_for_memory() -> int:
    """How many processes of this machine the kernel has ended because memory ran out; 0 where it does not tell."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def machine_memory() -> int:
    """Bytes that this machine has, or the container that we run in if that is less."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            found = min(found, int((Path("/sys/fs/cgroup") / name).read_text()))
    return found


def _pages(pid: int | str, column: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[column]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(REFUSED_EVENTS):
        raise RuntimeError(f"{event} in a process that reads what strangers sent")


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _filter_calls() -> bool:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in FORBIDDEN_CALLS or sys.maxsize < 2**32:
        return False
    instructions = _instructions(machine)
    program = _Program(len(instructions) // 8, instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    # Without it only root may filter; it also means that no program started from here gains rights.
    if libc.prctl(PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))) != 0:
        return False
    # All threads: numpy's may be there already.
    numbers = (SECCOMP_CALL[machine], SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC)
    done = libc.syscall(*map(ctypes.c_long, numbers), ctypes.byref(program))
    if done != 0:
        log.warning("the kernel took no filter of system calls (%s)", os.strerror(ctypes.get_errno()))
    return bool(done == 0)


def _instructions(machine: str) -> bytes:
    """A program of the kernel's small machine: refuse what is forbidden, allow the rest."""
    forbidden = sorted(FORBIDDEN_CALLS[machine].values())
    high = [(JUMP_AT_LEAST, X32_BIT)] if machine == "x86_64" else []
    tests = [*high, *((JUMP_EQUAL, number) for number in forbidden)]
    found = [(LOAD, 0, 0, ARCHITECTURE)]
    # The numbers of another architecture mean other calls: all of them are refused.
    found.append((JUMP_EQUAL, 0, len(tests) + 2, ARCHITECTURES[machine]))
    found.append((LOAD, 0, 0, NUMBER))
    found += [(code, len(tests) - at, 0, value) for at, (code, value) in enumerate(tests)]
    found += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in found)
