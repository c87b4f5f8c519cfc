"""What safety and general prompts look like inside a model: one streaming forward pass per prompt set.

Gathers, for every linear layer at once,
- C = mean of x·xᵀ (k, k) over its inputs x at the tokens of prompts and answers, once per *site*: layers that read the
  same tensor (q, k and v; gate and up) share it;
- G = ZᵀZ (r, r), Z = X·Aᵀ, over the *answers'* tokens, for the layers that an adapter reaches (NLSR, eq. 4).

Tokens that all conversations begin with (the chat template's system prompt) say nothing about safety or generality and
are the same in both sets; they are left out of C.

Knows nothing of masks and repairs. The published implementation makes one full pass per layer and keeps raw
activations; here nothing of the size of the data is ever kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from safegraft.engine.conversations import Batch, Encoded, batches
from safegraft.errors import InvalidParameter


@dataclass
class Statistics:
    """second_moments: site → C (k, k) float32; grams: module → G (r, r) float64; sites: module → site."""

    second_moments: dict[str, Tensor] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)
    sites: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    response_tokens: int = 0


def common_prefix(encoded: Sequence[Encoded]) -> int:
    """How many leading tokens all conversations share (at most up to the shortest prompt's end)."""
    shortest = min(item.response_start for item in encoded)
    first = encoded[0].ids
    for at in range(shortest):
        if any(item.ids[at] != first[at] for item in encoded):
            return at
    return shortest if len(encoded) > 1 else 0


@torch.inference_mode()
def gather(
    model: Any,
    modules: Sequence[str],
    encoded: Sequence[Encoded],
    *,
    pad: int,
    skip: int = 0,
    factors: Mapping[str, Tensor] | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """One pass of `model` over `encoded`.

    modules: names of linear layers as `model.get_submodule` knows them; factors: module → A (r, k) of the adapter whose
    G is wanted; skip: leading tokens left out of C.
    """
    collector = _Collector(skip, factors or {})
    handles = [model.get_submodule(name).register_forward_pre_hook(collector.hook(name)) for name in modules]
    try:
        done = 0
        for batch in batches(encoded, batch_size, pad):
            collector.begin(batch, model.device)
            # The transformer without its head: logits over the vocabulary are not needed.
            _body(model)(
                input_ids=batch.ids.to(model.device), attention_mask=batch.attention.to(model.device), use_cache=False
            )
            done += len(batch.rows)
            if progress:
                progress(done, len(encoded))
    finally:
        for handle in handles:
            handle.remove()
    return collector.finish()


def _body(model: Any) -> Any:
    return model.base_model if model.base_model is not model else model


class _Collector:
    """Sums over the batches of one pass."""

    def __init__(self, skip: int, factors: Mapping[str, Tensor]) -> None:
        self._skip = skip
        self._factors = factors
        self._sum = Statistics()
        self._last: tuple[Tensor, str] | None = None
        self._all: Tensor = torch.empty(0)
        self._response: Tensor = torch.empty(0)

    def begin(self, batch: Batch, device: torch.device) -> None:
        counted = batch.attention.bool()
        counted[:, : self._skip] = False
        self._all = counted.reshape(-1).to(device)
        self._response = batch.response.reshape(-1).to(device)
        self._last = None
        self._sum.tokens += int(counted.sum())
        self._sum.response_tokens += int(batch.response.sum())

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._add(name, inputs[0])

        return before

    def _add(self, name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if self._last is None or self._last[0] is not x:
            # The reference held in `_last` keeps x alive, so that no later tensor can take its identity.
            self._last = (x, name)
        site = self._sum.sites.setdefault(name, self._last[1])
        if len(rows) != len(self._all):
            raise InvalidParameter(
                f"{name}: reads {len(rows)} tokens where the model reads {len(self._all)}; models that send tokens to "
                "some of their layers (mixtures of experts) are not supported.",
                code="model_unsupported",
                param=name,
            )
        if site == name:
            counted = rows[self._all].float()
            _add_to(self._sum.second_moments, name, counted.T @ counted)
        if name in self._factors:
            z = rows[self._response].float() @ self._factors[name].to(rows.device).T
            _add_to(self._sum.grams, name, (z.T @ z).double())

    def finish(self) -> Statistics:
        self._last = None
        for site, total in self._sum.second_moments.items():
            self._sum.second_moments[site] = total / max(1, self._sum.tokens)
        return self._sum


def _add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value
