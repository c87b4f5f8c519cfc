"""Attention heads that tell safe from unsafe answers (SafetyLock, arXiv 2410.10343, § 3).

From the inputs of each attention output projection at the last tokens of safe and of unsafe answers: per head the
direction θ = unit(mean safe − mean unsafe), the standard deviation σ of all activations along it, and how well a linear
probe tells the two apart. The published code ranks heads by the mean of the probe's accuracy on answers that it saw and
on the 40 % that it did not, and splits single tokens; here whole conversations are split, so that no answer is on both
sides. Where probes tell everything apart, as they do where unsafe answers are one placeholder, accuracies are equal and
the distance between the two kinds decides.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HELD_OUT = 0.4
RIDGE = 1e-2
# Of means that nothing spreads around; a number that JSON can hold.
SEPARATE = 1e6
_OUTPUTS = ("o_proj", "dense", "out_proj", "wo", "c_proj")


@dataclass(frozen=True)
class Heads:
    """All heads of one output projection: directions (heads, size), sigma (heads,), accuracy (heads,), and separation
    (heads,), the distance of the two means along the direction in standard deviations within them."""

    directions: Tensor
    sigma: Tensor
    accuracy: Tensor
    separation: Tensor


def attention_outputs(config: Any, modules: Iterable[str], inputs: dict[str, int]) -> dict[str, int]:
    """Output projection of an attention → its number of heads, told by their names in the known families."""
    count = getattr(config, "num_attention_heads", None)
    if not isinstance(count, int) or count < 1:
        return {}
    found = {}
    for name in modules:
        *parents, last = name.split(".")
        if last in _OUTPUTS and parents and "att" in parents[-1] and inputs[name] % count == 0:
            found[name] = count
    return found


def measure_heads(safe: Tensor, unsafe: Tensor, heads: int, seed: int = 0) -> Heads:
    """safe, unsafe: (conversation, token, k) inputs of one output projection; k = heads · size."""
    samples = torch.stack([safe, unsafe]).double()  # (2, n, t, k)
    _, n, tokens, k = samples.shape
    split = samples.reshape(2, n, tokens, heads, k // heads).permute(3, 0, 1, 2, 4)  # (heads, 2, n, t, size)
    difference = split[:, 0].mean(dim=(1, 2)) - split[:, 1].mean(dim=(1, 2))
    length = difference.norm(dim=1, keepdim=True)
    directions = torch.where(length > 0, difference / length.clamp_min(1e-30), 0.0)
    along = torch.einsum("hcnts,hs->hcnt", split, directions)
    sigma = along.reshape(heads, -1).std(dim=1, correction=0)
    flat = along.reshape(heads, 2, -1)
    within = flat.var(dim=2, correction=0).mean(dim=1).sqrt()
    apart = flat[:, 0].mean(dim=1) - flat[:, 1].mean(dim=1)
    separation = torch.where(apart > 0, apart / within.clamp_min(1e-30), 0.0).clamp_max(SEPARATE)
    return Heads(directions, sigma, _probe(split, seed), separation)


def _probe(split: Tensor, seed: int) -> Tensor:
    """Accuracy (heads,) of a ridge-regularised least-squares classifier, seen and unseen answers averaged."""
    heads, _, n, tokens, size = split.shape
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    unseen = max(1, round(HELD_OUT * n))
    label = torch.tensor([1.0, -1.0], dtype=split.dtype)

    def flat(conversations: Tensor) -> tuple[Tensor, Tensor]:
        chosen = split[:, :, conversations].reshape(heads, -1, size)
        return chosen, label.repeat_interleave(len(conversations) * tokens)

    # With a single pair there is nothing to hold out; it is then judged on what it saw.
    seen, y = flat(order[unseen:] if n > 1 else order)
    # In place of an intercept, which the ridge would hold down: there are as many answers of either kind.
    centre = seen.mean(dim=1, keepdim=True)
    x = seen - centre
    gram = x.transpose(1, 2) @ x
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)
    gram = gram + ridge[:, None, None] * torch.eye(size, dtype=x.dtype)
    weights = torch.linalg.solve(gram, (x.transpose(1, 2) @ y)[..., None])
    parts = [(seen, y), flat(order[:unseen])]
    right = [((((part - centre) @ weights)[..., 0] * wanted) > 0).double().mean(dim=1) for part, wanted in parts]
    mean: Tensor = (right[0] + right[1]) / 2
    return mean
