"""API keys: who holds one, until when, and that the database holds none."""

import re
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.engine import Engine

from safegraft.contracts.keys import Key, Limits
from safegraft.errors import Conflict, InvalidParameter, NotFound
from safegraft.stores import keys as module
from safegraft.stores.database import api_keys, open_database
from safegraft.stores.keys import ALPHABET, FORM, KeyStore, new_key, well_formed
from safegraft.vault import Vault

PEPPER = b"a pepper for tests"


@pytest.fixture
def keys(engine: Engine) -> KeyStore:
    return KeyStore(engine, Vault(PEPPER))


def shift(engine: Engine, key: Key, column: str, seconds: float) -> None:
    """Moves one of a key's times, as if the clock had moved the other way."""
    with engine.begin() as connection:
        changed = connection.execute(
            text(f"UPDATE api_keys SET {column} = {column} + :seconds WHERE id = :id"),
            {"seconds": seconds, "id": key.id},
        )
        assert changed.rowcount == 1


def used(keys: KeyStore, key: Key) -> int | None:
    return next(item.last_used_at for item in keys.list() if item.id == key.id)


def test_a_key_is_found_by_its_text_alone(keys: KeyStore) -> None:
    key, given = keys.create("acme", name="ci", scopes=["write"])
    holder = keys.find(given)
    assert holder is not None
    assert (holder.key_id, holder.tenant, holder.seconds_left) == (key.id, "acme", None)
    assert holder.scopes == {"read", "write"}
    assert holder.limits == Limits()
    assert keys.find(new_key()) is None
    assert keys.find("") is None
    assert keys.find(key.id) is None
    assert (key.hint, key.revoked_at, key.last_used_at) == (given[:8], None, None)


@pytest.mark.parametrize(
    ("scopes", "granted"),
    [
        (None, {"read", "write"}),
        (["read"], {"read"}),
        (["admin"], {"read", "write", "admin"}),
        (["read", "admin", "read"], {"read", "write", "admin"}),
    ],
)
def test_scopes_include_the_smaller_ones(keys: KeyStore, scopes: list[str] | None, granted: set[str]) -> None:
    _, given = keys.create("acme", scopes=scopes)  # type: ignore[arg-type]
    holder = keys.find(given)
    assert holder is not None
    assert holder.scopes == granted


def test_two_keys_of_a_name_live_at_a_time(keys: KeyStore, engine: Engine) -> None:
    first, _ = keys.create("acme", name="ci")
    second, _ = keys.create("acme", name="ci", seconds=3600)
    with pytest.raises(Conflict) as raised:
        keys.create("acme", name="ci")
    assert raised.value.code == "too_many_keys"
    # Other names and other tenants have their own two.
    keys.create("acme", name="other")
    keys.create("other", name="ci")
    keys.revoke(first.id)
    keys.create("acme", name="ci")
    with pytest.raises(Conflict):
        keys.create("acme", name="ci")
    # One that expired makes room as well.
    shift(engine, second, "expires_at", -3601)
    keys.create("acme", name="ci")
    assert len(keys.list("acme")) == 5


def test_keys_expire_by_the_databases_clock(keys: KeyStore, engine: Engine) -> None:
    key, given = keys.create("acme", seconds=60)
    holder = keys.find(given)
    assert holder is not None
    assert holder.seconds_left == pytest.approx(60, abs=5)
    assert key.expires_at == pytest.approx(time.time() + 60, abs=5)
    shift(engine, key, "expires_at", -59)
    assert keys.find(given) is not None
    shift(engine, key, "expires_at", -1)
    assert keys.find(given) is None


def test_revoked_keys_stay_revoked(keys: KeyStore) -> None:
    key, given = keys.create("acme")
    _, other = keys.create("acme")
    revoked = keys.revoke(key.id)
    assert revoked.revoked_at is not None
    assert keys.find(given) is None
    assert keys.find(other) is not None
    assert keys.revoke(key.id) == revoked
    with pytest.raises(NotFound) as raised:
        keys.revoke("key_nothing")
    assert raised.value.code == "key_not_found"


def test_the_last_use_is_noted_but_not_at_every_request(keys: KeyStore, engine: Engine) -> None:
    key, given = keys.create("acme")
    assert used(keys, key) is None
    keys.find(given)
    first = used(keys, key)
    assert first == pytest.approx(time.time(), abs=5)
    with engine.connect() as connection:
        before = connection.execute(select(api_keys.c.last_used_at)).scalar_one()
    keys.find(given)
    with engine.connect() as connection:
        assert connection.execute(select(api_keys.c.last_used_at)).scalar_one() == before
    shift(engine, key, "last_used_at", -module.NOTE_SECONDS - 1)
    keys.find(given)
    with engine.connect() as connection:
        assert connection.execute(select(api_keys.c.last_used_at)).scalar_one() >= before


def test_a_wrong_key_notes_no_use(keys: KeyStore) -> None:
    key, given = keys.create("acme")
    keys.revoke(key.id)
    assert keys.find(given) is None
    assert used(keys, key) is None


def test_the_database_holds_no_key(engine: Engine, keys: KeyStore, tmp_path: Path) -> None:
    _, given = keys.create("acme")
    assert keys.find(given) is not None
    with engine.connect() as connection:
        row = connection.execute(select(api_keys)).one()
    assert row.mac == Vault(PEPPER).mark(given)
    assert re.fullmatch("[0-9a-f]{64}", row.mac)
    for value in row:
        assert given not in str(value)
        assert given[8:24] not in str(value)
    assert given not in str(keys.list())
    if engine.dialect.name == "sqlite":
        engine.dispose()
        files = [path for path in (tmp_path / "data").iterdir() if path.is_file()]
        assert any(row.mac.encode() in path.read_bytes() for path in files)
        for path in files:
            assert given[8:].encode() not in path.read_bytes()
    # Whoever copies the database cannot use it with another pepper, nor make marks of their own.
    assert KeyStore(engine, Vault(b"another pepper of theirs")).find(given) is None


def test_a_mistyped_key_is_known_without_the_database(monkeypatch: pytest.MonkeyPatch, keys: KeyStore) -> None:
    texts = [new_key() for _ in range(20)]
    assert len(set(texts)) == 20
    for given in texts:
        assert FORM.fullmatch(given)
        assert well_formed(given)
        for at in range(4, len(given)):
            other = ALPHABET[(ALPHABET.index(given[at]) + 1) % len(ALPHABET)]
            assert not well_formed(given[:at] + other + given[at + 1 :])
        swapped = given[:10] + given[11] + given[10] + given[12:]
        assert swapped == given or not well_formed(swapped)
    for wrong in ("", "sgk_", given[:-1], given + "0", given.upper(), f" {given}", f"{given}\n", "sgk_" + "ü" * 38):
        assert not well_formed(wrong)

    def fail(*_: object) -> None:
        raise AssertionError("the database was asked")

    monkeypatch.setattr(module, "reading", fail)
    assert keys.find(given[:-1] + ("0" if given[-1] != "0" else "1")) is None
    with pytest.raises(AssertionError, match="was asked"):
        keys.find(given)


@pytest.mark.parametrize("tenant", ["", "Acme", "a" * 41, "-a", "a/b", "ü", "a b", "a\0", "a\n"])
def test_bad_tenants_are_refused(keys: KeyStore, tenant: str) -> None:
    with pytest.raises(InvalidParameter) as raised:
        keys.create(tenant)
    assert raised.value.code == "bad_tenant"
    assert keys.list() == []


@pytest.mark.parametrize("name", ["", "a" * 101, "a\0", "a\nb", "\x1b[31m"])
def test_bad_names_are_refused(keys: KeyStore, name: str) -> None:
    with pytest.raises(InvalidParameter) as raised:
        keys.create("acme", name=name)
    assert raised.value.code == "bad_name"


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_key_that_never_lived_is_refused(keys: KeyStore, seconds: float) -> None:
    with pytest.raises(InvalidParameter):
        keys.create("acme", seconds=seconds)


def test_limits_are_the_tenants(keys: KeyStore) -> None:
    with pytest.raises(NotFound) as raised:
        keys.set_limits("acme", Limits(max_jobs=1))
    assert raised.value.code == "tenant_not_found"
    assert keys.limits("acme") == Limits()
    _, given = keys.create("acme")
    limits = Limits(max_bytes=2**40, max_jobs=0, max_requests_per_second=7)
    keys.set_limits("acme", limits)
    assert keys.limits("acme") == limits
    holder = keys.find(given)
    assert holder is not None
    assert holder.limits == limits
    # A further key does not reset them.
    keys.create("acme")
    assert keys.limits("acme") == limits


def test_lists_are_newest_first_and_of_one_tenant(keys: KeyStore) -> None:
    made = []
    for tenant in ("a", "b", "a"):
        made.append(keys.create(tenant)[0])
        time.sleep(0.002)  # ids sort by milliseconds
    assert keys.list() == made[::-1]
    assert keys.list("a") == [made[2], made[0]]
    assert keys.list("nobody") == []


@pytest.mark.parametrize("existing", [True, False])
def test_keys_made_at_the_same_time_are_two_at_most(url: str, existing: bool) -> None:
    """Each from a process of its own, as far as the database can tell: an engine and a connection each."""
    first = open_database(url)
    if existing:
        KeyStore(first, Vault(PEPPER)).create("acme", name="another")
    count = 8
    start, outcomes = threading.Barrier(count), []

    def make() -> None:
        engine = open_database(url)
        try:
            store = KeyStore(engine, Vault(PEPPER))
            start.wait(30)
            try:
                outcomes.append(store.create("acme", name="ci")[1])
            except Conflict as error:
                outcomes.append(error.code)
        finally:
            engine.dispose()

    threads = [threading.Thread(target=make) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [outcome for outcome in outcomes if outcome.startswith("sgk_")]
    assert len(made) == 2
    assert outcomes.count("too_many_keys") == count - 2
    store = KeyStore(first, Vault(PEPPER))
    assert all(store.find(given) is not None for given in made)
    assert len([key for key in store.list("acme") if key.name == "ci"]) == 2
    first.dispose()


def test_a_use_that_cannot_be_noted_locks_nobody_out(
    keys: KeyStore, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, say: those who want to read, or to delete something, still can."""
    if engine.dialect.name != "sqlite":
        pytest.skip("a trigger of SQLite's stands for the full disk")
    made, key = keys.create("t")
    with engine.begin() as connection:
        connection.execute(
            text("CREATE TRIGGER full BEFORE UPDATE ON api_keys BEGIN SELECT RAISE(FAIL, 'disk is full'); END")
        )
    holder = keys.find(key)
    assert holder is not None
    assert holder.key_id == made.id
    assert "was not noted" in caplog.text
    assert key not in caplog.text
