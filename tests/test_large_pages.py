"""Large pages, as Linux says that a process has asked for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    clean = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
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
