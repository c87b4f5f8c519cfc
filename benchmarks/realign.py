"""`make bench`: realigning an adapter against copying its file, in turn, in one process with a warm reference.

The adapters have SmolLM2-135M's shapes (30 layers, 7 projections) and random factors; the reference has its shapes too,
with random statistics. For every method and rank: the median over pairs of (seconds of `realign`) / (seconds of copying
and syncing the same file). Writes benchmarks/results/realign.json.
"""

import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import SMOLLM2_135M, write_adapter, write_reference
from safegraft.contracts.methods import GramParameters, NlsrParameters
from safegraft.engine.pipeline import realign
from safegraft.engine.reference import LoadedReference

RANKS = (8, 32, 128)
PAIRS = 5
# Of the eigenpairs of each layer input; a real reference for this model keeps about as many.
PAIRS_KEPT = 500
RESULTS = Path(__file__).parent / "results" / "realign.json"


def copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        print("building a reference of SmolLM2-135M's shapes …")
        write_reference(work / "reference", SMOLLM2_135M, rank=32, pairs=PAIRS_KEPT)
        reference = LoadedReference(work / "reference")
        for rank in RANKS:
            write_adapter(work / f"rank{rank}", SMOLLM2_135M, rank)
            weights = work / f"rank{rank}" / "adapter_model.safetensors"
            for parameters in (NlsrParameters(form="neuron"), GramParameters()):
                ratios = []
                for turn in range(PAIRS + 1):
                    out = work / "out"
                    run = seconds(lambda out=out, p=parameters, r=rank: realign(work / f"rank{r}", reference, p, out))  # type: ignore[misc]
                    # A copy of a few megabytes takes milliseconds; one alone would be noise.
                    beside = statistics.median(seconds(lambda w=weights: copy(w, work / "copy")) for _ in range(5))  # type: ignore[misc]
                    shutil.rmtree(out)
                    if turn:  # the first warms both up
                        ratios.append(run / beside)
                rows.append(
                    {
                        "method": parameters.type,
                        "rank": rank,
                        "megabytes": round(weights.stat().st_size / 1e6, 1),
                        "ratio_to_copy": round(statistics.median(ratios), 1),
                        "spread": [round(min(ratios), 1), round(max(ratios), 1)],
                    }
                )
                low, high = rows[-1]["spread"]
                print(
                    f"{parameters.type:5} rank {rank:<4} {rows[-1]['megabytes']:6} MB: "
                    f"{rows[-1]['ratio_to_copy']} x copying and syncing the file (from {low} to {high})"
                )
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "pairs": PAIRS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
