"""One realignment: compare → score → select → patch → check, with a report of what was measured.

Paths and tensors only. Reads the adapter module by module and never holds more than a few, so it reads it more than
once: for its lineage, for its scores (where selection needs all of them first), for the repair, and a last time,
together with what was written. Several strengths share every reading. Results appear under their names in one step, or
not at all.
"""

import math
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy
import safetensors
import torch
from torch import Tensor

import safegraft
from safegraft.adapter import (
    CONFIG,
    WEIGHTS,
    AdapterDescription,
    LoraModule,
    describe,
    is_companion,
    kind_of,
    natural_order,
)
from safegraft.compatibility import check_compatible, recommend
from safegraft.contracts.methods import (
    METHOD_PARAMETERS,
    STRENGTH,
    AutoParameters,
    parameters_by_strength,
    strength_name,
)
from safegraft.contracts.methods import Method as Parameters
from safegraft.contracts.report import (
    Digest,
    Environment,
    MethodRun,
    Recommendation,
    ReferenceUsed,
    Report,
    Variant,
    Warning,
)
from safegraft.engine import lowrank, measure
from safegraft.engine.adapter import AdapterReader, AdapterWriter, Layout, adapter_writer
from safegraft.engine.measure import Measured
from safegraft.engine.methods import METHODS
from safegraft.engine.methods.base import Kinship, Method, Module, Proposal, Selection
from safegraft.engine.parallel import each, one_thread_each
from safegraft.engine.products import fast_products, product_library
from safegraft.engine.reference import LoadedReference
from safegraft.engine.tensors import NAMES, TensorReader, TensorWriter
from safegraft.errors import Incompatible, SystemFault
from safegraft.files import atomic_folder, sha256_file, side_car_folder
from safegraft.ingest import companions_of

Progress = Callable[[str, int, int], None]
OutputRank = Literal["customer", "exact"]
# Measured: an adapter continued from the aligned one has a median cosine of .57 to .84 with its update, independent
# ones have between -.02 and .00; more training takes the former down (docs/decisions/0002-lineage.md).
CONTINUED_COSINE = 0.2
SAME_BASIS_COSINE = 0.5
# So many modules are compared at first; all of them where their median is nearer to the threshold than UNCLEAR.
COMPARED, UNCLEAR = 48, 0.1
SIDE_CAR = "side_car.safetensors"


@dataclass(eq=False)
class Run:
    """One strength of one method on one adapter. folder: where it writes; None where it only measures."""

    strength: float | None
    method: Method
    selection: Selection
    layout: Layout
    folder: Path | None = None
    writer: AdapterWriter | None = None
    measured: list[Measured] = field(default_factory=list)
    output: Digest | None = None

    @property
    def changed(self) -> frozenset[str]:
        return frozenset(item.line.name for item in self.measured if item.line.repaired)


def realign(
    folder: Path,
    reference: LoadedReference,
    parameters: AutoParameters | Parameters,
    out: Path | None,
    *,
    strengths: Sequence[float] = (),
    output_rank: OutputRank = "customer",
    dropped_files: Iterable[str] = (),
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Repairs the adapter in `folder` into the new folder `out`; with `out=None` only measures (mode `analyze`).

    strengths: several values of the method's strength parameter (`STRENGTH`) at once; `out` then holds one folder a
    value, named by `strength_name`. output_rank: `customer` keeps the adapter's ranks and thereby its configuration;
    `exact` takes the rank that the repair needs. progress(stage, done, total) is called after every module and may
    raise to stop the work. Raises UserError kinds for adapters that cannot be treated, FileExistsError where `out`
    exists.
    """
    clock = _Clock()
    # First of all: whoever sent the folder may have put anything into it, and a repair takes long.
    companions = companions_of(folder)
    description = describe(folder)
    check_compatible(description, reference.manifest, parameters)
    with (
        AdapterReader(folder, description, reference.device) as adapter,
        one_thread_each(reference.device) as workers,
        fast_products(),
        torch.inference_mode(),
    ):
        kinship = detect_kinship(adapter, reference, progress, workers)
        recommendation = recommend_method(description, reference, kinship)
        if isinstance(parameters, AutoParameters):
            check_compatible(description, reference.manifest, parameters, kinship.lineage)
            parameters = METHOD_PARAMETERS.validate_python({"type": recommendation.method})
            assert not isinstance(parameters, AutoParameters), "a recommendation names a method"
        check_compatible(description, reference.manifest, parameters, kinship.lineage)
        variants = parameters_by_strength(parameters, strengths)
        methods = [METHODS[own.type](own, reference, kinship) for own in variants.values()]
        for method in methods[1:]:
            method.recent = methods[0].recent
        clock.lap("open")
        unreached = [item.name for item in description.modules if not methods[0].reaches(item.name)]
        similarities: dict[str, float] | None = None
        if out is None or not all(method.takes_all for method in methods):
            similarities = _score(adapter, methods[0], workers, progress)
            clock.lap("score")
        runs = [
            _planned(strength, method, similarities, unreached, description, output_rank)
            for strength, method in zip(variants, methods, strict=True)
        ]
        beside_out = side_car_folder(out) if out is not None else None
        if beside_out is not None and beside_out.exists() and any(run.method.side_car() for run in runs):
            raise FileExistsError(f"{beside_out} exists already.")
        side_cars: dict[str, str] = {}
        if out is None:
            assert similarities is not None, "measured above"
            _analyze(adapter, runs, similarities, workers)
        else:
            with _removed_on_error(side_car_folder(out)), atomic_folder(out) as beside:
                for run in runs:
                    run.folder = beside if run.strength is None else beside / strength_name(run.strength)
                    run.folder.mkdir(exist_ok=True)
                _patch(adapter, runs, similarities, folder, companions, workers, progress)
                clock.lap("patch")
                for run in runs:
                    _check(run, folder, description)
                # Before the adapter appears: whoever finds it finds what belongs to it.
                side_cars = _write_side_cars(runs, side_car_folder(out))
            clock.lap("check")
    clock.total()
    return _report(
        folder, description, reference, list(variants.values()), kinship, recommendation, runs, unreached, side_cars,
        patched=out is not None, output_rank=output_rank, dropped_files=dropped_files, timings=clock.laps,
    )  # fmt: skip


def versions() -> dict[str, str]:
    """Of what decides the bytes of a result."""
    return {
        "safegraft": safegraft.__version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "products": product_library(),
    }


def detect_kinship(
    adapter: AdapterReader,
    reference: LoadedReference,
    progress: Progress = lambda stage, done, total: None,
    workers: int = 1,
) -> Kinship:
    """Compares updates, not factors: two adapters that were started from the same seed share A without being kin.

    Of many modules some that are spread evenly, and all only where these do not tell (docs/decisions/0002-lineage.md).
    """
    description = adapter.description
    shared = [item for item in description.modules if reference.reaches(item.name)]
    same_ranks = all(item.rank == reference.manifest.aligned[item.name].rank for item in shared)

    def compare(item: LoraModule) -> tuple[float, float | None]:
        aligned = reference.aligned(item.name)
        assert aligned is not None, "reached"
        module = adapter.module(item)
        same = _same_entries(module.a, aligned[1]) if same_ranks else None
        scale = math.sqrt(module.energy) * reference.norm(item.name)
        return lowrank.clamped(lowrank.inner(*module.update, *aligned), scale), same

    first, rest = shared, []
    if len(shared) > COMPARED:
        chosen = spread_evenly([item.name for item in shared], COMPARED)
        first, rest = ([item for item in shared if (item.name in chosen) is taken] for taken in (True, False))
    found = []
    for done, (_, compared) in enumerate(each(first, compare, workers), start=1):
        progress("compare", done, len(first))
        found.append(compared)
    cosine = statistics.median(update for update, _ in found) if found else None
    if rest and cosine is not None and abs(cosine - CONTINUED_COSINE) < UNCLEAR:
        found += [compared for _, compared in each(rest, compare, workers)]
        cosine = statistics.median(update for update, _ in found)
    if cosine is not None and cosine >= CONTINUED_COSINE:
        factors = [same for _, same in found if same is not None]
        return Kinship("continued", cosine, same_ranks and statistics.median(factors) >= SAME_BASIS_COSINE)
    known = description.config.base_model_name_or_path in reference.manifest.base_model.labels
    return Kinship("fresh" if known else "foreign", cosine, False)


def spread_evenly(names: Sequence[str], wanted: int) -> set[str]:
    """`wanted` of the names, as many of each kind of projection and from all depths: every so many, kind after kind.

    In the order of layers a step might meet one kind in every layer and no other.
    """
    ordered = sorted(names, key=lambda name: (kind_of(name), natural_order(name)))
    return {ordered[place * len(ordered) // wanted] for place in range(wanted)}


def _same_entries(a: Tensor, other: Tensor) -> float:
    """The cosine of two A entry by entry; 0 where their sizes differ so much that entries cannot be exchanged."""
    own, size = (float(torch.linalg.vector_norm(factor, dtype=torch.float64)) for factor in (a, other))
    if not 0.25 * size < own < 4.0 * size:
        return 0.0
    # In units of their norms: the products of extreme entries leave float32's range.
    return float(((a / own) * (other / size)).sum(dtype=torch.float64))


def recommend_method(description: AdapterDescription, reference: LoadedReference, kinship: Kinship) -> Recommendation:
    """What runs where no method is named. A reference that recommends none still serves those that are named."""
    try:
        method, reason = recommend(description, reference.manifest, kinship.lineage)
    except Incompatible as error:
        return Recommendation(method="none", reason=str(error))
    return Recommendation(method=method, reason=reason)


def _score(adapter: AdapterReader, method: Method, workers: int, progress: Progress) -> dict[str, float]:
    """Similarity by module, which no strength changes."""
    modules = adapter.description.modules
    similarities = {}
    for done, (item, found) in enumerate(
        each(modules, lambda item: _similarity(method, adapter.module(item)), workers), start=1
    ):
        similarities[item.name] = found
        progress("score", done, len(modules))
    return similarities


def _similarity(method: Method, module: Module) -> float:
    """1 for what the method does not reach."""
    return method.similarity(module) if method.reaches(module.name) else 1.0


def _planned(
    strength: float | None,
    method: Method,
    similarities: dict[str, float] | None,
    unreached: Sequence[str],
    description: AdapterDescription,
    output_rank: OutputRank,
) -> Run:
    """What one strength will do: which modules, and in which ranks. similarities: None where they decide nothing."""
    left_alone = frozenset(unreached)
    # A method that takes all looks at the names alone.
    known = dict.fromkeys((item.name for item in description.modules), 1.0) if similarities is None else similarities
    selection = method.select({name: found for name, found in known.items() if name not in left_alone})
    biases = bool(selection.names) and method.adds_biases
    ranks = _exact_ranks(description, method, selection) if output_rank == "exact" else None
    return Run(strength, method, selection, Layout(description, ranks, biases))


def _exact_ranks(description: AdapterDescription, method: Method, selection: Selection) -> dict[str, int]:
    """The ranks that lose nothing; one for all modules where the customer had one, since some servers demand it."""
    ranks = {}
    for module in description.modules:
        wanted = method.rank(module.name, module.rank) if module.name in selection.names else module.rank
        # No update has a higher rank than its layer.
        ranks[module.name] = max(module.rank, min(wanted, module.inputs, module.outputs))
    if len({module.rank for module in description.modules}) == 1:
        return dict.fromkeys(ranks, max(ranks.values()))
    return ranks


def fitted(module: Module, proposal: Proposal, rank: int) -> tuple[Module, float]:
    """A proposal in at most `rank`, and the truncation error relative to it."""
    if proposal.a.shape[0] <= rank:
        return module.with_factors(proposal.b, proposal.a), 0.0
    b, a, error = lowrank.recompress(proposal.b, proposal.a, rank)
    return module.with_factors(b, a), error


def _analyze(adapter: AdapterReader, runs: list[Run], similarities: dict[str, float], workers: int) -> None:
    for run in runs:

        def measured(item: LoraModule, run: Run = run) -> Measured:
            before = adapter.module(item)
            return measure.of_untouched(item, run.method, before, similarities[item.name], run.selection)

        run.measured = [found for _, found in each(adapter.description.modules, measured, workers)]


def _patch(
    adapter: AdapterReader,
    runs: list[Run],
    similarities: dict[str, float] | None,
    folder: Path,
    companions: Sequence[str],
    workers: int,
    progress: Progress,
) -> None:
    """Reads each module once and writes it for every strength; similarities: None where they are measured here."""
    modules = adapter.description.modules

    def patch(item: LoraModule) -> list[Measured]:
        before = adapter.module(item)
        similarity = _similarity(runs[0].method, before) if similarities is None else similarities[item.name]
        return [_patch_module(item, before, run, similarity, adapter) for run in runs]

    with _writers(runs, folder):
        for done, (_, found) in enumerate(each(modules, patch, workers), start=1):
            for run, measured in zip(runs, found, strict=True):
                run.measured.append(measured)
            progress("patch", done, len(modules))
    for run in runs:
        _finish(run, folder, companions, adapter.description)


@contextmanager
def _writers(runs: list[Run], folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        for run in runs:
            assert run.folder is not None, "a run that patches has a folder"
            run.writer = stack.enter_context(adapter_writer(run.folder, run.layout, folder))
        yield


def _patch_module(item: LoraModule, before: Module, run: Run, similarity: float, adapter: AdapterReader) -> Measured:
    assert run.writer is not None, "a run that patches has a writer"
    if item.name not in run.selection.names:
        run.writer.keep(item, before, adapter)
        return measure.of_untouched(item, run.method, before, similarity, run.selection)
    proposal = run.method.propose(before)
    patched, error = fitted(before, proposal, run.layout.rank(item))
    after, differs = run.writer.replace(item, before, patched, adapter, proposal.bias)
    return measure.of_repaired(
        item, run.method, before, after, similarity=similarity, selection=run.selection, differs=differs,
        truncation_error=error, biased=proposal.bias is not None,
    )  # fmt: skip


def _finish(run: Run, folder: Path, companions: Sequence[str], description: AdapterDescription) -> None:
    """Companions, and the customer's very bytes where nothing changed. Raises Incompatible."""
    assert run.folder is not None, "a run that patches has a folder"
    cause = measure.no_effect(run.measured, run.selection, description.dtype)
    if cause is not None:
        raise Incompatible(
            f"The repair would change nothing: {cause}.",
            code="repair_without_effect",
            hint="Use the mode analyze to see its measurements.",
        )
    if not run.changed:
        # Header and configuration included, so that hashes agree.
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(folder / name, run.folder / name)
    for name in companions:
        shutil.copyfile(folder / name, run.folder / name)


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """What did not exist before does not stay if the block fails."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_side_cars(runs: list[Run], folder: Path) -> dict[str, str]:
    """One file a strength, named like the strength's folder, or `side_car.safetensors`. Returns name → SHA-256."""
    found = {run: tensors for run in runs if (tensors := run.method.side_car())}
    if not found:
        return {}
    with atomic_folder(folder) as beside:
        for run, tensors in found.items():
            name = SIDE_CAR if run.strength is None else f"{strength_name(run.strength)}.safetensors"
            with (beside / name).open("wb") as file:
                writer = TensorWriter(file, {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()})
                for key, tensor in tensors.items():
                    writer.write(key, tensor)
                writer.close()
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


def _check(run: Run, folder: Path, description: AdapterDescription) -> None:
    """Compares the files on disk: they differ in the changed modules and nowhere else. Raises SystemFault."""
    assert run.folder is not None, "a run that patches has a folder"
    changed = run.changed
    with TensorReader(folder / WEIGHTS, description.header) as before, TensorReader(run.folder / WEIGHTS) as after:
        expected = run.layout.entries() if changed else Layout(description).entries()
        if {key: (entry.dtype, entry.shape) for key, entry in after.header.tensors.items()} != expected:
            raise SystemFault("The patched adapter has other tensors than planned.", code="effect_check_failed")
        for item in description.modules:
            # A module that was only filled up with zeros has other bytes and the same update: it is compared by value.
            differs = any(not _same(before, after, entry.name) for entry in (item.a, item.b))
            if differs and item.name not in changed:
                raise SystemFault(
                    f"{item.name} changed, against the report.", code="effect_check_failed", param=item.name
                )
            if item.name in changed and not differs and not run.layout.biases:
                raise SystemFault(
                    f"{item.name} did not change, against the report.", code="effect_check_failed", param=item.name
                )
    run.output = _digest(run.folder)


def _same(before: TensorReader, after: TensorReader, name: str) -> bool:
    if before.header.tensors[name].shape == after.header.tensors[name].shape:
        # Up to the first difference: of what was changed next to nothing is read.
        return all(one == other for one, other in zip(before.pieces(name), after.pieces(name), strict=True))
    old, new = before.tensor(name), after.tensor(name)
    filled = torch.zeros_like(new)
    filled[tuple(slice(0, size) for size in old.shape)] = old
    return torch.equal(filled, new)


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 4)
        self._last = now

    def total(self) -> None:
        self.laps["total"] = round(time.perf_counter() - self._started, 4)


def _report(
    folder: Path,
    description: AdapterDescription,
    reference: LoadedReference,
    parameters: list[Parameters],
    kinship: Kinship,
    recommendation: Recommendation,
    runs: list[Run],
    unreached: Sequence[str],
    side_cars: dict[str, str],
    *,
    patched: bool,
    output_rank: OutputRank,
    dropped_files: Iterable[str],
    timings: dict[str, float],
) -> Report:
    first = runs[0]
    method: Any = first.method
    others = [path.name for path in folder.iterdir() if path.name not in (CONFIG, WEIGHTS)]
    return Report(
        mode="patch" if patched else "analyze",
        method=MethodRun(
            type=method.type,
            parameters=parameters[0],
            resolved=method.resolved,
            seed=method.seed,
            similarity=method.similarity_meaning,
            break_even=method.break_even,
            explanation=method.explanation,
        ),
        recommendation=recommendation,
        reference=ReferenceUsed(id=reference.id, name=reference.manifest.name, sha256=reference.sha256),
        base_model=_base_label(description, reference),
        lineage=kinship.lineage,
        lineage_similarity=kinship.cosine,
        output_rank=output_rank,
        input=_digest(folder),
        output=first.output,
        summary=measure.summary(first.measured),
        layers=measure.layers(item.line for item in first.measured),
        modules=[item.line for item in first.measured],
        side_cars=side_cars,
        strength_parameter=STRENGTH[method.type] if first.strength is not None else None,
        variants=[
            Variant(strength=run.strength, output=run.output, summary=measure.summary(run.measured))
            for run in runs
            if run.strength is not None
        ],
        dropped_files=sorted({*dropped_files, *(_printable(name) for name in others if not is_companion(name))}),
        warnings=_warnings(runs, unreached, description, reference, patched=patched),
        environment=Environment(
            versions=versions(),
            device=reference.device,
            dtype=description.dtype,
        ),
        timings=timings,
    )


def _printable(name: str) -> str:
    """A file's name as JSON and pages can hold it: it may be any bytes, of which Python makes halves of letters."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _warnings(
    runs: list[Run],
    unreached: Sequence[str],
    description: AdapterDescription,
    reference: LoadedReference,
    *,
    patched: bool,
) -> list[Warning]:
    """Of every strength: what all have in common is said once, of anything else at which strengths it holds."""
    found: dict[str, list[tuple[Run, Warning]]] = {}
    for run in runs:
        for warning in measure.warnings(
            run.measured, run.selection, unreached, description, reference.manifest, run.method, patched=patched
        ):
            found.setdefault(warning.code, []).append((run, warning))
    return [_of_strengths(held, everywhere=len(held) == len(runs)) for held in found.values()]


def _of_strengths(held: list[tuple[Run, Warning]], *, everywhere: bool) -> Warning:
    (first, warning), *others = held
    if first.strength is None or (everywhere and all(other.message == warning.message for _, other in others)):
        return warning
    same = [f"{run.strength:g}" for run, other in held if other.message == warning.message]
    different = [f"{run.strength:g}" for run, other in others if other.message != warning.message]
    said = f"At {STRENGTH[first.method.type]} {', '.join(same[:-1]) + ' and ' if len(same) > 1 else ''}{same[-1]}"
    if different:
        said += f" (and, with other figures, at {', '.join(different)})"
    return warning.model_copy(update={"message": f"{said}: {warning.message}"})


def _digest(folder: Path) -> Digest:
    weights = folder / WEIGHTS
    return Digest(sha256=sha256_file(weights), bytes=weights.stat().st_size, config_sha256=sha256_file(folder / CONFIG))


def _base_label(description: AdapterDescription, reference: LoadedReference) -> str:
    """The customer's name for the base model where the reference knows it, else the reference's own."""
    labels = reference.manifest.base_model.labels
    own = description.config.base_model_name_or_path
    return own if own in labels else labels[0]
