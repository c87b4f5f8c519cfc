"""Stores on real files; on the scaled backend on a Postgres database instead."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine

from safegraft.stores.adapters import AdapterStore
from safegraft.stores.database import metadata, open_database
from safegraft.stores.jobs import JobStore
from safegraft.stores.migrations import VERSION_TABLE
from tests import scaled


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database without tables."""
    if scaled.SCALED:
        given = scaled.stores_database()
        engine = create_engine(given)
        with engine.begin() as connection:
            metadata.drop_all(connection)
            connection.execute(text(f"DROP TABLE IF EXISTS {VERSION_TABLE}"))
        engine.dispose()
        return given
    return f"sqlite:///{tmp_path / 'data' / 'safegraft.sqlite'}"


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = open_database(url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> JobStore:
    return JobStore(engine, lease_seconds=30, max_attempts=3)


@pytest.fixture
def adapters(engine: Engine) -> AdapterStore:
    return AdapterStore(engine)
