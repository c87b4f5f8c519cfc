"""The modules as CSV, one line each, with every field of `ModuleLine` at full precision."""

import csv
import io

from safegraft.contracts.report import ModuleLine, Report

# What makes a spreadsheet take a cell for a formula (OWASP's list, with the full-width forms that Excel accepts).
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def to_csv(report: Report) -> str:
    """Header and one line per module."""
    fields = list(ModuleLine.model_fields)
    text = io.StringIO()
    # RFC 4180's line ends; with "\n" alone, Python 3.11 would leave a "\r" in a name unquoted and split the line.
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(fields)
    for line in report.modules:
        writer.writerow([_cell(getattr(line, field)) for field in fields])
    return text.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return "" if value is None else value
