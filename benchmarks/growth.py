"""How the cost of a realignment grows: with rank, with modules, with the file: `make bench`.

`gram` on adapters of SmolLM2-135M's shapes: rank 8 to 256 at 210 modules, and 70 to 560 modules at rank 32; and of
Llama-3-8B's shapes from 5 MB to 3 GB, with the peak resident memory of each, in processes of their own. A straight line
through the points of each says how much a unit costs and how well a line describes it (R²). Times are shares of the
largest one's, so that they say nothing about the machine. Writes benchmarks/results/growth.json.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks import timing
from benchmarks.shapes import LLAMA_3_8B, SMOLLM2_135M, Shape, write_adapter, write_reference
from safegraft.adapter import WEIGHTS
from safegraft.contracts.methods import GramParameters
from safegraft.engine.pipeline import realign
from safegraft.engine.reference import LoadedReference
from safegraft.memory import prepare_memory

RANKS = (8, 16, 32, 64, 128, 256)
LAYERS = (10, 20, 40, 80)
# Of Llama-3-8B's shapes: 5.2 MB of bf16 a rank.
LARGE_RANKS = (1, 8, 64, 256, 576)
TURNS = 5


def one(adapter: Path, reference: Path, turns: int) -> None:
    """In a process of its own: prints the median seconds and the peak above the interpreter's, in megabytes."""
    torch.linalg.svd(torch.randn(64, 64) @ torch.randn(64, 64))  # loads the linear algebra
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded, took = LoadedReference(reference), []
    for turn in range(turns + 1):
        out = adapter.parent / "out"
        took.append(timing.seconds(lambda out=out: realign(adapter, loaded, GramParameters(), out)))  # type: ignore[misc]
        subprocess.run(["rm", "-rf", str(out)], check=True)
        if not turn:
            took.clear()  # the first warms up
    above = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"seconds": statistics.median(took), "megabytes_above_interpreter": round(above)}))


def measured(work: Path, shape: Shape, rank: int, turns: int) -> dict[str, Any]:
    write_adapter(work / "adapter", shape, rank)
    size = (work / "adapter" / WEIGHTS).stat().st_size
    command = [
        sys.executable,
        "-m",
        "benchmarks.growth",
        "--one",
        str(work / "adapter"),
        str(work / "reference"),
        str(turns),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    subprocess.run(["rm", "-rf", str(work / "adapter")], check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return {"rank": rank, "modules": len(shape.modules()), "megabytes": round(size / 1e6, 1), **found}


def line(points: list[dict[str, Any]], over: str) -> dict[str, Any]:
    """R² of the straight line through seconds, and the points relative to the largest."""
    x, y = (numpy.array([point[key] for point in points], dtype=float) for key in (over, "seconds"))
    slope, offset = numpy.polyfit(x, y, 1)
    fitted = slope * x + offset
    left = float(((y - fitted) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    for point in points:
        point["share_of_largest"] = round(point.pop("seconds") / float(y.max()), 4)
    return {
        "over": over,
        "r_squared": round(1.0 - left, 4),
        "slope": float(f"{slope / y.max():.3g}"),
        "points": points,
    }


def main() -> None:
    prepare_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("ADAPTER", "REFERENCE", "TURNS"), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="two points a line, one turn, nothing written")
    arguments = parser.parse_args()
    if arguments.one:
        one(Path(arguments.one[0]), Path(arguments.one[1]), int(arguments.one[2]))
        return
    torch.manual_seed(0)
    quick = arguments.quick
    turns = 1 if quick else TURNS
    lines = []
    with tempfile.TemporaryDirectory() as name:
        for title, shapes, ranks, over in (
            ("rank", [SMOLLM2_135M], RANKS[:2] if quick else RANKS, "rank"),
            (
                "modules",
                [dataclasses.replace(SMOLLM2_135M, layers=n) for n in (LAYERS[:2] if quick else LAYERS)],
                (32,),
                "modules",
            ),
            ("size", [] if quick else [LLAMA_3_8B], LARGE_RANKS, "megabytes"),
        ):
            points = []
            for shape in shapes:
                work = Path(name) / f"{title}-{shape.layers}"
                work.mkdir()
                write_reference(work / "reference", shape, rank=32, pairs=128)
                for rank in ranks:
                    points.append(measured(work, shape, rank, 1 if title == "size" else turns))
                    print(title, points[-1], flush=True)
                subprocess.run(["rm", "-rf", str(work)], check=True)
            if points:
                lines.append({"what": title, **line(points, over)})
                if not quick:
                    # Through two points every line is straight.
                    print(f"{title}: R² of a straight line {lines[-1]['r_squared']}", flush=True)
    if not quick:
        timing.store("growth", method="gram", eigenpairs=128, lines=lines)


if __name__ == "__main__":
    main()
