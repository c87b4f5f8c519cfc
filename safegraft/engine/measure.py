"""What a repair did, in numbers and warnings: from measurements of single modules to the parts of a report."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safegraft.adapter import AdapterDescription, LoraModule, kind_of, layer_of, natural_order
from safegraft.contracts.methods import (
    AntidoteParameters,
    GramParameters,
    NlsrParameters,
    SafeLoraParameters,
    SafetyLockParameters,
)
from safegraft.contracts.reference import ReferenceManifest
from safegraft.contracts.report import LayerLine, ModuleLine, Spread, Summary, Warning
from safegraft.engine import lowrank
from safegraft.engine.methods.base import Method, Module, Selection

# Part of the update's norm: below it a change is rounding of the float32 factors.
NO_EDIT = 1e-6
# Likewise, squared: below it float32's differences are mostly rounding.
CANCELLED = 1e-2
# Likewise: what brings a module into the warning about truncation.
ROUGH = 0.1
# Share kept below which little is left of a fine-tuning, and edit above which it is a small part of what is there:
# safelora at its published threshold keeps .00 of a fresh adapter, and safetylock's edit is 8 to 20, which took two
# fifths of the task and more (docs/evidence, docs/methods.md).
LITTLE, MUCH = 0.05, 5.0
# Median similarity, where it is the share on general inputs, from which on an adapter avoids safety prompts' inputs
# more than any that was trained without that aim (.62 to .71), and as those do that were repaired already or made to
# evade the repair (.98 and more; docs/evidence).
AVOIDING = 0.9
# Share of neurons left out (P_SR) above which NLSR's transplant did not help (docs/evidence).
SPARSE = 0.5
# safetylock's strength from which on it did so.
DESTRUCTIVE = 3.0
# gram's strength from which on refusals stay away, and what was measured there (docs/evidence, headline-1).
WEAK, WEAK_MEASURED = 0.5, ".02, .06 and .16"


@dataclass(frozen=True)
class Measured:
    """One module's line, and its energies: squared Frobenius norms relative to the aligned model."""

    line: ModuleLine
    energy: float
    overlap: float
    difference: float
    biased: bool = False


def of_repaired(
    item: LoraModule,
    method: Method,
    before: Module,
    after: Module,
    *,
    similarity: float,
    selection: Selection,
    differs: bool,
    truncation_error: float,
    biased: bool,
) -> Measured:
    """What was done to one module; `after` as it was rounded to the customer's dtype."""
    b, a = method.relative(before)
    energy = _energy(before, b, a)
    # relative(after) − relative(before), without Δ_a. Where only a bias came, it is zero.
    difference, overlap = 0.0, energy
    if differs and (found := _only_a(before, after, b)) is not None:
        difference, overlap = found[0], energy + found[1]
    elif differs and (difference := _difference(before, after, energy)) > 0:
        new_b, new_a = method.relative(after)
        overlap = lowrank.inner(
            new_b, new_a, b, a,
            of_b=before.gram if new_b is b is before.update[0] else None,
            of_a=before.gram_of_rows if new_a is a is before.update[1] else None,
        )  # fmt: skip
    line = ModuleLine(
        **_common(item, similarity, selection),
        similarity_after=method.similarity_after(before, after) if differs else similarity,
        repaired=differs,
        kept=kept(overlap, energy, difference),
        edit=edit(difference, energy),
        truncation_error=truncation_error,
    )
    return Measured(line, energy, overlap, difference, biased)


def _only_a(before: Module, after: Module, b: Tensor) -> tuple[float, float] | None:
    """(‖BC‖², ⟨BC, BA⟩) where only A became A + C and nothing is taken off: both from BᵀB·C. None elsewhere."""
    (own_b, own_a), (new_b, new_a) = before.update, after.update
    if not (b is own_b is new_b) or new_a.shape != own_a.shape:
        return None
    change = new_a - own_a
    found = lowrank.with_gram(before.gram, change, change, own_a)
    return None if found is None else (max(found[0], 0.0), found[1])


def _energy(module: Module, b: Tensor, a: Tensor) -> float:
    """‖BA‖² of an update relative to the aligned model, which for what sits on it is the module's own."""
    return module.energy if b is module.update[0] else max(lowrank.inner(b, a, b, a), 0.0)


def _difference(before: Module, after: Module, energy: float) -> float:
    """‖B''A'' − BA‖², from the factors' own differences where they have one rank: B''A'' − BA = (B''−B)A'' + B(A''−A).

    In float64 where the two updates are nearly the same: their difference is then what is left of cancellation.
    """
    (own_b, own_a), (new_b, new_a) = before.update, after.update
    # Where one of them was balanced, the other has its factors in other units, and their differences say nothing.
    if own_b.shape == new_b.shape and before.is_as_stored and after.is_as_stored:
        same_b, same_a = (mine is other or torch.equal(mine, other) for mine, other in ((own_b, new_b), (own_a, new_a)))
        if same_b and same_a:
            return 0.0
        if same_a:
            change = new_b - own_b
            return max(lowrank.inner(change, own_a, change, own_a, of_a=before.gram_of_rows), 0.0)
        if same_b:
            change = new_a - own_a
            return max(lowrank.inner(own_b, change, own_b, change, of_b=before.gram), 0.0)
        found = lowrank.norm(*lowrank.stack((new_b - own_b, new_a), (own_b, new_a - own_a))) ** 2
        if found > CANCELLED * energy:
            return found
    doubled = lowrank.stack((new_b.double(), new_a.double()), (-own_b.double(), own_a.double()))
    return lowrank.norm(*doubled) ** 2


def of_untouched(item: LoraModule, method: Method, before: Module, similarity: float, selection: Selection) -> Measured:
    energy = _energy(before, *method.relative(before))
    line = ModuleLine(
        **_common(item, similarity, selection),
        similarity_after=similarity,
        repaired=False,
        kept=1.0,
        edit=0.0,
        truncation_error=0.0,
    )
    return Measured(line, energy, energy, 0.0)


def _common(item: LoraModule, similarity: float, selection: Selection) -> dict[str, object]:
    probability = selection.probability
    return {
        "name": item.name,
        "layer": layer_of(item.name),
        "kind": kind_of(item.name),
        "rank": item.rank,
        "similarity_before": similarity,
        "selection_probability": probability.get(item.name) if probability is not None else None,
    }


def kept(overlap: float, energy: float, difference: float) -> float:
    """⟨ΔW_out, ΔW_in⟩/‖ΔW_in‖². Of an update that is zero all is kept, unless something was put in its place."""
    if energy > 0:
        return overlap / energy
    return 0.0 if difference > 0 else 1.0


def edit(difference: float, energy: float) -> float:
    """‖ΔW_out − ΔW_in‖/‖ΔW_in‖; 1 where a zero update was replaced, for which no ratio exists."""
    if energy > 0:
        return math.sqrt(difference / energy)
    return 1.0 if difference > 0 else 0.0


def summary(measured: Sequence[Measured]) -> Summary:
    energy = sum(item.energy for item in measured)
    lines = [item.line for item in measured]
    difference = sum(item.difference for item in measured)
    return Summary(
        modules=len(lines),
        repaired=sum(line.repaired for line in lines),
        similarity=_spread([line.similarity_after for line in lines]),
        similarity_before=_spread([line.similarity_before for line in lines]),
        similarity_after=_spread([line.similarity_after for line in lines]),
        kept=_share_kept(measured),
        edit=edit(difference, energy),
        truncation_error=max(line.truncation_error for line in lines),
    )


def _spread(values: list[float]) -> Spread:
    return Spread(min=min(values), median=statistics.median(values), max=max(values))


def layers(lines: Iterable[ModuleLine]) -> list[LayerLine]:
    """The mean of each layer's modules; modules of no layer come last."""
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


def warnings(
    measured: Sequence[Measured],
    selection: Selection,
    unreached: Sequence[str],
    description: AdapterDescription,
    manifest: ReferenceManifest,
    method: Method,
    *,
    patched: bool,
) -> list[Warning]:
    """What a reader has to know besides the numbers."""
    lines = [item.line for item in measured]
    found = [
        _label(description, manifest),
        _method(method, manifest),
        _weak(method) if patched else None,
        _incomplete(description, manifest) if not method.on_aligned else None,
        _unreached(unreached, len(lines)) if method.type not in ("safetylock", "none") else None,
        _without_effect(measured, selection) if patched else None,
        _fell_short(measured, method) if patched else None,
        _biases(measured, method) if patched else None,
        _truncated(lines),
        _avoiding(measured, method),
        _little_left(measured) if patched else None,
        _overwhelmed(measured) if patched else None,
    ]
    return [item for item in found if item is not None]


def _label(description: AdapterDescription, manifest: ReferenceManifest) -> Warning | None:
    own, labels = description.config.base_model_name_or_path, manifest.base_model.labels
    if own in labels:
        return None
    return Warning(
        code="base_label_unknown",
        message=f"The adapter calls its base model {(own or 'nothing')[:200]!r}; the reference was built for "
        f"{' or '.join(labels)}. Names and shapes of all layers fit, but another model of the same family has the same "
        "ones: make sure that it is the same model.",
    )


def _method(method: Method, manifest: ReferenceManifest) -> Warning | None:
    """What docs/evidence and docs/methods.md found of this method, with these parameters, on this kind of adapter."""
    continued = not method.on_aligned
    match method.parameters:
        case NlsrParameters(skip_share=left_out) if left_out > 0 or manifest.parameters.sparsity > SPARSE:
            found = (
                "Of poisoned adapters, transplanting neurons halved the harm score only where no module was left out "
                "(skip_share 0) and half of the neurons or more were taken (which the operator decides: a reference of "
                "sparsity 0.5 or less)"
            )
        case SafeLoraParameters(projector="paper", selection="threshold") if continued:
            found = (
                "Of an adapter that was continued from the aligned one this found nothing to repair, because it lies "
                "in the alignment's own subspace"
            )
        case AntidoteParameters() if continued:
            found = (
                "Of an adapter that was continued from the aligned one this pruned the alignment too, and the harm "
                "score stayed high"
            )
        case SafetyLockParameters(strength=strength) if strength >= DESTRUCTIVE:
            found = "Pushed so hard, a small model lost two fifths of its task accuracy or more"
        case _:
            return None
    if "gram" not in manifest.methods:
        return None
    return Warning(
        code="method_may_not_help", message=f"{found}, wherever this project measured it; the method gram did better."
    )


def _weak(method: Method) -> Warning | None:
    """Every module may have come to act less on safety prompts than on general ones, and harmful ones be answered."""
    if not isinstance(method.parameters, GramParameters) or method.parameters.general_weight < WEAK:
        return None
    return Warning(
        code="weak_strength",
        message="So weak a repair may leave harmful prompts answered although no module acts more on safety prompts "
        f"than on general ones any more: of one adapter {WEAK_MEASURED} of them were at strengths 0.2, 0.5 and 1. Ask "
        "it some before you serve it, or take the method's own strength.",
    )


def _avoiding(measured: Sequence[Measured], method: Method) -> Warning | None:
    # A zero update has a similarity of 1 to everything.
    found = [item.line.similarity_before for item in measured if item.energy > 0]
    if method.break_even is None or not found or (median := statistics.median(found)) < AVOIDING:
        return None
    return Warning(
        code="safety_inputs_avoided",
        message="Before any repair this adapter did next to nothing on the inputs of safety prompts (median similarity "
        f"{median:.2f}; those that were trained without that aim had .62 to .71 wherever this project measured it). It "
        "was repaired already, or it was trained to stay outside of what this reference looks at: adapters of that "
        "kind answered harmful prompts before gram's repair and after it. Ask it some before you serve it.",
    )


def _little_left(measured: Sequence[Measured]) -> Warning | None:
    left = _share_kept(measured)
    # Of nothing, nothing can be left.
    if left >= LITTLE or not any(item.line.repaired and item.energy > 0 for item in measured):
        return None
    share = f"{_percent(left, 1)} is left" if left > 0 else "nothing is left"
    return Warning(
        code="little_left",
        message=f"Of the fine-tuning's update {share}. An adapter that does nothing is as safe as "
        "the model below it, and has not learnt the customer's task either: try the task before you serve it.",
    )


def _overwhelmed(measured: Sequence[Measured]) -> Warning | None:
    energy, difference = (sum(values) for values in zip(*((m.energy, m.difference) for m in measured), strict=True))
    size = edit(difference, energy)
    if size <= MUCH:
        return None
    return Warning(
        code="much_added",
        message=f"The update changed by {_times(size)} times its own size. Adapters that were changed so much lost two "
        "fifths of their task accuracy or more, wherever this project measured it: read some answers before you serve "
        "it.",
    )


def _share_kept(measured: Sequence[Measured]) -> float:
    energy = sum(item.energy for item in measured)
    return kept(sum(item.overlap for item in measured), energy, sum(item.difference for item in measured))


def _incomplete(description: AdapterDescription, manifest: ReferenceManifest) -> Warning | None:
    """A continued adapter is served on the unaligned model: where it has no factors, there is no alignment."""
    own = {module.name for module in description.modules}
    missing = [name for name in manifest.aligned if name not in own]
    if not missing:
        return None
    return Warning(
        code="alignment_incomplete",
        message=f"The aligned adapter reaches {_modules(len(missing))} on which this adapter has no factors (the first "
        f"is {missing[0]}). It was continued from the aligned adapter, so what that did there is gone, and no repair "
        "of the others brings it back.",
    )


def _unreached(names: Sequence[str], total: int) -> Warning | None:
    if not names:
        return None
    return Warning(
        code="modules_not_reached",
        message=f"{len(names)} of {_modules(total)} {'was' if len(names) == 1 else 'were'} left alone, because the "
        f"reference holds nothing for them that this method needs (the first is {names[0]}). They show "
        "a similarity of 1.",
    )


def _without_effect(measured: Sequence[Measured], selection: Selection) -> Warning | None:
    unchanged = [item.line.name for item in measured if item.line.name in selection.names and not item.line.repaired]
    if not unchanged:
        return None
    return Warning(
        code="repair_without_effect",
        message=f"{_modules(len(unchanged), 'selected ')} did not change (the first is {unchanged[0]}): the update is "
        "zero, or already the reference's.",
    )


def _fell_short(measured: Sequence[Measured], method: Method) -> Warning | None:
    """After the repair there are still more than half as many modules that act more on safety prompts than on general
    ones: counted as the report's headline counts them."""
    even = method.break_even
    if even is None or method.type == "none":
        return None
    before = sum(item.line.similarity_before < even for item in measured)
    after = sum(item.line.similarity_after < even for item in measured)
    if 2 * after <= before:
        return None
    return Warning(
        code="repair_fell_short",
        message=f"Before the repair {_modules(before)} acted more on safety prompts than on general ones, after it "
        f"{after} {'does' if after == 1 else 'do'}: the strength is too weak, or the reference was built from too few "
        "prompts to tell them apart. Take another strength or reference, or ask the adapter some harmful prompts "
        "before you serve it.",
    )


def _biases(measured: Sequence[Measured], method: Method) -> Warning | None:
    biased = sum(item.biased for item in measured)
    if biased:
        return Warning(
            code="biases_added",
            message=f"{_modules(biased)} got a bias, which kept and edit do not see: both compare updates of weights. "
            "Servers other than PEFT do not load it.",
        )
    if method.side_car():
        return Warning(
            code="side_car",
            message="The adapter is as it was; the repair is in the side-car file and has no effect until a server "
            "adds its biases to the attention outputs.",
        )
    return None


def _truncated(lines: Sequence[ModuleLine]) -> Warning | None:
    rough = [line for line in lines if line.truncation_error > ROUGH]
    if not rough:
        return None
    worst = max(rough, key=lambda line: line.truncation_error)
    return Warning(
        code="truncated",
        message=f"Bringing the result back to the adapter's rank lost more than 10\u00a0% of the update's norm in "
        f"{_modules(len(rough))} (most in {worst.name}: {_percent(worst.truncation_error)}). The output rank "
        "exact loses nothing.",
    )


def _times(size: float) -> str:
    """As the report's sentences write it: 19.8, 20, 1,234."""
    return f"{size:,.{1 if size < 100 else 0}f}".removesuffix(".0")


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}\u00a0%"


def _modules(count: int, which: str = "") -> str:
    return f"{count} {which}module" + ("" if count == 1 else "s")


def no_effect(measured: Sequence[Measured], selection: Selection, dtype: str) -> str | None:
    """Why a repair that selected modules changed no update at all; None where it did, or had nothing selected.

    selection: the modules that were promised to change.
    """
    chosen = [item for item in measured if item.line.name in selection.names]
    if not chosen or any(item.line.edit > NO_EDIT or item.biased for item in chosen):
        return None
    if all(item.energy == 0 for item in chosen):
        return "the adapter's update is zero in every selected module, as before any training"
    return (
        f"the repair of every selected module is smaller than what {dtype} can hold, or the adapter already is what "
        "the repair would make of it"
    )
