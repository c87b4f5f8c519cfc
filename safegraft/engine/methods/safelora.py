"""SafeLoRA (Hsu et al., NeurIPS 2024, arXiv 2405.16833): back into the subspace of the alignment.

V = W_aligned − W_base of a module, C = V·Vᵀ/‖V‖_F (eq. 2). Where cos(C·ΔW, ΔW) ≤ τ, or in the K modules with the lowest
cosine, ΔW becomes C·ΔW. C is no projector: its eigenvalues are σ²/‖V‖_F, so it mostly shrinks; `orthogonal` is the
projector U·Uᵀ onto V's column space.

C (d, d) is never formed: with V = B_a·A_a, C·B = B_a[(A_a·A_aᵀ)(B_aᵀ·B)]/‖B_a·A_a‖_F. Modules are paired by name; the
published code pairs them by order, which gives an adapter on some layers the wrong C.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from safegraft.contracts.methods import SafeLoraParameters
from safegraft.engine import lowrank
from safegraft.engine.methods.base import Fidelity, Kinship, Method, Module, Proposal, Selection, lowest
from safegraft.engine.reference import LoadedReference

# Directions of V below this share of the largest are rounding.
RANK_TOLERANCE = 1e-6


class SafeLora(Method):
    type = "safelora"
    parameters: SafeLoraParameters
    fidelity: ClassVar[Mapping[str, Fidelity]] = {"paper": "paper", "orthogonal": "variant"}
    similarity_meaning = (
        "cosine between the update and its projection onto the alignment's subspace; 1 means that it lies within"
    )

    def __init__(self, parameters: SafeLoraParameters, reference: LoadedReference, kinship: Kinship) -> None:
        super().__init__(parameters, reference, kinship)
        self.explanation = "The update was replaced by its projection onto the subspace of the alignment" + (
            ", C = V·Vᵀ/‖V‖, which mostly shrinks it." if parameters.projector == "paper" else "."
        )

    def reaches(self, name: str) -> bool:
        return self.reference.reaches(name)

    def similarity(self, module: Module) -> float:
        b, a = module.update
        projected, of_a = self._projected(module.name, b), module.gram_of_rows
        own, size = module.energy, max(lowrank.inner(projected, a, projected, a, of_a=of_a), 0.0)
        return lowrank.clamped(lowrank.inner(projected, a, b, a, of_a=of_a), math.sqrt(own) * math.sqrt(size))

    def select(self, similarities: Mapping[str, float]) -> Selection:
        if self.parameters.selection == "lowest":
            return Selection(frozenset(lowest(similarities)[: self.parameters.modules]))
        return Selection(frozenset(name for name, found in similarities.items() if found <= self.parameters.threshold))

    def propose(self, module: Module) -> Proposal:
        # C acts on each column of B alone; in units of its largest entry none leaves float32's range on the way.
        unit = module.b.abs().amax(dim=0, keepdim=True).clamp_min(torch.finfo(module.b.dtype).tiny)
        return Proposal(self._projected(module.name, module.b / unit) * unit, module.a)

    def _projected(self, name: str, b: Tensor) -> Tensor:
        """C·B (d, r)."""
        aligned = self.reference.aligned(name)
        assert aligned is not None, "asked for modules that the method reaches"
        v_b, v_a = aligned
        if self.parameters.projector == "paper":
            size = self.reference.norm(name)
            return v_b @ ((v_a @ v_a.T) @ (v_b.T @ b)) / size if size > 0 else torch.zeros_like(b)
        u = column_space(v_b, v_a)
        projected: Tensor = u @ (u.T @ b)
        return projected


def column_space(b: Tensor, a: Tensor) -> Tensor:
    """An orthonormal basis U (d, q) of the columns of BA, q its numerical rank."""
    q, r_b = torch.linalg.qr(b)
    r_a = torch.linalg.qr(a.T).R
    u, sigma, _ = torch.linalg.svd(r_b.double() @ r_a.T.double())
    kept = int((sigma > RANK_TOLERANCE * sigma[0]).sum()) if sigma.numel() else 0
    basis: Tensor = q @ u[:, :kept].to(q.dtype)
    return basis
