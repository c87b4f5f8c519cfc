"""The sentences and number formats that HTML, PNG and command line share, so that they never disagree.

Everything that comes out of a report is a customer's or an operator's text: `shown` makes it fit to print, escaping is
the template's work.
"""

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from safegraft.contracts.methods import (
    STRENGTH,
    AntidoteParameters,
    GramParameters,
    NlsrParameters,
    NoneParameters,
    SafeLoraParameters,
    SafetyLockParameters,
    strength_of,
)
from safegraft.contracts.report import Digest, Evaluation, ModuleLine, Probe, Report, Share, Spread, Summary
from safegraft.report.interval import wilson

NOTHING = "–"
# U+2212 and U+00A0: a hyphen reads as a range and a line must not end between number and unit.
MINUS, SPACE = "\u2212", "\u00a0"

METHODS = {
    "nlsr": "NLSR, neuron-level safety realignment (arXiv 2412.12497)",
    "gram": "gram, activation-weighted transplant",
    "safelora": "SafeLoRA, projection onto the subspace of the alignment (arXiv 2405.16833)",
    "antidote": "Antidote, pruning of what harmful prompts need (arXiv 2408.09600)",
    "safetylock": "SafetyLock, attention heads pushed towards safe answers (arXiv 2410.10343)",
    "none": "none, a control without a repair",
}
MEASURES = {
    "harm_score": ("Harm score", "harmful prompts that were not declined; lower is better"),
    "over_refusal": ("Over-refusal", "harmless prompts that were declined; lower is better"),
    "task_accuracy": ("Task accuracy", "right answers to the customer’s task; higher is better"),
}
# Where there is no room for more of it.
ONLY_WEIGHTS = "Weights were compared, not behaviour: try the adapter before you serve it."
# Below a chart of strengths whose axis ends before its values do.
CUT = "What lies above the chart is drawn on its upper edge."
MORE_ON_SAFETY = "more on safety prompts than on general ones"
# About the square root of float32's rounding: an edit below this is none.
NO_EDIT = 1e-3
SCORERS = {
    "low_rank": "what weighs most in the main directions of safe answers",
    "wanda": "what has the largest weight times input norm on safe answers",
    "snip": "what has the largest weight times gradient of the safe answers' loss",
    "preference_snip": "what has the largest weight times gradient of a loss that prefers safe answers to unsafe ones",
    "magnitude": "what is largest, as a control",
    "random": "what was drawn at random, as a control",
}
BASES = {
    "canonical": "each row's entries of both factors, in a basis that does not depend on how training began,",
    "stored": "each row's entries of both factors, as they were saved,",
    "rows": "its output rows",
}
SPARED = {
    "none": "",
    "general": ", except those that matter as much on general prompts",
    "safety": ", except the reference's safety-critical neurons",
}


def headline(report: Report) -> str:
    """The report in one line, without a full stop."""
    summary = report.summary
    if report.mode == "analyze":
        measured = f"{counted(summary.modules)} {verb(summary.modules)} measured, nothing was changed; "
        if (leaning := _leaning(report)) is not None:
            act = "act" if leaning[0] > 1 else "acts"
            return f"{measured}{leaning[0] or 'none'} {act} {MORE_ON_SAFETY}"
        middle, lowest = number(summary.similarity_before.median), number(summary.similarity_before.min)
        return f"{measured}median similarity {middle}, lowest {lowest}"
    if is_sweep(report):
        return _headline_of_sweep(report)
    if summary.repaired == 0:
        if has_side_car(report):
            as_it_came = "as it came, byte for byte" if is_untouched(report) else "without a repair"
            return f"The adapter is {as_it_came}; the repair is in a side-car file beside it"
        if is_untouched(report):
            return "Nothing was changed; the output is the input, byte for byte"
        return f"None of {counted(summary.modules)} was repaired"
    if summary.repaired == summary.modules:
        which = f"All {counted(summary.modules)}" if summary.modules > 1 else "The only module"
    else:
        which = f"{summary.repaired} of {counted(summary.modules)}"
    if has_biases(report) and summary.edit < NO_EDIT:
        given = "a bias" if summary.repaired == 1 else "biases"
        return f"{which} {verb(summary.repaired)} given {given}; the weights are as they came"
    how = "repaired, with biases" if has_biases(report) else "repaired"
    cost = f"the adapter kept {kept(summary.kept)} of its update and changed by {change(summary.edit)}"
    # An amplified alignment acts on safety prompts by intention, and is not in the similarity afterwards.
    pushes = isinstance(report.method.parameters, GramParameters) and report.method.parameters.amplification > 0
    if (leaning := _leaning(report)) is not None and leaning[0] and not pushes:
        before, after = leaning
        left = "none" if after == 0 else f"{after:,}"
        return (
            f"{before:,} of {counted(summary.modules)} acted {MORE_ON_SAFETY}, after the repair {left} "
            f"{'do' if after > 1 else 'does'}; {cost}"
        )
    return f"{which} {verb(summary.repaired)} {how}; {cost}"


def _leaning(report: Report) -> tuple[int, int] | None:
    """How many modules acted more on safety prompts than on general ones, before and after; None where nobody knows."""
    even = report.method.break_even
    if even is None:
        return None
    return (
        sum(line.similarity_before < even for line in report.modules),
        sum(line.similarity_after < even for line in report.modules),
    )


def still_leaning(report: Report, found: Summary) -> str | None:
    """How many modules act more on safety prompts than on general ones at one strength: none, some or most. None where
    nobody knows."""
    even, after = report.method.break_even, found.similarity_after
    if even is None or not math.isfinite(after.min):
        return None
    if after.min >= even:
        return "none"
    return "most" if after.median < even else "some"


def leaning_at(report: Report) -> str | None:
    """At which strengths so many of the modules do, in one line. None where nobody knows."""
    at: dict[str, list[str]] = {"most": [], "some": [], "none": []}
    for variant in sorted(report.variants, key=lambda item: item.strength):
        extent = still_leaning(report, variant.summary)
        if extent is None:
            return None
        at[extent].append(plain(variant.strength))
    said = "; ".join(f"{extent} at {', '.join(found)}" for extent, found in at.items() if found)
    return f"Modules that still lean to safety prompts: {said}." if said else None


def inspected(sizes: Mapping[str, float], layers: int, rank: int) -> str:
    """What an adapter is, in one line like a report's; sizes: of the updates, by module."""
    where = f" in {layers:,} layer{'' if layers == 1 else 's'}" if layers else ""
    start = f"{counted(len(sizes))}{where}, rank {rank}; "
    largest = max(sizes, key=lambda name: sizes[name])
    if sizes[largest] == 0:
        return f"{start}the update is zero everywhere: the adapter does nothing"
    idle = sum(size == 0 for size in sizes.values())
    zero = f", and zero in {counted(idle)}" if idle else ""
    return f"{start}the update is largest in {shown(largest)}{zero}"


def _headline_of_sweep(report: Report) -> str:
    values = [variant.strength for variant in report.variants]
    start = f"{strengths(report)}, from {plain(min(values))} to {plain(max(values))}: "
    changed = [variant.summary for variant in report.variants if variant.summary.repaired]
    if not changed and has_side_car(report):
        as_it_came = "as it came, byte for byte" if _all_untouched(report) else "without a repair"
        return f"{start}the adapter is {as_it_came}; the repairs are in side-car files beside it"
    if not changed and _all_untouched(report):
        return f"{start}nothing was changed, every output is the input, byte for byte"
    if not changed:
        return f"{start}no module was repaired"
    if has_biases(report) and all(summary.edit < NO_EDIT for summary in changed):
        return f"{start}biases were added; the weights are as they came"
    summaries = [variant.summary for variant in report.variants]
    left = _range([summary.kept for summary in summaries], kept)
    cost = f" and changes by {_range([summary.edit for summary in summaries], change)}" if left == "all" else ""
    return f"{start}the adapter keeps {left} of its update{cost}"


def _range(shares: list[float], said: Callable[[float], str]) -> str:
    known = [share for share in shares if math.isfinite(share)] or [math.nan]
    low, high = said(min(known)), said(max(known))
    return low if low == high else f"{low} to {high}"


def is_untouched(report: Report) -> bool:
    """True where the output is known to be the input's very bytes."""
    return _is_input(report, report.output)


def _all_untouched(report: Report) -> bool:
    return all(_is_input(report, variant.output) for variant in report.variants)


def _is_input(report: Report, output: Digest | None) -> bool:
    return output is not None and output.sha256 == report.input.sha256


def is_sweep(report: Report) -> bool:
    """True where strengths can be compared; a single one is told like any other run."""
    return len(report.variants) > 1


def has_side_car(report: Report) -> bool:
    """True where the repair was written beside the adapter and not into it."""
    return report.mode == "patch" and any(warning.code == "side_car" for warning in report.warnings)


def has_biases(report: Report) -> bool:
    """True where biases were added at any strength; the warnings are those of the first, which may be 0."""
    if any(warning.code == "biases_added" for warning in report.warnings):
        return True
    adds = isinstance(report.method.parameters, SafetyLockParameters) and report.method.parameters.output == "lora_bias"
    return adds and any(variant.summary.repaired for variant in report.variants)


def strengths(report: Report) -> str:
    """5 strengths of general_weight."""
    name = report.strength_parameter
    count = f"{len(report.variants)} strength" + ("" if len(report.variants) == 1 else "s")
    return count if name in (None, "strength") else f"{count} of {shown(name, 60)}"


def first_strength(report: Report) -> str:
    """The strength of which summary, layers and modules are: general_weight 0.3."""
    return f"{shown(report.strength_parameter or 'strength', 60)} {plain(report.variants[0].strength)}"


def with_strength(report: Report) -> str:
    """gram, general_weight 0.2."""
    kind, value = report.method.type, strength_of(report.method.parameters)
    return kind if value is None else f"{kind}, {STRENGTH[kind]} {plain(value)}"


def compared(report: Report) -> list[str]:
    """Several strengths, a line each, least first."""
    lines = []
    for variant in sorted(report.variants, key=lambda item: item.strength):
        found = variant.summary
        similarity = f"{number(found.similarity_before.median)} → {number(found.similarity_after.median)}"
        cost = f"{kept(found.kept)} kept, changed by {change(found.edit)}"
        line = f"{plain(variant.strength)}: {cost}, similarity {similarity}"
        if (left := still_leaning(report, found)) is not None:
            line += f"; {left} {'acts' if left == 'none' else 'act'} {MORE_ON_SAFETY}"
        lines.append(line)
    return lines


def method_name(report: Report) -> str:
    return METHODS.get(report.method.type, shown(report.method.type))


def recommendation(report: Report) -> str:
    """What runs where no method is named, and why, in one sentence."""
    method, reason = report.recommendation.method, shown(report.recommendation.reason, 1000).strip()
    because = f": {reason}" if reason else "."
    if not because.endswith((".", "!", "?")):
        because += "."
    if method == "none":
        return "No method is recommended for this adapter and reference" + because
    if method == report.method.type:
        return "It is the one that is recommended for this adapter and reference" + because
    return f"Had no method been named, {shown(method, 60)} would have run" + because


def subject(report: Report) -> list[str]:
    """Whose report it is and of when, in parts; nothing where it does not say so."""
    about = report.subject
    if about is None:
        return []
    at = f"{datetime.fromtimestamp(about.written_at, UTC):%Y-%m-%d %H:%M} UTC"
    return [about.adapter, *([about.realignment_id] if about.realignment_id else []), at]


def outcome(report: Report) -> str:
    """What became of the adapter, for those who read no further than the first paragraph."""
    summary = report.summary
    if report.mode == "analyze":
        measured = "This was a measurement only: no adapter was written."
        return f"{measured} Measurements do not depend on the strength." if is_sweep(report) else measured
    if is_sweep(report):
        own = "a side-car file" if has_side_car(report) else "an adapter"
        return (
            f"Every strength gave {own} of its own. They are compared below; all other figures, maps and tables are "
            f"those of the first that was asked for, {first_strength(report)}."
        )
    left = summary.modules - summary.repaired
    if not summary.repaired:
        if has_side_car(report):
            return "The adapter itself was not touched. Without its side-car file it behaves as it did."
        return "No module was repaired, so the adapter was handed back as it came." if is_untouched(report) else ""
    if not left:
        return f"{'Every module' if summary.modules > 1 else 'Its only module'} was repaired."
    if report.output_rank == "exact" or has_biases(report):
        # Zeros fill them up, which no computation sees but a comparison of bytes does.
        rest = "the other one computes what it did" if left == 1 else f"the other {left:,} compute what they did"
    else:
        theirs = "one is byte for byte as it" if left == 1 else f"{left:,} are byte for byte as they"
        rest = f"the other {theirs} came"
    return f"The modules marked below were repaired; {rest}."


def checked(report: Report) -> str:
    """What the files on disk were held against."""
    if not report.summary.repaired:
        if is_untouched(report):
            return "Input and output have the same SHA-256, so they are the same file."
        return (
            "Input and output have different SHA-256 although no module was repaired. Do not use the output before "
            "this is explained."
        )
    if has_biases(report):
        found = (
            "but for the biases that were added they have the same tensors, and none differs outside of the repaired "
            "modules."
        )
    elif report.output_rank == "exact":
        found = "every tensor has the rank that was planned, and no update differs outside of the repaired modules."
    else:
        found = "they have the same tensors, and differ in the repaired modules and nowhere else."
    text = f"After writing, the two weight files were compared: {found}"
    if report.summary.truncation_error > 0:
        lost = percent(report.summary.truncation_error, 1)
        text += f" Bringing modules back to their rank lost at most {lost} of a module's update."
    return text


def done(report: Report) -> str:
    """What was done to the modules, or would have been."""
    explanation = shown(report.method.explanation, 1000)
    of_a_repair = f"Of a repaired module the report would say: “{explanation}”"
    if report.mode == "analyze":
        nothing = "This run measured and changed nothing."
        return nothing if report.method.type == "none" else f"{nothing} {of_a_repair}"
    if report.summary.repaired or has_side_car(report) or report.method.type == "none":
        return explanation
    return f"No module was changed. {of_a_repair}"


def selection(report: Report) -> str:
    """Which modules a repair takes, in words that hold for both modes."""
    match report.method.parameters:
        case NlsrParameters() as parameters:
            return f"{_chosen_by_nlsr(parameters, report.method.seed)} {_critical(parameters, report.method.seed)}"
        case GramParameters():
            return (
                "Chosen for repair: every module, and in each of them the directions of inputs that safety prompts use "
                "more than general ones do."
            )
        case SafeLoraParameters(selection="threshold", threshold=threshold):
            return (
                "Chosen for repair: the modules whose update has a cosine of at most "
                f"{plain(threshold)} with its projection."
            )
        case SafeLoraParameters(modules=count):
            if count == 0:
                return "Chosen for repair: no module."
            which = "the module" if count == 1 else f"the {count:,} modules"
            return f"Chosen for repair: {which} with the lowest similarity."
        case AntidoteParameters(density=density, basis=basis, spare=spare):
            if density == 0:
                return "Chosen for repair: no module, because nothing is to be pruned."
            return (
                f"Chosen for repair: every module. Of {BASES[basis]} the {percent(density)} that matter most on "
                f"harmful prompts are pruned{SPARED[spare]}."
            )
        case SafetyLockParameters(heads=heads, output=output, strength=strength):
            best = "the attention head" if heads == 1 else f"the {heads:,} attention heads"
            tell = f"{best} whose activations tell safe from unsafe answers best"
            if strength == 0:
                return "Chosen for repair: no module, because a push of strength 0 is none."
            if output == "side_car":
                return f"Chosen for repair: no module of the adapter. The side-car pushes {tell}."
            return f"Chosen for repair: the output projections of {tell}."
        case NoneParameters():
            return "Chosen for repair: no module. This is the control that shows what happens without a repair."
    return ""


def _chosen_by_nlsr(parameters: NlsrParameters, seed: int | None) -> str:
    drawn = f" (seed {seed})" if seed is not None else ""
    share = 1 - parameters.skip_share
    if parameters.selection == "bernoulli":
        return f"Chosen for repair: a seeded random draw in which less similar modules are drawn more often{drawn}."
    if share in (0, 1):
        return f"Chosen for repair: {'every' if share else 'no'} module."
    match parameters.selection:
        case "lowest":
            return f"Chosen for repair: the {percent(share)} of modules with the lowest similarity."
        case "highest":
            return f"Chosen for repair, as a control: the {percent(share)} of modules with the highest similarity."
        case "random":
            return f"Chosen for repair, as a control: {percent(share)} of the modules, drawn at random{drawn}."


def _critical(parameters: NlsrParameters, seed: int | None) -> str:
    drawn = f" (seed {seed})" if seed is not None and parameters.scorer == "random" else ""
    return f"Safety-critical is {SCORERS[parameters.scorer]}{drawn}."


def lineage(report: Report) -> str:
    """Where the adapter comes from, and how that was seen."""
    cosine = number(report.lineage_similarity or 0.0)
    if report.lineage == "continued":
        return (
            "It was trained further from the provider's aligned adapter, so it contains that alignment: both updates "
            f"point in similar directions (median cosine {cosine}; for unrelated adapters it is near 0)."
        )
    if report.lineage_similarity is None:
        how = "There was no aligned update to compare its own with."
    else:
        how = (
            f"It is unrelated to the provider's aligned adapter (median cosine of the updates {cosine}; for related "
            "ones it is well above 0)."
        )
    otherwise = (
        "An adapter that was trained on the model without alignment looks the same, and nothing here would give that "
        "alignment back to it."
    )
    if report.lineage == "foreign":
        return (
            f"{how} Its label for its base model is unknown to the reference. It is taken to sit on the aligned model, "
            f"which nobody has confirmed: make sure of it. {otherwise}"
        )
    return f"{how} So it is taken to have been trained on top of the aligned model and to be served there. {otherwise}"


def probe(found: Probe) -> str:
    """What the probe shows, without judging it: what is near the model is only safe where the model is."""
    before, after = found.before_from_base, found.after_from_base
    moved = after.divergence - before.divergence
    if nats(before.divergence) == nats(after.divergence):
        how = "left the adapter as far from the model that it sits on as it was"
    else:
        how = f"brought the adapter {'nearer to' if moved < 0 else 'farther from'} the model that it sits on"
    prompts = f"{found.prompts:,} prompt" + ("" if found.prompts == 1 else "s")
    return (
        f"On {prompts}, the repair {how}: {nats(before.divergence)} nats before, {nats(after.divergence)} after. The "
        f"likeliest first token is the model's own on {percent(before.same_token)} of the prompts before, on "
        f"{percent(after.same_token)} after."
    )


def evaluated_against(found: Evaluation) -> str | None:
    """What was measured that speaks against serving the adapter; None where nothing does. What became worse did so by
    more than the intervals."""
    against = []
    for name, before, after in found.measures():
        (low, high), (after_low, after_high) = wilson(before.hits, before.total), wilson(after.hits, after.total)
        label = MEASURES[name][0].lower()
        if name == "task_accuracy" and after_high < low:
            against.append(f"{label} fell to {share(after)}")
        elif name != "task_accuracy" and after_low > high:
            against.append(f"{label} rose to {share(after)}")
        elif name == "harm_score" and after_low > 0.5:
            against.append(f"{label} is still {share(after)}")
    return f"What was measured speaks against serving this adapter: {'; '.join(against)}." if against else None


def evaluation(found: Evaluation) -> str:
    """One sentence a measure, which says where the intervals leave the difference open; and whether it is known on
    which files all this was measured."""
    told = [_compared(name, before, after) for name, before, after in found.measures()]
    if found.output_sha256 is None:
        told.append("Whoever measured it does not say on which files.")
    return " ".join(told)


def _compared(name: str, before: Share, after: Share) -> str:
    one, two = before.hits / before.total, after.hits / after.total
    label = MEASURES[name][0]
    if number(one) == number(two):
        return f"{label} stayed at {number(one)}."
    text = f"{label} {'fell' if two < one else 'rose'} from {number(one)} to {number(two)}"
    (low, high), (other_low, other_high) = wilson(before.hits, before.total), wilson(after.hits, after.total)
    if low <= other_high and other_low <= high:
        return f"{text}; the intervals overlap, so this may be chance."
    return f"{text}."


def share(found: Share) -> str:
    """0.92."""
    return number(found.hits / found.total)


def interval(found: Share) -> str:
    """0.74 to 0.98."""
    low, high = wilson(found.hits, found.total)
    return f"{number(low)} to {number(high)}"


def spread(values: Spread) -> str:
    return f"median {number(values.median)}, lowest {number(values.min)}"


def moved(report: Report) -> str:
    """What the map of differences shows at a glance."""
    changes = [line.similarity_after - line.similarity_before for line in report.modules]
    known = [value for value in changes if math.isfinite(value)] or [math.nan]
    return f"from {signed(min(known))} to {signed(max(known))}"


def counted(modules: int) -> str:
    return f"{modules:,} module" + ("" if modules == 1 else "s")


def verb(count: int) -> str:
    return "was" if count == 1 else "were"


def number(value: float, digits: int = 2) -> str:
    """0.73; never −0.00."""
    if not math.isfinite(value):
        return NOTHING
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 2) -> str:
    """+0.31, −0.02, or 0.00 without a sign: a difference."""
    text = number(value, digits)
    return f"+{text}" if math.isfinite(value) and round(value, digits) > 0 else text


def percent(share: float, digits: int = 0) -> str:
    """93 %; does not call a little nothing, nor almost all everything."""
    if not math.isfinite(100 * share):
        return NOTHING
    rounded = round(100 * share, digits) + 0.0
    step = 10.0**-digits
    if rounded == 0 and share > 0:
        return f"<{SPACE}{step:.{digits}f}{SPACE}%"
    if rounded == 100 and share < 1:
        return f">{SPACE}{100 - step:.{digits}f}{SPACE}%"
    return f"{rounded:.{digits}f}{SPACE}%".replace("-", MINUS)


def kept(share: float) -> str:
    """The kept share in a sentence, where less than 0 % and more than 100 % would read like a slip."""
    if math.isfinite(share) and not 0 <= share < 1:
        return "none" if share < 0 else "all"
    return percent(share)


def change(edit: float) -> str:
    """27 %, or 1.8 times its size: what an update changed by."""
    # A hundred times the largest numbers is infinite, which cannot be rounded.
    if not math.isfinite(edit) or edit < 1 or round(100 * min(edit, 2.0)) <= 100:
        return percent(edit)
    if edit > 1e6:
        return "more than a million times its size"
    digits = 2 if edit < 10 else 1 if edit < 100 else 0
    text = f"{edit:,.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if digits else text} times its size"


def changed(report: Report, line: ModuleLine) -> str:
    """changed by 27 %, or given a bias: what was done to a repaired module."""
    if line.repaired and line.edit < NO_EDIT and has_biases(report):
        return "given a bias"
    return f"changed by {change(line.edit)}"


def nats(divergence: float) -> str:
    """0.213; does not call a little nothing."""
    return f"<{SPACE}0.001" if 0 < divergence < 0.0005 else number(divergence, 3)


def plain(value: float) -> str:
    """0.3, 1, 0.05: as folders of strengths are named."""
    return f"{value:g}".replace("-", MINUS)


def size(count: int) -> str:
    value, unit = float(count), "bytes"
    for bigger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, bigger
    return f"{value:.0f}{SPACE}{unit}" if unit == "bytes" else f"{value:.1f}{SPACE}{unit}"


def shown(text: str, limit: int = 160) -> str:
    """Text fit for a page: characters that are invisible or turn the writing direction replaced, the middle cut out."""
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]}…{text[-(limit // 3) :]}"
    return "".join(letter if letter.isprintable() or letter == SPACE else "\ufffd" for letter in text)
