"""Where the aligned update Δ_a comes from: one adapter, a weak and a strong one, or two full checkpoints.

All end as factors by module. The difference of two checkpoints is streamed tensor by tensor and truncated to a rank; a
full difference is never held for more than one module.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from safegraft.adapter import CONFIG, WEIGHTS, AdapterDescription, describe
from safegraft.contracts.reference import Source
from safegraft.engine.tensors import TensorReader
from safegraft.errors import Incompatible, InvalidParameter, InvalidTensors
from safegraft.files import sha256_file
from safegraft.header import TensorEntry

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Of the randomised decomposition: columns beyond the wanted rank, and power iterations.
OVERSAMPLING, ITERATIONS = 16, 4


@dataclass(frozen=True)
class AlignedFactors:
    """Δ_a = scaling·b·a of one module, a (r, k), b (d, r) in the dtype in which they were trained.

    weak: (B₀ with its scaling folded in, A₀) of the weaker adapter in float32, or None where that is zero.
    truncation_error: ‖what the rank cut off‖ / ‖difference of the checkpoints‖.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    weak: tuple[Tensor, Tensor] | None = None
    truncation_error: float = 0.0

    @property
    def update(self) -> tuple[Tensor, Tensor]:
        """(B, A) in float32, the scaling folded into B."""
        return self.b.float() * self.scaling, self.a.float()

    @property
    def stacked_a(self) -> Tensor:
        """[A_a; A₀] in float32: one G over it holds what every extrapolation needs."""
        return self.a.float() if self.weak is None else torch.cat([self.a.float(), self.weak[1]])


@dataclass(frozen=True)
class AlignedUpdate:
    """The aligned update by module, where it came from, and the labels that its files carry."""

    source: Source
    factors: dict[str, AlignedFactors] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)


def from_adapters(strong: Path, weak: Path | None, shapes: Mapping[str, tuple[int, int]]) -> AlignedUpdate:
    """One adapter, or two. Raises Incompatible where one does not fit the base model, InvalidTensors (`non_finite`)."""
    description = describe(strong)
    check_shapes(description, shapes, "aligned")
    files = _hashes(strong, "")
    others: dict[str, tuple[Tensor, Tensor]] = {}
    if weak is not None:
        beside = describe(weak)
        check_shapes(beside, shapes, "weak")
        files |= _hashes(weak, "weak/")
        with TensorReader(weak / WEIGHTS, beside.header) as reader:
            for module in beside.modules:
                b = _finite(reader, module.b).float() * module.scaling
                others[module.name] = (b, _finite(reader, module.a).float())
        missing = sorted(others.keys() - {module.name for module in description.modules})
        if missing:
            raise Incompatible(
                f"{missing[0]}: the weak adapter reaches it, the aligned one does not.",
                code="weak_mismatch",
                param=missing[0],
            )
    factors = {}
    with TensorReader(strong / WEIGHTS, description.header) as reader:
        for module in description.modules:
            factors[module.name] = AlignedFactors(
                a=_finite(reader, module.a),
                b=_finite(reader, module.b),
                scaling=module.scaling,
                weak=others.get(module.name),
            )
    label = description.config.base_model_name_or_path
    return AlignedUpdate("two_adapters" if weak else "adapter", factors, files, [label] if label else [])


def from_checkpoints(
    base: Path,
    aligned: Path,
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AlignedUpdate:
    """The difference of two full models, truncated to `rank` by a randomised SVD with a fixed seed.

    Modules that do not differ are left out. Raises Incompatible where a weight is missing, has another shape or is not
    finite.
    """
    factors = {}
    with Checkpoint(base) as before, Checkpoint(aligned) as after:
        for done, (name, shape) in enumerate(shapes.items(), start=1):
            key = f"{name}.weight"
            pair = [checkpoint.tensor(key).to(device).float() for checkpoint in (before, after)]
            for checkpoint, weight in zip((before, after), pair, strict=True):
                if tuple(weight.shape) != shape:
                    raise Incompatible(
                        f"{name}: {checkpoint.folder} holds {list(weight.shape)}, the model has {list(shape)}.",
                        code="base_mismatch",
                        param=name,
                    )
            difference = pair[1] - pair[0]
            if not bool(torch.isfinite(difference).all()):
                raise Incompatible(f"{name}: a weight is NaN or infinite.", code="non_finite", param=name)
            if bool(difference.any()):
                b, a, error = truncate(difference, rank)
                factors[name] = AlignedFactors(a=a.cpu(), b=b.cpu(), truncation_error=error)
            progress(done, len(shapes))
        files = {f"base/{k}": v for k, v in before.hashes().items()} | {
            f"aligned/{k}": v for k, v in after.hashes().items()
        }
    if not factors:
        raise InvalidParameter(
            "The two checkpoints are the same in every linear layer; there is no alignment between them.",
            code="no_aligned_update",
            param="aligned",
            hint="If the model is aligned already, give it as --aligned and leave --base out.",
        )
    return AlignedUpdate("checkpoints", factors, files)


def truncate(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(B (d, r), A (r, k), relative error) nearest to `difference` up to the randomised SVD's own error.

    The error is exact for the factors that are returned: with V ≈ UΣWᵀ and U from an orthonormal basis of V's image,
    ‖V − UΣWᵀ‖² = ‖V‖² − Σσ².
    """
    kept = min(rank, *difference.shape)
    wider = min(kept + OVERSAMPLING, *difference.shape)
    devices = [difference.device] if difference.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        u, sigma, w = torch.svd_lowrank(difference, q=wider, niter=ITERATIONS)
    root = sigma[:kept].clamp_min(0.0).sqrt()
    total = float(difference.double().square().sum())
    lost = max(0.0, total - float(sigma[:kept].double().square().sum()))
    return u[:, :kept] * root, root[:, None] * w[:, :kept].T, (lost / total) ** 0.5 if total > 0 else 0.0


class Checkpoint:
    """Weights of a model folder by name, over all of its shards. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = ExitStack()
        self._readers: dict[str, TensorReader] = {}
        self._shard_of: dict[str, str] = {}

    def __enter__(self) -> "Checkpoint":
        for shard in _shards(self.folder):
            reader = self._open.enter_context(TensorReader(self.folder / shard))
            self._readers[shard] = reader
            self._shard_of |= dict.fromkeys(reader.header.tensors, shard)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def tensor(self, key: str) -> Tensor:
        """Raises Incompatible where the checkpoint does not hold it."""
        # Checkpoints of a bare transformer leave out the prefix that the full model gives to its layers.
        for name in (key, key.partition(".")[2]):
            if name in self._shard_of:
                return self._readers[self._shard_of[name]].tensor(name)
        raise Incompatible(f"{self.folder} holds no {key}.", code="weight_missing", param=key)

    def hashes(self) -> dict[str, str]:
        return {shard: sha256_file(self.folder / shard) for shard in self._readers}


def _shards(folder: Path) -> Iterator[str]:
    if (folder / SINGLE).is_file():
        yield SINGLE
        return
    if not (folder / INDEX).is_file():
        raise InvalidParameter(
            f"{folder} holds neither {SINGLE} nor {INDEX}.", code="base_not_found", param=str(folder)
        )
    try:
        shards = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidParameter(
            f"{folder / INDEX} is no index of weights.", code="base_not_found", param=str(folder)
        ) from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not (folder / shard).is_file():
            raise InvalidParameter(
                f"{folder / INDEX} names {shard!r}, which is no file beside it.",
                code="base_not_found",
                param=str(folder),
            )
        yield shard


def _hashes(folder: Path, prefix: str) -> dict[str, str]:
    # The configuration holds the scaling, so it decides the update as much as the weights do.
    return {f"{prefix}{name}": sha256_file(folder / name) for name in (WEIGHTS, CONFIG)}


def _finite(reader: TensorReader, entry: TensorEntry) -> Tensor:
    tensor = reader.tensor(entry.name)
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidTensors(f"{entry.name} holds NaN or infinity.", code="non_finite", param=entry.name)
    return tensor


def check_shapes(adapter: AdapterDescription, shapes: Mapping[str, tuple[int, int]], which: str) -> None:
    """Raises Incompatible where a module is not among `shapes`, name → (outputs d, inputs k). which: in words."""
    for module in adapter.modules:
        if shapes.get(module.name) != (module.outputs, module.inputs):
            raise Incompatible(
                f"{module.name}: the {which} adapter is for {module.outputs}x{module.inputs}, the base model has "
                f"{shapes.get(module.name, 'no such layer')}.",
                code="base_mismatch",
                param=module.name,
            )
