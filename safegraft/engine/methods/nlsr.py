"""NLSR: neuron-level safety realignment (Yi et al., AAAI 2025, arXiv 2412.12497), without its published code's faults.

The reference brings the aligned update and the masks M_A, M_B of its safety-critical entries (§ 3.2, computed offline
in `bundle.py`); Δ_e = Δ_a + β(Δ_a − Δ₀) is the amplified update, B_e·A_e in the aligned adapter's own basis. Per
adapter (§ 3.3):

    similarity   S = cos((M_B⊙B_e)(M_A⊙A_e), (M_B⊙B_t)(M_A⊙A_t))
    selection    modules with the lowest S are repaired; the paper draws each with probability 1 − P_j, where
                 P_j = P_L + δ·r_j/N for rank r_j by similarity, so that similar modules tend to be skipped. Here the
                 span is centred, P_L + δ·(r_j/N − ½), as in the published code: P_L then is the share that is skipped
    repair       factor   A'' = ¬M_A⊙A_t + M_A⊙A_e, B'' likewise; same rank, but BA carries cross terms
                 paper    B''A'' = (M_B⊙B_e)(M_A⊙A_e) + (¬M_B⊙B_t)(¬M_A⊙A_t), of twice the rank
                 neuron   ΔW'' = D·Δ_e + (I−D)·Δ_total, D = the output rows that matter most (oᵢ² = bᵢGbᵢᵀ)

The first two compare entries of factors, which only means something where the customer continued the aligned adapter;
`neuron` compares updates and serves every adapter. The published code patches the *most* similar modules; this follows
the paper's text. `highest` and `random` selections, `magnitude` and `random` scorers are controls.
"""

import math
import random
from collections.abc import Mapping
from typing import ClassVar

import torch

from safegraft.compatibility import lineage_mismatch
from safegraft.contracts.methods import NlsrParameters
from safegraft.engine import lowrank
from safegraft.engine.methods.base import Fidelity, Kinship, Method, Module, Proposal, Selection, lowest
from safegraft.engine.reference import LoadedReference, SafetyNeurons, magnitude_neurons, random_neurons


class Nlsr(Method):
    type = "nlsr"
    parameters: NlsrParameters
    fidelity: ClassVar[Mapping[str, Fidelity]] = {"factor": "authors' code", "paper": "paper", "neuron": "variant"}

    def __init__(self, parameters: NlsrParameters, reference: LoadedReference, kinship: Kinship) -> None:
        super().__init__(parameters, reference, kinship)
        given = parameters.amplification
        self.beta = reference.amplification if given is None else given
        shares_factors = self.lineage == "continued" and kinship.same_basis
        form = parameters.form
        if form == "auto":
            form = "factor" if shares_factors else "neuron"
        if form in ("factor", "paper") and not shares_factors:
            raise lineage_mismatch(form, self.lineage if self.on_aligned else "expressed in another basis")
        self.form = form
        self.explanation = _EXPLANATIONS[form]
        self.similarity_meaning = (
            "cosine between the reference's and the adapter's update, both restricted to the safety-critical "
            + ("output neurons" if form == "neuron" else "entries of the factors")
            + "; 1 means unchanged"
        )

    @property
    def resolved(self) -> dict[str, str]:
        return {"form": self.form, "amplification": f"{self.beta:g}"}

    @property
    def seed(self) -> int | None:
        drawn = self.parameters.selection in ("bernoulli", "random") or self.parameters.scorer == "random"
        return self.parameters.seed if drawn else None

    def reaches(self, name: str) -> bool:
        return self.reference.reaches(name)

    def rank(self, name: str, own: int) -> int:
        if self.form == "factor":
            return own
        if self.form == "paper":
            return 2 * own
        return own + (0 if self.on_aligned and self.beta == 0.0 else self.reference.amplified_rank(name, self.beta))

    def similarity(self, module: Module) -> float:
        safe = self._neurons(module.name)
        if self.form == "neuron":
            b_e, a_e = self._amplified(module.name)
            b, a = self.total(module)
            return self._cosine(module.name, b_e[safe.rows], a_e, b[safe.rows], a)
        b_e, a_e = self._on_a(module.name)
        b, a = module.update
        # Numbers are multiplied several times as fast as truth values; each mask is needed twice.
        mask_b, mask_a = safe.mask_b.to(b.dtype), safe.mask_a.to(a.dtype)
        return self._cosine(module.name, b_e * mask_b, a_e * mask_a, b * mask_b, a * mask_a)

    def similarity_after(self, before: Module, after: Module) -> float:
        if self.form != "paper":
            return self.similarity(after)
        # Recompression left the basis of the masks: what stands in the place of the masked part is all that is not
        # the customer's own part.
        safe = self._neurons(before.name)
        b_e, a_e = self._on_a(before.name)
        b, a = before.update
        own = (-b * ~safe.mask_b, a * ~safe.mask_a)
        return self._cosine(before.name, b_e * safe.mask_b, a_e * safe.mask_a, *lowrank.stack(after.update, own))

    def select(self, similarities: Mapping[str, float]) -> Selection:
        order = lowest(similarities)
        share = self.parameters.skip_share
        # Rounded up: of a single module, half is that module.
        count = math.ceil((1.0 - share) * len(order) - 1e-9)
        match self.parameters.selection:
            case "lowest":
                return Selection(frozenset(order[:count]))
            case "highest":
                return Selection(frozenset(order[len(order) - count :]))
            case "random":
                drawn = random.Random(self.parameters.seed).sample(sorted(order), count)
                return Selection(frozenset(drawn), dict.fromkeys(order, count / len(order) if order else 0.0))
        repair = {}
        for rank, name in enumerate(order, start=1):
            skip = share + self.parameters.spread * (rank / len(order) - 0.5)
            repair[name] = 1.0 - min(1.0, max(0.0, skip))
        generator = random.Random(self.parameters.seed)
        return Selection(frozenset(name for name in sorted(repair) if generator.random() < repair[name]), repair)

    def propose(self, module: Module) -> Proposal:
        safe = self._neurons(module.name)
        if self.form == "neuron":
            return self._propose_neurons(module, safe)
        b_e, a_e = self._on_a(module.name)
        # In the customer's units: whatever the scaling of the two adapters, s_t·B is what PEFT will add.
        b_e = b_e / module.scaling
        if self.form == "factor":
            return Proposal(torch.where(safe.mask_b, b_e, module.b), torch.where(safe.mask_a, a_e, module.a))
        theirs = (b_e * safe.mask_b, a_e * safe.mask_a)
        return Proposal(*lowrank.stack(theirs, (module.b * ~safe.mask_b, module.a * ~safe.mask_a)))

    def _propose_neurons(self, module: Module, safe: SafetyNeurons) -> Proposal:
        own = (module.b * ~safe.rows[:, None], module.a)
        # Relative to the aligned model, on which a fresh adapter sits, D·Δ_e is only what was amplified.
        theirs = self.reference.surplus(module.name, self.beta) if self.on_aligned else self._amplified(module.name)
        if theirs is None:
            return Proposal(*own)
        b_e, a_e = theirs
        return Proposal(*lowrank.stack((b_e / module.scaling * safe.rows[:, None], a_e), own))

    def _cosine(self, name: str, b_e: torch.Tensor, a_e: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> float:
        """`lowrank.cosine` of the aligned update's safety-critical part and another's; the first one's norm is the same
        for every adapter, and taken once."""
        parameters = self.parameters
        seed = parameters.seed if parameters.scorer == "random" else None
        part = (name, self.form == "neuron", parameters.scorer, seed, self.beta)
        scale = self.reference.remembered(part, lambda: lowrank.norm(b_e, a_e))
        return lowrank.clamped(lowrank.inner(b_e, a_e, b, a), scale * lowrank.norm(b, a))

    def _amplified(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.reference.amplified(name, self.beta)
        assert found is not None, "asked for modules that the method reaches"
        return found

    def _on_a(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(B_e, A_e) of the aligned adapter's own rank and basis."""
        aligned = self.reference.aligned(name)
        assert aligned is not None, "asked for modules that the method reaches"
        return self.reference.amplified_on_a(name, self.beta), aligned[1]

    def _neurons(self, name: str) -> SafetyNeurons:
        scorer = self.parameters.scorer
        if scorer == "random":
            return random_neurons(self.reference, name, self.parameters.seed)
        if scorer == "magnitude":
            return magnitude_neurons(self.reference, name)
        return self.reference.neurons(name, scorer)


_EXPLANATIONS = {
    "factor": "The safety-critical entries of both factors were replaced by those of the amplified aligned adapter.",
    "paper": "The safety-critical part of the update was replaced by the amplified aligned adapter's.",
    "neuron": "The output rows (neurons) that matter most for safe answers were replaced by the amplified aligned "
    "adapter's.",
}
