"""`safegraft admin database`, and programs that find a database of another version."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine

from safegraft.settings import SharedSettings
from safegraft.stores import migrations
from safegraft.stores.database import open_database
from tests import scaled
from tests.service.conftest import SAFEGRAFT, environment_of
from tests.stores.releases import released, write_later

COMMANDS = {
    "gateway": "sys.argv = ['uvicorn', '--factory', 'service.main:app', '--port', '0']\n"
    "from uvicorn.main import main\nmain()",
    "worker": "sys.argv = ['celery', '-A', 'worker.main', 'worker']\nfrom celery.__main__ import main\nmain()",
    "safegraft": "from safegraft.cli import main\nmain()",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def address(data: Path) -> str:
    given = scaled.environment(data).get("SAFEGRAFT_DATABASE_URL", "")
    return SharedSettings(data=data, database_url=given).database


def engine_on(data: Path) -> Engine:
    data.mkdir(exist_ok=True)
    return create_engine(address(data))


def run(
    data: Path, name: str, *arguments: str, folder: Path | None = None, **changed: str
) -> subprocess.CompletedProcess[str]:
    """A program on the installation in a data folder, of a version that also knows the revisions in `folder`."""
    more = f"migrations.LOCATIONS += (pathlib.Path({str(folder)!r}),)\n" if folder else ""
    code = f"import pathlib, sys\nfrom safegraft.stores import migrations\n{more}{COMMANDS[name]}"
    environment = environment_of(data) | {"SAFEGRAFT_DATA": str(data), "COLUMNS": "200"} | changed
    environment = {"SAFEGRAFT_REDIS_URL": "redis://127.0.0.1:1/0"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def admin(data: Path, *arguments: str, folder: Path | None = None, **changed: str) -> Any:
    done = run(data, "safegraft", "admin", "database", *arguments, "--json", folder=folder, **changed)
    return json.loads(done.stdout)


def test_status_says_where_it_stands_and_changes_nothing(data: Path, tmp_path: Path) -> None:
    known = migrations.revisions()
    found = {"state": "empty", "revision": None, "head": known[-1], "pending": known}
    assert admin(data, "status") == found
    assert not (data / "safegraft.sqlite").exists()
    engine = engine_on(data)
    released(engine)
    number = write_later(tmp_path / "later")
    found = {"state": "behind", "revision": "0001", "head": number, "pending": [*known[1:], number]}
    for _ in range(2):
        assert admin(data, "status", folder=tmp_path / "later", SAFEGRAFT_DATABASE_UPGRADE="always") == found
    shown = run(data, "safegraft", "admin", "database", "status", folder=tmp_path / "later").stdout
    assert all(word in shown for word in ("behind", "0001", number))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0999'"))
    assert admin(data, "status")["state"] == "ahead"
    engine.dispose()


def test_upgrade_brings_it_up_once_and_says_so(data: Path, tmp_path: Path) -> None:
    engine = engine_on(data)
    released(engine)
    number = write_later(tmp_path / "later")
    done = run(data, "safegraft", "admin", "database", "upgrade", folder=tmp_path / "later")
    assert done.returncode == 0
    assert done.stderr == (
        "There is no way back but a backup of the database.\n"
        f"The database is at revision {number} now; it was at 0001.\n"
    )
    again = {"before": number, "revision": number, "applied": []}
    assert admin(data, "upgrade", folder=tmp_path / "later") == again
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT action, target FROM audit")).all()
    assert [tuple(row) for row in rows] == [("admin.database.upgrade", number)]
    # The version before this one, which is still installed somewhere.
    refused = run(data, "safegraft", "admin", "database", "upgrade", "--json")
    assert refused.returncode == 1
    assert json.loads(refused.stdout)["error"]["code"] == "database_ahead"
    engine.dispose()


def test_upgrade_makes_an_empty_database(data: Path) -> None:
    known = migrations.revisions()
    assert admin(data, "upgrade", SAFEGRAFT_DATABASE_UPGRADE="never") == {
        "before": None, "revision": known[-1], "applied": known,
    }  # fmt: skip
    open_database(address(data), upgrade="never").dispose()


@pytest.mark.parametrize("name", ["gateway", "worker"])
def test_programs_refuse_a_database_of_another_version_in_one_line(data: Path, tmp_path: Path, name: str) -> None:
    engine = engine_on(data)
    released(engine)
    number = write_later(tmp_path / "later")
    settings = {} if scaled.SCALED else {"SAFEGRAFT_DATABASE_UPGRADE": "never"}
    behind = run(data, name, folder=tmp_path / "later", **settings)
    assert behind.returncode == 1
    assert behind.stderr.splitlines()[-1] == (
        f"database_behind: The database is at revision 0001, and this version needs {number}. "
        "Stop gateways and workers, back it up, then run: safegraft admin database upgrade"
    )
    with engine.begin() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == "0001"
        connection.execute(text("UPDATE alembic_version SET version_num = '0999'"))
    ahead = run(data, name, SAFEGRAFT_DATABASE_UPGRADE="always")
    assert ahead.returncode == 1
    assert ahead.stderr.splitlines()[-1].startswith("database_ahead: The database is at revision 0999, ")
    engine.dispose()


def test_serve_refuses_it_too(data: Path) -> None:
    open_database(address(data)).dispose()
    engine = engine_on(data)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0999'"))
    engine.dispose()
    environment = environment_of(data)
    command = [SAFEGRAFT, "serve", "--data", str(data), "--port", str(scaled.free_port())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("database_ahead: The database is at revision 0999")
    assert done.stderr.count("\n") == 1
