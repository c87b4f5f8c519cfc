"""NLSR: neuron-level safety realignment (Yi et al., AAAI 2025, arXiv 2412.12497), without its published code's faults.

The reference brings the amplified update Δ_e = B_e·A_e and the masks M_A, M_B of its safety-critical entries (§ 3.2,
computed offline in `reference.py`). Per adapter (§ 3.3):

    similarity   S = cos((M_B⊙B_e)(M_A⊙A_e), (M_B⊙B_t)(M_A⊙A_t))
    selection    modules with the lowest S are repaired; the paper draws each with probability 1 − P_j, where
                 P_j = P_L + δ·r_j/N for rank r_j by similarity, so that similar modules tend to be skipped. Here the
                 span is centred, P_L + δ·(r_j/N − ½), as in the published code: P_L then is the share that is skipped
    repair       factor   A'' = ¬M_A⊙A_t + M_A⊙A_e, B'' likewise; same rank, but BA carries cross terms
                 paper    B''A'' = (M_B⊙B_e)(M_A⊙A_e) + (¬M_B⊙B_t)(¬M_A⊙A_t), recompressed to the rank
                 neuron   ΔW'' = D·Δ_e + (I−D)·Δ_total, D = the output rows with the largest oᵢ² = bᵢGbᵢᵀ

The first two compare entries of factors, which only means something where the customer continued the aligned adapter;
`neuron` compares updates and serves every adapter. The published code patches the *most* similar modules; this follows
the paper's text.
"""

import math
import random
from collections.abc import Mapping

import torch
from torch import Tensor

from safegraft.contracts.methods import NlsrParameters
from safegraft.engine import lowrank
from safegraft.engine.methods.base import Kinship, Method, Module, Patched, Selection
from safegraft.engine.reference import LoadedReference
from safegraft.errors import Incompatible


class Nlsr(Method):
    type = "nlsr"

    def __init__(self, parameters: NlsrParameters, reference: LoadedReference, kinship: Kinship) -> None:
        super().__init__(parameters, reference, kinship)
        self.parameters = parameters
        shares_factors = self.lineage == "continued" and kinship.same_basis
        form = parameters.form
        if form == "auto":
            form = "factor" if shares_factors else "neuron"
        if form in ("factor", "paper") and not shares_factors:
            relation = "fresh" if self.lineage == "fresh" else "expressed in another basis"
            raise Incompatible(
                f"The form {form!r} needs an adapter that was continued from the aligned one; this one is {relation}.",
                code="lineage_mismatch",
                param="method.form",
                hint="Use the form neuron, or the method gram.",
            )
        self.form = form
        self.explanation = _EXPLANATIONS[form]
        self.similarity_meaning = (
            "cosine between the reference's and the adapter's update, both restricted to the safety-critical "
            + ("output neurons" if form == "neuron" else "entries of the factors")
            + "; 1 means unchanged"
        )

    @property
    def resolved(self) -> dict[str, str]:
        return {"form": self.form}

    @property
    def seed(self) -> int | None:
        return self.parameters.seed if self.parameters.selection == "bernoulli" else None

    def similarity(self, module: Module) -> float:
        safe = self.reference.neurons(module.name)
        if self.form == "neuron":
            b, a = self.total(module)
            return lowrank.cosine(safe.b[safe.rows], safe.a, b[safe.rows], a)
        b, a = module.update
        return lowrank.cosine(safe.b * safe.mask_b, safe.a * safe.mask_a, b * safe.mask_b, a * safe.mask_a)

    def select(self, similarities: Mapping[str, float]) -> Selection:
        """Lowest similarity first; equal ones in the order of their names, so that a run can be repeated."""
        order = sorted(similarities, key=lambda name: (similarities[name], name))
        share = self.parameters.skip_share
        if self.parameters.selection == "lowest":
            # Rounded up: of a single module, half is that module.
            return Selection(frozenset(order[: math.ceil((1.0 - share) * len(order) - 1e-9)]))
        repair = {}
        for rank, name in enumerate(order, start=1):
            skip = share + self.parameters.spread * (rank / len(order) - 0.5)
            repair[name] = 1.0 - min(1.0, max(0.0, skip))
        generator = random.Random(self.parameters.seed)
        return Selection(frozenset(name for name in sorted(repair) if generator.random() < repair[name]), repair)

    def patch(self, module: Module) -> Patched:
        safe = self.reference.neurons(module.name)
        # In the customer's units: whatever the scaling of the two adapters, s_t·B is what PEFT will add.
        b_e = safe.b / module.scaling
        if self.form == "factor":
            return Patched(
                module.with_factors(torch.where(safe.mask_a, safe.a, module.a), torch.where(safe.mask_b, b_e, module.b))
            )
        if self.form == "paper":
            return _recompressed(
                module,
                (b_e * safe.mask_b, safe.a * safe.mask_a),
                (module.b * ~safe.mask_b, module.a * ~safe.mask_a),
            )
        return self._patch_neurons(module, b_e, safe.a, safe.rows)

    def _patch_neurons(self, module: Module, b_e: Tensor, a_e: Tensor, rows: Tensor) -> Patched:
        own = (module.b * ~rows[:, None], module.a)
        if self.lineage == "fresh":
            # Relative to the aligned model, on which a fresh adapter sits, D·Δ_e is only what was amplified: β·D·Δ_a.
            beta = self.reference.amplification
            b_e = b_e * (beta / (1.0 + beta))
            if beta == 0.0:
                return Patched(module.with_factors(module.a, own[0]))
        return _recompressed(module, (b_e * rows[:, None], a_e), own)


def _recompressed(module: Module, *parts: tuple[Tensor, Tensor]) -> Patched:
    b, a, error = lowrank.recompress(*lowrank.stack(*parts), module.rank)
    return Patched(module.with_factors(a, b), error)


_EXPLANATIONS = {
    "factor": "The safety-critical entries of both factors were replaced by those of the amplified aligned adapter.",
    "paper": "The safety-critical part of the update was replaced by the amplified aligned adapter's, and the result "
    "brought back to the adapter's rank.",
    "neuron": "The output rows (neurons) that matter most for safe answers were replaced by the amplified aligned "
    "adapter's, and the result brought back to the adapter's rank.",
}
