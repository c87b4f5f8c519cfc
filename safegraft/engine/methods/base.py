"""The protocol of a repair method: a few questions per module, and one about all of them.

    reaches(name)          whether it can say anything about a module at all         → the others are left alone
    similarity(module)     how like the reference it is                              → report
    select(similarities)   which modules are repaired, asked once for all            → names, probabilities
    takes_all              whether the answer is all of them, whatever is measured   → one reading fewer
    propose(module)        the repaired update, exactly, of whatever rank it takes   → factors, perhaps a bias
    rank(name, own)        that rank, known without weights                          → the output's layout
    relative(module)       the update relative to the aligned model                  → kept and edit in the report

A method is made for one job from its parameters, the loaded reference and the adapter's lineage, and holds no state
between modules but what it has read of the reference. It sees tensors, never files: `pipeline.py` brings what it
proposes to the customer's rank and dtype, measures what that did, and writes it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, overload

import torch
from torch import Tensor

from safegraft.contracts.reference import Lineage
from safegraft.engine import lowrank
from safegraft.engine.reference import EigenPairs, LoadedReference

# Eigenpairs of so many sites stay in memory during a job, unless V and W are larger than 32 MB of float32 together: the
# wide inputs of down projections, which one module alone reads, are not worth keeping.
RECENT_SITES, RECENT_ENTRIES = 3, 2**22
# Largest entries of a row between which no product with it leaves float32's range.
USUAL = 2.0**-40, 2.0**40

Value = TypeVar("Value")
Fidelity = Literal["paper", "authors' code", "variant"]


class once(Generic[Value]):
    """functools.cached_property without its lock, which in Python 3.11 is one for all instances: modules are worked on
    in parallel, and each by one thread."""

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self._compute = compute

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...
    def __get__(self, instance: object | None, owner: type) -> Self | Value:
        if instance is None:
            return self
        found = instance.__dict__[self._name] = self._compute(instance)
        return found


# What a module keeps of its factors once it is computed.
_OF_A, _OF_B = ("_gram_a", "_projected"), ("_scaled_b", "_gram_b")


@dataclass(frozen=True)
class Module:
    """One adapted layer in float32: ΔW = scaling·b·a with a (r, k) and b (d, r) as the customer's file holds them."""

    name: str
    a: Tensor
    b: Tensor
    scaling: float
    # What was read or computed of the reference for this layer, kept while it and its repaired self are worked on.
    known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @once
    def update(self) -> tuple[Tensor, Tensor]:
        """(B, A) with the scaling folded into B, balanced: however the customer's factors share ΔW's size."""
        b, a = lowrank.balanced(self.b, self.a)
        return self._scaled_b if b is self.b else b * self.scaling, a

    @property
    def is_as_stored(self) -> bool:
        """Whether `update` has the factors as the file has them, the scaling apart: nothing had to be balanced."""
        return self.update[1] is self.a

    @once
    def gram(self) -> Tensor:
        """BᵀB (r, r) of `update`'s B: every norm and inner product of the update needs it."""
        b, _ = self.update
        return self._gram_b if b is self._scaled_b else b.T @ b

    @once
    def gram_of_rows(self) -> Tensor:
        """AAᵀ (r, r) of `update`'s A."""
        _, a = self.update
        return self._gram_a if a is self.a else a @ a.T

    @once
    def energy(self) -> float:
        """‖ΔW‖². Raises InvalidTensors."""
        b, a = self.update
        return max(lowrank.inner(b, a, b, a, of_b=self.gram, of_a=self.gram_of_rows), 0.0)

    @once
    def _gram_a(self) -> Tensor:
        return self.a @ self.a.T

    @once
    def _scaled_b(self) -> Tensor:
        return self.b if self.scaling == 1.0 else self.b * self.scaling

    @once
    def _gram_b(self) -> Tensor:
        return self._scaled_b.T @ self._scaled_b

    def projected(self, pairs: EigenPairs) -> tuple[Tensor, Tensor | None]:
        """(U⁻¹·A·W (r, m), the diagonal of U (r, 1)), computed once for one W.

        U: powers of two near the largest entry of each of A's rows, since the products in between have a wider range
        than A; None for rows of the usual sizes, of which dividing and multiplying by them would change no bit.
        """
        known: tuple[Tensor, Tensor, Tensor | None] | None = self.__dict__.get("_projected")
        if known is None or known[0] is not pairs.w:
            largest = lowrank.largest_along(self.a, 1)[:, None].clamp_min(torch.finfo(self.a.dtype).tiny)
            unit = torch.ldexp(torch.ones_like(largest), largest.frexp().exponent - 1)
            usual = bool(((unit > USUAL[0]) & (unit < USUAL[1])).all())
            known = (pairs.w, self.a @ pairs.w, None) if usual else (pairs.w, (self.a / unit) @ pairs.w, unit)
            self.__dict__["_projected"] = known
        return known[1], known[2]

    def with_factors(self, b: Tensor, a: Tensor) -> "Module":
        """The same layer with other factors. What is known of a factor that stays is not computed again."""
        other = Module(self.name, a, b, self.scaling, self.known)
        stays = (*_OF_A,) * (a is self.a) + (*_OF_B,) * (b is self.b)
        other.__dict__.update({key: self.__dict__[key] for key in stays if key in self.__dict__})
        return other


@dataclass(frozen=True)
class Proposal:
    """ΔW'' = scaling·b·a in the customer's scaling, b (d, q) and a (q, k) of any rank q.

    bias (d,): added to the layer's output as it is, without the scaling; None where there is none.
    """

    b: Tensor
    a: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Kinship:
    """How a customer's adapter is related to the reference's aligned adapter.

    cosine: median over the modules of cos(ΔW_t, ΔW_a), None without a module to compare. lineage: `continued` adapters
    contain the alignment, `fresh` ones sit on the aligned model, `foreign` ones are not known to. same_basis: whether
    A_t still points where A_a does, entry by entry, so that masks on the factors mean the same thing in both.
    """

    lineage: Lineage
    cosine: float | None
    same_basis: bool


@dataclass(frozen=True)
class Selection:
    """Names of the modules to repair, and the probability with which each was drawn (None where nothing was drawn)."""

    names: frozenset[str]
    probability: Mapping[str, float] | None = None


class RecentPairs:
    """Eigenpairs of the sites that are being worked on; one for all strengths of a job. Safe to use from threads."""

    def __init__(self, reference: LoadedReference) -> None:
        self._reference = reference
        self._kept: dict[tuple[str, int | None], EigenPairs] = {}
        self._lock = Lock()

    def get(self, name: str, count: int | None) -> EigenPairs:
        key = self._reference.manifest.base_model.modules[name].site, count
        with self._lock:
            found = self._kept.pop(key, None)
        if found is None:
            found = self._reference.pairs(name, count)
            if found.v.numel() > RECENT_ENTRIES:
                return found
        with self._lock:
            # The latest last: what modules are being worked on stays.
            self._kept[key] = found
            while len(self._kept) > RECENT_SITES:
                self._kept.pop(next(iter(self._kept)))
        return found


class Method(ABC):
    """See the module's text. fidelity: by form, how near it is to what was published; tied to a test."""

    type: ClassVar[str]
    fidelity: ClassVar[Mapping[str, Fidelity]]
    parameters: Any
    similarity_meaning: str
    # The similarity at which a module acts on safety prompts and on general ones alike, where it says so.
    break_even: float | None = None
    explanation: str

    def __init__(self, parameters: Any, reference: LoadedReference, kinship: Kinship) -> None:
        self.parameters = parameters
        self.reference = reference
        self.lineage = kinship.lineage
        # What is unrelated to the aligned adapter is served on the aligned model, as far as anyone can tell.
        self.on_aligned = kinship.lineage != "continued"
        self.recent = RecentPairs(reference)

    def pairs(self, module: Module, count: int | None = None) -> EigenPairs:
        """The reference's eigenpairs, kept for the next modules where they read the same input (as q, k and v do)."""
        key = "pairs", count
        if key not in module.known:
            module.known[key] = self.recent.get(module.name, count)
        found: EigenPairs = module.known[key]
        return found

    @property
    def resolved(self) -> dict[str, str]:
        """What parameters left to the method became."""
        return {}

    @property
    def seed(self) -> int | None:
        """The seed of what was drawn, None where nothing is."""
        return None

    def reaches(self, name: str) -> bool:
        """Whether the reference holds what this method needs for a module."""
        return True

    @property
    def adds_biases(self) -> bool:
        """Whether proposals carry biases, for which the output file needs keys."""
        return False

    def rank(self, name: str, own: int) -> int:
        """The rank of what `propose` gives for a module of rank `own`."""
        return own

    @property
    def takes_all(self) -> bool:
        """Whether `select` takes every module whatever its similarity, so that nothing has to be measured before."""
        return False

    @abstractmethod
    def similarity(self, module: Module) -> float: ...

    def similarity_after(self, before: Module, after: Module) -> float:
        """`similarity` of a repaired module; another question where the repair left the basis in which it is asked."""
        return self.similarity(after)

    @abstractmethod
    def select(self, similarities: Mapping[str, float]) -> Selection: ...

    @abstractmethod
    def propose(self, module: Module) -> Proposal: ...

    def side_car(self) -> dict[str, Tensor]:
        """Tensors to be delivered beside the adapter."""
        return {}

    def relative(self, module: Module) -> tuple[Tensor, Tensor]:
        """(B, A) of the customer's update relative to the aligned model: Δ_t − Δ_a, or Δ_t where it sits on it."""
        aligned = None if self.on_aligned else self.reference.aligned(module.name)
        if aligned is None:
            return module.update
        b, a = aligned
        return lowrank.stack(module.update, (-b, a))

    def total(self, module: Module) -> tuple[Tensor, Tensor]:
        """(B, A) of the update relative to the *unaligned* base: Δ_t, or Δ_a + Δ_t for what sits on the aligned."""
        aligned = self.reference.aligned(module.name) if self.on_aligned else None
        return module.update if aligned is None else lowrank.stack(aligned, module.update)

    def general_share(self, module: Module, *, without: tuple[Tensor, Tensor] | None = None) -> float:
        """√(E_g / (E_g + E_s)), E the mean squared output of the update relative to the aligned model.

        With P = A·W: E_s = ‖B·P·√μ‖², E_g = ‖B·P‖², over the eigenpairs that the reference keeps. 1 for no update.
        without: (B, P) of an update that is taken off before.
        """
        b, a = self.relative(module)
        pairs = self.pairs(module)
        if a is module.a:
            p, unit = module.projected(pairs)
            p = p if unit is None else p * unit
        else:
            p = a @ pairs.w
        if without is not None:
            b, p = lowrank.stack((b, p), (-without[0], without[1]))
        of_b = module.gram if b is module.update[0] else None
        general, safety = lowrank.energies(b, p, pairs.mu, of_b=of_b)
        total = general + safety
        return (max(general, 0.0) / total) ** 0.5 if total > 0 else 1.0


BREAK_EVEN = 0.5**0.5
GENERAL_SHARE = (
    "how much of the fine-tuning's effect falls on general inputs rather than on safety prompts (square root of the "
    "share, in the directions of inputs that the reference keeps): 1 means that it does nothing to safety prompts, "
    "0.71 that it acts on both alike"
)


def everything(similarities: Mapping[str, float]) -> Selection:
    """All modules, whatever their similarity."""
    return Selection(frozenset(similarities))


def lowest(similarities: Mapping[str, float]) -> list[str]:
    """Names from the lowest similarity up; equal ones in the order of their names, so that a run can be repeated."""
    return sorted(similarities, key=lambda name: (similarities[name], name))
