"""What operators decide while the service runs; every process reads it when it needs it."""

from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from safegraft.stores.database import now, options, reading

DEFAULT_REFERENCE = "default_reference"


def get(engine: Engine, name: str) -> Any:
    """None where nothing was decided."""
    with reading(engine) as connection:
        return connection.execute(select(options.c.value).where(options.c.name == name)).scalar_one_or_none()


def put(engine: Engine, name: str, value: Any) -> None:
    """None takes the decision back."""
    with engine.begin() as connection:
        if value is None:
            connection.execute(delete(options).where(options.c.name == name))
        else:
            _put(connection, name, value)


def due(engine: Engine, name: str, seconds: float) -> bool:
    """True once in `seconds` seconds, for one of all the processes that ask."""
    with engine.begin() as connection:
        insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        # So that there is a row to lock (SQLite has one writer anyway).
        connection.execute(insert(options).values(name=name, value=0.0).on_conflict_do_nothing())
        row = connection.execute(
            select(options.c.value, now().label("now")).where(options.c.name == name).with_for_update()
        ).one()
        if row.now - float(row.value) < seconds:
            return False
        _put(connection, name, row.now)
    return True


def _put(connection: Connection, name: str, value: Any) -> None:
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(options).values(name=name, value=value)
    connection.execute(
        statement.on_conflict_do_update(index_elements=["name"], set_={"value": statement.excluded.value})
    )
