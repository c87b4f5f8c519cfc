"""Gradients of a preference loss with respect to the aligned adapter's factors ("preference-SNIP").

The plain variant, SNIP on the safe answers' loss, needs no pass of its own: `statistics.gather` takes it on the way.
Here the loss compares a safe with an unsafe answer to the same prompt, as in DPO (arXiv 2305.18290, eq. 7), with the
aligned model as the policy and the same model without its adapter as the reference:

    L = −log σ(β·[(log π(safe) − log π₀(safe)) − (log π(unsafe) − log π₀(unsafe))])
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from safegraft.engine.conversations import Encoded, batches
from safegraft.engine.statistics import Statistics, add_absolute_gradients, inputs_of

PREFERENCE_BETA = 0.1


def preference_gradients(
    model: Any,
    without_adapter: Callable[[], AbstractContextManager[Any]],
    trained: Mapping[str, tuple[nn.Parameter, nn.Parameter]],
    safe: Sequence[Encoded],
    unsafe: Sequence[Encoded],
    *,
    pad: int,
    state: Statistics | None = None,
    save: Callable[[Statistics], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """module → (Σ|∂L/∂A|, Σ|∂L/∂B|) over the pairs, one pair at a time. float32.

    state: what an interrupted run had gathered, and save: is called with it after every pair.
    """
    parameters = [parameter for pair in trained.values() for parameter in pair]
    sums = state or Statistics()
    for done, pair in enumerate(zip(safe, unsafe, strict=True), start=1):
        if done <= sums.done:
            continue
        with torch.no_grad(), without_adapter():
            anchor = [_log_likelihood(model, item, pad) for item in pair]
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            good, bad = (_log_likelihood(model, item, pad) for item in pair)
            margin = PREFERENCE_BETA * ((good - anchor[0]) - (bad - anchor[1]))
            (-nn.functional.logsigmoid(margin)).backward()  # type: ignore[no-untyped-call]
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
        add_absolute_gradients(trained, sums.gradients)
        sums.done = done
        if save:
            save(sums)
        if progress:
            progress(done, len(safe))
    return sums.gradients


def _log_likelihood(model: Any, item: Encoded, pad: int) -> Tensor:
    """log π(answer | prompt), summed over the answer's tokens."""
    batch = next(iter(batches([item], 1, pad)))
    logits = model(**inputs_of(batch, model.device), use_cache=False).logits[0, :-1].float()
    wanted = batch.ids[0, 1:].to(logits.device)
    chosen = logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
    total: Tensor = chosen[batch.response[0, 1:].to(logits.device)].sum()
    return total
