"""One realignment: score every module → select once → patch → write, with a report of what was measured.

Paths and tensors only. Reads the adapter module by module and never holds more than one, so it reads it more than once:
kinship, scores (selection needs all of them first), repair, and a last look at both files. The result appears under its
name in one step, or not at all.
"""

import math
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import safegraft
from safegraft.adapter import (
    CONFIG,
    WEIGHTS,
    AdapterDescription,
    LoraModule,
    describe,
    is_companion,
    kind_of,
    layer_of,
    natural_order,
)
from safegraft.compatibility import check_compatible
from safegraft.contracts.methods import GramParameters, NlsrParameters
from safegraft.contracts.report import (
    Digest,
    Environment,
    LayerLine,
    MethodRun,
    ModuleLine,
    ReferenceUsed,
    Report,
    Spread,
    Summary,
    Warning,
)
from safegraft.engine import lowrank
from safegraft.engine.adapter import AdapterReader, AdapterWriter, adapter_writer
from safegraft.engine.methods import METHODS
from safegraft.engine.methods.base import Kinship, Method, Module, Selection
from safegraft.engine.reference import LoadedReference
from safegraft.engine.tensors import TensorReader
from safegraft.errors import SystemFault
from safegraft.files import atomic_folder, sha256_file

Progress = Callable[[str, int, int], None]
# Measured: an adapter continued from the aligned one has a median cosine of .84 with its update, independent ones have
# between -.02 and .00; more training takes the former down (docs/decisions/0002-lineage.md).
CONTINUED_COSINE = 0.2
SAME_BASIS_COSINE = 0.5


@dataclass(frozen=True)
class Measured:
    """What one module's repair did; energies are squared Frobenius norms relative to the aligned model."""

    line: ModuleLine
    energy: float
    overlap: float
    difference: float


def detect_kinship(
    adapter: AdapterReader, reference: LoadedReference, progress: Progress = lambda stage, done, total: None
) -> Kinship:
    """Compares updates, not factors: two adapters that were started from the same seed share A without being kin."""
    updates, factors = [], []
    for done, item in enumerate(adapter.description.modules, start=1):
        progress("compare", done, len(adapter.description.modules))
        aligned = reference.aligned(item.name)
        if aligned is None:
            continue
        module = adapter.module(item)
        updates.append(lowrank.cosine(*module.update, *aligned))
        if module.a.shape == aligned[1].shape:
            factors.append(_same_entries(module.a, aligned[1]))
    cosine = statistics.median(updates) if updates else 0.0
    return Kinship(
        lineage="continued" if cosine >= CONTINUED_COSINE else "fresh",
        cosine=cosine,
        same_basis=len(factors) == len(updates) > 0 and statistics.median(factors) >= SAME_BASIS_COSINE,
    )


def _same_entries(a: torch.Tensor, other: torch.Tensor) -> float:
    """The cosine of two A entry by entry; 0 where their sizes differ so much that entries cannot be exchanged."""
    own, size = float(a.double().norm()), float(other.double().norm())
    if not 0.25 * size < own < 4.0 * size:
        return 0.0
    return float((a.double() * other.double()).sum()) / (own * size)


def realign(
    folder: Path,
    reference: LoadedReference,
    parameters: NlsrParameters | GramParameters,
    out: Path | None,
    *,
    dropped_files: Iterable[str] = (),
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Repairs the adapter in `folder` into the new folder `out`; with `out=None` only measures (mode `analyze`).

    progress(stage, done, total) is called after every module and may raise to stop the work. Raises UserError kinds for
    adapters that cannot be treated, FileExistsError where `out` exists.
    """
    started = time.perf_counter()
    timings: dict[str, float] = {}
    description = describe(folder)
    check_compatible(description, reference.manifest, parameters)
    with AdapterReader(folder, description, reference.device) as adapter, torch.inference_mode():
        kinship = detect_kinship(adapter, reference, progress)
        method = METHODS[parameters.type](parameters, reference, kinship)
        timings["open"] = _lap(started)

        began = time.perf_counter()
        similarities = {}
        for done, item in enumerate(description.modules, start=1):
            similarities[item.name] = method.similarity(adapter.module(item))
            progress("score", done, len(description.modules))
        timings["score"] = _lap(began)

        selection = method.select(similarities)
        began = time.perf_counter()
        output = None
        if out is None:
            measured = _analyze(description, adapter, method, selection, similarities)
        else:
            with atomic_folder(out) as beside:
                measured, changed = _patch(
                    description, adapter, method, selection, similarities, folder, beside, progress
                )
                timings["patch"] = _lap(began)
                began = time.perf_counter()
                _check_effect(folder, beside, description, changed)
                output = Digest(sha256=sha256_file(beside / WEIGHTS), bytes=(beside / WEIGHTS).stat().st_size)
            timings["check"] = _lap(began)

    timings["total"] = _lap(started)
    others = sorted(path.name for path in folder.iterdir() if path.name not in (CONFIG, WEIGHTS))
    return Report(
        mode="patch" if out is not None else "analyze",
        method=MethodRun(
            type=method.type,
            parameters=parameters,
            resolved=method.resolved,
            seed=method.seed,
            similarity=method.similarity_meaning,
            explanation=method.explanation,
        ),
        reference=ReferenceUsed(id=reference.id, name=reference.manifest.name, sha256=reference.sha256),
        base_model=_base_label(description, reference),
        lineage=kinship.lineage,
        lineage_similarity=kinship.cosine,
        input=Digest(sha256=sha256_file(folder / WEIGHTS), bytes=description.header.file_bytes),
        output=output,
        summary=_summary(measured),
        layers=_layers([item.line for item in measured]),
        modules=[item.line for item in measured],
        dropped_files=sorted({*dropped_files, *(name for name in others if not is_companion(name))}),
        warnings=_warnings(measured, selection, description, reference, method, patched=out is not None),
        environment=Environment(
            versions={
                "safegraft": safegraft.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            device=reference.device,
            dtype=description.dtype,
        ),
        timings=timings,
    )


def _lap(since: float) -> float:
    return round(time.perf_counter() - since, 4)


def _patch(
    description: AdapterDescription,
    adapter: AdapterReader,
    method: Method,
    selection: Selection,
    similarities: dict[str, float],
    folder: Path,
    out: Path,
    progress: Progress,
) -> tuple[list[Measured], set[str]]:
    """Writes into the folder `out`; returns the measurements and the names of the modules whose bytes changed."""
    measured: list[Measured] = []
    changed: set[str] = set()
    with adapter_writer(out / WEIGHTS, description) as writer:
        for done, item in enumerate(description.modules, start=1):
            before = adapter.module(item)
            if item.name in selection.names:
                result, differs = _replace(item, before, method, similarities, selection, adapter, writer)
                measured.append(result)
                if differs:
                    changed.add(item.name)
            else:
                writer.keep(item, adapter)
                measured.append(_untouched(item, before, method, similarities, selection))
            progress("patch", done, len(description.modules))
    if not changed:
        # Nothing was repaired: the customer's very bytes, header included, so that hashes agree.
        shutil.copyfile(folder / WEIGHTS, out / WEIGHTS)
    for path in folder.iterdir():
        if path.name == CONFIG or is_companion(path.name):
            shutil.copyfile(path, out / path.name)
    return measured, changed


def _analyze(
    description: AdapterDescription,
    adapter: AdapterReader,
    method: Method,
    selection: Selection,
    similarities: dict[str, float],
) -> list[Measured]:
    return [_untouched(item, adapter.module(item), method, similarities, selection) for item in description.modules]


def _replace(
    item: LoraModule,
    before: Module,
    method: Method,
    similarities: dict[str, float],
    selection: Selection,
    adapter: AdapterReader,
    writer: AdapterWriter,
) -> tuple[Measured, bool]:
    patched = method.patch(before)
    after, differs = writer.replace(item, patched.module, adapter)
    b, a = method.relative(before)
    energy = max(lowrank.inner(b, a, b, a), 0.0)
    # The difference of the two updates as one pair of factors: relative(after) − relative(before) without Δ_a.
    own_b, own_a = before.update
    new_b, new_a = after.update
    difference = lowrank.norm(*lowrank.stack((new_b, new_a), (-own_b, own_a))) ** 2 if differs else 0.0
    overlap = lowrank.inner(*method.relative(after), b, a) if differs else energy
    line = ModuleLine(
        **_common(item, similarities, selection),
        similarity_after=method.similarity(after) if differs else similarities[item.name],
        repaired=differs,
        kept=_kept(overlap, energy, difference),
        edit=_edit(difference, energy),
        truncation_error=patched.truncation_error,
    )
    return Measured(line, energy, overlap, difference), differs


def _untouched(
    item: LoraModule, before: Module, method: Method, similarities: dict[str, float], selection: Selection
) -> Measured:
    b, a = method.relative(before)
    energy = max(lowrank.inner(b, a, b, a), 0.0)
    line = ModuleLine(
        **_common(item, similarities, selection),
        similarity_after=similarities[item.name],
        repaired=False,
        kept=1.0,
        edit=0.0,
        truncation_error=0.0,
    )
    return Measured(line, energy, energy, 0.0)


def _common(item: LoraModule, similarities: dict[str, float], selection: Selection) -> dict[str, object]:
    probability = selection.probability
    return {
        "name": item.name,
        "layer": layer_of(item.name),
        "kind": kind_of(item.name),
        "rank": item.rank,
        "similarity_before": similarities[item.name],
        "selection_probability": probability[item.name] if probability is not None else None,
    }


def _summary(measured: list[Measured]) -> Summary:
    energy = sum(item.energy for item in measured)
    lines = [item.line for item in measured]
    return Summary(
        modules=len(lines),
        repaired=sum(line.repaired for line in lines),
        similarity=_spread([line.similarity_after for line in lines]),
        similarity_before=_spread([line.similarity_before for line in lines]),
        similarity_after=_spread([line.similarity_after for line in lines]),
        kept=_kept(sum(item.overlap for item in measured), energy, sum(item.difference for item in measured)),
        edit=_edit(sum(item.difference for item in measured), energy),
        truncation_error=max(line.truncation_error for line in lines),
    )


def _kept(overlap: float, energy: float, difference: float) -> float:
    """⟨ΔW_out, ΔW_in⟩/‖ΔW_in‖². Of an update that is zero all is kept, unless something was put in its place."""
    if energy > 0:
        return overlap / energy
    return 0.0 if difference > 0 else 1.0


def _edit(difference: float, energy: float) -> float:
    """‖ΔW_out − ΔW_in‖/‖ΔW_in‖; 1 where a zero update was replaced, for which no ratio exists."""
    if energy > 0:
        return math.sqrt(difference / energy)
    return 1.0 if difference > 0 else 0.0


def _spread(values: list[float]) -> Spread:
    return Spread(min=min(values), median=statistics.median(values), max=max(values))


def _layers(lines: list[ModuleLine]) -> list[LayerLine]:
    grouped: dict[int | None, list[ModuleLine]] = {}
    for line in sorted(lines, key=lambda line: natural_order(line.name)):
        grouped.setdefault(line.layer, []).append(line)
    return [
        LayerLine(
            layer=layer,
            similarity_before=statistics.fmean(line.similarity_before for line in group),
            similarity_after=statistics.fmean(line.similarity_after for line in group),
            modules=len(group),
            repaired=sum(line.repaired for line in group),
        )
        for layer, group in sorted(grouped.items(), key=lambda item: (item[0] is None, item[0] or 0))
    ]


def _base_label(description: AdapterDescription, reference: LoadedReference) -> str:
    """The customer's name for the base model where the reference knows it, else the reference's own."""
    labels = reference.manifest.base_model.labels
    own = description.config.base_model_name_or_path
    return own if own in labels else labels[0]


def _warnings(
    measured: list[Measured],
    selection: Selection,
    description: AdapterDescription,
    reference: LoadedReference,
    method: Method,
    *,
    patched: bool,
) -> list[Warning]:
    found = []
    own, labels = description.config.base_model_name_or_path, reference.manifest.base_model.labels
    if own not in labels:
        found.append(
            Warning(
                code="base_label_unknown",
                message=f"The adapter calls its base model {(own or 'nothing')[:200]!r}; the reference was built for "
                f"{' or '.join(labels)}. Names and shapes of all layers fit, but another model of the same family has "
                "the same ones: make sure that it is the same model.",
            )
        )
    if method.type == "nlsr" and method.lineage == "fresh" and "gram" in reference.manifest.methods:
        found.append(
            Warning(
                code="method_may_not_help",
                message="Transplanting neurons did not lower the harm score of adapters that are unrelated to the "
                "aligned one wherever this project measured it, however similar they became; the method gram did.",
            )
        )
    lines = [item.line for item in measured]
    unchanged = [line.name for line in lines if line.name in selection.names and not line.repaired]
    if unchanged and patched:
        found.append(
            Warning(
                code="repair_without_effect",
                message=f"{len(unchanged)} selected modules did not change (the first is {unchanged[0]}): their update "
                "is zero, or already the reference's.",
            )
        )
    rough = [line for line in lines if line.truncation_error > 0.1]
    if rough:
        worst = max(rough, key=lambda line: line.truncation_error)
        found.append(
            Warning(
                code="truncated",
                message=f"Bringing the result back to the adapter's rank lost more than 10 % of the update's norm in "
                f"{len(rough)} modules (most in {worst.name}: {worst.truncation_error:.0%}).",
            )
        )
    return found


def _check_effect(folder: Path, out: Path, description: AdapterDescription, changed: set[str]) -> None:
    """Compares the files on disk: they differ in the changed modules and nowhere else. Raises SystemFault."""
    with TensorReader(folder / WEIGHTS, description.header) as before, TensorReader(out / WEIGHTS) as after:
        if list(before.header.tensors) != list(after.header.tensors):
            raise SystemFault("The patched adapter has other keys than the customer's.", code="effect_check_failed")
        for item in description.modules:
            differs = any(before.bytes(entry.name) != after.bytes(entry.name) for entry in (item.a, item.b))
            if differs != (item.name in changed):
                raise SystemFault(
                    f"{item.name} {'changed' if differs else 'did not change'}, against the report.",
                    code="effect_check_failed",
                    param=item.name,
                )
