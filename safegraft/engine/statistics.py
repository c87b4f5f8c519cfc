"""What a prompt set looks like inside a model: one streaming forward pass, for every linear layer at once.

Per *site* (layers that read the same tensor share it: q, k and v; gate and up):
- C = mean of x·xᵀ (k, k) and the mean of x (k,), over the inputs x at the tokens of prompts and answers;
- Σx² (k,) over the *answers'* tokens (Wanda's input norms);
per module that an adapter reaches:
- G = ZᵀZ (r, r), Z = X·Aᵀ, over the answers' tokens (NLSR, eq. 4);
- where asked for, Σ|∂L/∂A| and Σ|∂L/∂B| over single conversations (SNIP), from the same pass and its way back;
per attention output, where asked for:
- the inputs at the last tokens of each answer (SafetyLock).

Tokens that all conversations begin with (the chat template's system prompt) say nothing about safety or generality and
are the same in every set; they are left out of the input moments.

Knows nothing of masks and repairs. The published implementations make one full pass per layer and keep raw
activations; here nothing of the size of the data is kept, except for the few last tokens.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from safegraft.engine.conversations import Batch, Encoded, batches
from safegraft.errors import InvalidParameter

LAST_TOKENS = 5
# How many inputs back a layer may share its own: Phi and GPT-NeoX run the attention between two readers of one input.
RECENT = 8


@dataclass
class Statistics:
    """Sums over `done` conversations; `finished` turns them into means.

    second_moments: site → Σxxᵀ (k, k); means: site → Σx (k,); response_squares: site → Σx² (k,), all float32 on the
    model's device. grams: module → G (r, r) float64. gradients: module → (Σ|∂A|, Σ|∂B|) float32. last: attention
    output → inputs at the last answer tokens (conversation, LAST_TOKENS, k) float32 in main memory, in the order of the
    conversations, the first token repeated before short answers.
    sites: module → site. forward_passes: how often the model read the whole set.
    """

    second_moments: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    response_squares: dict[str, Tensor] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    sites: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    response_tokens: int = 0
    done: int = 0
    forward_passes: int = 0

    def finished(self) -> "Statistics":
        """The same with C and the means divided by the number of counted tokens."""
        count = max(1, self.tokens)
        self.second_moments = {site: total / count for site, total in self.second_moments.items()}
        self.means = {site: total / count for site, total in self.means.items()}
        self.forward_passes += 1
        return self


def common_prefix(encoded: Sequence[Encoded]) -> int:
    """How many leading tokens all conversations share (at most up to the shortest prompt's end)."""
    shortest = min(item.response_start for item in encoded)
    first = encoded[0].ids
    for at in range(shortest):
        if any(item.ids[at] != first[at] for item in encoded):
            return at
    return shortest if len(encoded) > 1 else 0


def gather(
    model: Any,
    modules: Sequence[str],
    encoded: Sequence[Encoded],
    *,
    pad: int,
    skip: int = 0,
    factors: Mapping[str, Tensor] | None = None,
    trained: Mapping[str, tuple[nn.Parameter, nn.Parameter]] | None = None,
    outputs: Sequence[str] = (),
    first: int | None = None,
    moments: bool = True,
    batch_size: int = 8,
    state: Statistics | None = None,
    save: Callable[[Statistics], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """One pass of `model` over `encoded`.

    modules: names of linear layers as `model.get_submodule` knows them; factors: module → A (r, k) of the update whose
    G is wanted; trained: module → its A and B inside of the model, whose gradients are wanted (single conversations
    are then read one by one); outputs: attention outputs whose last tokens are kept, of the `first` conversations or of
    all; skip: leading tokens left out of the moments; moments: False where only `outputs` matter. state: what an
    interrupted pass had gathered, and save: is called with it after every batch.
    """
    sums = state or Statistics()
    size = 1 if trained else batch_size
    kept = min(len(encoded), len(encoded) if first is None else first)
    collector = _Collector(sums, skip, factors or {}, frozenset(outputs), kept, moments)
    handles = [model.get_submodule(name).register_forward_pre_hook(collector.hook(name)) for name in modules]
    try:
        with _gradients_of(trained) if trained else torch.inference_mode():
            at = 0
            for batch in batches(encoded, size, pad):
                at += len(batch.rows)
                if at <= sums.done:
                    continue
                collector.begin(batch, model.device)
                if trained:
                    _add_gradients(model, batch, trained, sums.gradients)
                else:
                    # The transformer without its head: logits over the vocabulary are not needed.
                    body(model)(**inputs_of(batch, model.device), use_cache=False)
                sums.done = at
                if save:
                    save(sums)
                if progress:
                    progress(at, len(encoded))
    finally:
        for handle in handles:
            handle.remove()
    return sums.finished()


def body(model: Any) -> Any:
    """The transformer without its language-model head."""
    return model.base_model if model.base_model is not model else model


def inputs_of(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {"input_ids": batch.ids.to(device), "attention_mask": batch.attention.to(device)}


@contextmanager
def _gradients_of(trained: Mapping[str, tuple[nn.Parameter, nn.Parameter]]) -> Iterator[None]:
    parameters = [parameter for pair in trained.values() for parameter in pair]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _add_gradients(
    model: Any,
    batch: Batch,
    trained: Mapping[str, tuple[nn.Parameter, nn.Parameter]],
    sums: dict[str, tuple[Tensor, Tensor]],
) -> None:
    labels = batch.ids.masked_fill(~batch.response, -100).to(model.device)
    model(**inputs_of(batch, model.device), labels=labels, use_cache=False).loss.backward()
    add_absolute_gradients(trained, sums)


def add_absolute_gradients(
    trained: Mapping[str, tuple[nn.Parameter, nn.Parameter]], sums: dict[str, tuple[Tensor, Tensor]]
) -> None:
    """Adds |gradient| of every factor to `sums`, and clears it: the next sample starts from zero."""
    for name, pair in trained.items():
        found = []
        for parameter in pair:
            gradient = parameter.grad
            found.append(torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient.float())
            parameter.grad = None
        a, b = (gradient.detach().abs() for gradient in found)
        if name in sums:
            a, b = sums[name][0] + a, sums[name][1] + b
        sums[name] = (a, b)


class _Collector:
    """Adds one batch at a time to the sums, from hooks on the layers' inputs."""

    def __init__(
        self,
        sums: Statistics,
        skip: int,
        factors: Mapping[str, Tensor],
        outputs: frozenset[str],
        conversations: int,
        moments: bool,
    ) -> None:
        self._sum = sums
        self._skip = skip
        self._factors = factors
        self._outputs = outputs
        self._conversations = conversations
        self._moments = moments
        self._recent: deque[tuple[Tensor, str]] = deque(maxlen=RECENT)
        self._all: Tensor = torch.empty(0)
        self._response: Tensor = torch.empty(0)
        self._batch: Batch | None = None

    def begin(self, batch: Batch, device: torch.device) -> None:
        counted = batch.attention.bool()
        counted[:, : self._skip] = False
        self._all = counted.reshape(-1).to(device)
        self._response = batch.response.reshape(-1).to(device)
        self._recent.clear()
        self._batch = batch
        self._sum.tokens += int(counted.sum())
        self._sum.response_tokens += int(batch.response.sum())

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._add(name, inputs[0])

        return before

    def _add(self, name: str, x: Tensor) -> None:
        shared = next((first for tensor, first in self._recent if tensor is x), None)
        if shared is None:
            # The reference held here keeps x alive, so that no later tensor can take its identity.
            self._recent.append((x, name))
        site = self._sum.sites.setdefault(name, shared or name)
        rows = x.detach().reshape(-1, x.shape[-1])
        if len(rows) != len(self._all):
            raise InvalidParameter(
                f"{name}: reads {len(rows)} tokens where the model reads {len(self._all)}; models that send tokens to "
                "some of their layers (mixtures of experts) are not supported.",
                code="model_unsupported",
                param=name,
            )
        if site == name and self._moments:
            counted = rows[self._all].float()
            answers = rows[self._response].float()
            _add_to(self._sum.second_moments, name, counted.T @ counted)
            _add_to(self._sum.means, name, counted.sum(dim=0))
            _add_to(self._sum.response_squares, name, answers.square().sum(dim=0))
        if name in self._factors:
            z = rows[self._response].float() @ self._factors[name].to(rows.device).T
            _add_to(self._sum.grams, name, (z.T @ z).double())
        if name in self._outputs:
            self._keep_last(name, x.detach())

    def _keep_last(self, name: str, x: Tensor) -> None:
        assert self._batch is not None, "begin() comes before every batch"
        if name not in self._sum.last:
            self._sum.last[name] = torch.zeros(self._conversations, LAST_TOKENS, x.shape[-1])
        for j, row in enumerate(self._batch.rows):
            if row >= self._conversations:
                continue
            answer = x[j, self._batch.response[j].to(x.device)][-LAST_TOKENS:].float().cpu()
            missing = LAST_TOKENS - len(answer)
            # Zeros would pull means and directions towards the origin, more so for the kind with shorter answers.
            self._sum.last[name][row] = torch.cat([answer[:1].expand(missing, -1), answer])


def _add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value
