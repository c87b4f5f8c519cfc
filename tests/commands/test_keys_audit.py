"""`safegraft keys` leaves its marks in the audit log."""

import json
import os
import pwd
from pathlib import Path

from sqlalchemy import text

from safegraft.settings import SharedSettings
from safegraft.stores.audit import AuditLog
from safegraft.stores.database import open_database
from tests.test_cli import refused, safegraft


def test_what_changes_keys_is_noted_in_their_tenants_log(tmp_path: Path) -> None:
    data = tmp_path / "data"
    made = json.loads(safegraft("keys", "create", "--tenant", "acme", "--data", data, "--json").stdout)
    safegraft("keys", "list", "--data", data)
    safegraft("keys", "revoke", made["id"], "--data", data, LOGNAME="somebody_else", USER="somebody_else")
    refused("keys", "revoke", "key_nothing", "--data", data, code="key_not_found")
    refused("keys", "create", "--tenant", "A!", "--data", data, code="bad_tenant")
    engine = open_database(SharedSettings(data=data).database)
    log = AuditLog(engine)
    actor = f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
    found = [(item.actor, item.action, item.target, item.status) for item in log.page("acme", limit=10)[0]]
    assert found == [(actor, "keys.revoke", made["id"], 0), (actor, "keys.create", made["id"], 0)]
    assert log.page("default", limit=10) == ([], False)
    with engine.connect() as connection:
        rows = str(connection.execute(text("SELECT * FROM audit")).all())
    assert made["key"] not in rows
    engine.dispose()


def test_a_log_that_cannot_be_written_hides_no_key(tmp_path: Path) -> None:
    data = tmp_path / "data"
    safegraft("keys", "create", "--data", data)
    engine = open_database(SharedSettings(data=data).database)
    with engine.begin() as connection:
        connection.execute(text("CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no room'); END"))
    engine.dispose()
    done = safegraft("keys", "create", "--data", data)
    assert done.stdout.startswith("sgk_")
    assert "audit_failed: keys.create of key_" in done.stderr
