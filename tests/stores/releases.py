"""Databases of other versions: of the first release, and of one that is still to come."""

import sqlite3
from pathlib import Path

from sqlalchemy.engine import Engine

from safegraft.stores import migrations
from tests.stores import schemas

LATER = '''
"""Jobs have a colour."""
import os
import time
from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "{number}", "{before}", None, None


def upgrade() -> None:
    with op.batch_alter_table("realignments") as batch:
        batch.add_column(sa.Column("colour", sa.String(20)))
        batch.create_index("realignments_by_colour", ["tenant", "colour"])
        batch.alter_column("worker", type_=sa.String(300))
    with op.batch_alter_table("audit") as batch:
        batch.alter_column("target", type_=sa.String(300))
    op.execute("UPDATE realignments SET colour = 'blue'")
    if os.environ.get("TEST_RUNS"):
        with open(os.environ["TEST_RUNS"], "a") as file:
            file.write("once\\n")
    if os.environ.get("TEST_HOLD"):
        Path(os.environ["TEST_HOLD"]).touch()
        time.sleep(600)
'''


def write_later(folder: Path) -> str:
    """A new folder with one more revision, which follows all that there are; its number."""
    folder.mkdir()
    before = migrations.revisions()[-1]
    number = f"{int(before) + 1:04d}"
    (folder / f"{number}_colour.py").write_text(LATER.format(number=number, before=before))
    return number


def released(engine: Engine) -> None:
    """The first released schema, from the text that is kept of it."""
    script = schemas.sql_of(engine.dialect.name)
    if engine.dialect.name == "sqlite":
        with sqlite3.connect(str(engine.url.database)) as raw:
            raw.executescript(script)
        raw.close()
        return
    with engine.begin() as connection:
        connection.exec_driver_sql(script.replace("%", "%%"))
