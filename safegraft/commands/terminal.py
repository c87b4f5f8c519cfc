"""What all commands share: two consoles, options that several have, and the stores that the environment names."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from safegraft.errors import InvalidParameter, NotFound
from safegraft.report.text import Look
from safegraft.settings import SharedSettings

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from safegraft.stores.references import ReferenceRegistry

out, err = Console(), Console(stderr=True)
# More than any list here takes.
_WIDE = 1000
Json = Annotated[bool, typer.Option("--json", envvar="SAFEGRAFT_JSON", help="Print one JSON object instead of text.")]
Data = Annotated[Path, typer.Option(envvar="SAFEGRAFT_DATA", help="The service's data folder.")]


def _device(name: str) -> str:
    # Here, so that a typing error is bad usage and not a failure deep in torch.
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"{name!r} is none of cpu, cuda, cuda:0, cuda:1, …")
    return name


DeviceName = Annotated[str, typer.Option(envvar="SAFEGRAFT_DEVICE", callback=_device, help="cpu, cuda, cuda:1, …")]


class ModelDtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


def print_list(table: Table) -> None:
    """A row a line, however narrow the terminal is, and where there is none: what a cell holds can be found and cut."""
    text = StringIO()
    Console(file=text, width=_WIDE).print(table, markup=False, highlight=False)
    for line in text.getvalue().splitlines():
        out.out(line.rstrip(), highlight=False)


def use_any_encoding() -> None:
    """A letter that the terminal cannot show becomes a question mark, and no failure of the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="replace")


def plain(text: str) -> str:
    """A stranger's text as it may stand on a terminal: in one line, and nothing in it moves the cursor or recolours."""
    # A hard space stands in our own warnings, between a number and its unit.
    return "".join(letter if letter.isprintable() or letter == "\u00a0" else "\ufffd" for letter in text)


def tell(text: str, style: str = "", *, soft: bool = True) -> None:
    """A line of which nothing is markup or moves the cursor; soft: no width breaks it, so that paths can be copied."""
    out.print(plain(Look.of(out).text(text)), markup=False, highlight=False, style=style, soft_wrap=soft)


def print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


@contextmanager
def progress_bars(quiet: bool, *, log: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A bar a stage, on standard error; with `log`, and where that is no terminal, a line a stage."""
    columns: list[ProgressColumn] = [TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn()]
    if err.width >= 60:
        columns += [TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
                if log and not quiet and not err.is_terminal:
                    err.print(f"{stage} …", markup=False)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def settings_for(data: Path) -> SharedSettings:
    """The service's settings as gateway and worker read them, with this data folder. Raises InvalidParameter."""
    try:
        return SharedSettings(data=data)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidParameter(f"The setting {where} cannot be used: {first['msg']}.", param=where) from None


# The stores are imported where a command asks for them: groups.py says why.


def database_of(settings: SharedSettings) -> "Engine":
    """The service's database, made where it is not there yet. Raises SystemFault where it is another version's."""
    from safegraft.stores.database import open_database

    return open_database(settings.database, upgrade=settings.database_upgrade)


def installed_database_of(settings: SharedSettings) -> "Engine":
    """The database of a service that is there already: a mistyped folder is no service without jobs and keys. Raises
    NotFound."""
    from sqlalchemy.engine import make_url

    url = make_url(settings.database)
    if url.get_backend_name() == "sqlite" and url.database and not Path(url.database).is_file():
        raise NotFound(
            f"No service ever ran with this data folder: there is no {url.database}.",
            code="no_installation",
            param="--data",
            hint="Name its folder with --data or SAFEGRAFT_DATA, or its database with SAFEGRAFT_DATABASE_URL.",
        )
    return database_of(settings)


def references_of(settings: SharedSettings) -> "ReferenceRegistry":
    """The references that are installed in the service's storage."""
    from safegraft.stores.references import open_references

    return open_references(settings)
