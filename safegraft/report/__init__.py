"""A report as files: JSON for machines, HTML for people, CSV for spreadsheets, PNG for slides. No torch here."""

from pathlib import Path

from safegraft.contracts.report import Evaluation, Report
from safegraft.errors import InvalidParameter
from safegraft.files import write_atomic
from safegraft.report.html import to_html
from safegraft.report.png import figures, to_png
from safegraft.report.table import tables, to_csv
from safegraft.report.words import headline

__all__ = [
    "figures",
    "headline",
    "render",
    "tables",
    "to_csv",
    "to_html",
    "to_json",
    "to_png",
    "with_evaluation",
    "with_headline",
]


def render(report: Report, stem: Path) -> list[Path]:
    """Writes `<stem>.json`, `.html`, `.csv`, `.png`, `.changes.png`; where there is something to draw `.layers.png`,
    of several strengths `.strengths.csv` and `.png`, of an evaluation `.evaluation.csv` and `.png`. The stem may
    contain dots. Returns the paths, `.json` first."""
    contents = {
        ".json": to_json(report).encode(),
        ".html": to_html(report).encode(),
        **{f".{ending}": text.encode() for ending, text in tables(report).items()},
        **{f".{ending}": data for ending, data in figures(report).items()},
    }
    paths = []
    for suffix, data in contents.items():
        path = stem.with_name(stem.name + suffix)
        write_atomic(path, data)
        paths.append(path)
    return paths


def to_json(report: Report) -> str:
    """The report itself, with its headline; `Report.model_validate_json` reads it back."""
    return with_headline(report).model_dump_json(indent=2) + "\n"


def with_headline(report: Report) -> Report:
    """For those who read the JSON: the sentence that all other forms have; one that was there before is replaced."""
    return report.model_copy(update={"headline": headline(report)})


def with_evaluation(report: Report, evaluation: Evaluation, *, param: str) -> Report:
    """The report with what was measured of the behaviour; param: the field that is named at fault.

    Raises InvalidParameter: `other_adapter_evaluated` where the evaluation names another adapter than the report's,
    `nothing_evaluated` where the report is of a measurement that made none.
    """
    if report.output is None:
        raise InvalidParameter(
            "The report is of a measurement, which made no adapter whose behaviour could be told.",
            code="nothing_evaluated",
            param=param,
            hint="Take the report of a realignment with `mode` patch.",
        )
    own, named = report.output.sha256, evaluation.output_sha256
    if named is not None and named != own:
        raise InvalidParameter(
            f"The evaluation is of the adapter {named}, the report of {own}.",
            code="other_adapter_evaluated",
            param=param,
            hint="Measure the adapter that this report is of, or take that adapter's report.",
        )
    return report.model_copy(update={"evaluation": evaluation})
