"""SafetyLock (Zhu et al., arXiv 2410.10343): push attention heads along their direction from unsafe to safe answers.

The reference brings, for every head of every attention output, the direction θ, the standard deviation σ of activations
along it, and how well a probe tells answers apart there. The K best heads get the displacement α·σ·θ; with d the
displacements of a layer's heads side by side, its output projection then adds the constant b = W·d, where W is the
projection as the adapter is served: W_o, plus the aligned update where the adapter sits on the aligned model, plus
the adapter's own s·B·A.

    lora_bias   b as the bias of lora_B (PEFT's `lora_bias`): exact; other servers do not load it
    rank_one    ΔW + b·uᵀ with u = E[xxᵀ]⁻¹E[x], so that uᵀx ≈ 1: approximate, loads everywhere; the manifest holds
                the error E(1 − uᵀx)² of every layer
    side_car    b in a file beside the adapter, which stays as it is
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from safegraft.compatibility import top_heads
from safegraft.contracts.methods import SafetyLockParameters
from safegraft.engine import lowrank
from safegraft.engine.methods.base import Fidelity, Kinship, Method, Module, Proposal, Selection
from safegraft.engine.reference import LoadedReference


class SafetyLock(Method):
    type = "safetylock"
    parameters: SafetyLockParameters
    fidelity: ClassVar[Mapping[str, Fidelity]] = {"lora_bias": "paper", "side_car": "paper", "rank_one": "variant"}
    similarity_meaning = (
        "how much of the wanted push towards safe answers an attention output carries, on the mean input: 0 before, 1 "
        "where it is there in full; modules of which none is wanted show 1"
    )

    def __init__(self, parameters: SafetyLockParameters, reference: LoadedReference, kinship: Kinship) -> None:
        super().__init__(parameters, reference, kinship)
        self.chosen = top_heads(reference.manifest, parameters.heads)
        pushed = sum(len(heads) for heads in self.chosen.values())
        self.explanation = (
            f"{pushed} attention {'head was' if pushed == 1 else 'heads were'} pushed along the direction from unsafe "
            "to safe answers"
            + (
                {
                    "rank_one": ", by an update of rank one on their output projections.",
                    "lora_bias": ", by biases on their output projections.",
                    "side_car": "; the biases are in a file of their own, the adapter is as it was.",
                }[parameters.output]
            )
        )

    @property
    def resolved(self) -> dict[str, str]:
        heads = "; ".join(f"{layer}: {', '.join(map(str, found))}" for layer, found in self.chosen.items())
        return {"heads": heads}

    @property
    def adds_biases(self) -> bool:
        return self.parameters.output == "lora_bias"

    def reaches(self, name: str) -> bool:
        return name in self.chosen

    def rank(self, name: str, own: int) -> int:
        return own + 1 if self.parameters.output == "rank_one" else own

    def similarity(self, module: Module) -> float:
        return 0.0

    def similarity_after(self, before: Module, after: Module) -> float:
        if self.parameters.output != "rank_one":
            return 1.0
        wanted, heads = self._bias(before), self.reference.heads(before.name)
        (b, a), (own_b, own_a) = after.update, before.update
        added = b @ (a @ heads.mean) - own_b @ (own_a @ heads.mean)
        size = float(wanted.double().square().sum())
        return float(added.double() @ wanted.double()) / size if size > 0 else 1.0

    def select(self, similarities: Mapping[str, float]) -> Selection:
        if self.parameters.output == "side_car" or self.parameters.strength == 0:
            return Selection(frozenset())
        return Selection(frozenset(similarities))

    def propose(self, module: Module) -> Proposal:
        bias = self._bias(module)
        if self.parameters.output == "lora_bias":
            return Proposal(module.b, module.a, bias)
        constant = self.reference.heads(module.name).constant
        return Proposal(
            *lowrank.stack((module.b, module.a), (bias[:, None] / module.scaling, constant[None, :].to(bias.dtype)))
        )

    def side_car(self) -> dict[str, Tensor]:
        """<attention output>.displacement (k,): the push on the layer's input, from which any server makes its bias.

        And .bias (d,) = W·d for the model without the customer's own part, which needs the adapter to add s·B(A·d).
        """
        if self.parameters.output != "side_car":
            return {}
        found: dict[str, Tensor] = {}
        for name in self.chosen:
            displacement, bias = self._displacement(name)
            found |= {f"{name}.displacement": displacement, f"{name}.bias": bias}
        return found

    def _displacement(self, name: str) -> tuple[Tensor, Tensor]:
        """d (k,) and W·d (d,) of the model on which the adapter sits."""
        heads = self.reference.heads(name)
        push = heads.sigma.new_zeros(len(heads.sigma))
        push[self.chosen[name]] = self.parameters.strength * heads.sigma[self.chosen[name]]
        displacement = (push[:, None] * heads.directions).reshape(-1)
        bias = push @ heads.shift
        # The reference's W_o is that of the model which its statistics ran on, without adapters: the unaligned base
        # where the alignment is an adapter, the aligned model where it is a full one.
        has_alignment = self.reference.manifest.origin.source in ("checkpoints", "none")
        aligned = self.reference.aligned(name) if has_alignment != self.on_aligned else None
        if aligned is not None:
            shift = aligned[0] @ (aligned[1] @ displacement)
            bias = bias - shift if has_alignment else bias + shift
        return displacement, bias

    def _bias(self, module: Module) -> Tensor:
        displacement, bias = self._displacement(module.name)
        b, a = module.update
        return bias + b @ (a @ displacement)
