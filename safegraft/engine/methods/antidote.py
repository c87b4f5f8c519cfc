"""Antidote (Huang et al., ICML 2025, arXiv 2408.09600): prune what matters most on harmful prompts.

Wanda's score |W|·‖X‖₂ on harmful prompts, for lora_A over its inputs and for lora_B over Z = X·Aᵀ; of each row the
`density` with the largest scores becomes zero. The published method reads the customer's model on harmful data; here
the inputs are those of the aligned model on the reference's safety prompts, so that no model is needed per adapter:
‖X‖² = diag(C_s) and ‖Z‖² = diag(A·C_s·Aᵀ), both from the eigenpairs, C_s = W·diag(μ)·Wᵀ.

Entries of factors depend on the basis in which training left them: A → M·A, B → B·M⁻¹ is the same update with other
entries. `canonical` prunes in the basis of the SVD with √σ on each side, `stored` as published code does, `rows` prunes
output rows by their mean squared output bᵢ(A·C_s·Aᵀ)bᵢᵀ, which no basis changes.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from safegraft.contracts.methods import AntidoteParameters
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


class Antidote(Method):
    type = "antidote"
    parameters: AntidoteParameters
    fidelity: ClassVar[Mapping[str, Fidelity]] = {"stored": "variant", "canonical": "variant", "rows": "variant"}
    similarity_meaning = GENERAL_SHARE
    break_even = BREAK_EVEN

    def __init__(self, parameters: AntidoteParameters, reference: LoadedReference, kinship: Kinship) -> None:
        super().__init__(parameters, reference, kinship)
        what = "output rows" if parameters.basis == "rows" else "entries of both factors"
        self.explanation = f"The {what} that matter most on harmful prompts were set to zero."

    def similarity(self, module: Module) -> float:
        return self.general_share(module)

    @property
    def takes_all(self) -> bool:
        return self.parameters.density > 0

    def select(self, similarities: Mapping[str, float]) -> Selection:
        """All, as published."""
        return everything(similarities) if self.parameters.density > 0 else Selection(frozenset())

    def propose(self, module: Module) -> Proposal:
        pairs = self.pairs(module)
        b, a = module.b, module.a
        if self.parameters.basis == "rows":
            prune = self._top(_row_energy(b, a, pairs, harmful=True), per_row=False) & ~self._spared_rows(module, pairs)
            return Proposal(b * ~prune[:, None], a)
        if self.parameters.basis == "canonical":
            b, a, _ = lowrank.recompress(b, a, module.rank)
        score_a, score_b = _wanda(b, a, pairs, harmful=True)
        prune_a, prune_b = self._top(score_a, per_row=True), self._top(score_b, per_row=True)
        if self.parameters.spare == "general":
            keep_a, keep_b = _wanda(b, a, pairs, harmful=False)
            prune_a &= ~self._top(keep_a, per_row=True)
            prune_b &= ~self._top(keep_b, per_row=True)
        if not bool(prune_a.any() or prune_b.any()):
            # The same update in another basis would pass for a repair.
            return Proposal(module.b, module.a)
        return Proposal(b * ~prune_b, a * ~prune_a)

    def _spared_rows(self, module: Module, pairs: EigenPairs) -> Tensor:
        if self.parameters.spare == "general":
            return self._top(_row_energy(module.b, module.a, pairs, harmful=False), per_row=False)
        if self.parameters.spare == "safety" and self.reference.reaches(module.name):
            return self.reference.neurons(module.name, "low_rank").rows
        return torch.zeros(module.b.shape[0], dtype=torch.bool, device=module.b.device)

    def _top(self, score: Tensor, *, per_row: bool) -> Tensor:
        # Where the share is less than half an entry, nothing: else an adapter of rank 1 would lose all of its B.
        if round(self.parameters.density * (score.shape[1] if per_row else score.numel())) == 0:
            return torch.zeros_like(score, dtype=torch.bool)
        return lowrank.top_mask(score, self.parameters.density, per_row=per_row)


def _moment(a: Tensor, pairs: EigenPairs, *, harmful: bool) -> Tensor:
    """A·C·Aᵀ (r, r) with C = C_s on harmful prompts, C_g on general ones. A's rows in units of its largest entry."""
    p = a / _unit(a) @ pairs.w
    return (p * pairs.mu if harmful else p) @ p.T


def _unit(a: Tensor) -> Tensor:
    return a.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)


def _row_energy(b: Tensor, a: Tensor, pairs: EigenPairs, *, harmful: bool) -> Tensor:
    """The mean squared output of each row (d,), up to one factor for all."""
    balanced_b, balanced_a = lowrank.balanced(b, a)
    scaled = balanced_b * _unit(balanced_a).T
    size = scaled.abs().max().clamp_min(torch.finfo(b.dtype).tiny)
    return lowrank.output_energy(scaled / size, _moment(balanced_a, pairs, harmful=harmful))


def _wanda(b: Tensor, a: Tensor, pairs: EigenPairs, *, harmful: bool) -> tuple[Tensor, Tensor]:
    """|A|·‖X‖ (r, k) and |B|·‖Z‖ (d, r), up to a factor for each row, which no comparison within rows sees."""
    of_x = (pairs.w.square() @ pairs.mu if harmful else pairs.w.square().sum(dim=1)).clamp_min(0.0).sqrt()
    unit = _unit(a)
    balanced_b, balanced_a = lowrank.balanced(b, a)
    of_z = _moment(balanced_a, pairs, harmful=harmful).diagonal().clamp_min(0.0).sqrt() * _unit(balanced_a)[:, 0]
    return (a / unit).abs() * of_x, balanced_b.abs() * of_z
