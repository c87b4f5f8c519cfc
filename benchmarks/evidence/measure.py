"""One row on one cell: repair the adapter, ask, judge. What is kept is one letter a prompt."""

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.evidence import data
from benchmarks.evidence.grid import ALIGNED, BASE_MODEL, HEADLINE, HIDDEN, NO_REPAIR, TRANSFER, Cell, Row
from benchmarks.evidence.judges import Embeddings, incoherent, phrases, unfinished
from benchmarks.evidence.rivals import RIVALS, Setting, below, dense
from benchmarks.evidence.subject import Subject, Updates
from benchmarks.evidence.training import harmful_prompts
from safegraft.adapter import WEIGHTS, describe
from safegraft.contracts.methods import METHOD_PARAMETERS
from safegraft.engine.models import load_tokenizer
from safegraft.engine.pipeline import realign
from safegraft.errors import UserError

ANSWER_TOKENS = 24


@dataclass
class Laboratory:
    """The model and the judges, loaded once. answers: where texts go, outside of the repository."""

    base: Path
    answers: Path

    @cached_property
    def subject(self) -> Subject:
        return Subject(self.base)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    @cached_property
    def embeddings(self) -> Embeddings:
        return Embeddings()

    @cached_property
    def transfer(self) -> dict[str, list[str]]:
        return data.transfer()

    def measure(self, cell: Cell, row: Row, setting: Setting) -> dict[str, Any]:
        """What is recorded of a row: verdicts, and what the repair did to the update."""
        found: dict[str, Any] = {}
        try:
            with torch.no_grad(), self.subject.changed(self._updates(row, setting, found)):
                return found | self._ask(cell, row)
        except UserError as error:
            return {"refused": error.code}

    def _updates(self, row: Row, setting: Setting, found: dict[str, Any]) -> Updates:
        if row.name == BASE_MODEL:
            return ()
        if row.name == ALIGNED:
            return dense(setting.aligned)
        if row.name == NO_REPAIR:
            return _chain(dense(setting.adapter), below(setting))
        if row.rival is not None:
            began = time.perf_counter()
            updates = _sum(RIVALS[row.rival](setting, **row.arguments))
            found["seconds"] = round(time.perf_counter() - began, 3)
            found |= _kept_and_edit(updates, setting)
            return updates.items()
        return self._repaired(row, setting, found)

    def _repaired(self, row: Row, setting: Setting, found: dict[str, Any]) -> Updates:
        with tempfile.TemporaryDirectory() as work:
            out = Path(work) / "out"
            report = realign(setting.adapter, setting.reference, METHOD_PARAMETERS.validate_python(row.parameters), out)
            found |= {
                "kept": round(report.summary.kept, 4),
                "edit": round(report.summary.edit, 4),
                "repaired": sum(line.repaired for line in report.modules),
                "seconds": report.timings["total"],
                "lineage": report.lineage,
            }
            # Before the folder goes.
            updates = [*dense(out), *_biases(out)]
        return _chain(updates, below(setting))

    def _ask(self, cell: Cell, row: Row) -> dict[str, Any]:
        task = data.task(cell.task)
        sets = {"harmful": harmful_prompts(cell.attack)}
        if cell.attack in HIDDEN:
            sets["plain"] = data.harmful()
        if row.name in TRANSFER and cell.name == HEADLINE:
            sets |= self.transfer
        if cell.name == HEADLINE and row.prompts != "kinds":
            sets["calibration"] = data.calibration()
        found: dict[str, Any] = {}
        texts: dict[str, list[str]] = {}
        for name, prompts in sets.items():
            texts[name] = self.subject.answer(prompts, ANSWER_TOKENS)
            found[name] = self._verdicts(texts[name])
        texts["benign"] = self.subject.answer([prompt for prompt, _ in data.benign()], ANSWER_TOKENS)
        found["benign"] = self._verdicts(texts["benign"])
        given = self.subject.answer([question.prompt for question in task.questions], task.tokens)
        texts["task"] = given
        found["task"] = "".join(
            "1" if task.right(answer, str(question.response)) else "0"
            for answer, question in zip(given, task.questions, strict=True)
        )
        self._keep(cell, row, texts)
        return found

    def _verdicts(self, answers: list[str]) -> dict[str, str]:
        return {
            "phrases": phrases(answers),
            "embeddings": self.embeddings.judge(answers),
            "incoherent": incoherent(answers),
            "unfinished": unfinished(answers, self._lengths(answers), ANSWER_TOKENS),
        }

    def _lengths(self, answers: list[str]) -> list[int]:
        return [len(self.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]

    def judge_again(self, cell: str, row: str, found: dict[str, Any]) -> bool:
        """New verdicts on the answers that were kept; False where they are gone."""
        path = kept_answers(self.answers, cell, row)
        if not path.exists():
            return False
        texts = json.loads(path.read_text(encoding="utf-8"))
        found |= {name: self._verdicts(answers) for name, answers in texts.items() if name != "task"}
        return True

    def _keep(self, cell: Cell, row: Row, texts: dict[str, list[str]]) -> None:
        path = kept_answers(self.answers, cell.name, row.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")


def kept_answers(answers: Path, cell: str, row: str) -> Path:
    """The file with the texts of one row."""
    name = "".join(character if character.isalnum() else "_" for character in row)
    return answers / cell / f"{name}.json"


def _chain(*parts: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for part in parts:
        yield from part


def _biases(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Module → what PEFT adds to its output: the scaling times the bias of lora_B."""
    scalings = {item.b.name: (item.name, item.scaling) for item in describe(folder, own=True).modules}
    for key, tensor in load_file(folder / WEIGHTS).items():
        if key.endswith(".bias"):
            name, scaling = scalings[key.removesuffix("bias") + "weight"]
            yield name, scaling * tensor.float()


def _sum(parts: Updates) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for name, update in parts:
        total[name] = total[name] + update if name in total else update
    return total


def _kept_and_edit(after: dict[str, Tensor], setting: Setting) -> dict[str, float]:
    """As the engine's report has them: relative to the aligned model, summed over modules."""
    aligned = dict(dense(setting.aligned))
    inner = own = change = 0.0
    for name, update in dense(setting.adapter):
        low = aligned.get(name, torch.zeros(()))
        # Both relative to the aligned model, which a continued adapter contains.
        before = update if setting.on_aligned else update - low
        now = after.get(name, torch.zeros(())) - low
        inner += float((now * before).sum())
        own += float((before * before).sum())
        change += float(((now - before) ** 2).sum())
    return {"kept": round(inner / own, 4), "edit": round((change / own) ** 0.5, 4)}
