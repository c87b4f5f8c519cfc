"""`safegraft report`: a report that lies there as JSON, told on the terminal and written in all forms."""

from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from safegraft.commands.terminal import Json, out, print_json, tell
from safegraft.contracts.report import Evaluation, Report
from safegraft.errors import InvalidParameter
from safegraft.files import read_bounded
from safegraft.report import render, with_evaluation, with_headline
from safegraft.report.text import Look, story
from safegraft.verification import MAX_DOCUMENT_BYTES

Document = TypeVar("Document", bound=BaseModel)
WRITTEN_BY = {
    "not_a_report": "`safegraft realign` writes it as OUT.report.json, and the service has it at a job's report_url; "
    "provenance is for `safegraft verify`.",
    "not_an_evaluation": "`safegraft evaluate --out FILE` writes it.",
}


def tell_report(report: Report) -> None:
    """The story of a report, and its warnings, on standard output."""
    # In one line for programs, broken between words for people.
    out.print(story(report, Look.of(out)), soft_wrap=not out.is_terminal, highlight=False)
    for warning in report.warnings:
        tell(f"Warning: {warning.message}", style="yellow", soft=not out.is_terminal)


def show(
    report: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A report.json.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            envvar="SAFEGRAFT_EVALUATION",
            help="What was measured of the behaviour before and after, as JSON; it becomes part of the report.",
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--out",
            envvar="SAFEGRAFT_OUT",
            help="Writes OUT.json, .html, .csv and the pictures; replaces what is there.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tells a report on the terminal, adds an evaluation to it, and writes it as page, table and pictures."""
    found = read_report(report, "FILE")
    if evaluation is not None:
        measured = _read(evaluation, Evaluation, "not_an_evaluation", "--evaluation")
        found = with_evaluation(found, measured)
    files = render(found, to) if to is not None else []
    if as_json:
        print_json(with_headline(found).model_dump(mode="json"))
        return
    tell_report(found)
    if files:
        tell("Report:  " + " ".join(str(path) for path in files))


def read_report(path: Path, param: str) -> Report:
    """Raises InvalidParameter (`not_a_report`) with the first field at fault."""
    return _read(path, Report, "not_a_report", param)


def _read(path: Path, kind: type[Document], code: str, param: str) -> Document:
    """Raises InvalidParameter with the first field at fault."""
    try:
        return kind.model_validate_json(read_bounded(path, MAX_DOCUMENT_BYTES))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        fault = f"{where}: {first['msg']}" if where else first["msg"]
        raise InvalidParameter(
            f"{path} is no {kind.__name__.lower()}: {fault}.",
            code=code,
            param=param,
            hint=WRITTEN_BY[code],
        ) from error
