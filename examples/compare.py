"""Every method and control on one adapter: harm score, over-refusal, task accuracy, kept and edit.

    python examples/compare.py                       examples/fresh and examples/continued
    python examples/compare.py --adapter FOLDER …    another adapter for SmolLM2-135M-Instruct
    python examples/compare.py --page                writes the tables into docs/methods.md

Builds the reference from examples/aligned if it is not given, repairs the adapter in each way, and asks held-out
prompts. Results are added to the JSON file row by row, and rows that it holds already are not measured again: a run
that was stopped goes on. Some forty minutes on two cores. Small samples: directions, not evidence.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import judge  # type: ignore[import-not-found] # the module beside this one

from safegraft.contracts.methods import METHOD_PARAMETERS
from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
from safegraft.engine.bundle import BuildSettings
from safegraft.engine.conversations import read_conversations
from safegraft.engine.models import resolve_base
from safegraft.engine.pipeline import realign
from safegraft.engine.reference import LoadedReference
from safegraft.errors import UserError

HERE = Path(__file__).parent
WORK = HERE.parent / ".demo"
RESULTS = HERE / "results" / "compare.json"
PAGE = HERE.parent / "docs" / "methods.md"
MARKERS = "<!-- measured -->", "<!-- /measured -->"
BEFORE, ALIGNED = "no repair", "the aligned model"
# Row → parameters. Those of one method stand together, its default first.
ROWS: dict[str, dict[str, Any]] = {
    "gram": {"type": "gram"},
    "gram p=1, λ=.3": {"type": "gram", "steepness": 1.0, "general_weight": 0.3},
    "gram p=1, λ=1": {"type": "gram", "steepness": 1.0, "general_weight": 1.0},
    "gram p=1, λ=.1": {"type": "gram", "steepness": 1.0, "general_weight": 0.1},
    "gram p=1, λ=1, β=.5": {"type": "gram", "steepness": 1.0, "general_weight": 1.0, "amplification": 0.5},
    "gram p=1, λ=.3, 64 pairs": {"type": "gram", "steepness": 1.0, "general_weight": 0.3, "pairs": 64},
    "nlsr": {"type": "nlsr"},
    "nlsr, every module": {"type": "nlsr", "skip_share": 0.0},
    "nlsr paper form, every module": {"type": "nlsr", "form": "paper", "skip_share": 0.0},
    "nlsr, most similar half (control)": {"type": "nlsr", "selection": "highest"},
    "nlsr, random half (control)": {"type": "nlsr", "selection": "random"},
    "nlsr wanda": {"type": "nlsr", "scorer": "wanda"},
    "nlsr snip": {"type": "nlsr", "scorer": "snip"},
    "nlsr preference_snip": {"type": "nlsr", "scorer": "preference_snip"},
    "nlsr magnitude (control)": {"type": "nlsr", "scorer": "magnitude"},
    "nlsr random neurons (control)": {"type": "nlsr", "scorer": "random"},
    "safelora τ=.5": {"type": "safelora"},
    "safelora orthogonal, lowest half": {
        "type": "safelora", "projector": "orthogonal", "selection": "lowest", "modules": 105,
    },
    "antidote .1": {"type": "antidote"},
    "antidote .1 stored basis": {"type": "antidote", "basis": "stored"},
    "antidote .1 rows": {"type": "antidote", "basis": "rows"},
    "safetylock α=6": {"type": "safetylock"},
    "safetylock α=6, biases": {"type": "safetylock", "output": "lora_bias"},
    "safetylock α=3": {"type": "safetylock", "strength": 3.0},
    "safetylock α=3, biases": {"type": "safetylock", "output": "lora_bias", "strength": 3.0},
    "safetylock α=2, biases": {"type": "safetylock", "output": "lora_bias", "strength": 2.0},
    "safetylock α=6, 6 heads, biases": {"type": "safetylock", "output": "lora_bias", "heads": 6},
}  # fmt: skip


def reference(folder: Path | None) -> LoadedReference:
    if folder is None:
        folder = WORK / "compare-reference"
        if not folder.exists():
            build_reference(
                folder,
                sources=BuildSources(aligned=HERE / "aligned", base=resolve_base(judge.BASE), labels=[judge.BASE]),
                prompts=BuildPrompts(
                    safety=read_conversations(judge.DATA / "safety.jsonl"),
                    general=read_conversations(judge.DATA / "general.jsonl")[: judge.QUESTIONS],
                ),
                settings=BuildSettings(snip=True, preference_snip=True),
            )
    return LoadedReference(folder)


def measure(name: str, adapter: Path, known: LoadedReference, asked: Any) -> dict[str, Any]:
    """One row of the table."""
    if name in (BEFORE, ALIGNED):
        return _rates(asked.measure(adapter if name == BEFORE else None))
    with tempfile.TemporaryDirectory() as work:
        try:
            report = realign(adapter, known, METHOD_PARAMETERS.validate_python(ROWS[name]), Path(work) / "out")
        except UserError as error:
            return {"refused": error.code}
        row = _rates(asked.measure(Path(work) / "out"))
    return row | {"kept": report.summary.kept, "edit": report.summary.edit, "lineage": report.lineage}


def _rates(rates: tuple[Any, Any, Any]) -> dict[str, Any]:
    names = ("harm_score", "over_refusal", "task_accuracy")
    return {name: [rate.hits, rate.total] for name, rate in zip(names, rates, strict=True)}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows of one adapter as Markdown."""
    lines = ["| | harm score ↓ | over-refusal ↓ | task accuracy ↑ | kept | edit |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        if "refused" in row:
            lines.append(f"| {name} | refused: `{row['refused']}` | | | | |")
            continue
        rates = [f"{hits / total:.2f}" for hits, total in (row[key] for key in list(row)[:3])]
        shares = [f"{row[key]:.2f}" if key in row else "" for key in ("kept", "edit")]
        lines.append(f"| {name} | {' | '.join([*rates, *shares])} |")
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """What stands in docs/methods.md between the markers."""
    parts = [f"**`examples/{name}`**\n\n{table(rows)}" for name, rows in results.items()]
    return "\n\n".join(parts)


def write_page(results: dict[str, Any], path: Path = PAGE) -> None:
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    path.write_text(f"{before}{MARKERS[0]}\n\n{page(results)}\n\n{MARKERS[1]}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, action="append", default=[])
    parser.add_argument("--reference", type=Path, default=None)
    parser.add_argument("--aligned", type=Path, default=HERE / "aligned", help="the adapter below a fresh one")
    parser.add_argument("--harmful", type=Path, default=judge.Questions.harmful)
    parser.add_argument("--task", type=Path, default=judge.Questions.task)
    parser.add_argument("--task-prompt", default=judge.TASK)
    parser.add_argument("--row", action="append", default=[], help="only this row; repeatable")
    parser.add_argument("-n", type=int, default=40, help="harmful prompts, and as many benign ones")
    parser.add_argument("--tasks", type=int, default=96)
    parser.add_argument("--page", action="store_true", help="write what was measured into docs/methods.md, and end")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.page:
        write_page(json.loads(arguments.results.read_text()))
        return
    WORK.mkdir(exist_ok=True)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    known = reference(arguments.reference)
    questions = judge.Questions(
        harmful=arguments.harmful,
        task=arguments.task,
        task_prompt=arguments.task_prompt.replace("\\n", "\n"),
        aligned=arguments.aligned,
    )
    for adapter in arguments.adapter or [HERE / "fresh", HERE / "continued"]:
        rows = results.setdefault(adapter.name, {})
        on_aligned = realign(adapter, known, METHOD_PARAMETERS.validate_python({"type": "none"}), None)
        asked = judge.Judge(on_aligned.lineage != "continued", arguments.n, arguments.tasks, questions)
        for name in arguments.row or [ALIGNED, BEFORE, *ROWS]:
            if name not in rows:
                rows[name] = measure(name, adapter, known, asked)
                arguments.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
                print(adapter.name, name, rows[name], flush=True)
        print(f"\n{adapter.name}\n\n{table(rows)}\n", flush=True)


if __name__ == "__main__":
    main()
