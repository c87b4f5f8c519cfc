"""From what was measured on the models to a reference bundle: masks, eigenpairs, heads, manifest.

A folder with `manifest.json` and, where they were asked for and possible:

    nlsr.safetensors        <module>.A (r, k), .B (d, r)            the aligned update as trained, its own dtype
                            <module>.weak_A, .weak_B                the weak adapter's, scaling folded into B; float32
                            <module>.weak_on_A (d, r)               B₀A₀A⁺, the weak update in A's rows; float32
                            <module>.G (r', r')                     ZᵀZ over the safe answers' tokens; float64
                            <module>.mask_A.<scorer>, .mask_B.…     bit-packed: safety-critical entries; uint8
                            <module>.rows.<scorer>                  bit-packed: safety-critical output rows; uint8
    gram.safetensors        <site>.V, .W (k, m), .mu (m,)           generalised eigenpairs C_s·v = μ·C_g·v, W = C_g·V
    safetylock.safetensors  <output>.directions (heads, size), .sigma (heads,), .shift (heads, d) = W_o[:, head]·θ,
                            .mean (k,), .constant (k,)              E[x], and u with uᵀx ≈ 1; all float32

With the eigenpairs K = C_s(C_s + λC_g)⁻¹ = Σ μ/(μ+λ)·w·vᵀ for any λ ≥ .01, and no k×k matrix is needed again.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import safegraft
from safegraft.bundle import GRAM, MANIFEST, NLSR, SAFETYLOCK
from safegraft.contracts.reference import (
    AlignedModule,
    BaseModelIdentity,
    BaseModule,
    BuildParameters,
    BundleFile,
    GramStatistics,
    HeadLayer,
    Lineage,
    Origin,
    PromptSet,
    ReferenceManifest,
    SafetyLockStatistics,
    Scorer,
)
from safegraft.engine import lowrank
from safegraft.engine.checkpoint import Checkpoint
from safegraft.engine.heads import Heads
from safegraft.engine.sources import AlignedFactors, AlignedUpdate
from safegraft.engine.statistics import Statistics
from safegraft.engine.tensors import NAMES, TensorReader, TensorWriter
from safegraft.files import atomic_file, atomic_folder, sha256_file, write_atomic

Progress = Callable[[str, int, int], None]
# Of the mean of E[xxᵀ]'s diagonal: what keeps the constant u of a rank-one update from leaning on single directions.
CONSTANT_RIDGE = 1e-2


@dataclass(frozen=True)
class BuildSettings:
    """amplification β and sparsity P_SR as in NLSR § 3; mask_scope: share per row (the paper) or over the whole factor.

    snip, preference_snip: also score by gradients, which costs a pass back. ridge: ε in C_g + ε·tr(C_g)/k·I, without
    which directions that no general prompt uses would have no scale. smallest_pair: eigenpairs with μ below it are
    dropped, and max_pairs: no more than so many a site. Pairs with a small μ change no repair, but hold most of C_g,
    which the report's similarity and Antidote's spared entries need. rank: to which the difference of two checkpoints
    is truncated.
    """

    amplification: float = 0.9
    sparsity: float = 0.8
    mask_scope: Literal["row", "factor"] = "row"
    snip: bool = False
    preference_snip: bool = False
    ridge: float = 1e-2
    smallest_pair: float = 0.0
    max_pairs: int | None = None
    max_tokens: int = 1024
    answer_tokens: int = 32
    batch_size: int = 8
    rank: int = 64
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "cpu"


@dataclass(frozen=True)
class Ingredients:
    """What was measured on the models, from which a bundle follows without them.

    shapes: linear layer → (outputs, inputs). general is None where the method gram is not wanted; gradients: scorer →
    module → (Σ|∂A|, Σ|∂B|); heads: attention output → its heads, and projections: → W_o (d, k) float32.
    """

    labels: list[str]
    config_sha256: str
    architecture: str
    dtype: str
    shapes: dict[str, tuple[int, int]]
    aligned: AlignedUpdate
    skipped_prefix: int
    safety: Statistics
    safety_prompts: PromptSet
    general: Statistics | None = None
    general_prompts: PromptSet | None = None
    unsafe_prompts: PromptSet | None = None
    gradients: dict[str, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    heads: dict[str, Heads] = field(default_factory=dict)
    projections: dict[str, Tensor] = field(default_factory=dict)
    heads_source: str = "measured"


def write_bundle(
    out: Path,
    ingredients: Ingredients,
    settings: BuildSettings,
    progress: Progress = lambda stage, done, total: None,
    checkpoint: Checkpoint | None = None,
) -> ReferenceManifest:
    """Writes the bundle `out`, which must not exist yet; it appears whole or not at all."""
    sites = ingredients.safety.sites
    factors = ingredients.aligned.factors
    scorers = _scorers(ingredients) if factors else []
    with atomic_folder(out) as folder:
        aligned = _write_nlsr(folder / NLSR, ingredients, scorers, settings, progress) if factors else {}
        gram = heads = None
        if ingredients.general is not None:
            gram = _write_gram(
                folder / GRAM, ingredients.safety, ingredients.general, settings, progress, checkpoint or Checkpoint()
            )
        if ingredients.heads:
            heads = _write_heads(folder / SAFETYLOCK, ingredients)
        methods, lineages = served(bool(aligned), gram is not None, heads is not None)
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
            origin=Origin(source=ingredients.aligned.source, files=ingredients.aligned.files),
            aligned=aligned,
            scorers=scorers,
            safety_prompts=ingredients.safety_prompts,
            general_prompts=ingredients.general_prompts,
            unsafe_prompts=ingredients.unsafe_prompts,
            parameters=BuildParameters(
                amplification=settings.amplification,
                sparsity=settings.sparsity,
                mask_scope=settings.mask_scope,
                ridge=settings.ridge,
                smallest_pair=settings.smallest_pair,
                max_pairs=settings.max_pairs,
                max_tokens=settings.max_tokens,
                answer_tokens=settings.answer_tokens,
                batch_size=settings.batch_size,
                skipped_prefix=ingredients.skipped_prefix,
                rank=settings.rank if ingredients.aligned.source == "checkpoints" else None,
                dtype=ingredients.dtype,
                device=settings.device,
            ),
            gram=gram,
            safetylock=heads,
            methods=methods,
            lineages=lineages,
            files={
                path.name: BundleFile(sha256=sha256_file(path), bytes=path.stat().st_size)
                for path in sorted(folder.glob("*.safetensors"))
            },
        )
        write_atomic(folder / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
    return manifest


def served(aligned: bool, gram: bool, heads: bool) -> tuple[list[str], list[Lineage]]:
    """(methods, lineages) that a bundle with these parts serves. `none` needs nothing."""
    wanted = {"nlsr": aligned, "gram": gram, "safelora": aligned, "antidote": gram, "safetylock": heads, "none": True}
    # Without an aligned update no adapter can have been continued from it.
    lineages: list[Lineage] = ["continued", "fresh", "foreign"] if aligned else ["fresh", "foreign"]
    return [name for name, possible in wanted.items() if possible], lineages


def _scorers(ingredients: Ingredients) -> list[Scorer]:
    known: list[Scorer] = ["low_rank", "wanda", "snip", "preference_snip"]
    return [name for name in known if name in ("low_rank", "wanda") or name in ingredients.gradients]


def _write_nlsr(
    path: Path, ingredients: Ingredients, scorers: list[Scorer], settings: BuildSettings, progress: Progress
) -> dict[str, AlignedModule]:
    factors = ingredients.aligned.factors
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, item in factors.items():
        (d, r), k = item.b.shape, item.a.shape[1]
        shapes |= {f"{name}.A": (NAMES[item.a.dtype], (r, k)), f"{name}.B": (NAMES[item.b.dtype], (d, r))}
        wide = r
        if item.weak is not None:
            weak_b, weak_a = item.weak
            wide += weak_a.shape[0]
            shapes |= {
                f"{name}.weak_A": ("F32", tuple(weak_a.shape)),
                f"{name}.weak_B": ("F32", tuple(weak_b.shape)),
                f"{name}.weak_on_A": ("F32", (d, r)),
            }
        shapes[f"{name}.G"] = ("F64", (wide, wide))
        for scorer in scorers:
            shapes |= {
                f"{name}.mask_A.{scorer}": ("U8", (-(-r * k // 8),)),
                f"{name}.mask_B.{scorer}": ("U8", (-(-d * r // 8),)),
                f"{name}.rows.{scorer}": ("U8", (-(-d // 8),)),
            }
    modules = {}
    with atomic_file(path) as file:
        writer = TensorWriter(file, shapes)
        for done, (name, item) in enumerate(factors.items(), start=1):
            modules[name] = _write_module(writer, name, item, ingredients, scorers, settings)
            progress("safety masks", done, len(factors))
        writer.close()
    return modules


def _write_module(
    writer: TensorWriter,
    name: str,
    item: AlignedFactors,
    ingredients: Ingredients,
    scorers: list[Scorer],
    settings: BuildSettings,
) -> AlignedModule:
    g = ingredients.safety.grams[name].cpu()
    rank, beta = item.a.shape[0], settings.amplification
    b, a = item.update
    writer.write(f"{name}.A", item.a)
    writer.write(f"{name}.B", item.b)
    writer.write(f"{name}.G", g)
    exact, on_a, off_basis = (b * (1.0 + beta), a), b * (1.0 + beta), 0.0
    if item.weak is not None:
        weak_b, weak_a = item.weak
        inside = weak_b @ (weak_a @ torch.linalg.pinv(a))
        writer.write(f"{name}.weak_A", weak_a)
        writer.write(f"{name}.weak_B", weak_b)
        writer.write(f"{name}.weak_on_A", inside)
        size = lowrank.norm(weak_b, weak_a)
        off_basis = lowrank.norm(*lowrank.stack((weak_b, weak_a), (-inside, a))) / size if size > 0 else 0.0
        exact = extrapolated((b, a), item.weak, beta)
        on_a = on_a - beta * inside
    squares = ingredients.safety.response_squares[ingredients.safety.sites[name]].cpu()
    for scorer in scorers:
        gradients = ingredients.gradients.get(scorer, {}).get(name)
        masks = _masks(scorer, a, on_a, exact, g, squares, gradients, settings, rank)
        for kind, mask in masks.items():
            writer.write(f"{name}.{kind}.{scorer}", lowrank.pack_mask(mask))
    return AlignedModule(
        rank=rank,
        scaling=item.scaling,
        norm=lowrank.norm(*exact),
        weak_rank=item.weak[1].shape[0] if item.weak is not None else None,
        off_basis=off_basis,
        truncation_error=item.truncation_error,
    )


def extrapolated(strong: tuple[Tensor, Tensor], weak: tuple[Tensor, Tensor], beta: float) -> tuple[Tensor, Tensor]:
    """Δ_e = Δ_a + β(Δ_a − Δ₀) as [(1+β)B_a, −βB₀]·[A_a; A₀], exactly (NLSR, eq. 2; ExPO, arXiv 2404.16792)."""
    return lowrank.stack((strong[0] * (1.0 + beta), strong[1]), (weak[0] * -beta, weak[1]))


def _masks(
    scorer: Scorer,
    a: Tensor,
    on_a: Tensor,
    exact: tuple[Tensor, Tensor],
    g: Tensor,
    squares: Tensor,
    gradients: tuple[Tensor, Tensor] | None,
    settings: BuildSettings,
    rank: int,
) -> dict[str, Tensor]:
    """mask_A (r, k), mask_B (d, r), rows (d,) of one scorer. on_a: B_e in A's basis; exact: Δ_e; G over exact's A."""
    share = 1.0 - settings.sparsity
    own = g[:rank, :rank]
    match scorer:
        case "low_rank":
            count = max(1, round(rank * share))
            of_a, of_b = lowrank.low_rank_a(a, own, count).abs(), lowrank.low_rank_b(on_a, own, count).abs()
            rows = lowrank.output_energy(exact[0], g.float())
        case "wanda":
            of_a = a.abs() * squares.clamp_min(0.0).sqrt()
            of_b = on_a.abs() * own.diagonal().clamp_min(0.0).sqrt().float()
            rows = of_b.square().sum(dim=1)
        case _:
            assert gradients is not None, "the scorers are those for which gradients were gathered"
            of_a, of_b = a.abs() * gradients[0].cpu(), on_a.abs() * gradients[1].cpu()
            rows = of_b.sum(dim=1)
    per_row = settings.mask_scope == "row"
    return {
        "mask_A": lowrank.top_mask(of_a, share, per_row=per_row),
        "mask_B": lowrank.top_mask(of_b, share, per_row=per_row),
        "rows": lowrank.top_mask(rows, share, per_row=False),
    }


def _write_gram(
    path: Path,
    safety: Statistics,
    general: Statistics,
    settings: BuildSettings,
    progress: Progress,
    checkpoint: Checkpoint,
) -> GramStatistics:
    pairs: dict[str, int] = {}
    energy: dict[str, float] = {}
    # Sizes are only known after the decomposition, so each site's pairs wait on the disk: a build that is killed
    # goes on behind the last one.
    with checkpoint.opened() as waiting:
        for done, (site, c_s) in enumerate(safety.second_moments.items(), start=1):
            name = f"pairs-{done}"
            if not waiting.has(name):
                mu, v, w = generalized_eigenpairs(c_s, general.second_moments[site], settings.ridge)
                kept = max(1, int((mu >= settings.smallest_pair).sum()))
                kept = min(kept, settings.max_pairs or kept)
                total = float(mu.sum())
                found = {
                    f"{site}.V": v[:, :kept].to(torch.bfloat16),
                    f"{site}.W": w[:, :kept].to(torch.bfloat16),
                    f"{site}.mu": mu[:kept].float(),
                }
                waiting.save(name, found, {"energy": float(mu[:kept].sum()) / total if total > 0 else 1.0})
            energy[site] = float(waiting.meta(name)["energy"])
            pairs[site] = waiting.shapes(name)[f"{site}.mu"][1][0]
            progress("eigenpairs", done, len(safety.second_moments))
        names = [f"pairs-{done}" for done in range(1, len(safety.second_moments) + 1)]
        with atomic_file(path) as file:
            writer = TensorWriter(file, {k: v for name in names for k, v in waiting.shapes(name).items()})
            for name in names:
                with TensorReader(waiting.path(name)) as reader:
                    for key in waiting.shapes(name):
                        writer.copy(key, reader)
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


def _write_heads(path: Path, ingredients: Ingredients) -> SafetyLockStatistics:
    layers = {}
    tensors: dict[str, Tensor] = {}
    for name, found in ingredients.heads.items():
        heads, size = found.directions.shape
        weight = ingredients.projections[name].cpu().double()
        shift = torch.einsum("dhs,hs->hd", weight.reshape(-1, heads, size), found.directions.double())
        mean, constant, unexplained = constant_input(name, ingredients.safety, ingredients.general)
        tensors |= {
            f"{name}.directions": found.directions.float(),
            f"{name}.sigma": found.sigma.float(),
            f"{name}.shift": shift.float(),
            f"{name}.mean": mean.float(),
            f"{name}.constant": constant.float(),
        }
        layers[name] = HeadLayer(
            heads=heads, accuracy=found.accuracy.tolist(), separation=found.separation.tolist(), unexplained=unexplained
        )
    with atomic_file(path) as file:
        writer = TensorWriter(file, {key: (NAMES[value.dtype], tuple(value.shape)) for key, value in tensors.items()})
        for key, value in tensors.items():
            writer.write(key, value)
        writer.close()
    return SafetyLockStatistics(source=ingredients.heads_source, layers=layers)


def constant_input(site: str, safety: Statistics, general: Statistics | None) -> tuple[Tensor, Tensor, float]:
    """E[x] (k,), u = (E[xxᵀ] + ridge)⁻¹E[x] (k,) with uᵀx ≈ 1, and E(1 − uᵀx)², over both prompt sets half and half."""
    sets: Mapping[str, Statistics] = {"safety": safety} | ({"general": general} if general else {})
    second = sum((item.second_moments[site].cpu().double() for item in sets.values()), torch.zeros(()).double())
    mean = sum((item.means[site].cpu().double() for item in sets.values()), torch.zeros(()).double())
    second, mean = second / len(sets), mean / len(sets)
    ridge = CONSTANT_RIDGE * second.diagonal().mean().clamp_min(1e-30)
    u = torch.linalg.solve(second + ridge * torch.eye(len(mean), dtype=second.dtype), mean)
    return mean, u, float(1.0 - 2.0 * (u @ mean) + u @ second @ u)
