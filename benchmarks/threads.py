"""Realigning with as many threads as are worth it, against one and against all: `make bench`.

Adapters with the shapes of SmolLM2-135M and random factors; every method in turn with the threads that are chosen
from what modules take (safegraft/engine/parallel.py), with one, and with one a core from the third module on. Writes
benchmarks/results/threads.json.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.realign import METHODS_TIMED, PAIRS_KEPT
from benchmarks.shapes import SMOLLM2_135M, write_adapter, write_reference
from safegraft.contracts.methods import METHOD_PARAMETERS
from safegraft.engine import parallel
from safegraft.engine.pipeline import realign
from safegraft.engine.reference import LoadedReference
from safegraft.memory import prepare_memory

RANKS = (8, 32, 128)
TURNS = 5


@contextmanager
def all_threads() -> Iterator[None]:
    held, parallel.HELD = parallel.HELD, 1e-9
    try:
        yield
    finally:
        parallel.HELD = held


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rows(work: Path, rank: int, turns: int) -> Iterator[dict[str, Any]]:
    adapter, out = work / f"rank{rank}", work / "out"
    write_adapter(adapter, SMOLLM2_135M, rank)
    reference = LoadedReference(work / "reference")
    for name, given in METHODS_TIMED.items():
        parameters = METHOD_PARAMETERS.validate_python(given)

        def chosen(p: Any = parameters) -> None:
            realign(adapter, reference, p, out)
            shutil.rmtree(out)

        def with_one(run: Any = chosen) -> None:
            with one_thread():
                run()

        def with_all(run: Any = chosen) -> None:
            with all_threads():
                run()

        against = {
            kind: timing.ratio(other, chosen, turns=turns).shown()
            for kind, other in (("one", with_one), ("all", with_all))
        }
        yield {"rank": rank, "method": name, **against}
    reference.close()
    shutil.rmtree(adapter)


def main() -> None:
    prepare_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest rank alone, one turn, nothing written")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_reference(work / "reference", SMOLLM2_135M, rank=32, pairs=PAIRS_KEPT)
        for rank in RANKS[:1] if arguments.quick else RANKS:
            for row in rows(work, rank, 1 if arguments.quick else TURNS):
                print(row, flush=True)
                found.append(row)
    if not arguments.quick:
        timing.store("threads", shape=SMOLLM2_135M.name, rows=found)


if __name__ == "__main__":
    main()
