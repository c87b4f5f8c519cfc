"""No secret is in anything that a run leaves: logs, database, broker, objects, reports, traces, answers.

A whole installation with secrets that are easy to recognise does its work, and fails in all ways that we know; then
everything it produced is searched, also for the secrets' usual disguises.
"""

import base64
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import httpx
import pytest
import redis

from safegraft.launch import find_broker
from tests import scaled
from tests.scaled import free_port, make_bucket
from tests.service.conftest import SAFEGRAFT, Running, environment_of, execute, finished, start, upload
from tests.service.otlp import Receiver, receiver
from tests.test_launch import processes, until

PEPPER = "pepper-Rk3vQx8ZtLm2"
BROKER_PASSWORD = "broker-Wn5cJd1YhUq7"
STORE_SECRET = "store-Gb9fEo4XiVs6"
DATABASE_PASSWORD = "database-Ma2pTz7HkCw0"
BUCKET = "secrets"
FORGED_KEY = "sgk_" + "ForgedKeyThatNobodyMade0123456789abcdefgh"


@dataclass
class Installation:
    """A run, and what is to be found nowhere in what it leaves."""

    running: Running
    broker: redis.Redis
    broker_data: Path
    endpoint: str
    traces: Receiver
    outputs: list[str] = field(default_factory=list)  # of commands, without what is shown on purpose
    answers: list[bytes] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)
    shown: set[str] = field(default_factory=set)  # secrets that an answer is there to show

    def store(self) -> Any:
        return boto3.client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1",
            aws_access_key_id="testing", aws_secret_access_key=STORE_SECRET,
        )  # fmt: skip

    def client(self, key: str | None = None) -> httpx.Client:
        client = self.running.client()
        client.follow_redirects = True
        if key:
            client.headers["Authorization"] = f"Bearer {key}"
        client.event_hooks["response"] = [self._keep]
        return client

    def _keep(self, answer: httpx.Response) -> None:
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            return
        answer.read()
        headers = repr(sorted(answer.headers.items())).encode()
        self.answers.append(headers + answer.content)


def disguises(secret: str) -> Iterator[bytes]:
    """As it is, in addresses, hexadecimal, and within base64 at any place."""
    raw = secret.encode()
    yield from {raw, quote(secret, safe="").encode(), raw.hex().encode(), json.dumps(secret)[1:-1].encode()}
    for before in range(3):
        # The digits at both ends also depend on their neighbours.
        yield base64.b64encode(bytes(before) + raw)[4 if before else 0 : -4]


def found_in(content: bytes, secrets: dict[str, str]) -> list[str]:
    return [name for name, secret in secrets.items() if any(form in content for form in disguises(secret))]


def places(here: Installation) -> Iterator[tuple[str, bytes]]:
    """Everything that the run produced, by name."""
    for root in (here.running.data, here.broker_data):
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield f"file {path}", path.read_bytes()
    for key in here.broker.scan_iter(count=1000):
        yield f"broker {key!r}", key + (here.broker.dump(key) or b"")
        kind = here.broker.type(key)
        # What `dump` writes may be compressed.
        if kind == b"list":
            yield f"broker {key!r}", repr(here.broker.lrange(key, 0, -1)).encode()
        elif kind == b"hash":
            yield f"broker {key!r}", repr(here.broker.hgetall(key)).encode()
    for page in here.store().get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for item in page["Contents"]:
            body = here.store().get_object(Bucket=BUCKET, Key=item["Key"])["Body"]
            yield f"object {item['Key']}", item["Key"].encode() + body.read()
    for number, answer in enumerate(here.answers):
        yield f"answer {number}", answer
    for number, output in enumerate(here.outputs):
        yield f"output {number}", output.encode()
    yield "traces", repr(here.traces.spans).encode()


def leaks(here: Installation) -> list[str]:
    """Which secret is where it must not be."""
    found = []
    for place, content in places(here):
        hidden = {
            name: text for name, text in here.secrets.items() if not (place.startswith("answer") and name in here.shown)
        }
        found += [f"{name} in {place}" for name in found_in(content, hidden)]
    return found


@contextlib.contextmanager
def broker_with_password(folder: Path, port: int) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    command = [str(find_broker()), "--port", str(port), "--bind", "127.0.0.1", "--requirepass", BROKER_PASSWORD]
    command += ["--dir", str(folder), "--appendonly", "yes", "--auto-aof-rewrite-percentage", "0", "--save", ""]
    with (folder / "broker.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    client = redis.Redis(port=port, password=BROKER_PASSWORD)
    until(lambda: _pings(client))
    try:
        yield
    finally:
        client.close()
        process.terminate()
        process.wait(30)


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.fixture(scope="module")
def here(bundle: Path, fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    root = tmp_path_factory.mktemp("secrets")
    data, port = root / "data", free_port()
    with contextlib.ExitStack() as stack:
        aws = stack.enter_context(scaled.s3_server()) | {"AWS_SECRET_ACCESS_KEY": STORE_SECRET}
        make_bucket(aws["AWS_ENDPOINT_URL"], BUCKET)
        broker = stack.enter_context(contextlib.ExitStack())
        broker.enter_context(broker_with_password(root / "broker", port))
        traces = stack.enter_context(receiver())
        key_file = root / "signing" / "signing_key.pem"
        settings = {
            **aws,
            "SAFEGRAFT_KEY_PEPPER": PEPPER,
            "SAFEGRAFT_REDIS_URL": f"redis://:{BROKER_PASSWORD}@127.0.0.1:{port}/0",
            "SAFEGRAFT_STORAGE_URL": f"s3://{BUCKET}/production",
            # SQLite has none; a name that could be one, where settings are shown.
            "SAFEGRAFT_DATABASE_URL": f"sqlite:///{data}/{'safegraft.sqlite'}",
            "PGPASSWORD": DATABASE_PASSWORD,
            "SAFEGRAFT_SIGNING_KEY": str(key_file),
            "SAFEGRAFT_WEBHOOK_ALLOW_PRIVATE": "1",
            "SAFEGRAFT_WEBHOOK_RETRY_SECONDS": "[0.2,0.2]",
            "SAFEGRAFT_MAX_ATTEMPTS": "2",
            "SAFEGRAFT_LOG_FORMAT": "json",
            "OTEL_EXPORTER_OTLP_ENDPOINT": traces.url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        data.mkdir()
        environment = environment_of(data) | settings

        def command(*arguments: str) -> str:
            line = [SAFEGRAFT, *arguments, "--data", str(data)]
            done = subprocess.run(line, check=True, capture_output=True, text=True, env=environment)
            outputs.append(done.stderr)
            return done.stdout

        outputs: list[str] = []
        subprocess.run(
            [SAFEGRAFT, "provenance", "keygen", "--out", str(key_file.parent)],
            check=True,
            capture_output=True,
            env=environment,
        )
        key = command("keys", "create", "--tenant", "acme", "--name", "platform", "--scopes", "admin").strip()
        outputs.append(command("keys", "list"))
        outputs.append(command("reference", "add", str(bundle)))
        running = start(data, workers=1, log=data / "serve.log", dev=False, **settings)
        try:
            made = Installation(
                running, redis.Redis(port=port, password=BROKER_PASSWORD), root / "broker",
                aws["AWS_ENDPOINT_URL"], traces, outputs,
            )  # fmt: skip
            body = "".join(line for line in key_file.read_text().splitlines() if "-----" not in line)
            made.secrets = {
                "pepper": PEPPER, "broker's password": BROKER_PASSWORD, "store's secret": STORE_SECRET,
                "database's password": DATABASE_PASSWORD, "key": key, "forged key": FORGED_KEY,
                "signing key": body[22:],  # what is before it says that it is an Ed25519 key
            }  # fmt: skip
            live(made, key, fresh)
            # The broker goes away for a while: whoever loses it says so.
            broker.close()
            with made.client(key) as client:
                client.get("/readyz")
                client.get("/v1/realignments")
            time.sleep(3)
            broker.enter_context(broker_with_password(root / "broker", port))
            until(lambda: httpx.get(f"{running.url}/readyz", trust_env=False).is_success, 60)
            yield made
            made.broker.close()
        finally:
            running.process.terminate()
            assert running.process.wait(120) == 0


def live(here: Installation, key: str, fresh: Path) -> None:
    """The main things, and the ways in which they fail."""
    with here.client(key) as client:
        shown = client.post(
            "/v1/webhook_endpoints", json={"url": f"http://127.0.0.1:{free_port()}/hook?token=x", "events": ["*"]}
        )
        if not shown.is_success:
            shown = client.post("/v1/webhook_endpoints", json={"url": f"http://127.0.0.1:{free_port()}/hook"})
        assert shown.is_success, shown.text
        here.secrets["webhook's secret"] = shown.json()["signing_secret"].removeprefix("whsec_")
        here.shown.add("webhook's secret")
        assert client.post("/v1/webhook_endpoints", json={"url": "ftp://example.com"}).status_code in (400, 422)
        client.post(f"/v1/webhook_endpoints/{shown.json()['id']}/test")
        adapter_id = upload(client, fresh)["id"]
        for request in ({}, {"method": {"type": "nlsr", "form": "factor"}}, {"mode": "analyze"}):
            job = client.post("/v1/realignments", json={"adapter_id": adapter_id, **request}).json()
            job = finished(client, job["id"], 120)
            for part in ("events", "report", "report.html", "provenance"):
                client.get(f"/v1/realignments/{job['id']}/{part}")
        # A worker's process and the engine's are killed in the middle of a job.
        for word in ("worker.engine_process", "spawn_main"):
            [victim] = _until_one(here.running.data, word)
            os.kill(victim, signal.SIGSTOP)
            job = client.post("/v1/realignments", json={"adapter_id": adapter_id}).json()
            time.sleep(1)
            os.kill(victim, signal.SIGKILL)
            assert finished(client, job["id"], 120)["status"] == "succeeded"
        client.post("/v1/adapters", content=b"{not an adapter")
        client.post("/v1/adapters", files={"files": ("adapter_model.bin", b"PK\x03\x04")})
        client.post("/v1/realignments", content=b"{" * 100)
        client.get("/v1/realignments/rlg_nothing", params={"key": FORGED_KEY})
        client.get("/metrics")
    with here.client(FORGED_KEY) as client:
        assert client.get("/v1/adapters").status_code == 401
        assert client.get("/v1/adapters", headers={"Authorization": f"Basic {FORGED_KEY}"}).status_code == 401
    with here.client() as client:
        assert client.get("/v1/adapters").status_code == 401
        assert client.get(f"/v1/adapters?key={FORGED_KEY}").status_code == 401


def _until_one(data: Path, word: str) -> list[int]:
    found: list[int] = []

    def there() -> bool:
        found[:] = [number for number, command in processes(data).items() if word in command]
        return len(found) == 1

    until(there, 60)
    return found


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(scaled.SCALED, reason="it brings a broker and a store of its own"),
    pytest.mark.timeout(900),
]


def test_no_secret_is_in_anything_that_a_run_leaves(here: Installation) -> None:
    assert len(here.secrets) == 8
    looked_at = {place.split()[0] for place, _ in places(here)}
    assert looked_at == {"file", "broker", "object", "answer", "output", "traces"}
    assert here.traces.spans
    assert leaks(here) == []


def _into_a_log(here: Installation, text: str) -> None:
    with (here.running.data / "logs" / "gateway.log").open("a") as file:
        file.write(f"connected to {text}\n")


def _into_the_database(here: Installation, text: str) -> None:
    execute(here.running.data, "UPDATE events SET message = :text WHERE type = 'created'", text=text)


def _into_a_message(here: Installation, text: str) -> None:
    here.broker.lpush("planted", base64.b64encode(f'{{"args": ["{text}"]}}'.encode()))


def _into_an_object(here: Installation, text: str) -> None:
    here.store().put_object(Bucket=BUCKET, Key="production/planted", Body=text.encode())


def _into_an_answer(here: Installation, text: str) -> None:
    here.answers.append(json.dumps({"error": {"message": text}}).encode())


@pytest.mark.parametrize("plant", [_into_a_log, _into_the_database, _into_a_message, _into_an_object, _into_an_answer])
def test_what_is_planted_is_found(here: Installation, plant: Callable[[Installation, str], Any]) -> None:
    """Runs after the test above: what that one says is worth nothing if this one fails."""
    before = set(leaks(here))
    plant(here, f"redis://:{BROKER_PASSWORD}@host, {PEPPER}")
    new = set(leaks(here)) - before
    assert {leak.partition(" in ")[0] for leak in new} >= {"broker's password", "pepper"}
