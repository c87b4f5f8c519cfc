"""The model under test: a base in float32, to which updates are added and from which they are taken again.

Answers are greedy. The tokens that all prompts begin with (the system prompt) are computed once a model and not once a
prompt; apart from that an answer is the one that transformers' `generate` gives.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safegraft.engine.conversations import Conversation, encode
from safegraft.engine.models import load_model, load_tokenizer, quiet_libraries
from safegraft.engine.products import fast_layers

Updates = Iterable[tuple[str, Tensor]]
BATCH = 50


class Subject:
    """One base model, reused for every adapter."""

    def __init__(self, base: Path) -> None:
        quiet_libraries()
        self.tokenizer = load_tokenizer(base)
        self.model = load_model(base, "cpu", torch.float32)
        self._modules = dict(self.model.named_modules())
        self._head = self.model.get_output_embeddings()

    @contextmanager
    def changed(self, updates: Updates) -> Iterator[None]:
        """With W + ΔW in the named modules; the very bits of W come back afterwards.

        A vector instead of a matrix is added to the module's output.
        """
        kept: dict[str, Tensor] = {}
        hooks = []
        try:
            for name, update in updates:
                if update.ndim == 1:
                    hooks.append(self._modules[name].register_forward_hook(_adding(update)))
                    continue
                weight = self._modules[name].weight.data
                if name not in kept:
                    kept[name] = weight.clone()
                weight += update
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, weight in kept.items():
                self._modules[name].weight.data.copy_(weight)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """Greedy answers of at most `tokens` tokens, in the order of the prompts."""
        encoded = [encode(self.tokenizer, Conversation(prompt)).ids for prompt in prompts]
        with fast_layers(self.model):
            return self._answers(encoded, tokens)

    def _answers(self, encoded: list[list[int]], tokens: int) -> list[str]:
        from transformers import DynamicCache

        shared = _common_prefix(encoded)
        start = DynamicCache()
        if shared:
            start = self.model(input_ids=torch.tensor([encoded[0][:shared]]), use_cache=True).past_key_values
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
        answers = [""] * len(encoded)
        for begin in range(0, len(order), BATCH):
            chosen = order[begin : begin + BATCH]
            for i, ids in zip(
                chosen, self._continue([encoded[i][shared:] for i in chosen], start, tokens), strict=True
            ):
                answers[i] = self.tokenizer.decode(ids, skip_special_tokens=True)
        return answers

    def _continue(self, rows: list[list[int]], start: Any, tokens: int) -> list[list[int]]:
        from transformers import DynamicCache

        count, width, shared = len(rows), max(map(len, rows)), start.get_seq_length()
        ids = torch.full((count, width), self.tokenizer.pad_token_id)
        attention = torch.ones((count, shared + width), dtype=torch.long)
        for row, own in enumerate(rows):
            ids[row, width - len(own) :] = torch.tensor(own)
            attention[row, shared : shared + width - len(own)] = 0
        cache = DynamicCache()
        for layer, found in enumerate(start.layers):
            cache.update(*(part.expand(count, -1, -1, -1).contiguous() for part in (found.keys, found.values)), layer)
        positions = (attention.cumsum(1) - 1)[:, shared:].clamp_min(0)
        ended = torch.zeros(count, dtype=torch.bool)
        written: list[Tensor] = []
        for _ in range(tokens):
            hidden = self.model.base_model(
                input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache
            ).last_hidden_state
            # As a matrix of its own: of a slice, torch would make a product for each row.
            logits = self._head(hidden[:, -1].contiguous())
            chosen = logits.argmax(-1).masked_fill(ended, self.tokenizer.pad_token_id)
            written.append(chosen)
            ended |= chosen == self.tokenizer.eos_token_id
            if bool(ended.all()):
                break
            ids, positions = chosen[:, None], positions[:, -1:] + 1
            attention = torch.cat([attention, torch.ones((count, 1), dtype=torch.long)], dim=1)
        stacked: list[list[int]] = torch.stack(written, dim=1).tolist()
        return [_until(row, self.tokenizer.eos_token_id) for row in stacked]


def _adding(bias: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
    return lambda module, inputs, output: output + bias


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all rows share; at least one of each is left."""
    shortest = min(map(len, rows)) - 1
    for place in range(shortest):
        if len({row[place] for row in rows}) > 1:
            return place
    return shortest
