"""Endpoints and deliveries on real databases: who signs, who may send what, in races, after silence; never twice."""

import base64
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.engine import Engine

from safegraft.contracts.webhooks import (
    RotateSecret,
    WebhookAttempt,
    WebhookEndpoint,
    WebhookEndpointCreate,
    WebhookEndpointUpdate,
)
from safegraft.errors import Conflict, Incompatible, InvalidParameter, NotFound, SystemFault
from safegraft.stores import outbox, totals
from safegraft.stores.database import webhook_deliveries, webhook_endpoints
from safegraft.stores.jobs import JobStore, Origins
from safegraft.stores.webhooks import MAX_ENDPOINTS, PER_ENDPOINT, PER_TENANT, Sending, WebhookStore
from safegraft.vault import Vault
from tests.stores.records import REFERENCE, claimed, queued, request

URL = "https://hooks.example.com/a"
DELIVERED = WebhookAttempt(at=1, seconds=0.1, status=200, error=None)
REFUSED = WebhookAttempt(at=1, seconds=0.1, status=500, error="It answered 500.")
DAY = 86400.0


@pytest.fixture
def webhooks(engine: Engine) -> WebhookStore:
    return WebhookStore(engine, Vault(b"a pepper for tests"), lease_seconds=60)


def made(webhooks: WebhookStore, tenant: str = "t", url: str = URL, types: list[str] | None = None) -> WebhookEndpoint:
    asked = WebhookEndpointCreate.model_validate({"url": url, "event_types": types or ["*"]})
    return webhooks.create(tenant, asked)[0]


def shift(engine: Engine, table: str, row_id: str, column: str, seconds: float) -> None:
    """Moves one of a row's times, as if the clock had moved the other way."""
    with engine.begin() as connection:
        changed = connection.execute(
            text(f"UPDATE {table} SET {column} = {column} + :seconds WHERE id = :id"),
            {"seconds": seconds, "id": row_id},
        )
        assert changed.rowcount == 1


def claimed_one(webhooks: WebhookStore) -> Sending:
    (sending,) = webhooks.claim(10)
    return sending


# Endpoints


def test_a_secret_is_shown_once_and_kept_sealed(webhooks: WebhookStore, engine: Engine) -> None:
    created, secret = webhooks.create("t", WebhookEndpointCreate(url=URL, name="mine"))
    assert secret.startswith("whsec_")
    assert len(base64.b64decode(secret[6:], validate=True)) == 32
    assert (created.url, created.name, created.event_types, created.enabled) == (URL, "mine", ["*"], True)
    with engine.begin() as connection:
        kept = str(connection.execute(select(webhook_endpoints)).all())
    assert secret not in kept
    assert secret[6:] not in kept
    assert secret not in webhooks.get("t", created.id).model_dump_json()


def test_a_wrong_pepper_signs_nothing(webhooks: WebhookStore, engine: Engine) -> None:
    webhooks.ping("t", made(webhooks).id)
    other = WebhookStore(engine, Vault(b"another pepper, by mistake"), lease_seconds=60)
    sending = claimed_one(other)
    with pytest.raises(SystemFault) as fault:
        other.secrets(sending)
    assert fault.value.code == "wrong_pepper"


def test_what_is_left_out_of_an_update_stays(webhooks: WebhookStore) -> None:
    endpoint = made(webhooks, types=["realignment.failed"])
    renamed = webhooks.update("t", endpoint.id, WebhookEndpointUpdate(name="new"))
    assert renamed == endpoint.model_copy(update={"name": "new"})
    moved = webhooks.update("t", endpoint.id, WebhookEndpointUpdate(url=URL + "/b", event_types=["*", "*"]))
    assert (moved.url, moved.event_types, moved.name) == (URL + "/b", ["*"], "new")
    assert webhooks.update("t", endpoint.id, WebhookEndpointUpdate(url=URL + "/b")).url == URL + "/b"


def test_an_address_is_registered_once_a_tenant(webhooks: WebhookStore) -> None:
    made(webhooks)
    other = made(webhooks, url=URL + "/other")
    with pytest.raises(Conflict) as refused:
        made(webhooks)
    assert refused.value.code == "webhook_url_taken"
    with pytest.raises(Conflict):
        webhooks.update("t", other.id, WebhookEndpointUpdate(url=URL))
    made(webhooks, "another tenant")


def test_twenty_endpoints_a_tenant_also_in_a_race(webhooks: WebhookStore) -> None:
    made(webhooks, "other")
    barrier = threading.Barrier(24)

    def create(number: int) -> str:
        barrier.wait()
        try:
            return made(webhooks, url=f"{URL}/{number}").id
        except Conflict as refused:
            return refused.code

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(create, range(24)))
    assert answers.count("too_many_webhook_endpoints") == 24 - MAX_ENDPOINTS
    seen: list[str] = []
    while True:
        page, more = webhooks.page("t", limit=7, after=seen[-1] if seen else None)
        seen += [item.id for item in page]
        if not more:
            break
    assert sorted(seen, reverse=True) == seen
    assert set(seen) == {answer for answer in answers if answer.startswith("we_")}


def test_another_tenant_sees_nothing(webhooks: WebhookStore) -> None:
    endpoint = made(webhooks)
    message = webhooks.ping("t", endpoint.id)
    asked: list[Callable[[], object]] = [
        lambda: webhooks.get("other", endpoint.id),
        lambda: webhooks.update("other", endpoint.id, WebhookEndpointUpdate(enabled=False)),
        lambda: webhooks.delete("other", endpoint.id),
        lambda: webhooks.rotate("other", endpoint.id, 0),
        lambda: webhooks.ping("other", endpoint.id),
        lambda: webhooks.delivery("other", message.id),
        lambda: webhooks.replay("other", message.id),
    ]
    for ask in asked:
        with pytest.raises(NotFound):
            ask()
    assert webhooks.page("other", limit=10) == ([], False)
    assert webhooks.deliveries("other", limit=10) == ([], False)
    assert webhooks.deliveries("other", limit=10, endpoint_id=endpoint.id) == ([], False)
    with pytest.raises(InvalidParameter):
        webhooks.registered("other", URL)
    assert webhooks.get("t", endpoint.id) == endpoint


def test_only_a_live_endpoint_can_be_named_by_a_job(webhooks: WebhookStore) -> None:
    endpoint = made(webhooks)
    assert webhooks.registered("t", URL) == endpoint.id
    for url in (URL + "/", URL.upper(), "", "https://elsewhere.example.com"):
        with pytest.raises(InvalidParameter) as refused:
            webhooks.registered("t", url)
        assert refused.value.code == "webhook_not_registered"
        assert refused.value.hint
    webhooks.update("t", endpoint.id, WebhookEndpointUpdate(enabled=False))
    with pytest.raises(InvalidParameter):
        webhooks.registered("t", URL)


# Rotation


def test_both_secrets_sign_until_the_overlap_ends(webhooks: WebhookStore, engine: Engine) -> None:
    endpoint, first = webhooks.create("t", WebhookEndpointCreate(url=URL))
    for _ in range(3):
        webhooks.ping("t", endpoint.id)
    assert {tuple(webhooks.secrets(s)) for s in webhooks.claim(1)} == {(first,)}
    rotated, second = webhooks.rotate("t", endpoint.id, DAY)
    assert second != first
    assert rotated.previous_secret_until is not None
    assert webhooks.secrets(webhooks.claim(1)[0]) == [second, first]
    shift(engine, "webhook_endpoints", endpoint.id, "previous_until", -DAY - 1)
    assert webhooks.secrets(webhooks.claim(1)[0]) == [second]
    assert webhooks.get("t", endpoint.id).previous_secret_until is None


def test_a_rotation_without_overlap_ends_the_old_secret_at_once(webhooks: WebhookStore, engine: Engine) -> None:
    endpoint = made(webhooks)
    rotated, secret = webhooks.rotate("t", endpoint.id, 0)
    assert rotated.previous_secret_until is None
    webhooks.ping("t", endpoint.id)
    assert webhooks.secrets(claimed_one(webhooks)) == [secret]
    with engine.begin() as connection:
        assert connection.execute(select(webhook_endpoints.c.previous_secret)).scalar_one() is None


def test_how_long_the_old_secret_signs() -> None:
    assert RotateSecret().overlap == 86400
    assert RotateSecret(overlap_seconds=0).overlap == 0
    assert RotateSecret(keep_old_secret_active_for_24_hours=True).overlap == 86400
    assert RotateSecret(keep_old_secret_active_for_24_hours=False).overlap == 0
    with pytest.raises(ValueError, match="not both"):
        RotateSecret(overlap_seconds=5, keep_old_secret_active_for_24_hours=True)


# The outbox


def test_the_end_of_a_job_tells_who_subscribed(webhooks: WebhookStore, store: JobStore) -> None:
    everything = made(webhooks, url=URL + "/all")
    failures = made(webhooks, url=URL + "/failed", types=["realignment.failed"])
    tuning = made(webhooks, url=URL + "/tuning", types=["fine_tuning.job.cancelled"])
    made(webhooks, "other")
    named = store.create("t", REFERENCE, request(), origins=Origins(webhook_endpoint_id=tuning.id)).job.id
    store.cancel("t", named)
    claim = claimed(store)
    store.fail(claim.id, claim.attempt, Incompatible("No."))
    store.create("t", REFERENCE, request(), origins=Origins(api="fine_tuning"))
    found, _ = webhooks.deliveries("t", limit=100)
    told = {(item.endpoint_id, item.type, webhooks.delivery("t", item.id).payload.data.id) for item in found}
    assert told == {
        (everything.id, "realignment.cancelled", named),
        (tuning.id, "realignment.cancelled", named),  # this job's own endpoint, whatever it subscribes to
        (everything.id, "realignment.failed", claim.id),
        (failures.id, "realignment.failed", claim.id),
    }
    assert webhooks.deliveries("other", limit=100) == ([], False)


def test_a_disabled_endpoint_is_told_nothing(webhooks: WebhookStore, store: JobStore) -> None:
    endpoint = made(webhooks)
    disabled = webhooks.update("t", endpoint.id, WebhookEndpointUpdate(enabled=False))
    assert (disabled.enabled, disabled.disabled_reason) == (False, "Disabled by its owner.")
    store.cancel("t", queued(store))
    assert webhooks.deliveries("t", limit=10) == ([], False)
    with pytest.raises(Conflict) as refused:
        webhooks.ping("t", endpoint.id)
    assert refused.value.code == "webhook_endpoint_disabled"
    enabled = webhooks.update("t", endpoint.id, WebhookEndpointUpdate(enabled=True))
    assert (enabled.enabled, enabled.disabled_at, enabled.disabled_reason) == (True, None, None)


# Claims


def test_eight_threads_race_and_nothing_is_claimed_twice(webhooks: WebhookStore) -> None:
    endpoints = [made(webhooks, tenant, f"{URL}/{n}") for tenant in ("a", "b") for n in range(3)]
    sent = {webhooks.ping(tenant, e.id).id for e, tenant in zip(endpoints, "aaabbb", strict=True) for _ in range(10)}
    barrier = threading.Barrier(8)

    def claim(_: int) -> list[str]:
        barrier.wait()
        return [sending.id for _ in range(20) for sending in webhooks.claim(5)]

    with ThreadPoolExecutor(8) as pool:
        found = [item for batch in pool.map(claim, range(8)) for item in batch]
    assert len(found) == len(set(found))
    # On Postgres one that another gateway looked at is skipped, not waited for; the next turn finds it.
    found += [sending.id for _ in range(20) for sending in webhooks.claim(100)]
    assert sorted(found) == sorted(sent)


def test_a_lease_that_ended_is_claimed_again_and_its_first_holder_is_not_heard(
    webhooks: WebhookStore, engine: Engine
) -> None:
    endpoint = made(webhooks)
    message = webhooks.ping("t", endpoint.id)
    first = claimed_one(webhooks)
    assert webhooks.claim(10) == []
    shift(engine, "webhook_deliveries", message.id, "lease_until", -61)
    second = claimed_one(webhooks)
    assert (second.id, second.body, second.attempt) == (first.id, first.body, first.attempt + 1)
    assert not webhooks.record(first, DELIVERED)
    assert webhooks.delivery("t", message.id).state == "pending"
    webhooks.give_back([first])
    assert webhooks.claim(10) == []
    assert webhooks.record(second, DELIVERED)
    assert not webhooks.record(second, REFUSED, retry_in=0)
    shown = webhooks.delivery("t", message.id)
    assert (shown.state, shown.attempts, shown.last_status, shown.next_attempt_at) == ("delivered", 2, 200, None)
    assert webhooks.claim(10) == []


def test_what_is_given_back_is_claimed_at_once(webhooks: WebhookStore) -> None:
    webhooks.ping("t", made(webhooks).id)
    first = claimed_one(webhooks)
    webhooks.give_back([first])
    assert claimed_one(webhooks).id == first.id


def test_places_are_shared(webhooks: WebhookStore) -> None:
    """A tenant with many endpoints and messages takes its share, and the others come first in turn."""
    greedy = [made(webhooks, "greedy", f"{URL}/{n}") for n in range(10)]
    for endpoint in greedy:
        for _ in range(PER_ENDPOINT + 2):
            webhooks.ping("greedy", endpoint.id)
    modest = made(webhooks, "modest")
    webhooks.ping("modest", modest.id)
    assert {s.tenant for s in webhooks.claim(2)} == {"greedy", "modest"}
    webhooks.ping("modest", modest.id)
    batch = webhooks.claim(64, busy=[greedy[0].id])
    counts = {e.id: sum(s.endpoint_id == e.id for s in batch) for e in greedy}
    assert counts[greedy[0].id] == 0
    assert max(counts.values()) <= PER_ENDPOINT
    assert sum(counts.values()) == PER_TENANT
    assert sum(s.tenant == "modest" for s in batch) == 1
    webhooks.ping("modest", modest.id)
    assert [s.tenant for s in webhooks.claim(64, full=["greedy"])] == ["modest"]


# Outcomes


def test_a_failure_is_due_again_after_its_pause(webhooks: WebhookStore, engine: Engine) -> None:
    endpoint = made(webhooks)
    message = webhooks.ping("t", endpoint.id)
    sending = claimed_one(webhooks)
    assert webhooks.record(sending, REFUSED, retry_in=300)
    shown = webhooks.delivery("t", message.id)
    assert (shown.state, shown.last_status, shown.last_error) == ("pending", 500, "It answered 500.")
    assert shown.history == [REFUSED]
    assert webhooks.get("t", endpoint.id).failing_since is not None
    assert webhooks.claim(10) == []
    shift(engine, "webhook_deliveries", message.id, "next_at", -301)
    again = claimed_one(webhooks)
    assert (again.step, again.attempt) == (1, 2)
    assert webhooks.record(again, DELIVERED)
    assert webhooks.delivery("t", message.id).history == [REFUSED, DELIVERED]
    assert webhooks.get("t", endpoint.id).failing_since is None
    counted = {(name, first): value for name, first, _, value in totals.read(engine)}
    assert counted["webhook_attempts", "retried"] == counted["webhook_attempts", "delivered"] == 1


def test_after_five_days_of_failures_an_endpoint_is_disabled(webhooks: WebhookStore, engine: Engine) -> None:
    endpoint = made(webhooks)
    webhooks.ping("t", endpoint.id)
    webhooks.record(claimed_one(webhooks), REFUSED, retry_in=0)
    shift(engine, "webhook_endpoints", endpoint.id, "failing_since", -4.9 * DAY)
    webhooks.record(claimed_one(webhooks), REFUSED, retry_in=0)
    assert webhooks.get("t", endpoint.id).enabled
    shift(engine, "webhook_endpoints", endpoint.id, "failing_since", -0.2 * DAY)
    webhooks.record(claimed_one(webhooks), REFUSED, retry_in=0)
    disabled = webhooks.get("t", endpoint.id)
    assert (disabled.enabled, disabled.disabled_reason) == (False, "Nothing could be delivered for 5 days.")
    # What was pending ends, and does not come back by itself when it is enabled again.
    assert webhooks.claim(10) == []
    (delivery,), _ = webhooks.deliveries("t", limit=10)
    assert (delivery.state, delivery.last_error) == ("failed", "The endpoint is disabled or was deleted.")
    enabled = webhooks.update("t", endpoint.id, WebhookEndpointUpdate(enabled=True))
    assert enabled.failing_since is None
    assert webhooks.claim(10) == []
    webhooks.replay("t", delivery.id)
    webhooks.record(claimed_one(webhooks), REFUSED, retry_in=0)
    assert webhooks.get("t", endpoint.id).enabled


def test_a_reason_stays_the_first_one(webhooks: WebhookStore) -> None:
    endpoint = made(webhooks)
    webhooks.ping("t", endpoint.id)
    webhooks.record(claimed_one(webhooks), REFUSED, disable="It answered 410 Gone.")
    assert webhooks.get("t", endpoint.id).disabled_reason == "It answered 410 Gone."
    again = webhooks.update("t", endpoint.id, WebhookEndpointUpdate(enabled=False))
    assert again.disabled_reason == "It answered 410 Gone."


def test_a_replay_has_the_same_message_and_the_whole_table_before_it(webhooks: WebhookStore) -> None:
    endpoint = made(webhooks)
    message = webhooks.ping("t", endpoint.id)
    first = claimed_one(webhooks)
    assert webhooks.replay("t", message.id).attempts == 1
    assert webhooks.claim(10) == []  # it is being sent: asking again does not send it twice
    webhooks.record(first, REFUSED)
    assert webhooks.delivery("t", message.id).state == "failed"
    replayed = webhooks.replay("t", message.id)
    assert (replayed.state, replayed.id, replayed.finished_at) == ("pending", message.id, None)
    again = claimed_one(webhooks)
    assert (again.id, again.body, again.step) == (first.id, first.body, 0)
    assert not webhooks.record(first, DELIVERED)
    webhooks.record(again, REFUSED, retry_in=3600)
    webhooks.replay("t", message.id)  # not waiting for the table
    assert claimed_one(webhooks).step == 0
    webhooks.update("t", endpoint.id, WebhookEndpointUpdate(enabled=False))
    with pytest.raises(Conflict):
        webhooks.replay("t", message.id)
    webhooks.delete("t", endpoint.id)
    with pytest.raises(NotFound):
        webhooks.replay("t", message.id)


def test_history_is_bounded(webhooks: WebhookStore) -> None:
    message = webhooks.ping("t", made(webhooks).id)
    for number in range(25):
        attempt = WebhookAttempt(at=number, seconds=0, status=None, error="x" * 300)
        webhooks.record(claimed_one(webhooks), attempt, retry_in=0)
    shown = webhooks.delivery("t", message.id)
    assert [item.at for item in shown.history] == list(range(5, 25))
    assert shown.attempts == 25


def test_a_deleted_endpoint_takes_its_secret_along_and_its_messages_end(webhooks: WebhookStore, engine: Engine) -> None:
    endpoint = made(webhooks)
    message, flying = webhooks.ping("t", endpoint.id), webhooks.ping("t", endpoint.id)
    (sending,) = webhooks.claim(1)
    webhooks.delete("t", endpoint.id)
    with engine.begin() as connection:
        assert connection.execute(select(func.count()).select_from(webhook_endpoints)).scalar_one() == 0
    assert webhooks.claim(10) == []
    webhooks.record(sending, DELIVERED)
    states = {webhooks.delivery("t", item.id).state for item in (message, flying)}
    assert states == {"failed", "delivered"}
    with pytest.raises(NotFound):
        webhooks.get("t", endpoint.id)


def test_deliveries_are_listed_by_endpoint_and_state(webhooks: WebhookStore) -> None:
    one, two = made(webhooks), made(webhooks, url=URL + "/2")
    for endpoint in (one, two):
        for _ in range(3):
            webhooks.ping("t", endpoint.id)
    done = next(s for s in webhooks.claim(10) if s.endpoint_id == one.id)
    webhooks.record(done, DELIVERED)
    first, more = webhooks.deliveries("t", limit=4)
    rest, no_more = webhooks.deliveries("t", limit=4, after=first[-1].id)
    assert (len(first), more, len(rest), no_more) == (4, True, 2, False)
    ids = [item.id for item in first + rest]
    assert ids == sorted(ids, reverse=True)
    assert [d.id for d in webhooks.deliveries("t", limit=9, state="delivered")[0]] == [done.id]
    assert len(webhooks.deliveries("t", limit=9, endpoint_id=one.id)[0]) == 3
    assert len(webhooks.deliveries("t", limit=9, endpoint_id=one.id, state="pending")[0]) == 2


def test_a_message_is_not_sent_for_what_was_rolled_back(webhooks: WebhookStore, engine: Engine) -> None:
    endpoint = made(webhooks)
    with engine.connect() as connection:
        transaction = connection.begin()
        outbox.add(connection, "t", endpoint.id, "realignment.succeeded", "rlg_1")
        transaction.rollback()
    with engine.begin() as connection:
        assert connection.execute(select(func.count()).select_from(webhook_deliveries)).scalar_one() == 0
