"""gram: activation-weighted transplant. Like the reference on safety prompts, like the customer elsewhere.

With C_s, C_g the second moments of a module's inputs on safety and on general prompts, the update that minimises
E_safety‖(Δ − Δ_e)x‖² + λ·E_general‖(Δ − Δ_t)x‖² is Δ_t + (Δ_e − Δ_t)·K, K = C_s(C_s + λC_g)⁻¹. Kin: RegMean (ICLR
2023), AlphaEdit's null space (ICLR 2025).

Relative to the aligned model (Δ_a = 0 there), with β = 0, a fresh adapter becomes just A'' = A(I − K): same rank, same
keys, B untouched, no reference adapter needed. A continued adapter contains Δ_a, so Δ'' = Δ_t(I − K) + Δ_e·K, and
β > 0 adds β(Δ_a − Δ₀)·K to a fresh one: both have a higher rank. With the eigenpairs of a reference,
A·K = Σ μ/(μ+λ)·(A·w)·vᵀ, so that λ, β and the number of pairs are chosen per job.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from safegraft.contracts.methods import GramParameters
from safegraft.engine import lowrank
from safegraft.engine.methods.base import (
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
    explanation = (
        "What the fine-tuning added on inputs that look like safety prompts was removed, weighted by how much such "
        "inputs differ from general ones; its effect on other inputs was kept."
    )
    similarity_meaning = GENERAL_SHARE

    def __init__(self, parameters: GramParameters, reference: LoadedReference, kinship: Kinship) -> None:
        super().__init__(parameters, reference, kinship)

    def rank(self, name: str, own: int) -> int:
        beta = self.parameters.amplification
        transplants = not self.on_aligned or beta > 0
        return own + (self.reference.amplified_rank(name, beta) if transplants else 0)

    def similarity(self, module: Module) -> float:
        return self.general_share(module)

    def select(self, similarities: Mapping[str, float]) -> Selection:
        """All: the damage is spread over every layer, and the repair leaves sound ones nearly alone."""
        return everything(similarities)

    def propose(self, module: Module) -> Proposal:
        pairs = self.pairs(module.name, self.parameters.pairs)
        left = module.a - self._through_k(module.a, pairs)
        beta = self.parameters.amplification
        wanted = self.reference.surplus if self.on_aligned else self.reference.amplified
        target = wanted(module.name, beta)
        if target is None:
            return Proposal(module.b, left)
        b, a = target
        return Proposal(*lowrank.stack((module.b, left), (b / module.scaling, self._through_k(a, pairs))))

    def _through_k(self, a: Tensor, pairs: EigenPairs) -> Tensor:
        """A·K (r, k)."""
        gain = pairs.mu / (pairs.mu + self.parameters.general_weight)
        # Row by row in units of its largest entry: the products in between have a wider range than A has.
        unit = a.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
        return (((a / unit) @ pairs.w) * gain) @ pairs.v.T * unit
