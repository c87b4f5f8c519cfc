"""Counters in the database: exact over restarts, the same for every gateway that is asked for them."""

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from safegraft.stores.database import reading, totals


def add(connection: Connection, name: str, first: str = "", second: str = "", value: float = 1.0) -> None:
    """Adds to a counter within the transaction of what it counts. `first` and `second` are its labels' values."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(totals).values(name=name, first=first[:60], second=second[:60], value=value)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["name", "first", "second"], set_={"value": totals.c.value + statement.excluded.value}
        )
    )


def read(engine: Engine) -> list[tuple[str, str, str, float]]:
    """All counters: (name, first label, second label, value)."""
    with reading(engine) as connection:
        rows = connection.execute(select(totals).order_by(totals.c.name, totals.c.first, totals.c.second)).all()
    return [(row.name, row.first, row.second, row.value) for row in rows]
