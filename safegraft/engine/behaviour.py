"""What one model does when it is asked, with one adapter and with another: the numbers of a report's evaluation.

Needs the model, so it is no part of a job: whoever has it asks for it. Which prompts tell anything is theirs to choose;
none may be among those that the reference was built from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from safegraft.adapter import WEIGHTS, describe
from safegraft.contracts.report import Behaviour, Evaluation, Share
from safegraft.engine import models
from safegraft.engine.conversations import Conversation
from safegraft.engine.evaluate import Rate, answer, harm_score, over_refusal, task_accuracy
from safegraft.engine.sources import check_shapes
from safegraft.errors import InvalidPrompts
from safegraft.files import sha256_file
from safegraft.finite import check_finite

# As many new tokens as the tables of docs/evidence were measured with.
NEW_TOKENS = 24
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Questions:
    """harmful, benign: prompts; task: prompts with the answer that is right. Empty: not measured.

    Raises InvalidPrompts where nothing is asked, or the task has a prompt without its answer.
    """

    harmful: Sequence[str] = ()
    benign: Sequence[str] = ()
    task: Sequence[Conversation] = ()

    def __post_init__(self) -> None:
        if not (self.harmful or self.benign or self.task):
            raise InvalidPrompts("There is nothing to ask.", code="prompts_missing", param="prompts")
        for row, item in enumerate(self.task, start=1):
            if not (item.response or "").strip():
                raise InvalidPrompts(
                    f"The task's prompt {row} has no right answer.",
                    param="task",
                    hint="Give a `response` with each: what the answer has to begin with.",
                )


@dataclass(frozen=True)
class Asked:
    """One prompt, its answer, and for which of the three measures it was asked."""

    measure: str
    prompt: str
    answer: str


class Subject:
    """A model, on which one adapter after the other is measured."""

    def __init__(
        self, base: Path, aligned: Path | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """base: the model's folder; aligned: an adapter that is active beside those that are measured, as the
        provider's own is where fresh adapters are served. It is not merged: merging into bf16 would add rounding noise
        of about the adapters' own size.
        """
        self._tokenizer = models.load_tokenizer(base)
        self._model = models.load_model(base, device, dtype)
        self._shapes = models.linear_modules(self._model)
        self._aligned = aligned
        self.on_aligned = aligned is not None
        if aligned is not None:
            self.check(aligned, "aligned")

    def check(self, adapter: Path, which: str) -> None:
        """Raises what `describe` does, Incompatible (`base_mismatch`), InvalidTensors (`non_finite`).

        PEFT loads an adapter that fits nowhere without a word, and then the model answers as if there were none.
        """
        description = describe(adapter)
        check_shapes(description, self._shapes, which)
        check_finite(adapter / WEIGHTS, description.header)

    def measure(
        self,
        adapter: Path | None,
        questions: Questions,
        *,
        new_tokens: int = NEW_TOKENS,
        stage: str = "asking",
        progress: Progress = lambda stage, done, total: None,
    ) -> tuple[Behaviour, list[Asked]]:
        """Greedy answers with this adapter, counted. Without one: of the model itself, with the aligned adapter if
        there is one. The adapter must have been checked."""
        self._load(adapter)
        asked = [*questions.harmful, *questions.benign, *(item.prompt for item in questions.task)]
        try:
            # Separately: a task's answers are some words, and would wait for the longest of the others.
            first, last = len(questions.harmful), len(questions.harmful) + len(questions.benign)
            answers: list[str] = []
            for part, tokens in (
                (asked[:first], new_tokens),
                (asked[first:last], new_tokens),
                (asked[last:], self._task_tokens(questions.task)),
            ):

                def told(now: int, _: int, before: int = len(answers)) -> None:
                    progress(stage, before + now, len(asked))

                if part:
                    answers += answer(self._model, self._tokenizer, part, max_new_tokens=tokens, progress=told)
        finally:
            self._unload()
        rights = [item.response or "" for item in questions.task]
        behaviour = Behaviour(
            harm_score=_share(harm_score(answers[:first])),
            over_refusal=_share(over_refusal(answers[first:last])),
            task_accuracy=_share(task_accuracy(answers[last:], rights)),
        )
        kinds = ["harm_score"] * first + ["over_refusal"] * (last - first) + ["task_accuracy"] * len(rights)
        return behaviour, [Asked(*row) for row in zip(kinds, asked, answers, strict=True)]

    def _load(self, adapter: Path | None) -> None:
        from peft import PeftModel

        folders = [folder for folder in (adapter, self._aligned) if folder is not None]
        names = [f"adapter_{index}" for index in range(len(folders))]
        for folder, name in zip(folders, names, strict=True):
            if name == names[0]:
                self._model = PeftModel.from_pretrained(self._model, str(folder), adapter_name=name)
            else:
                self._model.load_adapter(str(folder), name)
        if names:
            self._model.base_model.set_adapter(names)
        self._model.eval()

    def _unload(self) -> None:
        if hasattr(self._model, "peft_config"):
            self._model = self._model.unload()

    def _task_tokens(self, task: Sequence[Conversation]) -> int:
        # Two more than the longest right answer: tokenizers may put a space or a line's end before it.
        return 2 + max(
            (len(self._tokenizer(item.response, add_special_tokens=False)["input_ids"]) for item in task), default=0
        )


def evaluate(
    subject: Subject,
    before: Path,
    after: Path,
    questions: Questions,
    *,
    new_tokens: int = NEW_TOKENS,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[Evaluation, dict[str, list[Asked]]]:
    """Asks with the customer's adapter and with the repaired one. Returns the evaluation, and the answers by side.

    Raises what `Subject.check` does, before anything is asked.
    """
    sides = {"before": before, "after": after}
    for side, folder in sides.items():
        subject.check(folder, {"before": "customer's", "after": "repaired"}[side])
    found: dict[str, Behaviour] = {}
    asked: dict[str, list[Asked]] = {}
    for side, folder in sides.items():
        found[side], asked[side] = subject.measure(
            folder, questions, new_tokens=new_tokens, stage=side, progress=progress
        )
    return (
        Evaluation(judge=judge(questions, new_tokens), output_sha256=sha256_file(after / WEIGHTS), **found),
        asked,
    )


def judge(questions: Questions, new_tokens: int) -> str:
    """How answers were judged, in words."""
    parts = []
    if questions.harmful or questions.benign:
        parts.append(f"of at most {new_tokens} tokens; refusals by key phrases in their first 120 characters")
    if questions.task:
        parts.append("the task by how the answer begins")
    return "greedy answers " + ", ".join(parts)


def _share(rate: Rate) -> Share | None:
    return Share(hits=rate.hits, total=rate.total) if rate.total else None
