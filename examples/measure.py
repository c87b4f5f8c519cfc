"""The figures of docs/decisions, from the example adapters.

    python examples/measure.py lineage [FOLDER ...]   cosines of A and of the update with examples/aligned
    python examples/measure.py ridge                  gram under two regularisations of C_g

The same-seed adapter of 0002 is made by `python examples/train.py fresh --seed 7 --out same-seed`.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import judge  # type: ignore[import-not-found] # the module beside this one

from safegraft.adapter import describe
from safegraft.contracts.methods import GramParameters
from safegraft.engine import lowrank
from safegraft.engine.adapter import AdapterReader
from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
from safegraft.engine.bundle import BuildSettings
from safegraft.engine.conversations import read_conversations
from safegraft.engine.models import resolve_base
from safegraft.engine.pipeline import realign
from safegraft.engine.reference import LoadedReference

HERE = Path(__file__).parent


def factors(folder: Path) -> dict[str, Any]:
    description = describe(folder)
    with AdapterReader(folder, description) as reader:
        return {item.name: reader.module(item) for item in description.modules}


def lineage(folders: list[Path]) -> None:
    aligned = factors(HERE / "aligned")
    for folder in folders:
        a, update = [], []
        for name, module in factors(folder).items():
            other = aligned[name]
            if module.a.shape == other.a.shape:
                a.append(float((module.a * other.a).sum() / (module.a.norm() * other.a.norm())))
            update.append(lowrank.cosine(*module.update, *other.update))
        print(f"{folder.name:12} cos(A) {spread(a)}   cos(update) {spread(update)}")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]" if values else "not defined"


def ridge(prompts: int) -> None:
    base = resolve_base(judge.BASE)
    judges = {name: judge.Judge(name == "fresh", prompts, 2 * prompts) for name in ("fresh", "continued")}
    for value in (1e-3, 1e-2):
        with tempfile.TemporaryDirectory() as work:
            build_reference(
                Path(work) / "reference",
                sources=BuildSources(aligned=HERE / "aligned", base=base, labels=[judge.BASE]),
                prompts=BuildPrompts(
                    safety=read_conversations(judge.DATA / "safety.jsonl"),
                    general=read_conversations(judge.DATA / "general.jsonl")[: judge.QUESTIONS],
                ),
                settings=BuildSettings(ridge=value),
            )
            reference = LoadedReference(Path(work) / "reference")
            for name, asked in judges.items():
                out = Path(work) / name
                summary = realign(HERE / name, reference, GramParameters(), out).summary
                harm, refused, task = asked.measure(out)
                print(
                    f"ridge {value:g} {name:10} kept {summary.kept:.2f} edit {summary.edit:.2f}  "
                    f"harm {harm.share:.3f}  over-refusal {refused.share:.3f}  task {task.share:.3f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lineage", "ridge"])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("-n", type=int, default=48, help="prompts of each kind for `ridge`")
    arguments = parser.parse_args()
    if arguments.what == "lineage":
        lineage(arguments.folders or [HERE / "fresh", HERE / "continued"])
    else:
        ridge(arguments.n)


if __name__ == "__main__":
    main()
