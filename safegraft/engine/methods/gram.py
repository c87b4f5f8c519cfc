"""gram: activation-weighted transplant. Like the reference on safety prompts, like the customer elsewhere.

With C_s, C_g the second moments of a module's inputs on safety and on general prompts, the update that minimises
E_safety‖(Δ − Δ_e)x‖² + λ·E_general‖(Δ − Δ_t)x‖² is Δ_t + (Δ_e − Δ_t)·K, K = C_s(C_s + λC_g)⁻¹. Kin: RegMean (ICLR
2023), AlphaEdit's null space (ICLR 2025).

Relative to the aligned model (Δ_a = 0 there), with β = 0, a fresh adapter becomes just A'' = A(I − K): same rank, same
keys, B untouched, no reference adapter needed. A continued adapter contains Δ_a, so Δ'' = Δ_t(I − K) + Δ_e·K, and
β > 0 adds β(Δ_a − Δ₀)·K to a fresh one: both have a higher rank. With the eigenpairs of a reference,
A·K = Σ μ/(μ+λ)·(A·w)·vᵀ, so that λ, β and the number of pairs are chosen per job.

By default the gain is steeper, μᵖ/(μᵖ + λᵖ) with p = 2, which is the minimiser for C_s·C_g⁻¹·C_s in the place of C_s
and λ² in that of λ: safety inputs count the more, the less general ones look like them (docs/decisions/0010).
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from safegraft.contracts.methods import GramParameters
from safegraft.engine import lowrank
from safegraft.engine.methods.base import (
    BREAK_EVEN,
    GENERAL_SHARE,
    Fidelity,
    Kinship,
    Method,
    Module,
    Proposal,
    Selection,
    everything,
)
from safegraft.engine.reference import EigenPairs, LoadedReference


class Gram(Method):
    type = "gram"
    parameters: GramParameters
    fidelity: ClassVar[Mapping[str, Fidelity]] = {"gram": "variant"}
    similarity_meaning = GENERAL_SHARE
    break_even = BREAK_EVEN

    def __init__(self, parameters: GramParameters, reference: LoadedReference, kinship: Kinship) -> None:
        super().__init__(parameters, reference, kinship)
        self.explanation = (
            "What the fine-tuning added was removed from the directions of inputs that safety prompts use more than "
            "general ones do, as far as the strength asks for it; its effect on other inputs was kept."
        )
        if parameters.amplification > 0:
            self.explanation += " On such inputs the aligned adapter's own behaviour was amplified."

    def rank(self, name: str, own: int) -> int:
        beta = self.parameters.amplification
        transplants = not self.on_aligned or beta > 0
        return own + (self.reference.amplified_rank(name, beta) if transplants else 0)

    def similarity(self, module: Module) -> float:
        return self.general_share(module)

    def similarity_after(self, before: Module, after: Module) -> float:
        """Of what is left of the customer's own: without what the repair itself put on safety inputs."""
        push = self._push(after)
        if push is None:
            return self.general_share(after)
        b, a = push
        return self.general_share(after, without=(b, a @ self.pairs(after).w))

    def _push(self, module: Module) -> tuple[Tensor, Tensor] | None:
        """(B, A) of (Δ_e − Δ_a)·K, None where it is zero. Kept until the repaired module was measured."""
        # Several strengths of one job share what is known of a module.
        own = self.parameters
        key = "push", own.amplification, own.general_weight, own.steepness, own.pairs
        if key not in module.known:
            pairs = self.pairs(module, self.parameters.pairs)
            surplus = self.reference.surplus(module.name, self.parameters.amplification)
            push = None if surplus is None else (surplus[0], _back(surplus[1] @ pairs.w, self._gain(pairs), pairs))
            module.known[key] = push
        found: tuple[Tensor, Tensor] | None = module.known[key]
        return found

    @property
    def takes_all(self) -> bool:
        return True

    def select(self, similarities: Mapping[str, float]) -> Selection:
        """All: the damage is spread over every layer, and the repair leaves sound ones nearly alone."""
        return everything(similarities)

    def propose(self, module: Module) -> Proposal:
        pairs = self.pairs(module, self.parameters.pairs)
        gain = self._gain(pairs)
        p, unit = module.projected(pairs)
        if unit is None:
            left = torch.addmm(module.a, p * gain, pairs.v.T, alpha=-1.0)
        else:
            left = module.a - _back(p, gain, pairs) * unit
        if self.on_aligned:
            push = self._push(module)
        else:
            target = self.reference.amplified(module.name, self.parameters.amplification)
            push = None if target is None else (target[0], _back(target[1] @ pairs.w, gain, pairs))
        if push is None:
            return Proposal(module.b, left)
        b, a = push
        return Proposal(*lowrank.stack((module.b, left), (b / module.scaling, a)))

    def _gain(self, pairs: EigenPairs) -> Tensor:
        """μᵖ/(μᵖ + λᵖ) (m,), as 1/(1 + (λ/μ)ᵖ): no power of a tiny or a huge μ leaves float32's range by itself."""
        return 1.0 / (1.0 + (self.parameters.general_weight / pairs.mu.clamp_min(0.0)) ** self.parameters.steepness)


def _back(p: Tensor, gain: Tensor, pairs: EigenPairs) -> Tensor:
    """A·K (r, k) from P = A·W (r, m)."""
    return (p * gain) @ pairs.v.T
