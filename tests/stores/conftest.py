"""Stores on real files."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from safegraft.stores.adapters import AdapterStore
from safegraft.stores.database import open_database
from safegraft.stores.jobs import JobStore


@pytest.fixture
def url(tmp_path: Path) -> str:
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
