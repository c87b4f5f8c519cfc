"""gram: activation-weighted transplant. Like the reference on safety prompts, like the customer elsewhere.

With C_s, C_g the second moments of a module's inputs on safety and on general prompts, the update that minimises
E_safety‖(Δ − Δ_a)x‖² + λ·E_general‖(Δ − Δ_t)x‖² is Δ_t + (Δ_a − Δ_t)·K, K = C_s(C_s + λC_g)⁻¹. Kin: RegMean (ICLR
2023), AlphaEdit's null space (ICLR 2025).

Relative to the aligned model (Δ_a = 0 there) a fresh adapter becomes just A'' = A(I − K): same rank, same keys, B
untouched, no reference adapter needed. A continued adapter contains Δ_a, so Δ'' = Δ_t(I − K) + Δ_a·K has twice the rank
and is recompressed. With the eigenpairs of `reference.py`, A·K = Σ μ/(μ+λ)·(A·w)·vᵀ.

Not here yet: an amplified reference (β > 0).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from safegraft.contracts.methods import GramParameters
from safegraft.engine import lowrank
from safegraft.engine.methods.base import Kinship, Method, Module, Patched, Selection
from safegraft.engine.reference import EigenPairs, LoadedReference


class Gram(Method):
    type = "gram"
    explanation = (
        "What the fine-tuning added on inputs that look like safety prompts was removed, weighted by how much such "
        "inputs differ from general ones; its effect on other inputs was kept."
    )
    similarity_meaning = (
        "how much of the fine-tuning's effect falls on general inputs rather than on safety prompts (square root of "
        "the share): 1 means that it does nothing to safety prompts, 0.71 that it acts on both alike"
    )

    def __init__(self, parameters: GramParameters, reference: LoadedReference, kinship: Kinship) -> None:
        super().__init__(parameters, reference, kinship)
        self.general_weight = parameters.general_weight

    def similarity(self, module: Module) -> float:
        """√(E_g / (E_g + E_s)), E the mean squared output of the update relative to the aligned model.

        With P = A·W: E_s = ‖B·P·√μ‖², E_g = ‖B·P‖², over the eigenpairs that the reference keeps.
        """
        b, a = self.relative(module)
        pairs = self.reference.pairs(module.name)
        p = a @ pairs.w
        general = lowrank.inner(b, p, b, p)
        safety = lowrank.inner(b, p * pairs.mu, b, p)
        total = general + safety
        return (max(general, 0.0) / total) ** 0.5 if total > 0 else 1.0

    def select(self, similarities: Mapping[str, float]) -> Selection:
        """All: the damage is spread over every layer, and the repair leaves sound ones nearly alone."""
        return Selection(frozenset(similarities))

    def patch(self, module: Module) -> Patched:
        pairs = self.reference.pairs(module.name)
        removed = self._through_k(module.a, pairs)
        aligned = self.reference.aligned(module.name) if self.lineage == "continued" else None
        if aligned is None:
            return Patched(module.with_factors(module.a - removed, module.b))
        b_a, a_a = aligned
        stacked = lowrank.stack((module.b, module.a - removed), (b_a / module.scaling, self._through_k(a_a, pairs)))
        b, a, error = lowrank.recompress(*stacked, module.rank)
        return Patched(module.with_factors(a, b), error)

    def _through_k(self, a: Tensor, pairs: EigenPairs) -> Tensor:
        """A·K (r, k)."""
        gain = pairs.mu / (pairs.mu + self.general_weight)
        # Row by row in units of its largest entry: the products in between have a wider range than A has.
        unit = a.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
        return (((a / unit) @ pairs.w) * gain) @ pairs.v.T * unit
