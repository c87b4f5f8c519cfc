"""gram: activation-weighted transplant. Like the reference on safety prompts, like the customer elsewhere.

With C_s, C_g the second moments of a module's inputs on safety and on general prompts, the update that minimises
E_safety‖(Δ − Δ_e)x‖² + λ·E_general‖(Δ − Δ_t)x‖² is Δ_t + (Δ_e − Δ_t)·K, K = C_s(C_s + λC_g)⁻¹. Kin: RegMean (ICLR
2023), AlphaEdit's null space (ICLR 2025).

Relative to the aligned model (Δ_a = 0 there), with β = 0, a fresh adapter becomes just A'' = A(I − K): same rank, same
keys, B untouched, no reference adapter needed. A continued adapter contains Δ_a, so Δ'' = Δ_t(I − K) + Δ_e·K, and
β > 0 adds β(Δ_a − Δ₀)·K to a fresh one: both have a higher rank. With β > 0 what is left of the customer's update meets
a pull towards the reference, so that λ can be larger (docs/decisions/0010-gram-defaults.md). With the eigenpairs of a
reference, A·K = Σ μ/(μ+λ)·(A·w)·vᵀ, so that λ, β and the number of pairs are chosen per job.
"""

from collections.abc import Mapping
from typing import ClassVar

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

# Defaults, from docs/evidence: where the reference goes beyond the aligned behaviour on safety inputs, more of the
# customer's update may stay at the same harm score.
AMPLIFICATION, AMPLIFIED_WEIGHT, PLAIN_WEIGHT = 1.0, 1.0, 0.3


class Gram(Method):
    type = "gram"
    parameters: GramParameters
    fidelity: ClassVar[Mapping[str, Fidelity]] = {"gram": "variant"}
    similarity_meaning = GENERAL_SHARE

    def __init__(self, parameters: GramParameters, reference: LoadedReference, kinship: Kinship) -> None:
        super().__init__(parameters, reference, kinship)
        given = parameters.amplification
        # An alignment that was not trained as an adapter may be the whole of an instruction tuning: nothing to double.
        trained = reference.manifest.origin.source in ("adapter", "two_adapters")
        self.beta = (AMPLIFICATION if trained else 0.0) if given is None else given
        self.explanation = (
            "What the fine-tuning added on inputs that look like safety prompts was removed, weighted by how much such "
            "inputs differ from general ones; its effect on other inputs was kept."
        )
        if self.beta > 0:
            self.explanation += " On such inputs the aligned adapter's own behaviour was amplified."

    @property
    def resolved(self) -> dict[str, str]:
        if self.parameters.general_weight is not None:
            weight = f"{self.parameters.general_weight:g}"
        elif self.beta > 0:
            weight = f"{AMPLIFIED_WEIGHT:g}; {PLAIN_WEIGHT:g} where nothing is amplified"
        else:
            weight = f"{PLAIN_WEIGHT:g}"
        return {"general_weight": weight, "amplification": f"{self.beta:g}"}

    def general_weight(self, name: str) -> float:
        """λ of a module."""
        if self.parameters.general_weight is not None:
            return self.parameters.general_weight
        amplified = self.beta > 0 and self.reference.reaches(name)
        return AMPLIFIED_WEIGHT if amplified else PLAIN_WEIGHT

    def rank(self, name: str, own: int) -> int:
        transplants = not self.on_aligned or self.beta > 0
        return own + (self.reference.amplified_rank(name, self.beta) if transplants else 0)

    def similarity(self, module: Module) -> float:
        return self.general_share(module)

    def similarity_after(self, before: Module, after: Module) -> float:
        """Of what is left of the customer's own: without what the repair itself put on safety inputs."""
        surplus = self.reference.surplus(after.name, self.beta)
        if surplus is None:
            return self.general_share(after)
        pairs = self.pairs(after)
        push_b, push_a = surplus
        # (Δ_e − Δ_a)·K·W = (Δ_e − Δ_a)·W·diag(gain).
        push = push_b, (push_a @ pairs.w) * _gain(pairs, self.general_weight(after.name))
        return self.general_share(after, without=push)

    @property
    def takes_all(self) -> bool:
        return True

    def select(self, similarities: Mapping[str, float]) -> Selection:
        """All: the damage is spread over every layer, and the repair leaves sound ones nearly alone."""
        return everything(similarities)

    def propose(self, module: Module) -> Proposal:
        pairs = self.pairs(module, self.parameters.pairs)
        weight = self.general_weight(module.name)
        p, unit = module.projected(pairs)
        left = module.a - _back(p, pairs, weight) * unit
        wanted = self.reference.surplus if self.on_aligned else self.reference.amplified
        target = wanted(module.name, self.beta)
        if target is None:
            return Proposal(module.b, left)
        b, a = target
        return Proposal(*lowrank.stack((module.b, left), (b / module.scaling, _back(a @ pairs.w, pairs, weight))))


def _back(p: Tensor, pairs: EigenPairs, general_weight: float) -> Tensor:
    """A·K (r, k) from P = A·W (r, m)."""
    return (p * _gain(pairs, general_weight)) @ pairs.v.T


def _gain(pairs: EigenPairs, general_weight: float) -> Tensor:
    """μ/(μ+λ) (m,): K = W·diag(gain)·Vᵀ, and K·W = W·diag(gain)."""
    return pairs.mu / (pairs.mu + general_weight)
