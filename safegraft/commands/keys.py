"""`safegraft keys`: who may use the service. A key is shown once; what is kept cannot be turned back into it."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from safegraft.commands.audit import audited
from safegraft.commands.terminal import (
    Data,
    Json,
    database_of,
    err,
    installed_database_of,
    out,
    print_json,
    print_list,
    settings_for,
)
from safegraft.contracts.keys import DEFAULT_TENANT, Scope
from safegraft.errors import InvalidParameter
from safegraft.stores.keys import KeyStore
from safegraft.vault import open_vault

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
LONGEST = 5200 * UNITS["w"]  # a hundred years; far more could not be shown as a date


@app.command("create")
def create(
    tenant: Annotated[str, typer.Option(envvar="SAFEGRAFT_TENANT", help="Whose key: a-z, 0-9, - and _.")] = (
        DEFAULT_TENANT
    ),
    name: Annotated[str, typer.Option(envvar="SAFEGRAFT_NAME", help="What it is for; two may be live at a time.")] = (
        "default"
    ),
    scopes: Annotated[
        str, typer.Option(envvar="SAFEGRAFT_SCOPES", help="read, write (and read) or admin (and both).")
    ] = "write",
    expires: Annotated[str, typer.Option(envvar="SAFEGRAFT_EXPIRES", help="12h, 30d, 8w; never if left out.")] = "",
    data: Data = Path("var"),
    as_json: Json = False,
) -> None:
    """Makes a key and shows it, this once."""
    # First of all: what is refused leaves no new folder.
    wanted, seconds = parse_scopes(scopes), parse_span(expires)
    key, text = _store(data).create(tenant, name=name, scopes=wanted, seconds=seconds)
    audited(settings_for(data), "keys.create", key.id, tenant=key.tenant)
    if as_json:
        print_json({**key.model_dump(mode="json"), "key": text})
        return
    whose = f"{key.id} for {key.tenant}, {', '.join(key.scopes)}."
    err.print(f"{whose} Keep it: it is not shown again.", highlight=False, soft_wrap=True)
    out.print(text, highlight=False, soft_wrap=True)


@app.command("list")
def list_(
    tenant: Annotated[str, typer.Option(envvar="SAFEGRAFT_TENANT", help="Only this tenant's.")] = "",
    data: Data = Path("var"),
    as_json: Json = False,
) -> None:
    """Lists keys, newest first, without the keys themselves."""
    keys = _store(data, there=True).list(tenant or None)
    if as_json:
        print_json([key.model_dump(mode="json") for key in keys])
        return
    table = Table("id", "tenant", "name", "begins", "scopes", "made", "expires", "revoked", "last used", box=None)
    for key in keys:
        times = (key.created_at, key.expires_at, key.revoked_at, key.last_used_at)
        table.add_row(key.id, key.tenant, Text(key.name), f"{key.hint}…", ",".join(key.scopes), *map(_when, times))
    print_list(table)


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, key_…")], data: Data = Path("var"), as_json: Json = False
) -> None:
    """Ends a key. A gateway may accept it for some seconds more (SAFEGRAFT_KEY_CACHE_SECONDS)."""
    key = _store(data, there=True).revoke(key_id)
    audited(settings_for(data), "keys.revoke", key.id, tenant=key.tenant)
    if as_json:
        print_json(key.model_dump(mode="json"))
        return
    err.print(f"{key.id} of {key.tenant} is revoked.", highlight=False)


def parse_scopes(text: str) -> list[Scope]:
    known: dict[str, Scope] = {"read": "read", "write": "write", "admin": "admin"}
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InvalidParameter(f"{name!r} is no scope.", param="--scopes", hint="Known: read, write, admin.")
    if not names:
        raise InvalidParameter("A key needs a scope.", param="--scopes", hint="Known: read, write, admin.")
    return [known[name] for name in names]


def parse_span(text: str) -> float | None:
    """`30d` in seconds; None for the empty text."""
    if not text:
        return None
    match = re.fullmatch(r"([0-9]{1,6})([mhdw])", text)
    if match is None or not 0 < int(match[1]) * UNITS[match[2]] <= LONGEST:
        raise InvalidParameter(
            f"{text!r} is no span of time.", param="--expires", hint="For example 12h, 30d or 8w; at most 5200w."
        )
    return float(int(match[1]) * UNITS[match[2]])


def _store(data: Path, *, there: bool = False) -> KeyStore:
    """there: only if the service is there already."""
    settings = settings_for(data)
    return KeyStore((installed_database_of if there else database_of)(settings), open_vault(settings))


def _when(seconds: int | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"
