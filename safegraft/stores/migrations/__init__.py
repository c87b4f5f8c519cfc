"""The schema's revisions, and where a database stands among them.

A revision is a file of `versions/`, `NNNN_what.py`; its number is its name in the database (table `alembic_version`).
They follow each other in one line, and there is no way back but a backup. Alembic is loaded only where there is
something to do: a database that is up to date is opened without it.
"""

import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sqlalchemy import MetaData, create_engine, inspect
from sqlalchemy.engine import Connection

from safegraft.errors import SystemFault

if TYPE_CHECKING:
    from alembic.config import Config

FOLDER = Path(__file__).parent
LOCATIONS: tuple[Path, ...] = (FOLDER / "versions",)
FIRST = "0001"
VERSION_TABLE = "alembic_version"
COMMAND = "safegraft admin database upgrade"
# Alembic's `op` and `context` are one for the whole process.
_alembic = threading.Lock()


@dataclass(frozen=True)
class Status:
    """Where a database stands.

    empty: none of our tables is there. unversioned: they are, from the time before there were revisions. behind:
    `pending` is to be done. current: nothing is. ahead: a newer version was here. unknown: something else was.
    """

    state: Literal["empty", "unversioned", "behind", "current", "ahead", "unknown"]
    revision: str | None
    head: str
    pending: list[str]


def revisions() -> list[str]:
    """All that this version knows, the first one first."""
    found = (path.name for folder in LOCATIONS for path in folder.iterdir())
    return sorted(name[:4] for name in found if re.fullmatch(r"\d{4}_\w+\.py", name))


def status(connection: Connection, metadata: MetaData) -> Status:
    known = revisions()
    tables = set(inspect(connection).get_table_names())
    rows: list[str] = []
    if VERSION_TABLE in tables:
        rows = list(connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalars())
    head = known[-1]
    if not rows:
        there = not tables.isdisjoint(metadata.tables)
        return Status("unversioned" if there else "empty", None, head, known)
    revision = ", ".join(sorted(rows))
    if revision in known:
        pending = known[known.index(revision) + 1 :]
        return Status("behind" if pending else "current", revision, head, pending)
    newer = re.fullmatch(r"\d{4}", revision) is not None and revision > head
    return Status("ahead" if newer else "unknown", revision, head, [])


def refuse_strangers(found: Status) -> None:
    """Raises SystemFault (`database_ahead`, `database_unknown`) for what no upgrade of ours can mend."""
    if found.state == "ahead":
        raise SystemFault(
            f"The database is at revision {found.revision}, made by a newer version; this one knows none after "
            f"{found.head}.",
            code="database_ahead",
            hint="Install that version again, or restore the backup from before its upgrade.",
        )
    if found.state == "unknown":
        raise SystemFault(
            f"The database is at revision {found.revision}, which this version does not know; its own are {FIRST} to "
            f"{found.head}.",
            code="database_unknown",
            hint="Is it another program's database? Name ours in SAFEGRAFT_DATABASE_URL, or restore a backup.",
        )


def refuse_behind(found: Status) -> None:
    """Raises SystemFault (`database_behind`) for a database that waits for its operator."""
    at = f"at revision {found.revision}" if found.revision else "without a revision"
    raise SystemFault(
        f"The database is {at}, and this version needs {found.head}.",
        code="database_behind",
        hint=f"Stop gateways and workers, back it up, then run: {COMMAND}",
    )


def migrate(connection: Connection, metadata: MetaData) -> list[str]:
    """Brings a database to the newest revision, in the transaction that the connection is in; returns the revisions
    that were applied. Whoever calls keeps others from doing the same.

    Raises SystemFault: as `refuse_strangers`, and `schema_mismatch` for tables from before there were revisions that
    are not those of the first one.
    """
    found = status(connection, metadata)
    refuse_strangers(found)
    if found.state == "empty":
        _make(connection, metadata, found.head)
        return found.pending
    if found.state == "unversioned":
        # The first revision only makes what is not there, so that it can be run on what is.
        same_columns(connection, _first_columns(), exactly=True)
    if found.pending:
        run(connection, found.head)
    return found.pending


def _make(connection: Connection, metadata: MetaData, head: str) -> None:
    # What all revisions together come to, in half the time and without Alembic; a test holds the two together.
    metadata.create_all(connection, checkfirst=False)
    connection.exec_driver_sql(
        f"CREATE TABLE IF NOT EXISTS {VERSION_TABLE} "
        f"(version_num VARCHAR(32) NOT NULL, CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY (version_num))"
    )
    connection.exec_driver_sql(f"INSERT INTO {VERSION_TABLE} VALUES ('{head}')")


def run(connection: Connection, revision: str) -> None:
    """Alembic's own upgrade, without looking at what is there."""
    from alembic import command

    with _alembic:
        command.upgrade(configuration(connection=connection), revision)


def configuration(**attributes: object) -> "Config":
    """Alembic's, without a file. attributes: what env.py reads."""
    from alembic.config import Config

    config = Config(attributes=attributes)
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.set_main_option("version_locations", "\n".join(str(path).replace("%", "%%") for path in LOCATIONS))
    config.set_main_option("file_template", "%%(rev)s_%%(slug)s")
    return config


def same_columns(connection: Connection, expected: dict[str, set[str]], *, exactly: bool = False) -> None:
    """Raises SystemFault (`schema_mismatch`) where a table lacks a column, or, with `exactly`, has one more.

    expected: columns by table. With `exactly` a table may be missing: it will be made.
    """
    there = {
        name: {column["name"] for column in columns}
        for (_, name), columns in inspect(connection).get_multi_columns().items()
    }
    for table, columns in sorted(expected.items()):
        if exactly and table not in there:
            continue
        missing = sorted(columns - there.get(table, set()))
        added = sorted(there.get(table, set()) - columns) if exactly else []
        if missing or added:
            wrong = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has also {', '.join(added)}"] * bool(added)
            raise SystemFault(
                f"The database was made by another version: {table} {' and '.join(wrong)}.",
                code="schema_mismatch",
                hint="Begin with a new database, or go back to the version that made this one.",
            )


def _first_columns() -> dict[str, set[str]]:
    """Columns by table after the first revision, as it makes them."""
    engine = create_engine("sqlite://")
    try:
        with engine.begin() as connection:
            run(connection, FIRST)
            found = inspect(connection).get_multi_columns()
            return {
                name: {column["name"] for column in columns}
                for (_, name), columns in found.items()
                if name != VERSION_TABLE
            }
    finally:
        engine.dispose()
