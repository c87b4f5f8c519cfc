"""Peak resident memory of a realignment, above the interpreter's own: `make bench`.

A Llama-3-8B-shaped adapter of rank 128 (335.5 million parameters, 671 MB in bf16) is realigned by every method, each in
a process of its own that first imports the engine and notes its peak so far: as it is, and with what may be set
otherwise. Writes benchmarks/results/memory.json.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.shapes import LLAMA_3_8B, write_adapter, write_reference
from safegraft.contracts.methods import METHOD_PARAMETERS
from safegraft.engine.pipeline import realign
from safegraft.engine.reference import LoadedReference
from safegraft.memory import prepare_memory

RANK, PAIRS, TURNS = 128, 128, 3
ROWS: dict[str, dict[str, Any]] = {
    "nlsr": {"type": "nlsr", "skip_share": 0.0},
    "gram": {"type": "gram"},
    "gram, four strengths": {"type": "gram"},
    "safelora": {"type": "safelora", "threshold": 1.0},
    "antidote": {"type": "antidote"},
    "safetylock": {"type": "safetylock"},
}
# As it is first; what the others take is told in its units.
SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "a heap for each thread": {"MALLOC_ARENA_MAX": "16"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "memory back at once": {"MALLOC_TRIM_THRESHOLD_": "1000000"},
}
STRENGTHS = {"gram, four strengths": [0.1, 0.3, 1.0, 3.0]}


def peak() -> float:
    """Megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(work: Path, name: str) -> None:
    """In a process of its own: prints the peak before and after."""
    prepare_memory()
    torch.linalg.svd(torch.randn(64, 64) @ torch.randn(64, 64))  # loads the linear algebra
    before = peak()
    reference = LoadedReference(work / "reference")
    parameters = METHOD_PARAMETERS.validate_python(ROWS[name])
    began = time.perf_counter()
    report = realign(work / "adapter", reference, parameters, work / "out", strengths=STRENGTHS.get(name, []))
    seconds = time.perf_counter() - began
    print(json.dumps({"above": peak() - before, "seconds": seconds, "repaired": report.summary.repaired}))


def measured(work: Path, row: str, settings: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--one", str(work), row]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **settings})
    shutil.rmtree(work / "out")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("WORK", "ROW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(Path(arguments.one[0]), arguments.one[1])
        return
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        print("writing an adapter and a reference in Llama-3-8B's shapes …")
        write_adapter(work / "adapter", LLAMA_3_8B, RANK)
        write_reference(work / "reference", LLAMA_3_8B, rank=RANK, pairs=PAIRS)
        size = (work / "adapter" / "adapter_model.safetensors").stat().st_size / 1e6
        for row in ROWS:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
            for _ in range(TURNS):
                for name, settings in SETTINGS.items():
                    found[name].append(measured(work, row, settings))
            first = found["as it is"]
            ways = {
                name: {
                    "megabytes_above_interpreter": round(statistics.median(item["above"] for item in turns)),
                    "times_as_long": round(
                        statistics.median(
                            item["seconds"] / own["seconds"] for item, own in zip(turns, first, strict=True)
                        ),
                        2,
                    ),
                }
                for name, turns in found.items()
            }
            rows.append({"method": row, "repaired": first[0]["repaired"], "settings": ways})
            print(f"{row:22} {ways}", flush=True)
    timing.store("memory", adapter_megabytes=round(size), rows=rows)


if __name__ == "__main__":
    main()
