"""What all commands share: two consoles, options that several have, and the stores that the environment names."""

import json
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from safegraft.errors import InvalidParameter
from safegraft.report.text import Look
from safegraft.settings import SharedSettings

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from safegraft.stores.references import ReferenceRegistry

out, err = Console(), Console(stderr=True)
Json = Annotated[bool, typer.Option("--json", envvar="SAFEGRAFT_JSON", help="Print one JSON object instead of text.")]
Data = Annotated[Path, typer.Option(envvar="SAFEGRAFT_DATA", help="The service's data folder.")]


def use_any_encoding() -> None:
    """A letter that the terminal cannot show becomes a question mark, and no failure of the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="replace")


def plain(text: str) -> str:
    """A stranger's text as it may stand on a terminal: in one line, and nothing in it moves the cursor or recolours."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def tell(text: str, style: str = "", *, soft: bool = True) -> None:
    """A line of which nothing is markup or moves the cursor; soft: no width breaks it, so that paths can be copied."""
    out.print(plain(Look.of(out).text(text)), markup=False, highlight=False, style=style, soft_wrap=soft)


def print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


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


def references_of(settings: SharedSettings) -> "ReferenceRegistry":
    """The references that are installed in the service's storage."""
    from safegraft.stores.references import open_references

    return open_references(settings)
