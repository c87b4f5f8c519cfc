"""A reference bundle as the methods see it: updates, masks, eigenpairs and heads by module.

On the CPU tensors are read when they are asked for and dropped afterwards, so a worker's memory stays flat however
large the reference is; the operating system's page cache keeps what is used. On a GPU they stay on the device.
"""

import hashlib
import weakref
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safegraft.bundle import read_manifest, reference_id, verify_bundle
from safegraft.contracts.reference import Scorer
from safegraft.engine import lowrank
from safegraft.engine.bundle import extrapolated
from safegraft.engine.tensors import TensorReader

# Numbers that a loaded reference keeps; some modules have several.
_REMEMBERED = 2**16


@dataclass(frozen=True)
class SafetyNeurons:
    """What of a module is safety-critical: entries of A (r, k) and of B (d, r), and output rows (d,). Boolean."""

    mask_a: Tensor
    mask_b: Tensor
    rows: Tensor


@dataclass(frozen=True)
class EigenPairs:
    """μ (m,), V (k, m), W (k, m) of one site, float32."""

    mu: Tensor
    v: Tensor
    w: Tensor


@dataclass(frozen=True)
class SafetyHeads:
    """The heads of one attention output: directions θ (heads, size), σ (heads,), W_o[:, head]·θ (heads, d), the mean
    input (k,), and u (k,) with uᵀx ≈ 1."""

    directions: Tensor
    sigma: Tensor
    shift: Tensor
    mean: Tensor
    constant: Tensor


class LoadedReference:
    """A verified bundle, shared by all jobs of a worker."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Raises CorruptReference unless every file is the one that was built."""
        self.manifest = verify_bundle(folder)
        _, self.sha256 = read_manifest(folder)
        self.device = device
        # Held open: a reference that is removed while it is in use stays readable.
        self._files = ExitStack()
        weakref.finalize(self, self._files.close)
        self._reader_of: dict[str, TensorReader] = {}
        self._resident: dict[str, Tensor] = {}
        self._remembered: dict[Hashable, float] = {}
        for name in self.manifest.files:
            reader = self._files.enter_context(TensorReader(folder / name))
            for key in reader.header.tensors:
                self._reader_of[key] = reader
                if device != "cpu":
                    self._resident[key] = reader.tensor(key).to(device)

    def close(self) -> None:
        """Gives files and memory back."""
        self._files.close()
        self._resident.clear()

    def _get(self, key: str) -> Tensor:
        found = self._resident.get(key)
        return found if found is not None else self._reader_of[key].tensor(key)

    @property
    def id(self) -> str:
        return reference_id(self.sha256)

    @property
    def amplification(self) -> float:
        """β that the masks were made for."""
        return self.manifest.parameters.amplification

    def reaches(self, module: str) -> bool:
        """Whether the aligned update changes this module."""
        return module in self.manifest.aligned

    def aligned(self, module: str) -> tuple[Tensor, Tensor] | None:
        """(B, A) of the aligned update Δ_a, float32, scaling folded into B; None where it does not reach the module."""
        found = self.manifest.aligned.get(module)
        if found is None:
            return None
        return self._get(f"{module}.B").float() * found.scaling, self._get(f"{module}.A").float()

    def weak(self, module: str) -> tuple[Tensor, Tensor] | None:
        """(B, A) of the weak adapter's update Δ₀ likewise; None where it is zero."""
        found = self.manifest.aligned.get(module)
        if found is None or found.weak_rank is None:
            return None
        return self._get(f"{module}.weak_B"), self._get(f"{module}.weak_A")

    def amplified(self, module: str, beta: float) -> tuple[Tensor, Tensor] | None:
        """(B, A) of Δ_e = Δ_a + β(Δ_a − Δ₀), exactly; its rank is both adapters' together where there are two."""
        strong, weak = self.aligned(module), self.weak(module)
        if strong is None:
            return None
        if weak is None or beta == 0.0:
            return strong[0] * (1.0 + beta), strong[1]
        return extrapolated(strong, weak, beta)

    def surplus(self, module: str, beta: float) -> tuple[Tensor, Tensor] | None:
        """(B, A) of Δ_e − Δ_a = β(Δ_a − Δ₀): what amplification adds to the aligned model. None where it is zero."""
        strong, weak = self.aligned(module), self.weak(module)
        if strong is None or beta == 0.0:
            return None
        own = (strong[0] * beta, strong[1])
        return own if weak is None else lowrank.stack(own, (weak[0] * -beta, weak[1]))

    def amplified_rank(self, module: str, beta: float) -> int:
        """The rank of `amplified`, and of `surplus` where β > 0; 0 where the aligned update does not reach."""
        found = self.manifest.aligned.get(module)
        if found is None:
            return 0
        return found.rank + ((found.weak_rank or 0) if beta > 0 else 0)

    def amplified_on_a(self, module: str, beta: float) -> Tensor:
        """B_e (d, r) such that B_e·A_a is what of Δ_e lies in A_a's rows; all of it where there is no weak adapter."""
        strong = self.aligned(module)
        assert strong is not None, "asked for modules that the reference reaches"
        amplified = strong[0] * (1.0 + beta)
        return amplified if self.weak(module) is None else amplified - beta * self._get(f"{module}.weak_on_A")

    def neurons(self, module: str, scorer: Scorer) -> SafetyNeurons:
        """The safety-critical entries and rows of a module."""
        found, base = self.manifest.aligned[module], self.manifest.base_model.modules[module]

        def mask(kind: str, *shape: int) -> Tensor:
            return lowrank.unpack_mask(self._get(f"{module}.{kind}.{scorer}"), shape).to(self.device)

        return SafetyNeurons(
            mask_a=mask("mask_A", found.rank, base.inputs),
            mask_b=mask("mask_B", base.outputs, found.rank),
            rows=mask("rows", base.outputs),
        )

    def pairs(self, module: str, count: int | None = None) -> EigenPairs:
        """The eigenpairs of the input that a module reads, or the `count` largest."""
        site = self.manifest.base_model.modules[module].site
        return EigenPairs(
            mu=self._get(f"{site}.mu")[:count],
            v=self._get(f"{site}.V")[:, :count].float(),
            w=self._get(f"{site}.W")[:, :count].float(),
        )

    def norm(self, module: str) -> float:
        """‖Δ_a‖_F of a module that the aligned update reaches; computed once."""

        def computed() -> float:
            strong = self.aligned(module)
            assert strong is not None, "asked for modules that the reference reaches"
            return lowrank.norm(*strong)

        return self.remembered((module,), computed)

    def remembered(self, key: Hashable, computed: Callable[[], float]) -> float:
        """What depends on this reference and on `key` alone, whatever the adapter: computed for the first that asks."""
        found = self._remembered.get(key)
        if found is None:
            # Keys hold what customers choose, strengths for one.
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            found = self._remembered[key] = computed()
        return found

    def heads(self, module: str) -> SafetyHeads:
        """The heads of an attention output that safetylock knows."""
        return SafetyHeads(
            *(self._get(f"{module}.{part}") for part in ("directions", "sigma", "shift", "mean", "constant"))
        )


def random_neurons(reference: LoadedReference, module: str, seed: int) -> SafetyNeurons:
    """As many entries and rows as the other scorers take, drawn by chance (control)."""
    found, base = reference.manifest.aligned[module], reference.manifest.base_model.modules[module]
    # A name's own stream: the draw for one module does not depend on which others an adapter has.
    generator = torch.Generator().manual_seed(_mixed(seed, module))

    def score(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(reference.device)

    return _top(reference, score(found.rank, base.inputs), score(base.outputs, found.rank), score(base.outputs))


def magnitude_neurons(reference: LoadedReference, module: str) -> SafetyNeurons:
    """The largest entries and the rows with the largest norm of the amplified update (control)."""
    strong, exact = reference.aligned(module), reference.amplified(module, reference.amplification)
    if strong is None or exact is None:
        raise KeyError(module)
    on_a = reference.amplified_on_a(module, reference.amplification)
    b, a = exact
    return _top(reference, strong[1].abs(), on_a.abs(), lowrank.output_energy(b, a @ a.T))


def _top(reference: LoadedReference, of_a: Tensor, of_b: Tensor, of_rows: Tensor) -> SafetyNeurons:
    parameters = reference.manifest.parameters
    share, per_row = 1.0 - parameters.sparsity, parameters.mask_scope == "row"
    return SafetyNeurons(
        mask_a=lowrank.top_mask(of_a, share, per_row=per_row),
        mask_b=lowrank.top_mask(of_b, share, per_row=per_row),
        rows=lowrank.top_mask(of_rows, share, per_row=False),
    )


def _mixed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
