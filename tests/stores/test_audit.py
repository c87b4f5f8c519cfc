"""The audit log: what goes in comes out, and no statement but one that takes the guards down first can change it."""

import time

import pytest
from sqlalchemy import delete, insert, text, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from safegraft.stores.audit import AuditLog, Entry
from safegraft.stores.database import audit, metadata, open_database

REFUSED = "audit rows are only ever added"


@pytest.fixture
def log(engine: Engine) -> AuditLog:
    return AuditLog(engine)


def entry(number: int = 0, **values: object) -> Entry:
    given = {
        "tenant": "t",
        "actor": "key_1",
        "action": "deleteAdapter",
        "target": f"adp_{number}",
        "status": 200,
        "request_id": f"req_{number}",
        **values,
    }
    return Entry(**given)  # type: ignore[arg-type]


def test_a_row_is_shown_as_it_was_added(log: AuditLog) -> None:
    before = int(time.time())
    log.add(entry())
    (shown,), more = log.page("t", limit=10)
    assert not more
    assert (shown.actor, shown.action, shown.target) == ("key_1", "deleteAdapter", "adp_0")
    assert (shown.status, shown.request_id, shown.object) == (200, "req_0", "audit_event")
    assert before - 1 <= shown.created_at <= time.time() + 1
    log.add(entry(target=None, request_id=None))
    assert log.page("t", limit=1)[0][0].target is None


def test_pages_are_newest_first_and_of_one_tenant(log: AuditLog) -> None:
    for number in range(5):
        log.add(entry(number))
        log.add(entry(number, tenant="other"))
    first, more = log.page("t", limit=2)
    assert [item.target for item in first] == ["adp_4", "adp_3"]
    assert more
    second, more = log.page("t", limit=2, after=int(first[-1].id))
    assert [item.target for item in second] == ["adp_2", "adp_1"]
    third, more = log.page("t", limit=2, after=int(second[-1].id))
    assert ([item.target for item in third], more) == (["adp_0"], False)
    assert log.page("nobody", limit=10) == ([], False)
    # No number that a client may send is too large for the database.
    assert len(log.page("t", limit=10, after=10**18 - 1)[0]) == 5


def test_filters_narrow_together(log: AuditLog, engine: Engine) -> None:
    log.add(entry(0))
    log.add(entry(1, action="createAdapter"))
    log.add(entry(2, actor="cli:root"))
    log.add(entry(3, action="createAdapter", actor="cli:root"))

    def targets(**filters: object) -> list[str | None]:
        return [item.target for item in log.page("t", limit=10, **filters)[0]]  # type: ignore[arg-type]

    assert targets(action="createAdapter") == ["adp_3", "adp_1"]
    assert targets(actor="cli:root") == ["adp_3", "adp_2"]
    assert targets(actor="cli:root", action="createAdapter") == ["adp_3"]
    with engine.begin() as connection:
        connection.execute(
            insert(audit).values(at=1000.0, tenant="t", actor="a", action="old", target="adp_old", status=200)
        )
    assert targets(since=999)[0] == "adp_old"
    assert "adp_old" not in targets(since=1001)
    assert targets(since=time.time() + 60) == []


@pytest.mark.parametrize(
    "statement",
    [
        update(audit).values(status=200),
        update(audit).where(audit.c.sequence == 1).values(target="adp_9"),
        delete(audit),
        delete(audit).where(audit.c.sequence == 1),
        text("UPDATE audit SET tenant = 'other'"),
    ],
)
def test_no_row_can_be_changed_or_deleted(log: AuditLog, engine: Engine, statement: object) -> None:
    log.add(entry())
    before = log.page("t", limit=10)
    with pytest.raises(DBAPIError, match=REFUSED), engine.begin() as connection:
        connection.execute(statement)  # type: ignore[call-overload]
    assert log.page("t", limit=10) == before
    log.add(entry(1))
    assert len(log.page("t", limit=10)[0]) == 2


def test_no_row_can_be_replaced_or_emptied_away(log: AuditLog, engine: Engine) -> None:
    log.add(entry())
    row = "INTO audit (sequence, at, tenant, actor, action, status) VALUES (1, 1, 't', 'nobody', 'x', 200)"
    tries = {
        "sqlite": [f"INSERT OR REPLACE {row}", f"REPLACE {row}"],
        "postgresql": [
            "TRUNCATE audit",
            f"INSERT {row} ON CONFLICT (sequence) DO UPDATE SET actor = 'nobody'",
        ],
    }[engine.dialect.name]
    for statement in tries:
        with pytest.raises(DBAPIError, match=REFUSED), engine.begin() as connection:
            connection.execute(text(statement))
    assert [item.actor for item in log.page("t", limit=10)[0]] == ["key_1"]


def test_an_older_database_is_guarded_when_it_is_opened(url: str) -> None:
    """Its table was made before there were triggers."""
    engine = open_database(url)
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            for name in ("update", "delete", "replace"):
                connection.execute(text(f"DROP TRIGGER audit_no_{name}"))
        else:
            connection.execute(text("DROP TRIGGER audit_append_only ON audit"))
            connection.execute(text("DROP FUNCTION audit_refuse"))
    AuditLog(engine).add(entry())
    with engine.begin() as connection:
        connection.execute(update(audit).values(target="changed"))
    engine.dispose()
    for _ in range(2):  # and opening it again changes nothing
        engine = open_database(url)
        with pytest.raises(DBAPIError, match=REFUSED), engine.begin() as connection:
            connection.execute(delete(audit))
        assert [item.target for item in AuditLog(engine).page("t", limit=10)[0]] == ["changed"]
        engine.dispose()


def test_a_database_can_still_be_taken_down_and_made_again(engine: Engine, log: AuditLog) -> None:
    log.add(entry())
    metadata.drop_all(engine)
    metadata.create_all(engine)
    assert log.page("t", limit=10) == ([], False)
    log.add(entry())
    with pytest.raises(DBAPIError, match=REFUSED), engine.begin() as connection:
        connection.execute(delete(audit))


def test_nothing_that_is_sent_makes_a_row_fail_or_holds_a_secret(log: AuditLog) -> None:
    key = "sgk_" + "aB3" * 12 + "xy"
    for number, target in enumerate(["x" * 5000, "nul\0 and \ud800 and ü", f"adp_1/{key}", "whsec_c2VjcmV0+/="]):
        log.add(entry(number, tenant="t", actor="a" * 100, action="b" * 100, target=target))
    shown = [item.target for item in log.page("t", limit=10)[0]]
    assert shown == ["whsec_***", "adp_1/sgk_***", "nul? and ? and ?", "x" * 200]
    item = log.page("t", limit=1)[0][0]
    assert (item.actor, item.action) == ("a" * 80, "b" * 60)
