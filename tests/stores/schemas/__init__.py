"""The first released schema as SQL, per database, and what writes it and revisions: see `__main__`."""

from pathlib import Path

FOLDER = Path(__file__).parent
DIALECTS = ("sqlite", "postgresql")


def sql_of(dialect: str) -> str:
    """The first released schema, with `alembic_version`, as one script."""
    return (FOLDER / f"0001.{dialect}.sql").read_text(encoding="utf-8")
