"""Upgrades of databases with something in them, from the first released schema on, by SQLite and by Postgres.

There is one revision so far; `later` adds another in a temporary folder, to see that a second one works.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    JSON,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    create_engine,
    delete,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from safegraft.errors import SystemFault
from safegraft.stores import database, migrations
from safegraft.stores.database import metadata, open_database, upgrade_database
from safegraft.stores.jobs import JobStore
from tests.stores import schemas
from tests.stores.records import queued
from tests.stores.releases import released, write_later
from tests.stores.schemas import __main__ as writer

ROOT = Path(__file__).parents[2]
ROWS = 7
REFUSED = "audit rows are only ever added"


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One more revision: a column, an index, and tables that SQLite must copy; and the tables as they are after it."""
    folder = tmp_path / "versions % later"
    number = write_later(folder)
    monkeypatch.setattr(migrations, "LOCATIONS", (*migrations.LOCATIONS, folder))
    changed = MetaData()
    for table in metadata.sorted_tables:
        table.to_metadata(changed)
    jobs, audit = changed.tables["realignments"], changed.tables["audit"]
    jobs.append_column(Column("colour", String(20)))
    jobs.c.worker.type, audit.c.target.type = String(300), String(300)
    Index("realignments_by_colour", jobs.c.tenant, jobs.c.colour)
    monkeypatch.setattr(database, "metadata", changed)
    return number


@pytest.fixture
def plain(url: str) -> Iterator[Engine]:
    """The database without anything of ours: no lock, no upgrade."""
    if url.startswith("sqlite"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url)
    yield engine
    engine.dispose()


def fill(engine: Engine) -> dict[str, list[tuple[Any, ...]]]:
    """Rows in every table that is there, whatever its columns; what `rows` then says."""
    there = MetaData()
    there.reflect(engine)
    with engine.begin() as connection:
        for table in there.sorted_tables:
            if table.name == migrations.VERSION_TABLE:
                continue
            # Numbers that the database gives must go on where they were.
            given = [column for column in table.columns if column is not table.autoincrement_column]
            for number in range(1, ROWS + 1):
                connection.execute(insert(table), {column.name: value(column, number) for column in given})
    return rows(engine)


def value(column: Any, number: int) -> Any:
    if column.nullable and number == 1:
        return None
    if isinstance(column.type, JSON):
        return {"number": number, "text": "ü '%s' \\"}
    if isinstance(column.type, Float):
        return number + 0.25
    if isinstance(column.type, Integer):
        return number
    return f"{column.name} {number} ü"[: column.type.length]


def rows(engine: Engine, columns: dict[str, list[str]] | None = None) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables but Alembic's; of these columns, if they are named."""
    there = MetaData()
    there.reflect(engine)
    found = {}
    with engine.connect() as connection:
        for table in there.sorted_tables:
            if table.name != migrations.VERSION_TABLE:
                names = columns.get(table.name, []) if columns else table.columns.keys()
                lines = connection.execute(select(*(table.columns[name] for name in names)))
                found[table.name] = sorted((tuple(line) for line in lines), key=repr)
    return found


def columns_of(engine: Engine) -> dict[str, list[str]]:
    found = inspect(engine).get_multi_columns()
    return {name: [column["name"] for column in columns] for (_, name), columns in found.items()}


def schema(engine: Engine) -> list[tuple[str, ...]]:
    """Everything that makes a schema, as the database itself tells it, but for the order of columns: those that came
    later stand last, wherever the tables name them."""
    found: list[tuple[object, ...]] = []
    if engine.dialect.name == "sqlite":
        statements = ["SELECT type, name, tbl_name, sql FROM sqlite_master WHERE type <> 'table'"]
        told = inspect(engine)
        parts_of: dict[str, Any] = {
            "column": told.get_multi_columns(),
            "primary key": told.get_multi_pk_constraint(),
            "unique": told.get_multi_unique_constraints(),
            "check": told.get_multi_check_constraints(),
            "foreign key": told.get_multi_foreign_keys(),
        }
        for kind, tables in parts_of.items():
            for (_, name), parts in tables.items():
                found += [(kind, name, repr(part)) for part in (parts if isinstance(parts, list) else [parts])]
    else:
        statements = [
            "SELECT 'column', table_name, column_name, data_type, character_maximum_length, is_nullable, "
            "column_default FROM information_schema.columns WHERE table_schema = 'public'",
            "SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
            "SELECT 'constraint', conname, conrelid::regclass, pg_get_constraintdef(oid) FROM pg_constraint "
            "WHERE connamespace = 'public'::regnamespace",
            "SELECT 'trigger', tgname, tgenabled, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal",
            "SELECT 'function', proname, pg_get_functiondef(oid) FROM pg_proc "
            "WHERE pronamespace = 'public'::regnamespace",
            "SELECT 'sequence', sequencename, data_type, increment_by FROM pg_sequences WHERE schemaname = 'public'",
        ]
    with engine.connect() as connection:
        for statement in statements:
            found += [tuple(line) for line in connection.exec_driver_sql(statement)]
    return sorted(tuple(re.sub(r'[\s"]+', " ", str(part)) for part in line) for line in found)


def differences(engine: Engine, tables: MetaData) -> list[Any]:
    """What Alembic would still change."""
    with engine.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), tables))


def revision_of(engine: Engine) -> str:
    with engine.connect() as connection:
        return str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one())


def migrated(engine: Engine, revision: str) -> None:
    """By the revisions alone, one after the other, and what follows each upgrade."""
    with engine.begin() as connection:
        migrations.run(connection, revision)
        database._guard_audit(None, connection)


def empty(engine: Engine) -> None:
    with engine.begin() as connection:
        database.metadata.drop_all(connection)
        connection.execute(text("DROP TABLE IF EXISTS alembic_version"))
        if engine.dialect.name == "postgresql":
            connection.execute(text("DROP FUNCTION IF EXISTS audit_refuse CASCADE"))


# What is made


@pytest.mark.parametrize("one_more", [False, True])
def test_the_revisions_make_what_a_new_database_gets(
    plain: Engine, url: str, one_more: bool, request: pytest.FixtureRequest
) -> None:
    if one_more:
        request.getfixturevalue("later")
    migrated(plain, "head")
    assert differences(plain, database.metadata) == []
    by_revisions = schema(plain)
    empty(plain)
    open_database(url).dispose()
    assert revision_of(plain) == migrations.revisions()[-1]
    assert schema(plain) == by_revisions
    kinds = {line[0] for line in by_revisions}
    assert kinds >= {"column", "index", "trigger"}
    assert kinds & {"unique", "constraint"}
    named = str(by_revisions)
    assert all(name in named for name in ("one_job_per_idempotency_key", "audit_", "realignments_expiring"))


def test_a_difference_between_revisions_and_tables_is_seen(plain: Engine, later: str) -> None:
    """The judges above can tell: each is shown what it must not overlook."""
    migrated(plain, "head")
    assert [item[0] for item in differences(plain, metadata)] != []
    before = schema(plain)
    for change, undo in [
        ("DROP INDEX adapters_by_tenant", "CREATE INDEX adapters_by_tenant ON adapters (tenant, id)"),
        ("CREATE INDEX more ON adapters (tenant) WHERE bytes > 5", "DROP INDEX more"),
        ("ALTER TABLE totals ADD COLUMN more FLOAT", "ALTER TABLE totals DROP COLUMN more"),
    ]:
        with plain.begin() as connection:
            connection.execute(text(change))
        assert schema(plain) != before
        with plain.begin() as connection:
            connection.execute(text(undo))
    with plain.begin() as connection:
        trigger = "audit_no_delete" if plain.dialect.name == "sqlite" else "audit_append_only ON audit"
        connection.execute(text(f"DROP TRIGGER {trigger}"))
    assert schema(plain) != before


def test_the_text_of_the_first_schema_is_what_the_first_revision_makes(plain: Engine) -> None:
    released(plain)
    assert revision_of(plain) == migrations.FIRST
    kept = schema(plain)
    empty(plain)
    migrated(plain, migrations.FIRST)
    assert schema(plain) == kept


@pytest.mark.skipif(len(migrations.revisions()) > 1, reason="The first revision is released and stays as it is.")
def test_the_first_revision_is_as_the_tables_are(tmp_path: Path) -> None:
    """`make first-revision` would change nothing."""
    folder = tmp_path / "versions"
    folder.mkdir()
    written = writer.write_first(folder, tmp_path)
    [kept] = migrations.LOCATIONS[0].glob("0001_*.py")
    assert written.read_text() == kept.read_text()
    for dialect in schemas.DIALECTS:
        assert (tmp_path / f"0001.{dialect}.sql").read_text() == schemas.sql_of(dialect)


def test_a_revision_is_written_from_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Engine) -> None:
    changed = MetaData()
    for table in metadata.sorted_tables:
        table.to_metadata(changed)
    changed.tables["totals"].append_column(Column("more", Integer))
    Index("totals_by_more", changed.tables["totals"].c.more)
    monkeypatch.setattr(writer, "metadata", changed)
    monkeypatch.setattr(migrations, "LOCATIONS", (*migrations.LOCATIONS, tmp_path))
    before = migrations.revisions()[-1]
    path = writer.write_revision("totals have more", tmp_path)
    assert path.name == f"{int(before) + 1:04d}_totals_have_more.py"
    assert migrations.revisions() == [*migrations.revisions()[:-1], path.name[:4]]
    migrated(plain, "head")
    assert differences(plain, changed) == []


def test_revisions_are_one_line_and_go_forward_only() -> None:
    script = ScriptDirectory.from_config(migrations.configuration())
    line = [revision.revision for revision in script.walk_revisions()][::-1]
    assert line == migrations.revisions()
    assert line[0] == migrations.FIRST
    assert script.get_current_head() == line[-1]
    for folder in migrations.LOCATIONS:
        for path in folder.glob("0*.py"):
            assert "def downgrade" not in path.read_text()


def test_the_wheel_holds_what_alembic_reads(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "safegraft", source / "safegraft", ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        packed = set(wheel.namelist())
    needed = ["env.py", "script.py.mako", *(f"versions/{path.name}" for path in migrations.LOCATIONS[0].glob("*.py"))]
    assert len(needed) >= 4
    assert {f"safegraft/stores/migrations/{name}" for name in needed} <= packed


# Upgrades of what has something in it


def steps() -> list[str]:
    return migrations.revisions()


def test_every_revision_keeps_every_row(plain: Engine, later: str, url: str) -> None:
    released(plain)
    kept = fill(plain)
    columns = {name: names for name, names in columns_of(plain).items() if name in kept}
    assert all(len(lines) == ROWS for lines in kept.values())
    assert set(kept) == {table.name for table in metadata.sorted_tables}
    assert len(steps()) >= 2
    for revision in steps()[1:]:
        migrated(plain, revision)
        assert revision_of(plain) == revision
        still = {name: names for name, names in columns_of(plain).items() if name in kept}
        same = {name: [column for column in columns[name] if column in still[name]] for name in kept}
        assert same == columns, "a column of the first schema went: say here what became of it"
        assert rows(plain, same) == kept
    assert differences(plain, database.metadata) == []
    upgraded = schema(plain)
    empty(plain)
    migrated(plain, "head")
    assert upgraded == schema(plain)


def test_an_upgraded_database_works(plain: Engine, later: str, url: str) -> None:
    released(plain)
    fill(plain)
    before, applied = upgrade_database(url)
    assert (before.state, before.revision, applied) == ("behind", migrations.FIRST, steps()[1:])
    engine = open_database(url)
    store = JobStore(engine, lease_seconds=30, max_attempts=3)
    assert store.claim(queued(store), "w1") is not None
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM realignments WHERE colour = 'blue'")).scalar() == ROWS
    # SQLite copied the table, and with the old one its triggers went.
    with pytest.raises(DBAPIError, match=REFUSED), engine.begin() as connection:
        connection.execute(delete(database.audit))
    engine.dispose()
    assert upgrade_database(url)[1] == []


def test_a_file_is_upgraded_when_it_is_opened_and_postgres_waits(plain: Engine, later: str, url: str) -> None:
    released(plain)
    kept = fill(plain)
    columns = columns_of(plain)
    for upgrade in ("never", "auto"):
        if upgrade == "auto" and plain.dialect.name == "sqlite":
            continue
        with pytest.raises(SystemFault) as caught:
            open_database(url, upgrade=upgrade)
        assert caught.value.code == "database_behind"
        assert str(caught.value) == (
            f"The database is at revision 0001, and this version needs {later}. Stop gateways and workers, back it up, "
            "then run: safegraft admin database upgrade"
        )
        assert revision_of(plain) == "0001"
    open_database(url, upgrade="auto" if plain.dialect.name == "sqlite" else "always").dispose()
    assert revision_of(plain) == later
    assert rows(plain, columns) == kept


def test_an_empty_database_is_made_unless_even_that_waits(plain: Engine, url: str) -> None:
    with pytest.raises(SystemFault, match=r"without a revision.*safegraft admin database upgrade") as caught:
        open_database(url, upgrade="never")
    assert caught.value.code == "database_behind"
    assert inspect(plain).get_table_names() == []
    before, applied = upgrade_database(url)
    assert (before.state, applied) == ("empty", migrations.revisions())
    open_database(url, upgrade="never").dispose()


def test_another_programs_tables_are_left_alone(plain: Engine, url: str) -> None:
    with plain.begin() as connection:
        connection.execute(text("CREATE TABLE theirs (id INTEGER)"))
    open_database(url).dispose()
    with plain.begin() as connection:
        assert "theirs" in inspect(connection).get_table_names()
        connection.execute(text("DROP TABLE theirs"))


# Databases from before there were revisions


def test_a_database_from_before_is_taken_over(plain: Engine, url: str) -> None:
    with plain.begin() as connection:
        metadata.create_all(connection)
        # An older one still: without an index, and without a table.
        connection.execute(text("DROP INDEX realignments_expiring"))
        connection.execute(text("DROP TABLE options"))
    kept = fill(plain)
    columns = {name: names for name, names in columns_of(plain).items() if name != "options"}
    assert "options" not in kept
    before, applied = upgrade_database(url)
    assert (before.state, before.revision, applied) == ("unversioned", None, migrations.revisions())
    assert rows(plain, columns | {"options": ["name"]}) == kept | {"options": []}
    assert differences(plain, metadata) == []
    taken = schema(plain)
    empty(plain)
    migrated(plain, "head")
    assert taken == schema(plain)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("ALTER TABLE realignments DROP COLUMN ticket", "realignments lacks ticket"),
        ("ALTER TABLE adapters ADD COLUMN colour FLOAT", "adapters has also colour"),
    ],
)
def test_other_columns_from_before_are_refused(plain: Engine, url: str, change: str, said: str) -> None:
    with plain.begin() as connection:
        metadata.create_all(connection)
        connection.execute(text(change))
    kept = fill(plain)
    for upgrade in (lambda: upgrade_database(url), lambda: open_database(url, upgrade="always")):
        with pytest.raises(SystemFault, match=said) as caught:
            upgrade()
        assert caught.value.code == "schema_mismatch"
    assert migrations.VERSION_TABLE not in inspect(plain).get_table_names()
    assert rows(plain) == kept


def test_a_revision_that_is_not_what_it_says_is_refused(plain: Engine, url: str) -> None:
    open_database(url).dispose()
    with plain.begin() as connection:
        connection.execute(text("ALTER TABLE realignments DROP COLUMN ticket"))
    with pytest.raises(SystemFault, match="realignments lacks ticket") as caught:
        open_database(url)
    assert caught.value.code == "schema_mismatch"


# Databases of others


@pytest.mark.parametrize(("revision", "code"), [("0999", "database_ahead"), ("a1b2c3", "database_unknown")])
def test_a_database_that_is_ahead_or_unknown_is_refused(plain: Engine, url: str, revision: str, code: str) -> None:
    open_database(url).dispose()
    with plain.begin() as connection:
        connection.execute(text(f"UPDATE alembic_version SET version_num = '{revision}'"))
    before = schema(plain)
    for open_it in (
        lambda: open_database(url),
        lambda: open_database(url, upgrade="always"),
        lambda: open_database(url, upgrade="never"),
        lambda: upgrade_database(url),
    ):
        with pytest.raises(SystemFault, match=revision) as caught:
            open_it()
        assert caught.value.code == code
        assert "\n" not in str(caught.value)
    assert schema(plain) == before
    assert revision_of(plain) == revision


# Processes


def program(url: str) -> list[str]:
    """An upgrade in a process of its own, with the revisions that there are here; it prints those that it applied."""
    folders = [str(path) for path in migrations.LOCATIONS]
    return [
        sys.executable,
        "-c",
        "import json, sys, pathlib\n"
        "from safegraft.stores import database, migrations\n"
        f"migrations.LOCATIONS = tuple(map(pathlib.Path, {folders!r}))\n"
        "import alembic.command\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        f"print(json.dumps(database.upgrade_database({url!r})[1]), flush=True)\n",
    ]


def begun(url: str, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        program(url), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("start", ["released", "empty"])
def test_processes_that_upgrade_at_once_do_it_once(
    plain: Engine, later: str, url: str, tmp_path: Path, start: str
) -> None:
    kept = None
    if start == "released":
        released(plain)
        kept = fill(plain)
    columns = columns_of(plain)
    runs = tmp_path / "runs"
    processes = [begun(url, TEST_RUNS=str(runs)) for _ in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    applied = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    # An empty database gets the process's own tables, which know nothing of the later revision.
    expected = steps()[1:] if start == "released" else steps()
    assert sorted(applied) == [[], [], [], expected]
    assert revision_of(plain) == later
    if kept is not None:
        assert runs.read_text() == "once\n"
        assert rows(plain, columns) == kept


def test_an_upgrade_that_is_killed_has_not_happened(plain: Engine, later: str, url: str, tmp_path: Path) -> None:
    released(plain)
    kept = fill(plain)
    columns = columns_of(plain)
    before = schema(plain)
    hold = tmp_path / "in the middle"
    process = begun(url, TEST_HOLD=str(hold))
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not hold.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    # As it was, for a version that knows nothing of the revision …
    assert schema(plain) == before
    assert revision_of(plain) == migrations.FIRST
    assert rows(plain) == kept
    # … and for the next try.
    assert upgrade_database(url)[1] == steps()[1:]
    assert rows(plain, columns) == kept
    assert differences(plain, database.metadata) == []


def test_a_revision_that_fails_leaves_everything_as_it_was(plain: Engine, later: str, url: str) -> None:
    [path] = migrations.LOCATIONS[-1].glob("*.py")
    path.write_text(path.read_text() + "    raise RuntimeError('no')\n")
    released(plain)
    kept = fill(plain)
    before = schema(plain)
    with pytest.raises(RuntimeError, match="no"):
        upgrade_database(url)
    assert (schema(plain), rows(plain), revision_of(plain)) == (before, kept, migrations.FIRST)


def test_a_database_that_is_up_to_date_is_opened_without_alembic(url: str) -> None:
    open_database(url).dispose()
    done = subprocess.run(
        [sys.executable, "-c", "import sys\nfrom safegraft.stores.database import open_database\n"
         f"open_database({url!r}).dispose()\nprint(sorted({{'alembic', 'mako'}} & set(sys.modules)))"],
        check=True, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == "[]\n"
