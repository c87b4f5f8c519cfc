"""The report's tables as CSV at full precision: modules, strengths, and what an evaluation counted."""

import csv
import io
from collections.abc import Iterable, Sequence

from safegraft.contracts.report import Evaluation, ModuleLine, Report
from safegraft.report.interval import wilson
from safegraft.report.words import still_leaning

# What makes a spreadsheet take a cell for a formula (OWASP's list, with the full-width forms that Excel accepts).
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def to_csv(report: Report) -> str:
    """Header and one line per module, with every field of `ModuleLine`. strength: at which it was measured, where there
    are several: the first."""
    fields = list(ModuleLine.model_fields)
    strength = report.variants[0].strength if report.variants else None
    return _table(
        [*fields, "strength"], ([*(getattr(line, name) for name in fields), strength] for line in report.modules)
    )


def tables(report: Report) -> dict[str, str]:
    """All tables by the ending of their files, without those that would be empty."""
    found = {"csv": to_csv(report)}
    if report.variants:
        found["strengths.csv"] = _strengths(report)
    if report.evaluation is not None:
        found["evaluation.csv"] = evaluation_csv(report.evaluation)
    return found


def _strengths(report: Report) -> str:
    """A line for each strength, least first. still_leaning: how many modules still act more on safety prompts than on
    general ones: none, some, most; empty where that is not known."""
    head = ["strength", "modules", "repaired", "kept", "edit", "similarity_before_median", "similarity_after_min",
            "similarity_after_median", "similarity_after_max", "still_leaning", "truncation_error",
            "output_sha256"]  # fmt: skip
    lines = []
    for variant in sorted(report.variants, key=lambda item: item.strength):
        found, output = variant.summary, variant.output
        after = found.similarity_after
        lines.append(
            [variant.strength, found.modules, found.repaired, found.kept, found.edit, found.similarity_before.median,
             after.min, after.median, after.max, still_leaning(report, found), found.truncation_error,
             output.sha256 if output else None]
        )  # fmt: skip
    return _table(head, lines)


def evaluation_csv(evaluation: Evaluation) -> str:
    """A line for each measure and side, with Wilson's 95 % interval."""
    lines = []
    for name, before, after in evaluation.measures():
        for side, found in (("before", before), ("after", after)):
            lines.append([name, side, found.hits, found.total, found.share, *wilson(found.hits, found.total)])
    return _table(["measure", "side", "hits", "total", "share", "low", "high"], lines)


def _table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    # RFC 4180's line ends; with "\n" alone, Python 3.11 would leave a "\r" in a name unquoted and split the line.
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(head)
    for line in lines:
        writer.writerow([_cell(value) for value in line])
    return text.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return "" if value is None else value
