"""Realigning an adapter against copying its file, in turn, in one process with a warm reference: `make bench`.

Adapters with the shapes of SmolLM2-135M (30 layers, 7 projections; ranks 8, 32, 128) and of Llama-3-8B (32 layers; rank
128, 335.5 million parameters, 671 MB) and random factors; references of the same shapes with random statistics. For
every method: the median over turns of (seconds of `realign`) / (seconds of copying and syncing the same file). With the
operations that its products of matrices take (counted by torch; decompositions come on top), their rate, and the rate
of this machine's own large product beside it: what is left to gain. Writes benchmarks/results/realign.json.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timing
from benchmarks.shapes import LLAMA_3_8B, SMOLLM2_135M, Shape, write_adapter, write_reference
from safegraft.adapter import WEIGHTS, LoraModule, describe
from safegraft.contracts.methods import METHOD_PARAMETERS
from safegraft.engine import lowrank, measure, pipeline
from safegraft.engine.adapter import AdapterReader
from safegraft.engine.methods import METHODS
from safegraft.engine.methods.base import Kinship, Method, Selection
from safegraft.engine.pipeline import realign
from safegraft.engine.products import fast_products
from safegraft.engine.reference import LoadedReference
from safegraft.memory import prepare_memory

# Of the eigenpairs of each layer input; a real reference of the small model keeps about as many, one of the large model
# would be built with --max-pairs.
PAIRS_KEPT = 500
METHODS_TIMED: dict[str, dict[str, Any]] = {
    "gram": {"type": "gram"},
    "nlsr": {"type": "nlsr"},
    "nlsr, β = 0": {"type": "nlsr", "amplification": 0.0},
    "safelora": {"type": "safelora", "threshold": 1.0},
    "antidote": {"type": "antidote"},
    "safetylock": {"type": "safetylock"},
}


def copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def gigaflops(adapter: Path, reference: LoadedReference, parameters: Any) -> float:
    """10⁹ operations of all products of matrices in one realignment of a fresh adapter, counted on its first layer."""
    description = describe(adapter)
    first = [item for item in description.modules if ".layers.0." in item.name]
    layers = len(description.modules) // len(first)
    kinship = Kinship("fresh", 0.0, False)
    method = METHODS[parameters.type](parameters, reference, kinship)
    similarities = {item.name: 0.0 for item in first}
    selection = method.select({name: value for name, value in similarities.items() if method.reaches(name)})
    # Of the comparison with the aligned adapter, which takes some modules only.
    compared = min(1.0, pipeline.COMPARED / len(description.modules))
    with AdapterReader(adapter, description) as reader, torch.no_grad():
        with FlopCounterMode(display=False) as comparison:
            for item in first:
                aligned = reference.aligned(item.name)
                if aligned is not None:
                    module = reader.module(item)
                    lowrank.inner(*module.update, *aligned)
                    assert module.energy >= 0
        with FlopCounterMode(display=False) as counter:
            _count(reader, method, first, selection)
    return float(layers * (compared * comparison.get_total_flops() + counter.get_total_flops()) / 1e9)


def _count(reader: AdapterReader, method: Method, first: Sequence[LoraModule], selection: Selection) -> None:
    """One repair of the first layer, as `realign` does it."""
    for item in first:
        module = reader.module(item)
        if not method.reaches(item.name):
            continue
        method.similarity(module)
        # Read again where all similarities are needed before any module is repaired.
        again = module if method.takes_all else reader.module(item)
        if item.name in selection.names:
            after, _ = pipeline.fitted(again, method.propose(again), item.rank)
            measure.of_repaired(
                item, method, again, after, similarity=0.0, selection=selection, differs=True,
                truncation_error=0.0, biased=False,
            )  # fmt: skip


def rows(work: Path, shape: Shape, ranks: tuple[int, ...], methods: list[str], turns: int) -> list[dict[str, Any]]:
    folder = work / shape.name
    folder.mkdir()
    print(f"writing a reference of {shape.name}'s shapes …", flush=True)
    write_reference(folder / "reference", shape, rank=max(32, min(ranks)), pairs=PAIRS_KEPT)
    reference = LoadedReference(folder / "reference")
    found = []
    for rank in ranks:
        adapter, out = folder / f"rank{rank}", folder / "out"
        write_adapter(adapter, shape, rank)
        weights = adapter / WEIGHTS
        for name in methods:
            parameters = METHOD_PARAMETERS.validate_python(METHODS_TIMED[name])
            took: list[float] = []

            def run(a: Path = adapter, p: Any = parameters, o: Path = out, t: list[float] = took) -> None:
                t.append(timing.seconds(lambda: realign(a, reference, p, o)))

            result = timing.ratio(
                run, lambda w=weights: copy(w, folder / "copy"),  # type: ignore[misc]
                turns=turns, inner=5 if shape is SMOLLM2_135M else 1, after=lambda o=out: shutil.rmtree(o),  # type: ignore[misc]
            )  # fmt: skip
            products = gigaflops(adapter, reference, parameters)
            took = took[1:]  # the first warmed up
            rate = products / sorted(took)[len(took) // 2]
            found.append(
                {
                    "shape": shape.name, "rank": rank, "method": name,
                    "megabytes": round(weights.stat().st_size / 1e6, 1), **result.shown(),
                    "gigaflop": round(products, 1), "gigaflop_per_second": round(rate, 1),
                }
            )  # fmt: skip
            print(
                f"{shape.name} rank {rank:<4} {name:12} {result} x copying; {products:.0f} GFLOP at {rate:.0f}/s",
                flush=True,
            )
        shutil.rmtree(adapter)
    shutil.rmtree(folder)
    return found


def main() -> None:
    prepare_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest adapter alone, two turns, nothing written")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    names = list(METHODS_TIMED)
    with tempfile.TemporaryDirectory() as name:
        ranks, turns = ((8,), 2) if arguments.quick else ((8, 32, 128), 5)
        found = rows(Path(name), SMOLLM2_135M, ranks, names, turns)
        if not arguments.quick:
            found += rows(Path(name), LLAMA_3_8B, (128,), names, 3)
    if not arguments.quick:
        own = timing.peak_gflops()
        with fast_products() as used:
            fast = timing.peak_gflops()
        timing.store(
            "realign", eigenpairs=PAIRS_KEPT, machine_gigaflop_per_second=round(fast),
            onednn={"used": used, "times_the_rate_of_pytorchs_choice": round(fast / own, 2)}, rows=found,
        )  # fmt: skip


if __name__ == "__main__":
    main()
