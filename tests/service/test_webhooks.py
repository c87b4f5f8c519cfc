"""Webhooks from a real gateway to a real receiver: what arrives, how often, when, and what never does."""

import contextlib
import datetime
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from sqlalchemy.engine import Engine
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from safegraft.contracts.webhooks import EventType, WebhookEndpointCreate
from safegraft.settings import SharedSettings
from safegraft.stores.jobs import JobStore, Origins
from safegraft.stores.keys import KeyStore
from safegraft.stores.webhooks import PER_ENDPOINT, WebhookStore
from safegraft.vault import open_vault
from service import export
from service.destinations import Destinations
from service.routes.webhooks import MEANINGS
from service.settings import GatewaySettings
from service.webhooks import Sender, pause, retry_after
from tests.scaled import SCALED
from tests.service.answers import refused
from tests.service.conftest import SAFEGRAFT, Running, database_of, environment_of, free_port, start, upload
from tests.service.receiving import Received, Receiver, drip, endless, hang
from tests.stores.records import REFERENCE, request

TIMEOUT = 1.0
# Pauses short enough to see them all, and a lease (four times the timeout) that a test can wait for.
FAST = {
    "SAFEGRAFT_WEBHOOK_ALLOW_PRIVATE": "1",
    "SAFEGRAFT_WEBHOOK_SECONDS": "0.05",
    "SAFEGRAFT_WEBHOOK_TIMEOUT_SECONDS": str(TIMEOUT),
    "SAFEGRAFT_WEBHOOK_RETRY_SECONDS": "[0.2, 0.2, 0.2]",
}
if not SCALED:  # the client of object storage rightly uses them
    # Nobody listens there: who used the environment's proxies would deliver nothing.
    FAST |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")


# Where nothing is about a timeout, a busy machine shall not cause one.
PATIENT = {"SAFEGRAFT_WEBHOOK_TIMEOUT_SECONDS": "15"}


def start_gateway(data: Path, **environment: str) -> Running:
    """A gateway as uvicorn runs it, without broker and workers."""
    port, log = free_port(), data / "gateway.log"
    data.mkdir(parents=True, exist_ok=True)
    kept = environment_of(data)
    own = {"SAFEGRAFT_DEV": "1", "SAFEGRAFT_DATA": str(data), "SAFEGRAFT_REDIS_URL": "redis://127.0.0.1:1/0"}
    command = [sys.executable, "-m", "uvicorn", "--factory", "service.main:app", "--port", str(port)]
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=kept | own | FAST | environment)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        try:
            httpx.get(f"{url}/livez", trust_env=False).raise_for_status()
            return Running(url, data, process)
        except httpx.TransportError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)


def stop(running: Running) -> None:
    running.process.terminate()
    running.process.wait(30)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start_gateway(tmp_path_factory.mktemp("webhooks") / "data")
    yield running
    stop(running)
    log = (running.data / "gateway.log").read_text()
    assert "Traceback" not in log
    assert "whsec_" not in log
    assert "webhooks may go to private addresses" in log


@pytest.fixture
def client(gateway: Running) -> Iterator[httpx.Client]:
    with gateway.client() as client:
        yield client
        for endpoint in client.get("/v1/webhook_endpoints", params={"limit": 100}).json()["data"]:
            client.delete(f"/v1/webhook_endpoints/{endpoint['id']}")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@contextlib.contextmanager
def receiving(*answers: Any, **options: Any) -> Iterator[Receiver]:
    receiver = Receiver(*answers, **options)
    try:
        yield receiver
    finally:
        receiver.close()


def register(client: httpx.Client, url: str, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/webhook_endpoints", json={"url": url, **fields})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/webhook_endpoints/{answer.json()['id']}"
    body: dict[str, Any] = answer.json()
    return body


def ping(client: httpx.Client, endpoint: dict[str, Any]) -> str:
    answer = client.post(f"/v1/webhook_endpoints/{endpoint['id']}/test")
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def delivery(client: httpx.Client, delivery_id: str) -> dict[str, Any]:
    body: dict[str, Any] = client.get(f"/v1/webhook_deliveries/{delivery_id}").json()
    return body


def when(client: httpx.Client, delivery_id: str, ready: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while not ready(found := delivery(client, delivery_id)):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def ended(client: httpx.Client, delivery_id: str) -> dict[str, Any]:
    return when(client, delivery_id, lambda found: found["state"] != "pending")


opened: list[Engine] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while opened:
        opened.pop().dispose()


def stores(data: Path) -> tuple[WebhookStore, JobStore]:
    """The gateway's own records, as another process sees them."""
    settings = SharedSettings(data=data)
    engine = database_of(data)
    opened.append(engine)
    webhooks = WebhookStore(engine, open_vault(settings), lease_seconds=4 * TIMEOUT)
    return webhooks, JobStore(engine, lease_seconds=30, max_attempts=3)


def verified(secret: str, received: Received) -> Any:
    """The message, if both libraries accept its signature."""
    body, headers = received.body, received.headers
    found = Webhook(secret).verify(body, headers)
    event = OpenAI(api_key="unused").webhooks.unwrap(body, headers, secret=secret)
    assert event.id == found["id"] == received.id
    assert event.type == found["type"]
    return event


# What arrives


def test_both_libraries_accept_what_arrives(client: httpx.Client, receiver: Receiver) -> None:
    endpoint = register(client, f"{receiver.url}/hook?a=b%20c")
    message = ping(client, endpoint)
    assert ended(client, message)["state"] == "delivered"
    (received,) = receiver.received
    assert received.path == "/hook?a=b%20c"
    assert received.headers["content-type"] == "application/json"
    assert received.headers["user-agent"].startswith("safegraft/")
    assert received.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert abs(int(received.headers["webhook-timestamp"]) - time.time()) < 10
    assert received.id == message
    verified(endpoint["signing_secret"], received)
    sent = json.loads(received.body)
    assert sent["created_at"] > time.time() - 60
    del sent["created_at"]
    assert sent == {"id": message, "object": "event", "type": "ping", "data": {"id": endpoint["id"]}}


def test_no_other_bytes_and_no_other_secret_are_accepted(client: httpx.Client, receiver: Receiver) -> None:
    endpoint = register(client, receiver.url)
    other = register(client, receiver.url + "/other")
    ping(client, endpoint)
    received = receiver.wait(1)[0]
    verified(endpoint["signing_secret"], received)
    changed = Received(received.path, received.headers, received.body.replace(b"ping", b"pong"))
    older = {**received.headers, "webhook-timestamp": str(int(received.headers["webhook-timestamp"]) - 1)}
    renamed = {**received.headers, "webhook-id": "msg_0"}
    for secret, bad in (
        (other["signing_secret"], received),
        (endpoint["signing_secret"], changed),
        (endpoint["signing_secret"], Received(received.path, older, received.body)),
        (endpoint["signing_secret"], Received(received.path, renamed, received.body)),
    ):
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(bad.body, bad.headers)
        with pytest.raises(InvalidWebhookSignatureError):
            OpenAI(api_key="unused").webhooks.unwrap(bad.body, bad.headers, secret=secret)


def test_openais_client_knows_the_events_of_its_own_api(
    client: httpx.Client, gateway: Running, receiver: Receiver
) -> None:
    endpoint = register(client, receiver.url, event_types=["fine_tuning.job.cancelled"])
    _, jobs = stores(gateway.data)
    job_id = jobs.create("default", REFERENCE, request(), origins=Origins(api="fine_tuning")).job.id
    jobs.cancel("default", job_id)
    event = verified(endpoint["signing_secret"], receiver.wait(1)[0])
    assert type(event).__name__ == "FineTuningJobCancelledWebhookEvent"
    assert (event.type, event.data.id, event.object) == ("fine_tuning.job.cancelled", job_id, "event")


def test_openais_client_manages_endpoints(client: httpx.Client, gateway: Running, receiver: Receiver) -> None:
    webhooks = OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", http_client=None, max_retries=0).webhooks
    created = webhooks.create(url=receiver.url, name="mine", event_types=["fine_tuning.job.failed"])
    assert (created.url, created.name, created.event_types) == (receiver.url, "mine", ["fine_tuning.job.failed"])
    assert [item.id for item in webhooks.list(limit=5)] == [created.id]
    assert webhooks.retrieve(created.id).object == "webhook_endpoint"
    assert webhooks.update(created.id, name="ours").name == "ours"
    rotated = webhooks.rotate_secret(created.id, keep_old_secret_active_for_24_hours=True)
    message = ping(client, {"id": created.id})
    ended(client, message)
    for secret in (created.signing_secret, rotated.signing_secret):
        verified(secret, receiver.received[0])
    gone = webhooks.delete(created.id)
    assert (gone.deleted, gone.object) == (True, "webhook_endpoint.deleted")


def test_during_a_rotation_both_secrets_sign(client: httpx.Client, receiver: Receiver) -> None:
    endpoint = register(client, receiver.url)
    path = f"/v1/webhook_endpoints/{endpoint['id']}"
    rotated = client.post(f"{path}/rotate_secret").json()
    assert rotated["signing_secret"] != endpoint["signing_secret"]
    assert abs(rotated["previous_secret_until"] - time.time() - 86400) < 60
    ended(client, ping(client, endpoint))
    for secret in (endpoint["signing_secret"], rotated["signing_secret"]):
        verified(secret, receiver.received[0])
    assert len(receiver.received[0].headers["webhook-signature"].split(" ")) == 2
    # A second one ends the first secret, and one without overlap all but the newest.
    last = client.post(f"{path}/rotate_secret", json={"overlap_seconds": 0}).json()
    assert last["previous_secret_until"] is None
    ended(client, ping(client, endpoint))
    verified(last["signing_secret"], receiver.received[1])
    for secret in (endpoint["signing_secret"], rotated["signing_secret"]):
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(receiver.received[1].body, receiver.received[1].headers)


# Failures


def test_failures_are_tried_again_by_the_table_and_then_given_up(client: httpx.Client, receiver: Receiver) -> None:
    receiver.always = 500
    endpoint = register(client, receiver.url)
    message = ping(client, endpoint)
    found = ended(client, message)
    assert (found["state"], found["attempts"], found["next_attempt_at"]) == ("failed", 4, None)
    assert [item["status"] for item in found["history"]] == [500] * 4
    assert {item["error"] for item in found["history"]} == {"It answered 500."}
    assert {item.id for item in receiver.received} == {message}
    assert len({item.body for item in receiver.received}) == 1
    gaps = [b.at - a.at for a, b in zip(receiver.received, receiver.received[1:], strict=False)]
    assert all(gap >= 0.2 for gap in gaps), gaps
    for item in receiver.received:  # signed anew, with the time of the attempt
        verified(endpoint["signing_secret"], item)
    shown = client.get(f"/v1/webhook_endpoints/{endpoint['id']}").json()
    assert shown["enabled"]
    assert shown["failing_since"] is not None


def test_a_receiver_that_recovers_gets_it_once_more(client: httpx.Client, receiver: Receiver) -> None:
    receiver.answers = [503, lambda handler: handler.connection.close()]
    found = ended(client, ping(client, register(client, receiver.url)))
    assert (found["state"], found["last_status"], found["last_error"]) == ("delivered", 200, None)
    assert [item["status"] for item in found["history"]] == [503, None, 200]
    time.sleep(0.5)
    assert len(receiver.received) == 3


def test_any_2xx_is_a_delivery_and_nothing_else(client: httpx.Client, receiver: Receiver) -> None:
    endpoint = register(client, receiver.url)
    for status in (201, 202, 204):
        receiver.answers = [status]
        assert ended(client, ping(client, endpoint))["last_status"] == status
    for status in (304, 400, 404):
        receiver.answers = [status]
        assert [item["status"] for item in ended(client, ping(client, endpoint))["history"]] == [status, 200]


def test_a_closed_port_is_a_failure_like_any_other(client: httpx.Client) -> None:
    found = ended(client, ping(client, register(client, f"http://127.0.0.1:{free_port()}")))
    assert (found["state"], found["attempts"], found["last_status"]) == ("failed", 4, None)
    assert found["last_error"].startswith("No connection")


def test_410_disables_the_endpoint(client: httpx.Client, receiver: Receiver) -> None:
    receiver.always = 410
    endpoint = register(client, receiver.url)
    found = ended(client, ping(client, endpoint))
    assert (found["state"], found["attempts"]) == ("failed", 1)
    shown = client.get(f"/v1/webhook_endpoints/{endpoint['id']}").json()
    assert (shown["enabled"], shown["disabled_reason"]) == (False, "It answered 410 Gone.")
    for path in (f"webhook_endpoints/{endpoint['id']}/test", f"webhook_deliveries/{found['id']}/replay"):
        refused(client.post(f"/v1/{path}"), 409, "webhook_endpoint_disabled")
    receiver.always = 200
    client.post(f"/v1/webhook_endpoints/{endpoint['id']}", json={"enabled": True})
    client.post(f"/v1/webhook_deliveries/{found['id']}/replay")
    assert ended(client, found["id"])["state"] == "delivered"
    assert [item.id for item in receiver.received] == [found["id"]] * 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(client: httpx.Client, receiver: Receiver, status: int) -> None:
    with receiving() as elsewhere:
        receiver.always = (status, {"location": f"{elsewhere.url}/stolen"})
        found = ended(client, ping(client, register(client, receiver.url)))
        assert (found["state"], found["last_status"]) == ("failed", status)
        assert "redirects are not followed" in found["last_error"]
        assert elsewhere.received == []


@pytest.mark.long
def test_retry_after_stretches_a_pause_up_to_the_next_one(tmp_path: Path) -> None:
    gateway = start_gateway(tmp_path, SAFEGRAFT_WEBHOOK_RETRY_SECONDS="[0.1, 1.5, 0.1]")
    try:
        with receiving(*[(503, {"retry-after": "3600"})] * 2) as receiver, gateway.client() as client:
            assert ended(client, ping(client, register(client, receiver.url)))["state"] == "delivered"
            first, second, third = (item.at for item in receiver.received)
            assert 1.4 < second - first < 3.5  # by the table 0.1
            assert 1.4 < third - second < 3.5  # by the table 1.5, and the next is shorter
    finally:
        stop(gateway)


@pytest.mark.parametrize("slow", [hang, drip])
def test_a_slow_receiver_holds_up_nobody_else(client: httpx.Client, receiver: Receiver, slow: Any) -> None:
    with receiving() as other:
        receiver.always = slow
        late = [ping(client, register(client, f"{receiver.url}/{number}")) for number in range(10)]
        receiver.wait(5)
        quick = register(client, other.url)
        began = time.monotonic()
        assert ended(client, ping(client, quick))["state"] == "delivered"
        assert time.monotonic() - began < 0.8 * TIMEOUT
        found = when(client, late[0], lambda found: bool(found["history"]))
        assert found["history"][0]["error"] == "No answer within 1 seconds."
        assert found["history"][0]["seconds"] < 2 * TIMEOUT


def test_one_endpoint_takes_only_its_own_places(client: httpx.Client, receiver: Receiver) -> None:
    receiver.always = hang
    endpoint = register(client, receiver.url)
    late = [ping(client, endpoint) for _ in range(12)]
    receiver.wait(1)
    time.sleep(0.7 * TIMEOUT)
    first, *_ = came = list(receiver.received)
    assert len([item for item in came if item.at < first.at + 0.7 * TIMEOUT]) <= PER_ENDPOINT
    when(client, late[0], lambda found: bool(found["history"]))


def test_an_answers_body_is_not_read(client: httpx.Client, receiver: Receiver) -> None:
    receiver.always = endless
    found = ended(client, ping(client, register(client, receiver.url)))
    assert (found["state"], found["attempts"]) == ("delivered", 1)
    assert found["history"][0]["seconds"] < 0.8 * TIMEOUT


def test_a_replay_sends_the_same_message(client: httpx.Client, receiver: Receiver) -> None:
    endpoint = register(client, receiver.url)
    message = ping(client, endpoint)
    ended(client, message)
    answer = client.post(f"/v1/webhook_deliveries/{message}/replay")
    assert (answer.status_code, answer.json()["id"]) == (202, message)
    receiver.wait(2)
    first, second = receiver.received
    assert (first.id, first.body) == (second.id, second.body)
    verified(endpoint["signing_secret"], second)
    assert ended(client, message)["attempts"] == 2


def test_a_new_address_gets_what_is_pending(client: httpx.Client, receiver: Receiver) -> None:
    endpoint = register(client, f"http://127.0.0.1:{free_port()}")
    message = ping(client, endpoint)
    when(client, message, lambda found: bool(found["history"]))
    client.post(f"/v1/webhook_endpoints/{endpoint['id']}", json={"url": receiver.url})
    assert ended(client, message)["state"] == "delivered"
    assert receiver.received[0].id == message


# Gateways


@pytest.mark.long
def test_two_gateways_send_each_message_once(tmp_path: Path) -> None:
    one, two = start_gateway(tmp_path, **PATIENT), start_gateway(tmp_path, **PATIENT)
    try:
        with receiving() as receiver, one.client() as client, two.client() as other:
            endpoints = [register(client, f"{receiver.url}/{number}") for number in range(6)]
            sent = [ping((client, other)[n % 2], endpoint) for n in range(15) for endpoint in endpoints]
            receiver.wait(len(sent), 60)
            time.sleep(1)
            assert Counter(item.id for item in receiver.received) == Counter(sent)
            page = client.get("/v1/webhook_deliveries", params={"limit": 100}).json()
            assert {(item["state"], item["attempts"]) for item in page["data"]} == {("delivered", 1)}
            assert len(page["data"]) == len(sent)
    finally:
        stop(one)
        stop(two)


@pytest.mark.long
def test_what_a_killed_gateway_had_claimed_is_sent_by_the_next(tmp_path: Path) -> None:
    gateway = start_gateway(tmp_path)
    with receiving(hang) as receiver:
        with gateway.client() as client:
            endpoint = register(client, receiver.url)
            held = ping(client, endpoint)
        receiver.wait(1)
        gateway.process.send_signal(signal.SIGKILL)  # while it waits for the answer
        gateway.process.wait(30)
        webhooks, _ = stores(tmp_path)
        claimed = webhooks.ping("default", endpoint["id"]).id
        assert [item.id for item in webhooks.claim(10)] == [claimed]  # and this one was never sent
        after = start_gateway(tmp_path)
        try:
            receiver.wait(3)
            with after.client() as client:
                for message in (held, claimed):
                    assert ended(client, message)["attempts"] == 2
            assert Counter(item.id for item in receiver.received) == {held: 2, claimed: 1}
            verified(endpoint["signing_secret"], receiver.received[1])
        finally:
            stop(after)


@pytest.mark.long
def test_a_gateway_that_stops_gives_back_what_it_had_not_sent(tmp_path: Path) -> None:
    """Without waiting for the lease: with a timeout of 30 seconds that would take two minutes."""
    gateway = start_gateway(tmp_path, SAFEGRAFT_WEBHOOK_TIMEOUT_SECONDS="30")
    with receiving(hang) as receiver:
        with gateway.client() as client:
            message = ping(client, register(client, receiver.url))
        receiver.wait(1)
        began = time.monotonic()
        stop(gateway)
        assert time.monotonic() - began < 15
        assert "Traceback" not in (tmp_path / "gateway.log").read_text()
        after = start_gateway(tmp_path, SAFEGRAFT_WEBHOOK_TIMEOUT_SECONDS="30")
        try:
            receiver.wait(2)
            with after.client() as client:
                assert ended(client, message)["state"] == "delivered"
        finally:
            stop(after)


# Where nothing goes


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway that sends to public addresses only, and asks for keys."""
    running = start_gateway(
        tmp_path_factory.mktemp("strict") / "data", SAFEGRAFT_WEBHOOK_ALLOW_PRIVATE="0", SAFEGRAFT_DEV="0"
    )
    yield running
    stop(running)
    log = (running.data / "gateway.log").read_text()
    assert "Traceback" not in log
    assert "private addresses" not in log


def keyed(running: Running, tenant: str, scope: str = "admin") -> httpx.Client:
    settings = SharedSettings(data=running.data)
    scopes: Any = [scope]
    opened.append(database_of(running.data))
    _, key = KeyStore(opened[-1], open_vault(settings)).create(tenant, name=scope, scopes=scopes)
    return httpx.Client(base_url=running.url, timeout=30, trust_env=False, headers={"authorization": f"Bearer {key}"})


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://localhost/", "webhook_address_refused"),
        ("https://127.0.0.1:8443/", "webhook_address_refused"),
        ("https://2130706433/", "webhook_address_refused"),
        ("https://169.254.169.254/latest/meta-data/", "webhook_address_refused"),
        ("https://[::ffff:169.254.169.254]/", "webhook_address_refused"),
        ("https://[64:ff9b::a00:1]/", "webhook_address_refused"),
        ("http://hooks.example.com/", "webhook_url_refused"),
        ("https://user:pass@hooks.example.com/", "webhook_url_refused"),
        ("https://hooks.example.com/#fragment", "webhook_url_refused"),
    ],
)
def test_private_addresses_cannot_be_registered(strict: Running, url: str, code: str) -> None:
    with keyed(strict, f"t{time.time_ns()}") as client:
        assert refused(client.post("/v1/webhook_endpoints", json={"url": url}), 422, code)["param"] == "url"
        endpoint = register(client, "https://8.8.8.8/hook")
        refused(client.post(f"/v1/webhook_endpoints/{endpoint['id']}", json={"url": url}), 422, code)
        assert client.get(f"/v1/webhook_endpoints/{endpoint['id']}").json()["url"] == "https://8.8.8.8/hook"


def test_an_address_that_became_private_is_not_sent_to(strict: Running) -> None:
    """It is looked at again at every sending: what was registered may resolve to something else by now."""
    webhooks, _ = stores(strict.data)
    with receiving() as receiver, keyed(strict, "rebound") as client:
        for host, error in (("localhost", "not public"), ("127.0.0.1", "not public"), ("", "scheme must be https")):
            url = f"https://{host}:{receiver.port}/" if host else receiver.url
            created, _ = webhooks.create("rebound", WebhookEndpointCreate(url=url))
            found = ended(client, ping(client, {"id": created.id}))
            assert (found["state"], found["last_status"]) == ("failed", None)
            assert error in found["last_error"]
            assert "127.0.0.1" not in found["last_error"]
        assert receiver.received == []


def certificates(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for `name`, signed by itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    today = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public, private = folder / f"{name}.pem", folder / f"{name}.key"
    public.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    return public, private


@pytest.mark.parametrize(("named", "state"), [("hooks.example.com", "delivered"), ("other.example.com", "failed")])
def test_over_tls_the_name_is_checked_and_the_address_is_the_pinned_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, state: str
) -> None:
    """The receiver's certificate is for hooks.example.com; no DNS here knows any of these names."""
    import ssl

    public, private = certificates(tmp_path, "hooks.example.com")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    asked: list[str | None] = []
    context.sni_callback = lambda _, name, __: asked.append(name)
    monkeypatch.setenv("SSL_CERT_FILE", str(public))
    settings = GatewaySettings(data=tmp_path, webhook_seconds=0.05, webhook_retry_seconds=[])
    webhooks, _ = stores(tmp_path)
    destinations = Destinations(allow_private=True, resolve=lambda name, port: ["127.0.0.1"])
    with receiving(context=context) as receiver:
        url = f"https://{named}:{receiver.port}/hook"
        created, secret = webhooks.create("t", WebhookEndpointCreate(url=url))
        sender = Sender(settings, webhooks, destinations)
        sender.start()
        try:
            message = webhooks.ping("t", created.id).id
            deadline = time.monotonic() + 20
            while (found := webhooks.delivery("t", message)).state == "pending":
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            sender.stop()
        assert found.state == state, found
        assert asked == [named]
        if state == "delivered":
            assert receiver.received[0].headers["host"] == f"{named}:{receiver.port}"
            verified(secret, receiver.received[0])
        else:
            assert receiver.received == []
            assert found.last_error is not None
            assert "certificate" in found.last_error


# Who may


def test_another_tenant_and_a_lesser_key_see_nothing(strict: Running) -> None:
    with (
        keyed(strict, "owner") as owner,
        keyed(strict, "stranger") as stranger,
        keyed(strict, "owner", "write") as less,
    ):
        endpoint = register(owner, "https://8.8.8.8/hook")
        owner.post(f"/v1/webhook_endpoints/{endpoint['id']}", json={"enabled": True})
        message = ping(owner, endpoint)
        for subject, asked in (
            (
                endpoint["id"],
                [("GET", ""), ("POST", ""), ("DELETE", ""), ("POST", "/rotate_secret"), ("POST", "/test")],
            ),
            (message, [("GET", ""), ("POST", "/replay")]),
        ):
            kind = "webhook_endpoint" if subject == endpoint["id"] else "webhook_delivery"
            path = "/v1/webhook_endpoints" if subject == endpoint["id"] else "/v1/webhook_deliveries"
            for method, rest in asked:
                body: dict[str, Any] = {"json": {}} if method == "POST" and rest == "" else {}
                answers = [
                    refused(stranger.request(method, f"{path}/{name}{rest}", **body), 404, f"{kind}_not_found")
                    for name in (subject, "we_0")
                ]
                told = [answer["message"].replace(subject, "x").replace("we_0", "x") for answer in answers]
                assert told[0] == told[1]
                refused(less.request(method, f"{path}/{subject}{rest}", **body), 403, "insufficient_scope")
        for path in (
            "/v1/webhook_endpoints",
            "/v1/webhook_deliveries",
            f"/v1/webhook_deliveries?endpoint_id={endpoint['id']}",
        ):
            assert stranger.get(path).json()["data"] == []
            assert owner.get(path).json()["data"] != []
            refused(less.get(path), 403, "insufficient_scope")
        refused(less.post("/v1/webhook_endpoints", json={"url": "https://8.8.8.8/"}), 403, "insufficient_scope")
        assert "signing_secret" not in owner.get("/v1/webhook_endpoints").text


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"url": None},
        {"url": "https://8.8.8.8/\x00"},
        {"url": "https://8.8.8.8/\ud800"},
        {"url": "https://8.8.8.8/" + "x" * 2000},
        {"url": "https://8.8.8.8/", "event_types": []},
        {"url": "https://8.8.8.8/", "event_types": ["realignment.exploded"]},
        {"url": "https://8.8.8.8/", "event_types": ["ping"]},
        {"url": "https://8.8.8.8/", "name": "\x00"},
        {"url": "https://8.8.8.8/", "secret": "whsec_AAAA"},
    ],
)
def test_what_cannot_be_registered(client: httpx.Client, body: dict[str, Any]) -> None:
    answer = client.post(
        "/v1/webhook_endpoints", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    error = refused(answer, 422, "invalid_request")
    assert "[" not in error["param"], "a place in the body, and no name of pydantic's"


def test_the_lists_filters_are_checked(client: httpx.Client) -> None:
    refused(client.get("/v1/webhook_deliveries", params={"state": "lost"}), 422, "invalid_request")
    assert client.get("/v1/webhook_deliveries", params={"endpoint_id": "we_0"}).json()["data"] == []


# Jobs


def test_a_job_tells_the_endpoint_that_its_request_names(bundle: Path, fresh: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    subprocess.run([SAFEGRAFT, "reference", "add", str(bundle), "--data", str(data)], check=True, capture_output=True)
    service = start(data, workers=1, log=tmp_path / "serve.log", dev=True, **FAST | PATIENT)
    try:
        with receiving() as receiver, service.client() as client:
            adapter = upload(client, fresh)["id"]
            url = f"{receiver.url}/jobs"
            asked = {"adapter_id": adapter, "method": {"type": "gram"}}
            answer = client.post("/v1/realignments", json={**asked, "webhook_url": url})
            error = refused(answer, 422, "webhook_not_registered")
            assert error["param"] == "webhook_url"
            assert "POST /v1/webhook_endpoints" in error["message"]
            assert client.get("/v1/realignments").json()["data"] == []
            endpoint = register(client, url, event_types=["realignment.cancelled"])
            silent = client.post("/v1/realignments", json=asked).json()["id"]
            named = client.post("/v1/realignments", json={**asked, "webhook_url": url}).json()["id"]
            event = verified(endpoint["signing_secret"], receiver.wait(1, 90)[0])
            assert (event.type, event.data.id) == ("realignment.succeeded", named)
            assert client.get(f"/v1/realignments/{named}").json()["status"] == "succeeded"
            assert client.get(f"/v1/realignments/{silent}").json()["status"] == "succeeded"
            time.sleep(0.5)
            assert len(receiver.received) == 1
    finally:
        service.process.terminate()
        service.process.wait(60)


# The table and the description


def test_the_table_is_the_specifications() -> None:
    table = GatewaySettings().webhook_retry_seconds
    assert table == [5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400]
    for step, seconds in enumerate(table):
        waits = [pause(table, step, None) for _ in range(100)]
        assert all(wait is not None and seconds <= wait <= 1.1 * seconds for wait in waits)
        assert len(set(waits)) > 50
    assert pause(table, len(table), None) is None
    assert pause([], 0, 10.0) is None
    assert 20 <= (pause(table, 0, 20.0) or 0) <= 22
    assert 300 <= (pause(table, 0, 1e9) or 0) <= 330
    assert 300 <= (pause(table, 1, 1.0) or 0) <= 330
    assert 86400 <= (pause(table, 8, 1e9) or 0) <= 95040


def test_what_retry_after_says() -> None:
    assert retry_after("120") == 120
    assert retry_after(" 0 ") == 0
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=100)
    given = retry_after(later.strftime("%a, %d %b %Y %H:%M:%S GMT"))
    assert given is not None
    assert 95 < given <= 100
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    for nothing in (None, "", "soon", "-5", "1.5", "²", "Wed, 99 Oct 2015", "9" * 5000):
        assert retry_after(nothing) in (None, 999999999.0)


def test_every_event_is_described() -> None:
    document = json.loads(export.document())
    assert set(MEANINGS) == set(get_args(EventType))
    assert set(document["webhooks"]) == {*MEANINGS, "ping"}
    for item in document["webhooks"].values():
        schema = item["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/WebhookMessage"}
        assert "HTTPValidationError" not in json.dumps(item)
    assert "HTTPValidationError" not in document["components"]["schemas"]
