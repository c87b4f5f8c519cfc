"""One installation that may be hurt: broker, gateway and workers as `safegraft serve` starts them, each a process.

Whoever dies is started again at the next look (`tend`), which every wait does. Nothing here sleeps for a fault: faults
are failpoints, whose marks say that they have happened, and signals.
"""

import hashlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import redis

from safegraft import failpoints
from safegraft.contracts.queue import REALIGN_QUEUE
from safegraft.launch import Plan, plan_children
from safegraft.settings import SharedSettings
from safegraft.stores.database import open_database, reading
from tests.chaos.invariants import Accepted, Digests, Ledger, Verdict, check, digests
from tests.scaled import free_port
from tests.service.conftest import SAFEGRAFT, files_of

TENANTS = ("acme", "bolt")
LEASE_SECONDS = 3.0
WORKER_POINTS = ("claimed", "fetched", "patching", "written", "published", "committed")
# What may happen on a ground; all of it is disarmed until a row arms it.
SPECS = [
    *(f"worker.{point}={action}@1" for point in WORKER_POINTS for action in ("kill-group", "stop")),
    *(f"worker.{point}=kill@3" for point in WORKER_POINTS),
    *(f"{point}=kill@1" for point in ("gateway.creating", "gateway.created", "gateway.stored", "dispatcher.due")),
    "gateway.receiving=error:ENOSPC@1",
    "store.publish=error:ENOSPC@1",
]
Method = Mapping[str, Any]
GRAM: Method = {"type": "gram"}
ENDED = ("succeeded", "failed", "cancelled")


class Stuck(AssertionError):
    """What was waited for did not come; the row that waited is red."""


@dataclass(frozen=True)
class Material:
    """What services are fed with, made once."""

    bundle: Path
    adapters: tuple[Path, ...]


class Ground:
    """`adapters` are uploaded for every tenant at the start; `twin` says what a job makes of one without faults."""

    def __init__(self, data: Path, material: Material, *, workers: int = 2, database_url: str = "", **settings: str):
        self.data, self.material = data, material
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.ledger = Ledger()
        self.injected = 0
        # Called where nothing is answered for a while: somebody who was stopped may hold a lock.
        self.stalled: Callable[[], object] = lambda: None
        self._sockets = tempfile.TemporaryDirectory(prefix="chaos-")
        self._marks = data / "marks"
        self._marks.mkdir(parents=True)
        self._held: set[str] = set()
        self._groups: set[int] = set()
        self._twins: dict[tuple[int, str], tuple[Digests, ...]] = {}
        self._own: dict[tuple[str, int], str] = {}
        self._environment = {
            "SAFEGRAFT_LEASE_SECONDS": str(LEASE_SECONDS),
            "SAFEGRAFT_DATABASE_URL": database_url,
            "SAFEGRAFT_STORAGE_URL": "",
            "SAFEGRAFT_MAX_REQUESTS_PER_SECOND": "0",
            "SAFEGRAFT_WEBHOOK_ALLOW_PRIVATE": "1",
            failpoints.VARIABLE: ";".join(SPECS),
            failpoints.FOLDER: str(self._marks),
            failpoints.ALLOWED: "1",
            **settings,
        }
        self.engine = open_database(SharedSettings(data=data, database_url=database_url).database)
        for spec in failpoints.parse(";".join(SPECS)):
            self.disarm(spec.point, spec.action, spec.times)
        self._command("reference", "add", str(material.bundle))
        self._keys = {
            tenant: self._command("keys", "create", "--tenant", tenant, "--scopes", "admin")["key"]
            for tenant in TENANTS
        }
        plan = Plan("127.0.0.1", self.port, data, workers, dev=False)
        self.children = {child.name: child for child in plan_children(plan, Path(self._sockets.name))}
        for child in self.children.values():
            child.environment |= self._environment
        self.workers = [name for name in self.children if name.startswith("worker")]
        self._redis = redis.Redis(unix_socket_path=str(Path(self._sockets.name) / "broker.sock"))
        self._clients = {tenant: self.client(tenant) for tenant in TENANTS}

    # Life

    def __enter__(self) -> "Ground":
        try:
            for name in self.children:
                self._start(name)
                if name == "broker":
                    self.until(self.broker_up, "the broker")
            self.until(lambda: self._up("/readyz"), "the service", 120)
            for tenant in TENANTS:
                hook = {"url": "http://127.0.0.1:9/ends", "event_types": ["*"]}
                self.ledger.hooks[tenant] = self.ask(tenant, "POST", "/v1/webhook_endpoints", json=hook).json()["id"]
                for number in range(len(self.material.adapters)):
                    self._own[tenant, number] = self.upload(tenant, number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for child in reversed(list(self.children.values())):
            if child.process is not None and child.alive():
                with suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGCONT)
        for child in reversed(list(self.children.values())):
            child.stop(20)
        for group in self._groups:  # pool processes whose worker was killed
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        for client in self._clients.values():
            client.close()
        self._redis.close()
        self.engine.dispose()
        self._sockets.cleanup()

    def tend(self) -> None:
        """Starts who has died, unless it is held down."""
        for name, child in self.children.items():
            if not child.alive() and name not in self._held:
                self._start(name)

    def until(self, true: Callable[[], bool], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                raise Stuck(f"waited {seconds:g} s for {what}")
            self.tend()
            time.sleep(0.02)

    def _start(self, name: str) -> None:
        child = self.children[name]
        child.start()
        assert child.process is not None
        self._groups.add(child.process.pid)

    # Faults

    def arm(self, point: str, action: str, times: int = 1) -> None:
        for number in range(1, times + 1):
            failpoints.mark(self._marks, point, action, number).unlink(missing_ok=True)

    def disarm(self, point: str, action: str, times: int = 1) -> None:
        for number in range(1, times + 1):
            failpoints.mark(self._marks, point, action, number).touch()

    def fired(self, point: str, action: str, times: int = 1) -> bool:
        return all(failpoints.mark(self._marks, point, action, number).exists() for number in range(1, times + 1))

    def strike(self, point: str, action: str, act: Callable[[], object], times: int = 1) -> None:
        """Arms a point, does what leads there, and waits until it has happened."""
        self.arm(point, action, times)
        act()
        self.until(lambda: self.fired(point, action, times), f"{point}={action}", 90)
        self.injected += times

    def kill(self, name: str, *, group: bool = True) -> None:
        """SIGKILL; a worker with its pool process, unless it is to live on as an orphan."""
        child = self.children[name]
        assert child.process is not None
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(child.process.pid, signal.SIGKILL)
        child.process.wait(30)

    def hold(self, name: str) -> None:
        """Whoever dies now is not started again until it is released."""
        self._held.add(name)

    def release(self, name: str) -> None:
        self._held.discard(name)
        self.tend()

    def signal(self, name: str, number: signal.Signals) -> None:
        """To the main process alone."""
        child = self.children[name]
        assert child.process is not None
        with suppress(ProcessLookupError):
            child.process.send_signal(number)

    def pool(self, name: str) -> list[int]:
        """The pool processes of a worker."""
        process = self.children[name].process
        return _below(process.pid, b"spawn_main") if process is not None else []

    def engines(self, name: str) -> list[int]:
        """The engine processes of a worker's pool."""
        return [engine for child in self.pool(name) for engine in _below(child, b"worker.engine_process")]

    def stopped(self) -> list[int]:
        """Processes of the workers that a SIGSTOP has reached."""
        found = []
        for name in self.workers:
            process = self.children[name].process
            for number in ([process.pid] if process is not None else []) + self.pool(name):
                with suppress(OSError):
                    if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                        found.append(number)
        return found

    def resume(self) -> None:
        """SIGCONT to every stopped process of the workers."""
        for number in self.stopped():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGCONT)

    # The broker

    def broker_up(self) -> bool:
        try:
            return bool(self._redis.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    def messages(self) -> tuple[int, int]:
        """How many wait, and how many were taken and not acknowledged."""
        waiting: Any = self._redis.llen(REALIGN_QUEUE)
        unacked: Any = self._redis.hlen("unacked")
        return int(waiting), int(unacked)

    def flush(self) -> None:
        self._redis.flushall()

    # Clients

    def client(self, tenant: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {self._keys[tenant]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)

    def key(self, tenant: str) -> str:
        return str(self._keys[tenant])

    def ask(self, tenant: str, method: str, path: str, **request: Any) -> httpx.Response:
        """Asks again and again until there is an answer; a 503 is none. The ledger hears all of them."""
        deadline, patience = time.monotonic() + 240, time.monotonic() + 20
        while True:
            with suppress(httpx.TransportError):
                answer = self._clients[tenant].request(method, path, **request)
                self.ledger.hear(tenant, answer)
                if answer.status_code != 503:
                    return answer
            if time.monotonic() > deadline:
                raise Stuck(f"no answer to {method} {path}")
            if time.monotonic() > patience:
                self.stalled()
                patience = time.monotonic() + 20
            self.tend()
            time.sleep(0.05)

    def upload(self, tenant: str, number: int) -> str:
        folder = self.material.adapters[number]
        answer = self.ask(tenant, "POST", "/v1/adapters", files=files_of(folder))
        if answer.status_code != 201:
            raise Stuck(f"an upload was answered with {answer.status_code}: {answer.text}")
        adapter_id = str(answer.json()["id"])
        self.ledger.uploads[adapter_id] = (tenant, digests(folder))
        return adapter_id

    def order(
        self,
        tenant: str = TENANTS[0],
        number: int = 0,
        method: Method = GRAM,
        *,
        adapter_id: str = "",
        outcomes: tuple[str, ...] = ("succeeded",),
    ) -> str:
        """Orders a job, as often as it takes, under one key; from then on the ledger expects its result."""
        twin = self.twin(number, method)
        adapter_id = adapter_id or self._own[tenant, number]
        key = f"chaos-{os.urandom(8).hex()}"
        body = {"adapter_id": adapter_id, **request_of(method)}
        answer = self.ask(tenant, "POST", "/v1/realignments", json=body, headers={"idempotency-key": key})
        if answer.status_code != 202:
            raise Stuck(f"a job was answered with {answer.status_code}: {answer.text}")
        job_id = str(answer.json()["id"])
        self.ledger.jobs[job_id] = Accepted(job_id, tenant, adapter_id, twin, frozenset(outcomes), key)
        return job_id

    def own(self, tenant: str, number: int) -> str:
        return self._own[tenant, number]

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.ask(self.ledger.jobs[job_id].tenant, "GET", f"/v1/realignments/{job_id}")
        found: dict[str, Any] = answer.json()
        return found

    def open_jobs(self) -> int:
        """Jobs of this ledger that have not ended."""
        return sum(state not in ("succeeded", "failed", "cancelled", "dead") for state in self.states().values())

    def announced(self, job_ids: list[str]) -> bool:
        with reading(self.engine) as connection:
            rows = connection.exec_driver_sql("SELECT id, announced FROM realignments").all()
        return {row[0] for row in rows if row[1] > 0} >= set(job_ids)

    def states(self) -> dict[str, str]:
        with reading(self.engine) as connection:
            rows = connection.exec_driver_sql("SELECT id, state FROM realignments").all()
        return {row[0]: row[1] for row in rows if row[0] in self.ledger.jobs}

    def finish(self, job_id: str, seconds: float = 90) -> dict[str, Any]:
        self.until(lambda: self.states().get(job_id, "") in (*ENDED, "dead"), f"the end of {job_id}", seconds)
        return self.job(job_id)

    def settle(self, seconds: float = 120) -> None:
        """Until every job of the ledger has ended and nobody is stopped or down. Raises Stuck."""
        self.resume()
        self._held.clear()
        self.until(lambda: self.open_jobs() == 0, "all jobs to end", seconds)
        self.until(lambda: self._up("/readyz"), "the service to be ready")
        for job_id in list(self.ledger.jobs):
            self.job(job_id)

    def twin(self, number: int, method: Method) -> tuple[Digests, ...]:
        """The files of each adapter that this job makes where nothing happens to it. First asked for before faults."""
        key = (number, json.dumps(method, sort_keys=True))
        if key not in self._twins:
            body = {"adapter_id": self._own[TENANTS[0], number], **request_of(method)}
            answer = self.ask(TENANTS[0], "POST", "/v1/realignments", json=body)
            assert answer.status_code == 202, answer.text
            path = f"/v1/realignments/{answer.json()['id']}"
            self.until(lambda: self.ask(TENANTS[0], "GET", path).json()["status"] in ENDED, "a twin")
            job = self.ask(TENANTS[0], "GET", path).json()
            assert job["status"] == "succeeded", job
            made = [item["adapter_id"] for item in job["result"]["variants"]] or [job["result"]["adapter_id"]]
            self._twins[key] = tuple(self._fetched(adapter_id) for adapter_id in made)
        return self._twins[key]

    def _fetched(self, adapter_id: str) -> Digests:
        """As a client downloads it."""
        adapter = self.ask(TENANTS[0], "GET", f"/v1/adapters/{adapter_id}").json()
        path = f"/v1/adapters/{adapter_id}/files"
        bodies = {item["name"]: self.ask(TENANTS[0], "GET", f"{path}/{item['name']}") for item in adapter["files"]}
        return {name: hashlib.sha256(body.content).hexdigest() for name, body in bodies.items()}

    # Judgement

    @contextmanager
    def fresh_ledger(self) -> Iterator[None]:
        """For one row: what it orders and hears is judged by itself; earlier uploads are still there."""
        before, self.injected = self.ledger, 0
        self.ledger = Ledger(uploads=dict(before.uploads), hooks=before.hooks)
        yield

    def judge(self, *, collect: bool = True) -> Verdict:
        return check(self.ledger, self.engine, self.data / "objects", collect=collect)

    def log(self, name: str) -> str:
        return self.children[name].log.read_text(errors="replace")

    def _up(self, path: str) -> bool:
        try:
            return httpx.get(f"{self.url}{path}", timeout=5, trust_env=False).is_success
        except httpx.TransportError:
            return False

    def _command(self, *arguments: str) -> dict[str, Any]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SAFEGRAFT_")}
        environment |= self._environment | {"SAFEGRAFT_DATA": str(self.data)}
        command = [SAFEGRAFT, *arguments, "--data", str(self.data), "--json"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def request_of(method: Method) -> dict[str, Any]:
    """A method, with `strengths` beside it where it has them."""
    rest = {key: value for key, value in method.items() if key != "strengths"}
    return {"method": rest, **({"strengths": method["strengths"]} if "strengths" in method else {})}


def _below(process: int, word: bytes) -> list[int]:
    """The children of a process whose command line has the word."""
    try:
        found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return [number for number in map(int, found) if word in Path(f"/proc/{number}/cmdline").read_bytes()]
    except OSError:
        return []
