"""A report as files: JSON for machines, HTML for people, CSV for spreadsheets, PNG for slides. No torch here."""

from collections.abc import Mapping
from pathlib import Path

from safegraft.contracts.report import Evaluation, Report
from safegraft.errors import InvalidParameter
from safegraft.files import write_atomic
from safegraft.report.html import to_html
from safegraft.report.png import figures, to_png
from safegraft.report.table import evaluation_csv, tables, to_csv
from safegraft.report.words import headline

__all__ = [
    "check_evaluation",
    "evaluation_csv",
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


def with_evaluation(report: Report, evaluation: Evaluation) -> Report:
    """The report with what was measured of the behaviour. Raises what `check_evaluation` does."""
    made = report.output.sha256 if report.output is not None else None
    others = {item.output.sha256: item.strength for item in report.variants if item.output is not None}
    check_evaluation(evaluation, report.input.sha256, made, others)
    return report.model_copy(update={"evaluation": evaluation})


def check_evaluation(evaluation: Evaluation, sent: str, made: str | None, strengths: Mapping[str, float]) -> None:
    """sent, made: SHA-256 of a report's input and output. strengths: those of its several outputs, by SHA-256.

    Raises InvalidParameter: `other_adapter_evaluated` where the evaluation names other adapters than these,
    `nothing_evaluated` where none was made.
    """
    if made is None:
        raise InvalidParameter(
            "The report is of a measurement, which made no adapter whose behaviour could be told.",
            code="nothing_evaluated",
            hint="Take the report of a realignment with `mode` patch.",
        )
    named = evaluation.output_sha256
    if named is not None and named != made and made in strengths and named in strengths:
        of, first = strengths[named], strengths[made]
        raise InvalidParameter(
            f"The evaluation is of the adapter of strength {of:g}; all figures of this report are of the first "
            f"strength that was asked for, {first:g}.",
            code="other_adapter_evaluated",
            param="output_sha256",
            hint=f"Measure the adapter of strength {first:g}, or ask for {of:g} in a job of its own: it makes the same "
            "adapter.",
        )
    for name, given, own in (
        ("input_sha256", evaluation.input_sha256, sent),
        ("output_sha256", evaluation.output_sha256, made),
    ):
        if given is not None and given != own:
            raise InvalidParameter(
                f"The evaluation is of the adapter {given}, the report of {own}.",
                code="other_adapter_evaluated",
                param=name,
                hint="Measure the adapters that this report is of, or take the report of those.",
            )
