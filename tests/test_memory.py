"""What a process asks the system for memory, as the system says it."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SET = ("THP_MEM_ALLOC_ENABLE", "MALLOC_ARENA_MAX")
# The flags of the mapping in which a tensor of 64 MiB lies.
FLAGS = """
import torch
from pathlib import Path
tensor = torch.ones(2**24)
at, found = tensor.data_ptr(), False
for line in Path("/proc/self/smaps").read_text().splitlines():
    first = line.split()[0]
    if "-" in first and not first.endswith(":"):
        low, high = (int(part, 16) for part in first.split("-"))
        found = low <= at < high
    elif found and line.startswith("VmFlags"):
        print("hg" in line.split())
        break
"""


def asked(code: str, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in SET}
    done = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="not Linux")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages in this kernel")
@pytest.mark.long
def test_the_command_line_asks_for_large_pages_before_its_first_tensor() -> None:
    device = "from typer.testing import CliRunner; from safegraft.cli import app; import torch\n"
    # What `realign` does before anything else: the root's callback, then a tensor on the device.
    starts = "CliRunner().invoke(app, ['inspect', '/nowhere']); torch.empty(1)\n"
    assert asked(device + starts + FLAGS) == "True"
    assert asked(FLAGS) == "False", "PyTorch itself does not"
    assert asked(device + starts + FLAGS, THP_MEM_ALLOC_ENABLE="0") == "False", "unless the environment says otherwise"


# Heaps that glibc has when six threads have each asked for memory.
HEAPS = """
import ctypes, re, tempfile, threading
from pathlib import Path
together = threading.Barrier(6)
def work():
    together.wait()
    libc.free(libc.malloc(5000))
    together.wait()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
threads = [threading.Thread(target=work) for _ in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
with tempfile.TemporaryDirectory() as name:
    path = Path(name) / "heaps.xml"
    libc.fopen.restype, libc.malloc_info.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    libc.fclose.argtypes = [ctypes.c_void_p]
    file = libc.fopen(str(path).encode(), b"w")
    assert libc.malloc_info(0, file) == 0
    libc.fclose(file)
    print(len(re.findall("<heap nr=", path.read_text())))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_threads_share_one_heap_unless_the_environment_says_otherwise() -> None:
    prepares = "from safegraft.memory import prepare_memory; prepare_memory()\n"
    assert asked(prepares + HEAPS) == "1"
    assert int(asked(HEAPS)) > 1, "glibc itself gives several"
    assert int(asked(prepares + HEAPS, MALLOC_ARENA_MAX="4")) > 1
