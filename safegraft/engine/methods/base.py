"""The protocol of a repair method: three questions per module, and one about all of them.

    similarity(module)     how like the reference it is, before and after        → report
    select(similarities)   which modules are repaired, asked once for all        → names, probabilities
    patch(module)          the repaired factors, in the customer's rank          → factors, truncation error
    relative(module)       the update relative to the aligned model              → kept and edit in the report

A method is made for one job from its parameters, the loaded reference and the adapter's lineage, and holds no state
between modules. It sees tensors, never files.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from safegraft.contracts.reference import Lineage
from safegraft.engine import lowrank
from safegraft.engine.reference import LoadedReference


@dataclass(frozen=True)
class Module:
    """One adapted layer in float32: ΔW = scaling·b·a with a (r, k) and b (d, r) as the customer's file holds them."""

    name: str
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def update(self) -> tuple[Tensor, Tensor]:
        """(B, A) with the scaling folded into B, balanced: however the customer's factors share ΔW's size."""
        b, a = lowrank.balanced(self.b, self.a)
        return b * self.scaling, a

    def with_factors(self, a: Tensor, b: Tensor) -> "Module":
        return replace(self, a=a, b=b)


@dataclass(frozen=True)
class Kinship:
    """How a customer's adapter is related to the reference's aligned adapter.

    cosine: median over the modules of cos(ΔW_t, ΔW_a). lineage: `continued` adapters contain the alignment, `fresh`
    ones sit on the aligned model. same_basis: whether A_t still points where A_a does, entry by entry, so that masks on
    the factors mean the same thing in both.
    """

    lineage: Lineage
    cosine: float
    same_basis: bool


@dataclass(frozen=True)
class Selection:
    """Names of the modules to repair, and the probability with which each was drawn (None where nothing was drawn)."""

    names: frozenset[str]
    probability: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Patched:
    """Repaired factors; truncation_error = ‖what was cut off‖_F / ‖exact update‖_F."""

    module: Module
    truncation_error: float = 0.0


class Method(ABC):
    """See the module's text."""

    type: ClassVar[str]
    similarity_meaning: str
    explanation: str

    def __init__(self, parameters: Any, reference: LoadedReference, kinship: Kinship) -> None:
        self.reference = reference
        self.lineage = kinship.lineage

    @property
    def resolved(self) -> dict[str, str]:
        """What parameters left to the method became."""
        return {}

    @property
    def seed(self) -> int | None:
        """The seed of what was drawn, None where nothing is."""
        return None

    @abstractmethod
    def similarity(self, module: Module) -> float: ...

    @abstractmethod
    def select(self, similarities: Mapping[str, float]) -> Selection: ...

    @abstractmethod
    def patch(self, module: Module) -> Patched: ...

    def relative(self, module: Module) -> tuple[Tensor, Tensor]:
        """(B, A) of the customer's update relative to the aligned model: Δ_t − Δ_a, or Δ_t where it sits on it."""
        aligned = self.reference.aligned(module.name) if self.lineage == "continued" else None
        if aligned is None:
            return module.update
        b, a = aligned
        return lowrank.stack(module.update, (-b, a))

    def total(self, module: Module) -> tuple[Tensor, Tensor]:
        """(B, A) of the update relative to the *unaligned* base: Δ_t, or Δ_a + Δ_t for fresh adapters."""
        aligned = self.reference.aligned(module.name) if self.lineage == "fresh" else None
        return module.update if aligned is None else lowrank.stack(aligned, module.update)
