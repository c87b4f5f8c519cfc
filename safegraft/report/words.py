"""The sentences and number formats that HTML, PNG and command line share, so that they never disagree.

Everything that comes out of a report is a customer's or an operator's text: `shown` makes it fit to print, escaping is
the template's work.
"""

import math

from safegraft.contracts.methods import GramParameters, NlsrParameters
from safegraft.contracts.report import Report

NOTHING = "–"
# U+2212 and U+00A0: a hyphen reads as a range and a line must not end between number and unit.
MINUS, SPACE = "\u2212", "\u00a0"

METHODS = {
    "nlsr": "NLSR, neuron-level safety realignment (arXiv 2412.12497)",
    "gram": "gram, activation-weighted transplant",
}


def headline(report: Report) -> str:
    """The report in one line, without a full stop."""
    summary = report.summary
    if report.mode == "analyze":
        middle, lowest = number(summary.similarity_before.median), number(summary.similarity_before.min)
        return (
            f"{counted(summary.modules)} {verb(summary.modules)} measured, nothing was changed; "
            f"median similarity {middle}, lowest {lowest}"
        )
    if summary.repaired == 0:
        if is_untouched(report):
            return "Nothing was changed; the output is the input, byte for byte"
        return f"None of {counted(summary.modules)} was repaired"
    if summary.repaired == summary.modules:
        which = f"All {counted(summary.modules)}" if summary.modules > 1 else "The only module"
    else:
        which = f"{summary.repaired} of {counted(summary.modules)}"
    return (
        f"{which} {verb(summary.repaired)} repaired; the adapter kept {percent(summary.kept)} of its update "
        f"and changed by {percent(summary.edit)}"
    )


def is_untouched(report: Report) -> bool:
    """True where the output is known to be the input's very bytes."""
    return report.output is not None and report.output.sha256 == report.input.sha256


def method_name(report: Report) -> str:
    return METHODS.get(report.method.type, shown(report.method.type))


def selection(report: Report) -> str:
    """Which modules a repair takes, in words that hold for both modes."""
    match report.method.parameters:
        case NlsrParameters(selection="lowest", skip_share=share):
            return f"Chosen for repair: the {percent(1 - share)} of modules with the lowest similarity."
        case NlsrParameters():
            seed = report.method.seed
            return "Chosen for repair: a seeded random draw in which less similar modules are drawn more often" + (
                f" (seed {seed})." if seed is not None else "."
            )
        case GramParameters():
            return (
                "Chosen for repair: every module. Where the fine-tuning does little to safety prompts, the repair "
                "changes little."
            )


def lineage(report: Report) -> str:
    """Where the adapter comes from, and how that was seen."""
    cosine = number(report.lineage_similarity)
    if report.lineage == "continued":
        return (
            "It was trained further from the provider's aligned adapter, so it contains that alignment: both updates "
            f"point in similar directions (median cosine {cosine}; for unrelated adapters it is near 0)."
        )
    return (
        f"It is unrelated to the provider's aligned adapter (median cosine of the updates {cosine}; for related ones "
        "it is well above 0). So it is taken to have been trained on top of the aligned model and to be served there. "
        "An adapter that was trained on the model without alignment looks the same, and nothing here would give that "
        "alignment back to it."
    )


def counted(modules: int) -> str:
    return f"{modules:,} module" + ("" if modules == 1 else "s")


def verb(count: int) -> str:
    return "was" if count == 1 else "were"


def number(value: float, digits: int = 2) -> str:
    """0.73; never −0.00."""
    if not math.isfinite(value):
        return NOTHING
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", MINUS)


def percent(share: float, digits: int = 0) -> str:
    """93 %; does not call a little nothing, nor almost all everything."""
    if not math.isfinite(share):
        return NOTHING
    rounded = round(100 * share, digits) + 0.0
    step = 10.0**-digits
    if rounded == 0 and share > 0:
        return f"<{SPACE}{step:.{digits}f}{SPACE}%"
    if rounded == 100 and share < 1:
        return f">{SPACE}{100 - step:.{digits}f}{SPACE}%"
    return f"{rounded:.{digits}f}{SPACE}%".replace("-", MINUS)


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
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
