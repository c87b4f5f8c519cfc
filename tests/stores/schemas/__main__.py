"""Writes revisions from the tables in `safegraft/stores/database.py`.

    python -m tests.stores.schemas revision jobs have a colour

writes the next one, from what the tables have and the newest revision does not make. Read it before it is committed:
renamed columns look like one that goes and one that comes.

    python -m tests.stores.schemas first

writes the first one again, and what it makes as SQL, beside this file. Only before 0.1.0 is released, and while it is
the only one: from then on others have databases that it made.
"""

import importlib.util
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from alembic import command
from alembic.operations import Operations
from alembic.operations.ops import CreateIndexOp, CreateTableOp
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine

from safegraft.stores import migrations
from safegraft.stores.database import AUDIT_POSTGRES, AUDIT_SQLITE, metadata
from tests.stores import schemas

GUARDS = {"sqlite": AUDIT_SQLITE, "postgresql": AUDIT_POSTGRES}


def write_revision(message: str, folder: Path = migrations.LOCATIONS[0]) -> Path:
    """The next revision, from the difference between the tables and the newest one."""
    number = f"{int(migrations.revisions()[-1]) + 1:04d}"
    with tempfile.TemporaryDirectory() as name:
        # A plain engine would do, but for the tables' check: here they differ.
        engine = create_engine(f"sqlite:///{name}/empty.sqlite")
        with engine.begin() as connection:
            migrations.run(connection, migrations.revisions()[-1])
        with engine.connect() as connection:
            config = migrations.configuration(connection=connection, metadata=metadata)
            command.revision(config, message, autogenerate=True, rev_id=number, version_path=str(folder))
        engine.dispose()
    return _formatted(folder, number)


def write_first(folder: Path, texts: Path) -> Path:
    """The first revision into `folder`, and its SQL into `texts`."""
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        config = migrations.configuration(
            connection=connection, metadata=metadata, batch=False, directives=_only_what_is_missing
        )
        config.set_main_option("version_locations", str(folder).replace("%", "%%"))
        command.revision(config, "first", autogenerate=True, rev_id=migrations.FIRST, version_path=str(folder))
    engine.dispose()
    path = _formatted(folder, migrations.FIRST)
    for dialect in schemas.DIALECTS:
        (texts / f"0001.{dialect}.sql").write_text(_as_sql(path, dialect), encoding="utf-8")
    return path


def _only_what_is_missing(context: Any, revision: Any, directives: Any) -> None:
    # Databases from before there were revisions are taken over by running it.
    for operation in directives[0].upgrade_ops.ops:
        for part in [operation, *getattr(operation, "ops", [])]:
            if isinstance(part, CreateTableOp | CreateIndexOp):
                part.if_not_exists = True


def _formatted(folder: Path, number: str) -> Path:
    [path] = folder.glob(f"{number}_*.py")
    text = re.sub(r"^ *# .*Alembic.*\n", "", path.read_text(encoding="utf-8"), flags=re.M)
    path.write_text(text, encoding="utf-8")
    for arguments in (["format"], ["check", "--fix", "--select", "I"]):
        subprocess.run([Path(sys.executable).parent / "ruff", *arguments, "--quiet", path], check=True)
    return path


def _as_sql(path: Path, dialect: str) -> str:
    spec = importlib.util.spec_from_file_location("first", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    buffer = io.StringIO()
    context = MigrationContext.configure(dialect_name=dialect, opts={"as_sql": True, "output_buffer": buffer})
    with Operations.context(context):
        module.upgrade()
    lines = [re.sub(r" +$", "", part.strip(), flags=re.M) for part in buffer.getvalue().split(";\n\n")]
    lines += [re.sub(r"^ +", "    ", guard, flags=re.M) for guard in GUARDS[dialect]]
    key = "CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)"
    lines += [f"CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, {key})"]
    lines += [f"INSERT INTO alembic_version VALUES ('{migrations.FIRST}')"]
    return "".join(f"{line};\n\n" for line in lines if line).rstrip("\n") + "\n"


def main(arguments: list[str]) -> None:
    match arguments:
        case ["revision", *words] if words:
            print(write_revision(" ".join(words)))  # noqa: T201
        case ["first"]:
            if migrations.revisions()[1:]:
                raise SystemExit("There are later revisions: the first one is released and stays as it is.")
            folder = migrations.LOCATIONS[0]
            for path in folder.glob(f"{migrations.FIRST}_*.py"):
                path.unlink()
            print(write_first(folder, schemas.FOLDER))  # noqa: T201
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
