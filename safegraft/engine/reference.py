"""The reference bundle: built once by the operator, held in memory by workers, used for every adapter.

A folder with `manifest.json`, `nlsr.safetensors` (where an aligned adapter was given) and `gram.safetensors` (where
general prompts were given):

    nlsr:  <module>.A (r, k), <module>.B (d, r)   the amplified update Δ_e = B·A, scaling and 1+β folded into B; float32
           <module>.G (r, r)                      ZᵀZ over the safe answers' tokens; float64
           <module>.mask_A, .mask_B, .rows        bit-packed: entries of A, entries of B, output rows; uint8
    gram:  <site>.V, <site>.W (k, m), <site>.mu   generalised eigenpairs C_s·v = μ·C_g·v, W = C_g·V; bfloat16, float32

With these K = C_s(C_s + λC_g)⁻¹ = Σ μ/(μ+λ)·w·vᵀ for any λ ≥ .01, and no k×k matrix is needed again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import safegraft
from safegraft.bundle import GRAM, MANIFEST, NLSR, read_manifest, reference_id, verify_bundle
from safegraft.contracts.reference import (
    AlignedAdapter,
    AlignedModule,
    BaseModelIdentity,
    BaseModule,
    BuildParameters,
    BundleFile,
    GramStatistics,
    PromptSet,
    ReferenceManifest,
)
from safegraft.engine import lowrank
from safegraft.engine.statistics import Statistics
from safegraft.engine.tensors import NAMES, TensorReader, TensorWriter
from safegraft.files import atomic_file, atomic_folder, sha256_file, write_atomic

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildSettings:
    """amplification β and sparsity P_SR as in NLSR § 3; mask_scope: share per row (the paper) or over the whole factor.

    ridge: ε in C_g + ε·tr(C_g)/k·I, without which directions that no general prompt uses would have no scale.
    smallest_pair: eigenpairs with μ below it are dropped; they would contribute less than 5 % of themselves at the
    smallest λ that is accepted (.01), and .2 % at the default (.3).
    """

    amplification: float = 0.9
    sparsity: float = 0.8
    mask_scope: Literal["row", "factor"] = "row"
    ridge: float = 1e-2
    smallest_pair: float = 5e-4
    max_tokens: int = 1024
    answer_tokens: int = 32
    batch_size: int = 8
    device: str = "cpu"


@dataclass(frozen=True)
class Ingredients:
    """What was measured on the models, from which a bundle follows without them.

    shapes: linear layer → (outputs, inputs); factors: module → (B with the scaling folded in, A) of the aligned
    adapter, float32; general is None where the method gram is not wanted.
    """

    labels: list[str]
    config_sha256: str
    architecture: str
    dtype: str
    shapes: dict[str, tuple[int, int]]
    aligned_sha256: str
    aligned_config_sha256: str
    skipped_prefix: int
    factors: dict[str, tuple[Tensor, Tensor]]
    safety: Statistics
    safety_prompts: PromptSet
    general: Statistics | None = None
    general_prompts: PromptSet | None = None


def write_bundle(
    out: Path,
    ingredients: Ingredients,
    settings: BuildSettings,
    progress: Progress = lambda stage, done, total: None,
) -> ReferenceManifest:
    """Writes the bundle `out`, which must not exist yet; it appears whole or not at all."""
    sites = ingredients.safety.sites
    with atomic_folder(out) as folder:
        aligned = _write_nlsr(folder / NLSR, ingredients.factors, ingredients.safety, settings, progress)
        gram = None
        if ingredients.general is not None:
            gram = _write_gram(folder / GRAM, ingredients.safety, ingredients.general, settings, progress)
        manifest = ReferenceManifest(
            name=out.name,
            created_at=int(time.time()),
            safegraft_version=safegraft.__version__,
            base_model=BaseModelIdentity(
                labels=ingredients.labels,
                config_sha256=ingredients.config_sha256,
                architecture=ingredients.architecture,
                modules={
                    name: BaseModule(outputs=d, inputs=k, site=sites[name])
                    for name, (d, k) in ingredients.shapes.items()
                },
            ),
            aligned=AlignedAdapter(
                sha256=ingredients.aligned_sha256, config_sha256=ingredients.aligned_config_sha256, modules=aligned
            ),
            safety_prompts=ingredients.safety_prompts,
            general_prompts=ingredients.general_prompts,
            parameters=BuildParameters(
                amplification=settings.amplification,
                sparsity=settings.sparsity,
                mask_scope=settings.mask_scope,
                ridge=settings.ridge,
                smallest_pair=settings.smallest_pair,
                max_tokens=settings.max_tokens,
                answer_tokens=settings.answer_tokens,
                batch_size=settings.batch_size,
                skipped_prefix=ingredients.skipped_prefix,
                dtype=ingredients.dtype,
                device=settings.device,
            ),
            gram=gram,
            methods=["nlsr", "gram"] if gram else ["nlsr"],
            lineages=["continued", "fresh"],
            files={
                path.name: BundleFile(sha256=sha256_file(path), bytes=path.stat().st_size)
                for path in sorted(folder.glob("*.safetensors"))
            },
        )
        write_atomic(folder / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
    return manifest


def _write_nlsr(
    path: Path,
    factors: dict[str, tuple[Tensor, Tensor]],
    statistics: Statistics,
    settings: BuildSettings,
    progress: Progress,
) -> dict[str, AlignedModule]:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (b, a) in factors.items():
        (d, r), k = b.shape, a.shape[1]
        shapes |= {
            f"{name}.A": ("F32", (r, k)),
            f"{name}.B": ("F32", (d, r)),
            f"{name}.G": ("F64", (r, r)),
            f"{name}.mask_A": ("U8", (-(-r * k // 8),)),
            f"{name}.mask_B": ("U8", (-(-d * r // 8),)),
            f"{name}.rows": ("U8", (-(-d // 8),)),
        }
    share = 1.0 - settings.sparsity
    per_row = settings.mask_scope == "row"
    modules = {}
    with atomic_file(path) as file:
        writer = TensorWriter(file, shapes)
        for done, (name, (b, a)) in enumerate(factors.items(), start=1):
            g = statistics.grams[name].cpu()
            rank = a.shape[0]
            count = max(1, round(rank * share))
            # Weak-to-strong extrapolation from a base whose own update is zero: W_e = (1 + β)·W_a, all on B.
            amplified = b * (1.0 + settings.amplification)
            masks = {
                "mask_A": lowrank.top_mask(lowrank.low_rank_a(a, g, count).abs(), share, per_row=per_row),
                "mask_B": lowrank.top_mask(lowrank.low_rank_b(amplified, g, count).abs(), share, per_row=per_row),
                "rows": lowrank.top_mask(lowrank.output_energy(amplified, g.float()), share, per_row=False),
            }
            writer.write(f"{name}.A", a)
            writer.write(f"{name}.B", amplified)
            writer.write(f"{name}.G", g)
            for kind, mask in masks.items():
                writer.write(f"{name}.{kind}", lowrank.pack_mask(mask))
            modules[name] = AlignedModule(rank=rank, norm=lowrank.norm(amplified, a))
            progress("safety masks", done, len(factors))
        writer.close()
    return modules


def _write_gram(
    path: Path, safety: Statistics, general: Statistics, settings: BuildSettings, progress: Progress
) -> GramStatistics:
    pairs: dict[str, int] = {}
    energy: dict[str, float] = {}
    # Sizes are only known after the decomposition, so each site's pairs wait here as bf16, half the size of one C.
    waiting: dict[str, Tensor] = {}
    for done, (site, c_s) in enumerate(safety.second_moments.items(), start=1):
        mu, v, w = generalized_eigenpairs(c_s, general.second_moments[site], settings.ridge)
        kept = max(1, int((mu >= settings.smallest_pair).sum()))
        pairs[site] = kept
        energy[site] = float(mu[:kept].sum() / mu.sum()) if float(mu.sum()) > 0 else 1.0
        waiting |= {
            f"{site}.V": v[:, :kept].to(torch.bfloat16).contiguous(),
            f"{site}.W": w[:, :kept].to(torch.bfloat16).contiguous(),
            f"{site}.mu": mu[:kept].float().contiguous(),
        }
        progress("eigenpairs", done, len(safety.second_moments))
    with atomic_file(path) as file:
        writer = TensorWriter(file, {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in waiting.items()})
        for name, tensor in waiting.items():
            writer.write(name, tensor)
        writer.close()
    return GramStatistics(pairs=pairs, energy=energy)


def generalized_eigenpairs(c_s: Tensor, c_g: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """C_s·v = μ·(C_g + ridge·tr(C_g)/k·I)·v, largest μ first, in float64.

    Returns μ (k,), V (k, k) and W = C_g·V (k, k), so that VᵀW = I, C_s = W·diag(μ)·Wᵀ and C_g = W·Wᵀ.
    """
    c_s, c_g = c_s.double(), c_g.double()
    k = c_g.shape[0]
    scale = float(c_g.diagonal().mean()) or 1.0
    regular = c_g + ridge * scale * torch.eye(k, dtype=c_g.dtype, device=c_g.device)
    lower = torch.linalg.cholesky(regular)
    half = torch.linalg.solve_triangular(lower, c_s, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.T.contiguous(), upper=False)
    mu, u = torch.linalg.eigh((whitened + whitened.T) / 2)
    mu, u = mu.flip(0).clamp_min(0.0), u.flip(1)
    v = torch.linalg.solve_triangular(lower.T.contiguous(), u.contiguous(), upper=True)
    return mu, v, lower @ u


@dataclass(frozen=True)
class SafetyNeurons:
    """What NLSR transplants in one module: the amplified update and what of it is safety-critical."""

    a: Tensor
    b: Tensor
    mask_a: Tensor
    mask_b: Tensor
    rows: Tensor


@dataclass(frozen=True)
class EigenPairs:
    """μ (m,), V (k, m), W (k, m) of one site, float32."""

    mu: Tensor
    v: Tensor
    w: Tensor


class LoadedReference:
    """A verified bundle with its tensors in memory on `device`, shared by all jobs of a worker."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Raises CorruptReference unless every file is the one that was built."""
        self.manifest = verify_bundle(folder)
        _, self.sha256 = read_manifest(folder)
        self.device = device
        self._tensors: dict[str, Tensor] = {}
        for name in self.manifest.files:
            with TensorReader(folder / name) as reader:
                for key in reader.header.tensors:
                    self._tensors[key] = reader.tensor(key).to(device)

    @property
    def id(self) -> str:
        return reference_id(self.sha256)

    @property
    def amplification(self) -> float:
        return self.manifest.parameters.amplification

    def aligned(self, module: str) -> tuple[Tensor, Tensor] | None:
        """(B, A) of the aligned update Δ_a (β = 0), scaling folded into B; None where it does not reach the module."""
        if f"{module}.B" not in self._tensors:
            return None
        return self._tensors[f"{module}.B"] / (1.0 + self.amplification), self._tensors[f"{module}.A"]

    def neurons(self, module: str) -> SafetyNeurons:
        """The amplified update of a module with its masks."""
        a, b = self._tensors[f"{module}.A"], self._tensors[f"{module}.B"]
        return SafetyNeurons(
            a=a,
            b=b,
            mask_a=lowrank.unpack_mask(self._tensors[f"{module}.mask_A"], tuple(a.shape)).to(self.device),
            mask_b=lowrank.unpack_mask(self._tensors[f"{module}.mask_B"], tuple(b.shape)).to(self.device),
            rows=lowrank.unpack_mask(self._tensors[f"{module}.rows"], (b.shape[0],)).to(self.device),
        )

    def pairs(self, module: str) -> EigenPairs:
        """The eigenpairs of the input that a module reads."""
        site = self.manifest.base_model.modules[module].site
        return EigenPairs(
            mu=self._tensors[f"{site}.mu"], v=self._tensors[f"{site}.V"].float(), w=self._tensors[f"{site}.W"].float()
        )
