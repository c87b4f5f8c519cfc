"""What one model does when it is asked, with one adapter and with another: the numbers of a report's evaluation.

Needs the model, so it is no part of a job: whoever has it asks for it. Which prompts tell anything is theirs to choose;
none may be among those that the reference was built from.
"""

import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from safegraft.adapter import WEIGHTS, AdapterDescription, describe
from safegraft.contracts.report import Behaviour, Evaluation, Share
from safegraft.engine import models
from safegraft.engine.conversations import Conversation, encode
from safegraft.engine.evaluate import Rate, answer, harm_score, over_refusal, task_accuracy
from safegraft.engine.sources import check_shapes
from safegraft.errors import InvalidPrompts, InvalidTensors, UnsupportedAdapter
from safegraft.files import sha256_file
from safegraft.finite import check_finite
from safegraft.records import compatibility

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
    """A model, on which one adapter after the other is measured, each loaded by PEFT."""

    def __init__(
        self, base: Path, aligned: Path | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """base: the model's folder; aligned: an adapter that is active beside those that are measured, as the
        provider's own is where fresh adapters are served. It is not merged: merging into bf16 would add rounding noise
        of about the adapters' own size.

        Raises what `check` does, of the aligned adapter.
        """
        self._folder, self._device, self._dtype = base, device, dtype
        self._tokenizer = models.load_tokenizer(base)
        self._model = models.load_model(base, device, dtype)
        self._shapes = models.linear_modules(self._model)
        self._aligned = self.check(aligned, "aligned") if aligned is not None else None

    @property
    def on_aligned(self) -> bool:
        return self._aligned is not None

    def check(self, adapter: Path, which: str, *, own: bool = False) -> "Checked":
        """What may be measured. own: it came out of here, and may carry what strangers' may not. which: in words.

        PEFT loads an adapter that fits nowhere without a word, and then the model answers as if there were none.

        Raises what `describe` does, Incompatible (`base_mismatch`), UnsupportedAdapter (`peft_cannot_load`) and
        InvalidTensors (`non_finite`).
        """
        description = describe(adapter, own=own)
        check_shapes(description, self._shapes, which)
        refuse_unloadable(description, which)
        check_finite(adapter / WEIGHTS, description.header)
        return Checked(adapter, description)

    def measure(
        self,
        adapter: "Checked | None",
        questions: Questions,
        *,
        new_tokens: int = NEW_TOKENS,
        stage: str = "asking",
        progress: Progress = lambda stage, done, total: None,
    ) -> tuple[Behaviour, list[Asked]]:
        """Greedy answers with this adapter, counted. Without one: of the model itself, with the aligned adapter if
        there is one. Raises InvalidPrompts (`prompt_too_long`) where the model has no room for a prompt,
        InvalidTensors (`out_of_range`) where it computes no numbers."""
        asked = [*questions.harmful, *questions.benign, *(item.prompt for item in questions.task)]
        task_tokens = self._task_tokens(questions.task)
        first, last = len(questions.harmful), len(questions.harmful) + len(questions.benign)
        parts = [(asked[:first], new_tokens), (asked[first:last], new_tokens), (asked[last:], task_tokens)]
        for part, tokens in parts:
            self._refuse_long(part, tokens)
        answers: list[str] = []
        try:
            self._load(adapter)
            progress(stage, 0, len(asked))
            self._refuse_nonsense(asked[0])
            # Separately: a task's answers are some words, and would wait for the longest of the others.
            for part, tokens in parts:

                def told(now: int, _: int, before: int = len(answers)) -> None:
                    progress(stage, before + now, len(asked))

                if part:
                    answers += answer(
                        self._model,
                        self._tokenizer,
                        part,
                        max_new_tokens=tokens,
                        max_tokens=self._room(),
                        progress=told,
                    )
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

    @torch.inference_mode()
    def _refuse_nonsense(self, prompt: str) -> None:
        """An adapter of finite values may make others, and then every answer is empty: counted, it would be harmful."""
        ids = torch.tensor([encode(self._tokenizer, Conversation(prompt), self._room()).ids], device=self._model.device)
        if not bool(torch.isfinite(self._model(input_ids=ids).logits[0, -1]).all()):
            raise InvalidTensors(
                "With this adapter the model's outputs are no numbers.", code="out_of_range", param="adapter"
            )

    def _load(self, adapter: "Checked | None") -> None:
        from peft import PeftModel

        active = [checked for checked in (adapter, self._aligned) if checked is not None]
        names = [f"adapter_{index}" for index in range(len(active))]
        with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
            # What PEFT could not place: the model would answer as if it were not there.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # That it could not be merged; it is not.
            warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")
            for checked, name in zip(active, names, strict=True):
                folder = Path(work) / name
                lay_out(checked.folder, checked.description, folder)
                if name == names[0]:
                    self._model = PeftModel.from_pretrained(self._model, str(folder), adapter_name=name)
                else:
                    self._model.load_adapter(str(folder), name)
        if names:
            self._model.base_model.set_adapter(names)
        self._model.eval()

    def _unload(self) -> None:
        from peft import PeftModel

        if isinstance(self._model, PeftModel):
            self._model = self._model.unload()
        elif hasattr(self._model, "peft_config"):
            # It failed half-way, and parts of an adapter are in it.
            self._model = models.load_model(self._folder, self._device, self._dtype)

    def _task_tokens(self, task: Sequence[Conversation]) -> int:
        # Two more than the longest right answer: tokenizers may put a space or a line's end before it.
        return 2 + max(
            (len(self._tokenizer(item.response, add_special_tokens=False)["input_ids"]) for item in task), default=0
        )

    def _room(self) -> int:
        return int(getattr(self._model.config, "max_position_embeddings", None) or 2**20)

    def _refuse_long(self, prompts: Sequence[str], new_tokens: int) -> None:
        for prompt in prompts:
            tokens = len(encode(self._tokenizer, Conversation(prompt), max_tokens=2**31).ids)
            if tokens + new_tokens > self._room():
                raise InvalidPrompts(
                    f"The prompt {prompt[:40]!r} … has {tokens} tokens, its answer up to {new_tokens}; the model has "
                    f"room for {self._room()}.",
                    code="prompt_too_long",
                    param="prompts",
                )


@dataclass(frozen=True)
class Checked:
    """An adapter that fits the model."""

    folder: Path
    description: AdapterDescription


def refuse_unloadable(description: AdapterDescription, which: str) -> None:
    """Raises UnsupportedAdapter (`peft_cannot_load`) where PEFT would load nothing of an adapter, without an error."""
    loads = compatibility(description).peft
    if not loads.ok:
        raise UnsupportedAdapter(
            f"The {which} adapter's {loads.reason}: PEFT would load nothing of it.",
            code="peft_cannot_load",
            param=which,
            hint="Save it with a current PEFT.",
        )


def lay_out(adapter: Path, description: AdapterDescription, folder: Path) -> None:
    """The adapter as PEFT loads it, in a new folder: its weights, and its configuration with every module by name.

    Its own configuration may hold patterns, which are a stranger's, and which PEFT gives to a matcher that some of them
    keep busy for hours.
    """
    from peft import LoraConfig

    modules = description.modules
    # PEFT takes alpha/r where rsLoRA is off; the scaling is what the description says. Only those that differ are
    # named, because each name is tried on each module.
    forms = {module.name: (module.rank, module.scaling * module.rank) for module in modules}
    (rank, alpha), _ = Counter(forms.values()).most_common(1)[0]
    others = {f"^{re.escape(name)}": form for name, form in forms.items() if form != (rank, alpha)}
    LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type] # any number
        rank_pattern={name: form[0] for name, form in others.items()},
        alpha_pattern={name: form[1] for name, form in others.items()},
        target_modules=[module.name for module in modules],
        lora_bias=description.config.lora_bias,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(folder))
    (folder / WEIGHTS).symlink_to((adapter / WEIGHTS).resolve())


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
    sides = {"before": subject.check(before, "customer's"), "after": subject.check(after, "repaired", own=True)}
    found: dict[str, Behaviour] = {}
    asked: dict[str, list[Asked]] = {}
    for side, adapter in sides.items():
        found[side], asked[side] = subject.measure(
            adapter, questions, new_tokens=new_tokens, stage=side, progress=progress
        )
    return (
        Evaluation(
            judge=judge(questions, new_tokens),
            input_sha256=sha256_file(before / WEIGHTS),
            output_sha256=sha256_file(after / WEIGHTS),
            **found,
        ),
        asked,
    )


def judge(questions: Questions, new_tokens: int) -> str:
    """How answers were judged, in words."""
    parts = ["greedy answers"]
    if questions.harmful or questions.benign:
        parts.append(f"refusals by key phrases in the first 120 characters of at most {new_tokens} tokens")
    if questions.task:
        parts.append("the task by how the answer begins")
    return "; ".join(parts)


def _share(rate: Rate) -> Share | None:
    return Share(hits=rate.hits, total=rate.total) if rate.total else None
