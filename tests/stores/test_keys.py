"""API keys as records: two live ones at most, found by nothing but the key, ended at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text, update
from sqlalchemy.engine import Engine

from safegraft.contracts.keys import Limits
from safegraft.errors import Conflict, InvalidParameter, NotFound
from safegraft.stores import keys as module
from safegraft.stores.database import api_keys
from safegraft.stores.keys import KeyStore, new_key, well_formed
from safegraft.vault import Vault

PEPPER = b"a pepper for tests"


@pytest.fixture
def store(engine: Engine) -> KeyStore:
    return KeyStore(engine, Vault(PEPPER))


def shift(engine: Engine, key_id: str, column: str, seconds: float) -> None:
    with engine.begin() as connection:
        shifted = update(api_keys).where(api_keys.c.id == key_id)
        assert connection.execute(shifted.values({column: api_keys.c[column] + seconds})).rowcount == 1


def test_a_key_can_be_told_from_a_typing_error() -> None:
    for _ in range(200):
        key = new_key()
        assert well_formed(key)
        assert len(key) == 42
        swapped = key[:10] + key[11] + key[10] + key[12:]
        assert not well_formed(swapped) or swapped == key
        for wrong in (key[:-1], key + "a", key.upper(), f" {key}", f"{key}\n", key.replace("sgk_", "sk-_"), ""):
            assert not well_formed(wrong)
    assert len({new_key() for _ in range(1000)}) == 1000


def test_a_key_is_found_by_itself_alone(store: KeyStore, engine: Engine) -> None:
    made, text_ = store.create("acme", scopes=["read"])
    holder = store.find(text_)
    assert holder is not None
    assert (holder.tenant, holder.key_id, holder.scopes) == ("acme", made.id, frozenset({"read"}))
    assert (holder.seconds_left, holder.limits) == (None, Limits())
    with engine.begin() as connection:
        row = connection.execute(api_keys.select()).one()
    for other in (made.id, row.mac, row.hint, new_key(), f"{text_} ", text_.swapcase(), "%", ""):
        assert store.find(other) is None
    assert text_ not in str(row)
    assert KeyStore(engine, Vault(b"another pepper of ours")).find(text_) is None


def test_a_revoked_or_expired_key_is_not_found(store: KeyStore, engine: Engine) -> None:
    revoked, first = store.create("t")
    expiring, second = store.create("t", seconds=100.0)
    assert not store.any_live() or store.find(first) is not None
    store.revoke(revoked.id)
    assert store.find(first) is None
    assert store.any_live()
    shift(engine, expiring.id, "expires_at", -50.0)
    holder = store.find(second)
    assert holder is not None
    assert holder.seconds_left == pytest.approx(50.0, abs=2.0)
    shift(engine, expiring.id, "expires_at", -51.0)
    assert store.find(second) is None
    assert not store.any_live()
    assert store.revoke(revoked.id) == store.revoke(revoked.id)
    with pytest.raises(NotFound):
        store.revoke("key_nothing")


def test_twenty_makers_at_once_make_two(store: KeyStore) -> None:
    barrier = threading.Barrier(20)

    def make(_: int) -> str:
        barrier.wait()
        try:
            store.create("t")
        except Conflict as error:
            return error.code
        return "made"

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(make, range(20)))
    assert sorted(found) == ["made"] * module.MAX_LIVE + ["too_many_keys"] * (20 - module.MAX_LIVE)
    assert len(store.list("t")) == module.MAX_LIVE
    assert store.create("other")[0].tenant == "other"


def test_an_expired_key_makes_room(store: KeyStore, engine: Engine) -> None:
    old = [store.create("t", seconds=100.0)[0] for _ in range(2)]
    with pytest.raises(Conflict):
        store.create("t")
    shift(engine, old[0].id, "expires_at", -101.0)
    store.create("t")


def test_a_use_is_noted_at_most_once_a_minute(store: KeyStore, engine: Engine) -> None:
    made, key = store.create("t")
    assert made.last_used_at is None
    store.find(key)
    first = store.list("t")[0].last_used_at
    assert first is not None
    shift(engine, made.id, "last_used_at", -module.NOTE_SECONDS + 5)
    store.find(key)
    assert store.list("t")[0].last_used_at == pytest.approx(first - module.NOTE_SECONDS + 5, abs=1)
    shift(engine, made.id, "last_used_at", -6)
    store.find(key)
    assert store.list("t")[0].last_used_at == pytest.approx(first, abs=5)


def test_a_use_that_cannot_be_noted_locks_nobody_out(
    store: KeyStore, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, say: those who want to read, or to delete something, still can."""
    if engine.dialect.name != "sqlite":
        pytest.skip("a trigger of SQLite's stands for the full disk")
    made, key = store.create("t")
    with engine.begin() as connection:
        connection.execute(
            text("CREATE TRIGGER full BEFORE UPDATE ON api_keys BEGIN SELECT RAISE(FAIL, 'disk is full'); END")
        )
    holder = store.find(key)
    assert holder is not None
    assert holder.key_id == made.id
    assert "was not noted" in caplog.text
    assert key not in caplog.text


def test_limits_are_the_tenants(store: KeyStore) -> None:
    _, first = store.create("t")
    _, second = store.create("t", name="other")
    _, foreign = store.create("u")
    own = Limits(max_bytes=0, max_jobs=5, max_requests_per_second=7)
    store.set_limits("t", own)
    for key, limits in ((first, own), (second, own), (foreign, Limits())):
        holder = store.find(key)
        assert holder is not None
        assert holder.limits == limits
    assert store.limits("t") == own
    store.set_limits("t", Limits(max_jobs=6))
    assert store.limits("t") == Limits(max_jobs=6)
    with pytest.raises(NotFound):
        store.set_limits("nobody", own)


@pytest.mark.parametrize("tenant", ["", "A", "a b", "a/b", "-a", "a" * 41, "ä", "a\0", "a\n"])
def test_a_tenants_name_is_plain(store: KeyStore, tenant: str) -> None:
    with pytest.raises(InvalidParameter):
        store.create(tenant)
    assert store.list() == []
