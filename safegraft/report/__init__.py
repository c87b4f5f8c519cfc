"""A report as files: JSON for machines, HTML for people, CSV for spreadsheets, PNG for slides. No torch here."""

from pathlib import Path

from safegraft.contracts.report import Report
from safegraft.files import write_atomic
from safegraft.report.html import to_html
from safegraft.report.png import figures, to_png
from safegraft.report.table import tables, to_csv
from safegraft.report.words import headline

__all__ = ["figures", "headline", "render", "tables", "to_csv", "to_html", "to_json", "to_png", "with_headline"]


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
