"""What a build asks of its model, counted where the model is loaded."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from safegraft.engine import models
from safegraft.engine.conversations import Conversation, encode


@dataclass
class Watch:
    """read: how often the transformer read each sequence of tokens, padding apart; answered: prompts that the model was
    asked to answer (what it reads for that is not in `read`)."""

    read: Counter[tuple[int, ...]] = field(default_factory=Counter)
    answered: int = 0


@contextmanager
def watched() -> Iterator[Watch]:
    """Counts what the models that are loaded meanwhile are asked to do."""
    watch, load, busy = Watch(), models.load_model, False

    def count(module: Any, arguments: Any, named: dict[str, torch.Tensor]) -> None:
        if not busy:
            for row, attention in zip(named["input_ids"], named["attention_mask"], strict=True):
                watch.read[tuple(row[attention.bool()].tolist())] += 1

    def loading(*arguments: Any, **named: Any) -> Any:
        model = load(*arguments, **named)
        generate = model.generate

        def answering(**wanted: Any) -> Any:
            nonlocal busy
            watch.answered += len(wanted["input_ids"])
            busy = True
            try:
                return generate(**wanted)
            finally:
                busy = False

        model.generate = answering
        model.base_model.register_forward_pre_hook(count, with_kwargs=True)
        return model

    with mock.patch.object(models, "load_model", loading):
        yield watch


def tokens(base: Path, conversations: Iterable[Conversation]) -> Counter[tuple[int, ...]]:
    """How often each conversation is read where each is read once."""
    tokenizer = models.load_tokenizer(base)
    return Counter(tuple(encode(tokenizer, item).ids) for item in conversations)
