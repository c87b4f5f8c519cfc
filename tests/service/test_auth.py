"""Keys: asked for everywhere but where a machine must get in without one, and before anything is read."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from starlette.requests import Request

from safegraft.contracts.keys import Limits
from safegraft.launch import find_broker
from safegraft.settings import SharedSettings
from safegraft.stores import keys as keys_module
from safegraft.stores.database import open_database
from safegraft.stores.keys import Holder, KeyStore, new_key, well_formed
from safegraft.vault import Vault, open_vault
from service.app import create_app
from service.auth import Gatekeeper
from service.errors import Forbidden, Unauthorized
from service.settings import GatewaySettings
from tests.patience import within
from tests.service.answers import refused
from tests.service.conftest import SAFEGRAFT, database_of, environment_of, execute, files_of, free_port, operate, upload

MAX_UPLOAD = 2**22
CACHE_SECONDS = 0.5
# Tenants with limits of their own.
SLOW, SMALL, UNLIMITED = "slow", "small", "unlimited"


def make_key(data: Path, tenant: str = "default", name: str = "default", *, scopes: str = "write") -> dict[str, Any]:
    """A key, made as operators make it: its record, and itself as `key`."""
    command = [SAFEGRAFT, "keys", "create", "--json", "--data", str(data), "--tenant", tenant, "--name", name]
    done = subprocess.run([*command, "--scopes", scopes], env=environment_of(data), check=True, capture_output=True)
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def list_keys(data: Path) -> dict[str, dict[str, Any]]:
    command = [SAFEGRAFT, "keys", "list", "--json", "--data", str(data)]
    done = subprocess.run(command, env=environment_of(data), check=True, capture_output=True)
    return {key["id"]: key for key in json.loads(done.stdout)}


@dataclass
class Gateway:
    url: str
    other_url: str  # a second gateway of the same service
    data: Path
    broker_port: int
    store: KeyStore

    def client(self, key: str | None, url: str = "") -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=url or self.url, timeout=30, trust_env=False, headers=headers)

    def shift(self, key_id: str, column: str, seconds: float) -> None:
        """Moves one of a key's times, as if the clock had moved the other way."""
        execute(
            self.data, f"UPDATE api_keys SET {column} = {column} + :seconds WHERE id = :id", seconds=seconds, id=key_id
        )


@contextmanager
def running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        yield
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            httpx.get(f"{url}/livez", trust_env=False).raise_for_status()
            return
        except httpx.TransportError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Iterator[Gateway]:
    """Two gateways that ask for keys, as uvicorn runs them, with one broker and without workers."""
    folder = tmp_path_factory.mktemp("keys")
    broker_port, ports = free_port(), (free_port(), free_port())
    data = folder / "data"
    own = environment_of(data)
    environment = own | {
        "SAFEGRAFT_DATA": str(data),
        "SAFEGRAFT_REDIS_URL": f"redis://127.0.0.1:{broker_port}/0",
        "SAFEGRAFT_MAX_UPLOAD_BYTES": str(MAX_UPLOAD),
        "SAFEGRAFT_KEY_CACHE_SECONDS": str(CACHE_SECONDS),
    }
    subprocess.run([SAFEGRAFT, "reference", "add", str(bundle), "--data", str(data)], env=own, check=True)
    with ExitStack() as stack:
        broker = [str(find_broker()), "--port", str(broker_port), "--save", "", "--dir", str(folder)]
        stack.enter_context(running(broker, folder / "broker.log", own))
        for port in ports:
            command = [sys.executable, "-m", "uvicorn", "--factory", "service.main:app", "--port", str(port)]
            stack.enter_context(running(command, folder / f"{port}.log", environment))
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        for url, port in zip(urls, ports, strict=True):
            answers(url, folder / f"{port}.log")
        engine = database_of(data)
        stack.callback(engine.dispose)
        store = KeyStore(engine, open_vault(SharedSettings(data=data)))
        yield Gateway(urls[0], urls[1], data, broker_port, store)
    logs = "".join((folder / f"{port}.log").read_text() for port in ports)
    assert "Traceback" not in logs
    # A machine that is busy enough may make it wait too long; whatever else would keep it from answering is a fault.
    assert "does not answer" not in logs.replace("does not answer (Timeout", "")
    assert "sgk_" not in logs


@pytest.fixture(scope="module")
def keys(gateway: Gateway) -> dict[str, str]:
    """Keys by what they are for."""
    made = {
        "write": make_key(gateway.data),
        "second": make_key(gateway.data),  # beside the first, as in a rotation
        "read": make_key(gateway.data, name="dashboard", scopes="read"),
        "admin": make_key(gateway.data, name="admin", scopes="admin"),
        "foreign": make_key(gateway.data, "another"),
        "slow": make_key(gateway.data, SLOW),
        "slow 2": make_key(gateway.data, SLOW, "second"),
        "small": make_key(gateway.data, SMALL),
        "unlimited": make_key(gateway.data, UNLIMITED),
    }
    store = gateway.store
    store.set_limits(SLOW, Limits(max_requests_per_second=3))
    store.set_limits(SMALL, Limits(max_jobs=1))
    store.set_limits(UNLIMITED, Limits(max_requests_per_second=0, max_jobs=0))
    return {name: key["key"] for name, key in made.items()}


@pytest.fixture
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client(None) as client:
        yield client


# The door


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer wrong", "Basic KEY", "KEY", "Bearer KEYx", "Bearer KE", "Bearer KEY OTHER",
     "Bearer KEY, OTHER", "Bearer UPPER", "Bearer \xe9\xff", "Bearer KEY\xa0", "Bearer \xa0KEY", "Bearer\tKEY",
     "Bearer sgk_", "Bearer \u0661", "bearer:KEY"],
)  # fmt: skip
def test_without_a_right_key_there_is_no_entry(client: httpx.Client, keys: dict[str, str], given: str) -> None:
    key = keys["write"]
    text = given.replace("KEY", key).replace("KE", key[:-1]).replace("OTHER", keys["second"])
    text = text.replace("UPPER", key.upper())
    answer = client.get(
        "/v1/adapters", headers={b"authorization": text.encode("utf-8" if "\u0661" in text else "latin-1")}
    )
    refused(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert key not in answer.text


def test_two_keys_in_one_request_open_nothing(client: httpx.Client, keys: dict[str, str]) -> None:
    """Which of them counts? A proxy may have looked at the other one."""
    for first, second in (("write", "second"), ("write", "write")):
        pairs = [("authorization", f"Bearer {keys[name]}") for name in (first, second)]
        refused(client.get("/v1/adapters", headers=pairs), 401, "unauthorized")


@pytest.mark.parametrize("length", [1000, 15_000, 60_000])
def test_a_very_long_key_is_a_wrong_one(client: httpx.Client, length: int) -> None:
    """uvicorn itself refuses what exceeds its buffer."""
    answer = client.get("/v1/adapters", headers={"authorization": f"Bearer sgk_{'a' * length}"})
    assert answer.status_code in (400, 401, 431)


def test_every_wrong_key_gets_the_same_answer(gateway: Gateway, client: httpx.Client) -> None:
    """Whether it never was one, or is no longer: who guesses learns nothing."""
    revoked, expired = make_key(gateway.data, "ended"), make_key(gateway.data, "ended", "expiring")
    store = gateway.store
    store.revoke(revoked["id"])
    execute(gateway.data, "UPDATE api_keys SET expires_at = created_at WHERE id = :id", id=expired["id"])
    unknown = new_key()
    assert well_formed(unknown)
    bodies = []
    for given in (None, "nonsense", unknown, revoked["key"], expired["key"]):
        headers = {} if given is None else {"authorization": f"Bearer {given}"}
        answer = client.get("/v1/adapters", headers=headers)
        refused(answer, 401, "unauthorized")
        bodies.append((answer.json(), sorted(answer.headers), answer.headers["content-length"]))
    assert bodies[1:] == bodies[:-1]


@pytest.mark.parametrize("given", ["Bearer {}", "bearer {}", "BEARER   {}"])
@pytest.mark.parametrize("name", ["write", "second", "read", "admin"])
def test_any_live_key_opens(client: httpx.Client, keys: dict[str, str], name: str, given: str) -> None:
    """Two of one name among them: that is how a key is rotated without a gap."""
    answer = client.get("/v1/adapters", headers={"authorization": given.format(keys[name])})
    assert answer.status_code == 200


def test_requests_on_one_connection_are_told_apart(gateway: Gateway, keys: dict[str, str]) -> None:
    """Nothing of a request's principal is left for the next one on the same connection."""
    with gateway.client(None) as client:
        wanted = [("write", 200), (None, 401), ("foreign", 200), ("nobody's", 401), ("read", 200), (None, 401)]
        for name, status in wanted:
            key = keys.get(name, "sgk_nobody") if name else None
            headers = {"authorization": f"Bearer {key}"} if key else {}
            assert client.get("/v1/realignments", headers=headers).status_code == status, name


@pytest.mark.parametrize("path", ["/livez", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json"])
def test_what_machines_look_at_needs_no_key(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert "ratelimit" not in answer.headers


def test_readiness_needs_no_key(client: httpx.Client) -> None:
    checks = client.get("/readyz").json()["checks"]
    assert all(checks[name] for name in ("database", "broker", "reference"))


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/realignments"])
@pytest.mark.parametrize(("name", "status"), [(None, 401), ("read", 403)])
def test_without_a_right_key_no_body_is_read(
    gateway: Gateway, keys: dict[str, str], path: str, name: str | None, status: int
) -> None:
    """The answer comes although not one byte of the body was sent."""
    kinds = {"/v1/adapters": "multipart/form-data; boundary=b", "/v1/realignments": "application/json"}
    key = f"Authorization: Bearer {keys[name]}\r\n" if name else ""
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])), timeout=5) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{key}Content-Type: {kinds[path]}\r\nContent-Length: 1000000\r\n"
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert connection.recv(4096).startswith(f"HTTP/1.1 {status} ".encode())


def test_without_a_key_a_broken_body_is_not_looked_at(client: httpx.Client) -> None:
    refused(client.post("/v1/realignments", content=b"{"), 401, "unauthorized")
    refused(client.post("/v1/adapters", content=b"{"), 401, "unauthorized")


def test_bodies_are_bounded(gateway: Gateway, keys: dict[str, str], fresh: Path) -> None:
    large = b'{"adapter_id": "' + b"x" * 2**20 + b'"}'
    with gateway.client(keys["write"]) as client:
        refused(client.post("/v1/realignments", content=large), 413, "request_too_large")
        # The kind of the body makes no difference, nor that its length is not announced.
        kind = {"content-type": "multipart/form-data; boundary=b"}
        refused(client.post("/v1/realignments", content=large, headers=kind), 413, "request_too_large")
        refused(client.post("/v1/realignments", content=iter([large])), 413, "request_too_large")
        form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.bin"\r\n\r\n' + bytes(
            MAX_UPLOAD + 2**17
        )
        refused(client.post("/v1/adapters", content=iter([form]), headers=kind), 413, "upload_too_large")
        refused(client.post("/v1/adapters", content=form, headers=kind), 413, "upload_too_large")
        assert client.post("/v1/adapters", files=files_of(fresh)).status_code == 201


# What a key allows


def test_a_reading_key_reads_and_does_nothing_else(gateway: Gateway, keys: dict[str, str], fresh: Path) -> None:
    with gateway.client(keys["write"]) as writer, gateway.client(keys["read"]) as reader:
        adapter = upload(writer, fresh)["id"]
        job = writer.post("/v1/realignments", json={"adapter_id": adapter}).json()["id"]
        for path in ("/v1/adapters", f"/v1/adapters/{adapter}", f"/v1/adapters/{adapter}/download",
                     f"/v1/realignments/{job}", f"/v1/realignments/{job}/events", "/v1/methods"):  # fmt: skip
            assert reader.get(path).status_code == 200, path
        assert reader.head(f"/v1/adapters/{adapter}/download").status_code == 200
        for method, path, body in (
            ("POST", "/v1/realignments", {"adapter_id": adapter}),
            ("POST", "/v1/realignments", None),
            ("POST", f"/v1/realignments/{job}/cancel", None),
            ("POST", "/v1/adapters", None),
            ("DELETE", f"/v1/adapters/{adapter}", None),
            ("DELETE", "/v1/adapters/adp_nothing", None),
        ):
            error = refused(reader.request(method, path, json=body), 403, "insufficient_scope")
            assert "write" in error["message"]
        assert reader.get(f"/v1/realignments/{job}").json()["status"] == "queued"
        assert writer.post(f"/v1/realignments/{job}/cancel").json()["status"] == "cancelled"
        assert writer.delete(f"/v1/adapters/{adapter}").status_code == 200


def test_an_admin_key_does_all_that_others_do(gateway: Gateway, keys: dict[str, str], fresh: Path) -> None:
    with gateway.client(keys["admin"]) as client:
        adapter = upload(client, fresh)["id"]
        assert client.get(f"/v1/adapters/{adapter}").status_code == 200
        assert client.delete(f"/v1/adapters/{adapter}").status_code == 200


def test_a_key_of_another_tenant_sees_nothing(gateway: Gateway, keys: dict[str, str], fresh: Path) -> None:
    """Not even whether it exists: what is not yours and what is not there are answered alike."""
    with gateway.client(keys["write"]) as mine, gateway.client(keys["foreign"]) as theirs:
        adapter = upload(mine, fresh)["id"]
        job = mine.post("/v1/realignments", json={"adapter_id": adapter}).json()["id"]
        assert theirs.get("/v1/adapters").json()["data"] == []
        assert theirs.get("/v1/realignments").json()["data"] == []
        asked = [
            ("GET", "/v1/adapters/{}", adapter, "adp_nothing"),
            ("DELETE", "/v1/adapters/{}", adapter, "adp_nothing"),
            ("GET", "/v1/adapters/{}/download", adapter, "adp_nothing"),
            ("GET", "/v1/adapters/{}/files/adapter_config.json", adapter, "adp_nothing"),
            ("GET", "/v1/realignments/{}", job, "rlg_nothing"),
            ("POST", "/v1/realignments/{}/cancel", job, "rlg_nothing"),
            ("GET", "/v1/realignments/{}/events", job, "rlg_nothing"),
            ("GET", "/v1/realignments/{}/report", job, "rlg_nothing"),
        ]
        for method, path, here, nowhere in asked:
            real, none = (theirs.request(method, path.format(name)) for name in (here, nowhere))
            assert real.status_code == none.status_code == 404, path
            assert real.text.replace(here, "") == none.text.replace(nowhere, ""), path
        body = {"adapter_id": adapter}
        refused(theirs.post("/v1/realignments", json=body), 404, "adapter_not_found")
        # A key of idempotency is a tenant's own, too.
        mine.post("/v1/realignments", json=body, headers={"idempotency-key": "order"})
        answer = theirs.post("/v1/realignments", json=body, headers={"idempotency-key": "order"})
        refused(answer, 404, "adapter_not_found")
        assert mine.get(f"/v1/realignments/{job}").json()["status"] == "queued"


# A key's life


def refused_within(client: httpx.Client, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if client.get("/v1/methods").status_code == 401:
            return True
        time.sleep(0.05)
    return False


def test_a_revoked_key_is_refused_soon_and_the_new_one_goes_on(gateway: Gateway) -> None:
    old, new = make_key(gateway.data, "rotating"), make_key(gateway.data, "rotating")
    with gateway.client(old["key"]) as before, gateway.client(new["key"]) as after:
        assert before.get("/v1/methods").status_code == after.get("/v1/methods").status_code == 200
        operate(gateway.data, "keys", "revoke", old["id"])
        assert refused_within(before, CACHE_SECONDS + 1.0)
        assert after.get("/v1/methods").status_code == 200


def test_an_expired_key_is_refused(gateway: Gateway) -> None:
    made = gateway.store.create("expiring", seconds=3600.0)
    with gateway.client(made[1]) as client:
        assert client.get("/v1/methods").status_code == 200
        gateway.shift(made[0].id, "expires_at", -3601.0)
        assert refused_within(client, CACHE_SECONDS + 1.0)


def test_a_keys_last_use_is_noted_once_a_minute(gateway: Gateway) -> None:
    made = make_key(gateway.data, "noted")
    assert made["last_used_at"] is None
    with gateway.client(made["key"]) as client:
        before = int(time.time()) - 1
        assert client.get("/v1/methods").status_code == 200
        first = list_keys(gateway.data)[made["id"]]["last_used_at"]
        assert before <= first <= time.time() + 1
        gateway.shift(made["id"], "last_used_at", -30.0)
        time.sleep(CACHE_SECONDS + 0.1)
        assert client.get("/v1/methods").status_code == 200
        assert list_keys(gateway.data)[made["id"]]["last_used_at"] == first - 30
        gateway.shift(made["id"], "last_used_at", -31.0)
        time.sleep(CACHE_SECONDS + 0.1)
        assert client.get("/v1/methods").status_code == 200
        assert list_keys(gateway.data)[made["id"]]["last_used_at"] >= first


# Requests in a second


def burst(client: httpx.Client, number: int) -> list[httpx.Response]:
    return [client.get("/v1/methods") for _ in range(number)]


def test_more_requests_than_allowed_are_refused_until_a_second_has_passed(
    gateway: Gateway, keys: dict[str, str]
) -> None:
    with gateway.client(keys["slow"]) as client:
        time.sleep(2.1)  # whatever was before
        found = burst(client, 12)
        statuses = [answer.status_code for answer in found]
        assert statuses[:3] == [200, 200, 200]
        assert statuses.count(429) >= 12 - 2 * 3  # a burst may last longer than a second
        first = found[0].headers
        assert first["x-ratelimit-limit-requests"] == "3"
        assert first["x-ratelimit-remaining-requests"] == "2"
        assert first["x-ratelimit-reset-requests"].endswith("ms")
        assert 0 <= int(first["x-ratelimit-reset-requests"].removesuffix("ms")) <= 1000
        assert first["ratelimit-policy"] == '"requests";q=3;w=1'
        assert first["ratelimit"] == '"requests";r=2;t=1'
        over = found[statuses.index(429)]
        refused(over, 429, "rate_limit_exceeded")
        assert over.headers["x-ratelimit-remaining-requests"] == "0"
        assert over.headers["ratelimit"] == '"requests";r=0;t=1'
        time.sleep(int(over.headers["retry-after"]))
        assert client.get("/v1/methods").status_code == 200


def test_the_limit_is_the_tenants_not_the_keys_nor_the_gateways(gateway: Gateway, keys: dict[str, str]) -> None:
    with (
        gateway.client(keys["slow"]) as one,
        gateway.client(keys["slow 2"]) as two,
        gateway.client(keys["slow"], gateway.other_url) as elsewhere,
    ):
        asked = (one, two, elsewhere, elsewhere, two, one)

        def statuses(_: int) -> list[int]:
            return [client.get("/v1/methods").status_code for client in asked]

        found = within(1.0, statuses, before=lambda: time.sleep(2.1))
        assert found == [200, 200, 200, 429, 429, 429]


def test_a_tenant_at_its_limit_slows_no_other(gateway: Gateway, keys: dict[str, str]) -> None:
    with gateway.client(keys["slow"]) as slow, gateway.client(keys["foreign"]) as other:
        for _ in range(5):
            slow.get("/v1/methods")
            answer = other.get("/v1/methods")
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-limit-requests"] == "100"
            assert int(answer.headers["x-ratelimit-remaining-requests"]) >= 90
        # A busy machine may have taken longer than the second that the limit counts.
        assert any(slow.get("/v1/methods").status_code == 429 for _ in range(50))


def test_no_limit_is_a_limit_too(gateway: Gateway, keys: dict[str, str]) -> None:
    """A tenant's own 0 means what the setting's 0 means."""
    with gateway.client(keys["unlimited"]) as client:
        found = burst(client, 130)
        assert {answer.status_code for answer in found} == {200}
        assert not [name for name in found[0].headers if "ratelimit" in name]


def test_wrong_keys_count_for_nobody(gateway: Gateway, keys: dict[str, str]) -> None:
    with gateway.client(f"{keys['foreign'][:-1]}!") as client:
        assert {answer.status_code for answer in burst(client, 120)} == {401}
    with gateway.client(keys["foreign"]) as client:
        assert int(client.get("/v1/methods").headers["x-ratelimit-remaining-requests"]) >= 90


def test_a_request_counts_once_whatever_looks_at_its_key(gateway: Gateway, keys: dict[str, str]) -> None:
    """Routes with bodies look at it twice: before the body is read, and for the tenant."""
    time.sleep(2.1)
    with gateway.client(keys["slow"]) as client:
        answer = client.post("/v1/realignments", json={})
        refused(answer, 422, "invalid_request")
        assert answer.headers["x-ratelimit-remaining-requests"] == "2"


# Open jobs


def test_a_tenant_has_only_so_many_open_jobs(gateway: Gateway, keys: dict[str, str], fresh: Path) -> None:
    with gateway.client(keys["small"]) as client, gateway.client(keys["unlimited"]) as other:
        body = {"adapter_id": upload(client, fresh)["id"]}
        first = client.post("/v1/realignments", json=body, headers={"idempotency-key": "one"})
        assert first.status_code == 202
        answer = client.post("/v1/realignments", json=body)
        refused(answer, 429, "too_many_jobs")
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        # What was sent before is no new job, and other tenants have their own share.
        again = client.post("/v1/realignments", json=body, headers={"idempotency-key": "one"})
        assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
        retried = client.post("/v1/realignments", json=body, headers={"x-stainless-retry-count": "1"})
        refused(retried, 429, "too_many_jobs")
        theirs = {"adapter_id": upload(other, fresh)["id"]}
        assert [other.post("/v1/realignments", json=theirs).status_code for _ in range(3)] == [202, 202, 202]
        client.post(f"/v1/realignments/{first.json()['id']}/cancel")
        assert client.post("/v1/realignments", json=body).status_code == 202


def test_thirty_posts_at_once_keep_the_limit(gateway: Gateway, keys: dict[str, str], fresh: Path) -> None:
    key = make_key(gateway.data, "racing")["key"]
    gateway.store.set_limits("racing", Limits(max_jobs=4))
    with gateway.client(key) as client:
        body = {"adapter_id": upload(client, fresh)["id"]}
        with ThreadPoolExecutor(30) as pool:
            statuses = list(pool.map(lambda _: client.post("/v1/realignments", json=body).status_code, range(30)))
        assert sorted(statuses) == [202] * 4 + [429] * 26


# The gatekeeper


def asking(key: str) -> Request:
    return Request(
        {"type": "http", "method": "GET", "path": "/", "query_string": b"", "state": {}, "client": ("192.0.2.1", 1),
         "headers": [(b"authorization", f"Bearer {key}".encode())]}
    )  # fmt: skip


@contextmanager
def guarded(folder: Path, **settings: Any) -> Iterator[tuple[Gatekeeper, KeyStore]]:
    known = GatewaySettings.model_validate(
        {"data": folder, "redis_url": "none://", "key_cache_seconds": 600.0, **settings}
    )
    engine = open_database(known.database)
    store = KeyStore(engine, open_vault(known))
    try:
        yield Gatekeeper(known, store), store
    finally:
        engine.dispose()


def test_a_wrong_key_is_not_remembered_as_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = new_key()
    monkeypatch.setattr(keys_module, "new_key", lambda: text)

    async def run(gatekeeper: Gatekeeper, store: KeyStore) -> None:
        for _ in range(2):
            with pytest.raises(Unauthorized):
                await gatekeeper.admit(asking(text))
        made, _ = store.create("t")
        assert (await gatekeeper.admit(asking(text))).key_id == made.id
        await gatekeeper.close()

    with guarded(tmp_path) as (gatekeeper, store):
        asyncio.run(run(gatekeeper, store))


def test_a_remembered_key_ends_when_it_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where this machine's clock is wrong: only the database's counts."""
    real = time.time

    async def run(gatekeeper: Gatekeeper, store: KeyStore) -> None:
        _, text = store.create("t", seconds=1.5)
        for offset in (600.0, -600.0, 0.0):
            monkeypatch.setattr(time, "time", lambda offset=offset: real() + offset)
            await gatekeeper.admit(asking(text))
        await asyncio.sleep(1.6)
        for offset in (0.0, -600.0):
            monkeypatch.setattr(time, "time", lambda offset=offset: real() + offset)
            with pytest.raises(Unauthorized):
                await gatekeeper.admit(asking(text))
        await gatekeeper.close()

    with guarded(tmp_path) as (gatekeeper, store):
        asyncio.run(run(gatekeeper, store))


class Slow(KeyStore):
    """Answers late, and counts how often it was asked."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self.asked = 0
        self.open = threading.Event()
        self.failing = False

    def find(self, text: str) -> Holder | None:
        self.asked += 1
        self.open.wait(10)
        if self.failing:
            raise RuntimeError("away")
        return self._store.find(text)


def test_requests_that_come_together_ask_once(tmp_path: Path) -> None:
    async def run(store: KeyStore, settings: GatewaySettings) -> None:
        _, text = store.create("t")
        slow = Slow(store)
        gatekeeper = Gatekeeper(settings, slow)
        waiting = [asyncio.create_task(gatekeeper.admit(asking(text))) for _ in range(100)]
        await asyncio.sleep(0.1)
        waiting[0].cancel()  # whoever came first may go away
        slow.open.set()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError)
        assert not [answer for answer in done[1:] if isinstance(answer, BaseException)]
        assert slow.asked == 1
        # A failure is nobody's answer for later.
        _, other = store.create("t", name="other")
        slow.failing = True
        with pytest.raises(RuntimeError):
            await gatekeeper.admit(asking(other))
        slow.failing = False
        assert (await gatekeeper.admit(asking(other))).tenant == "t"
        await gatekeeper.close()

    with guarded(tmp_path) as (_, store):
        asyncio.run(run(store, GatewaySettings(data=tmp_path, redis_url="none://")))


def test_only_so_many_keys_are_remembered(tmp_path: Path) -> None:
    async def run(store: KeyStore, settings: GatewaySettings) -> None:
        texts = [store.create("t", name=str(number))[1] for number in range(4)]
        slow = Slow(store)
        slow.open.set()
        gatekeeper = Gatekeeper(settings, slow)
        for text in [*texts, texts[3], texts[2], texts[0], texts[3]]:
            await gatekeeper.admit(asking(text))
        assert slow.asked == 5  # the first one had made room
        await gatekeeper.close()

    with guarded(tmp_path) as (_, store):
        settings = GatewaySettings(data=tmp_path, redis_url="none://", key_cache_size=3, key_cache_seconds=600.0)
        asyncio.run(run(store, settings))


@pytest.mark.parametrize(("scopes", "allowed"), [(["read"], 1), (["write"], 2), (["read", "write"], 2), (["admin"], 3)])
def test_scopes_contain_each_other(tmp_path: Path, scopes: list[Any], allowed: int) -> None:
    async def run(gatekeeper: Gatekeeper, store: KeyStore) -> None:
        _, text = store.create("t", scopes=scopes)
        for number, scope in enumerate(("read", "write", "admin")):
            if number < allowed:
                await gatekeeper.require(asking(text), scope)  # type: ignore[arg-type]
            else:
                with pytest.raises(Forbidden):
                    await gatekeeper.require(asking(text), scope)  # type: ignore[arg-type]
        await gatekeeper.close()

    with guarded(tmp_path) as (gatekeeper, store):
        asyncio.run(run(gatekeeper, store))


# Without keys


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1"])
def test_serving_the_world_without_keys_is_refused(tmp_path: Path, host: str) -> None:
    command = [SAFEGRAFT, "serve", "--dev", "--host", host, "--data", str(tmp_path / "data")]
    ended = subprocess.run(command, env=environment_of(tmp_path), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert "loopback" in ended.stderr
    assert not (tmp_path / "data").exists()


def test_a_gateway_on_its_own_without_keys_answers_nobody(tmp_path: Path) -> None:
    """Started by hand it is no error to have none: a key that is made later opens it."""
    settings = GatewaySettings(data=tmp_path, redis_url="redis://127.0.0.1:1/0")
    with TestClient(create_app(settings), client=("127.0.0.1", 1), base_url="http://localhost:8000") as client:
        for given in ("", "Bearer", f"Bearer {new_key()}"):
            refused(client.get("/v1/adapters", headers={"authorization": given}), 401, "unauthorized")
        key = make_key(tmp_path)["key"]
        assert client.get("/v1/adapters", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_another_pepper_opens_nothing(tmp_path: Path) -> None:
    """A copy of the database alone is of no use, nor is a gateway that has lost its pepper."""
    with guarded(tmp_path) as (_, store):
        _, text = store.create("t")
        assert store.find(text) is not None
        assert KeyStore(store._engine, Vault(b"another pepper of ours")).find(text) is None


def test_development_mode_answers_this_machine_alone(tmp_path: Path) -> None:
    """However the server was started: by hand it may listen on every address."""
    settings = GatewaySettings(dev=True, data=tmp_path, redis_url="redis://127.0.0.1:1/0")
    for host, status in (("127.0.0.1", 200), ("::1", 200), ("192.168.1.5", 401), ("10.0.0.1", 401)):
        with TestClient(create_app(settings), client=(host, 50000), base_url="http://localhost:8000") as client:
            assert client.get("/v1/adapters").status_code == status
            assert client.get("/livez").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"host": "10.0.0.1:8000"}, {"origin": "https://evil.example"}, {"origin": "null"},
     {"origin": "http://localhost@evil.example"}, {"origin": "http://["}, {"origin": "http://localhost.evil.example"}],
)  # fmt: skip
def test_development_mode_answers_no_page_of_another_host(tmp_path: Path, headers: dict[str, str]) -> None:
    """A page that the operator has open can send requests to this machine, under any name that points here."""
    settings = GatewaySettings(dev=True, data=tmp_path, redis_url="redis://127.0.0.1:1/0")
    with TestClient(create_app(settings), client=("127.0.0.1", 1), base_url="http://localhost:8000") as client:
        refused(client.get("/v1/adapters", headers=headers), 401, "unauthorized")
        answer = client.get("/v1/adapters", headers={"origin": "http://localhost:8000"})
        assert answer.status_code == 200
        assert "ratelimit" not in answer.headers


def test_settings_with_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEGRAFT_KEY_PEPPER", "a-long-random-pepper")
    assert "a-long-random-pepper" not in repr(GatewaySettings())
