"""The fifteen rows: each hurts a service in its own way and returns what the checker found afterwards.

A row gets a `Stage`, on which it has the ground that rows share, or makes one of its own. `quick` is one round of
everything; in full each fault happens ten times.
"""

import asyncio
import hashlib
import importlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks import load
from safegraft.adapter import WEIGHTS
from tests.chaos import plan as plans
from tests.chaos.ground import GRAM, TENANTS, WORKER_POINTS, Ground, Material, Stuck, request_of
from tests.chaos.invariants import Accepted, Verdict, code_of
from tests.scaled import Missing, postgres_server
from tests.service.conftest import files_of

CLOCKS = Path(__file__).parent / "clocks"


@dataclass
class Score:
    """What one row counted, on one seed."""

    faults: int = 0
    tried: int = 0
    found: list[str] = field(default_factory=list)  # "kind: what"
    note: str = ""
    left_out: str = ""
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, verdict: Verdict, faults: int) -> None:
        self.faults += faults
        self.tried += verdict.tried
        for fault in verdict.faults:
            self.wrong(fault.kind, fault.what)

    def wrong(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        self.found.append(f"{kind}: {what}")


@dataclass
class Stage:
    """Where rows find what they need; `shared` is the ground that several rows in turn may hurt."""

    material: Material
    folder: Path
    quick: bool = False
    seed: int = 1
    say: Callable[[str], None] = print
    _shared: Ground | None = None

    def rounds(self, full: int = 10) -> range:
        return range(1 if self.quick else full)

    @property
    def shared(self) -> Ground:
        if self._shared is None:
            self._shared = self.ground("shared").__enter__()
        return self._shared

    def ground(self, name: str, **options: Any) -> Ground:
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix=f"{name}-"))
        # So many that no job dies of what is done to the service; row 8 has its own number.
        options.setdefault("SAFEGRAFT_MAX_ATTEMPTS", "20")
        return Ground(folder / "data", self.material, **options)

    def close(self) -> None:
        if self._shared is not None:
            self._shared.__exit__()
            self._shared = None


Row = Callable[[Stage], Score]
ROWS: dict[int, tuple[str, Row]] = {}


def row(number: int, title: str) -> Callable[[Row], Row]:
    def add(function: Row) -> Row:
        ROWS[number] = (title, function)
        return function

    return add


@contextmanager
def judged(ground: Ground, score: Score, *, seconds: float = 120) -> Iterator[None]:
    """What is done within is judged afterwards. Where the ground does not come to rest, that is said too."""
    with ground.fresh_ledger():
        try:
            yield
            ground.settle(seconds)
        except Stuck as stuck:
            score.wrong("lost", str(stuck))
            ground.resume()
        score.add(ground.judge(), ground.injected)


@row(1, "SIGKILL the whole worker at six points")
def killed_worker(stage: Stage) -> Score:
    score, ground = Score(), stage.shared
    ground.twin(0, GRAM)
    attempts = Counter[int]()
    with judged(ground, score):
        for _ in stage.rounds():
            for point in WORKER_POINTS:
                orders: list[str] = []
                name = f"worker.{point}"
                ground.strike(name, "kill-group", lambda orders=orders: orders.append(ground.order()))  # type: ignore[misc]
                attempts[ground.finish(orders[0])["attempt"]] += 1
    score.note = f"attempts per job: {told(attempts)}"
    return score


@row(2, "SIGKILL the pool process at six points, and its engine in the middle of a job")
def killed_child(stage: Stage) -> Score:
    score, ground = Score(), stage.shared
    ground.twin(0, GRAM)
    attempts = Counter[int]()
    with judged(ground, score):
        for number in range(6 if stage.quick else 12):
            orders: list[str] = []
            name = f"worker.{WORKER_POINTS[number % 6]}"
            ground.strike(name, "kill", lambda orders=orders: orders.append(ground.order()))  # type: ignore[misc]
            attempts[ground.finish(orders[0])["attempt"]] += 1
        for _ in stage.rounds(6):
            orders = []
            ground.strike("worker.patching", "stop", lambda orders=orders: orders.append(ground.order()))  # type: ignore[misc]
            ground.until(lambda: bool(ground.stopped()), "a process that is stopped")
            stopped = ground.stopped()
            for name in ground.workers:
                if set(ground.pool(name)) & set(stopped):  # it waits at this point, and its engine for it
                    for engine in ground.engines(name):
                        os.kill(engine, signal.SIGKILL)
                        ground.injected += 1
            ground.resume()
            attempts[ground.finish(orders[0])["attempt"]] += 1
    score.note = f"attempts per job: {told(attempts)}"
    return score


@row(3, "SIGSTOP beyond the lease, then SIGCONT")
def stopped(stage: Stage) -> Score:
    score, ground = Score(), stage.shared
    ground.twin(0, GRAM)
    fenced = 0
    with judged(ground, score):
        points = WORKER_POINTS[-2:-1] if stage.quick else WORKER_POINTS
        for _ in stage.rounds(2):
            for point in points:
                orders: list[str] = []
                name = f"worker.{point}"
                before = taken_over(ground)
                ground.strike(name, "stop", lambda orders=orders: orders.append(ground.order()))  # type: ignore[misc]
                ground.until(lambda: bool(ground.stopped()), "a process that is stopped")
                # Without its worker: by another one, after the lease.
                ground.finish(orders[0])
                ground.resume()
                if point != "committed":
                    ground.until(lambda before=before: taken_over(ground) > before, "the late worker to notice")  # type: ignore[misc]
                    fenced += 1
    score.note = f"{fenced} late workers found their attempt taken over and published nothing"
    return score


def taken_over(ground: Ground) -> int:
    return sum(ground.log(name).count("was taken over") for name in ground.workers)


@row(4, "SIGKILL the gateway before and after commit, before the announcement, between bytes and row")
def killed_gateway(stage: Stage) -> Score:
    score, ground = Score(), stage.shared
    ground.twin(0, GRAM)
    with judged(ground, score):
        for number in stage.rounds():
            tenant = TENANTS[number % 2]
            ground.strike("gateway.creating", "kill", lambda tenant=tenant: ground.order(tenant))  # type: ignore[misc]
            ground.strike("gateway.created", "kill", lambda tenant=tenant: ground.order(tenant))  # type: ignore[misc]
            ground.strike("dispatcher.due", "kill", lambda tenant=tenant: ground.order(tenant))  # type: ignore[misc]
            sent: list[str] = []
            act = lambda tenant=tenant, sent=sent: sent.append(ground.upload(tenant, 0))  # noqa: E731
            ground.strike("gateway.stored", "kill", act)
            ground.order(tenant, adapter_id=sent[0])
    return score


@row(5, "kill -9 of Redis in the middle of a job")
def killed_broker(stage: Stage) -> Score:
    score, ground = Score(), stage.shared
    ground.twin(0, GRAM)
    with judged(ground, score):
        for _ in stage.rounds():
            ground.strike("worker.patching", "stop", ground.order)
            ground.hold("broker")
            ground.kill("broker")
            ground.injected += 1
            for tenant in TENANTS:  # the record is the truth: jobs are accepted without a broker
                ground.order(tenant)
            ground.resume()
            ground.release("broker")
            ground.until(ground.broker_up, "the broker")
            ground.settle()
    return score


@row(6, "FLUSHALL with jobs waiting and running")
def flushed(stage: Stage) -> Score:
    score, ground = Score(), stage.shared
    ground.twin(0, GRAM)
    gone = 0
    with judged(ground, score):
        for _ in stage.rounds(3):
            ground.strike("worker.patching", "stop", ground.order)
            for name in ground.workers:
                ground.signal(name, signal.SIGSTOP)
            for number in range(6):
                ground.order(TENANTS[number % 2])
            ground.until(lambda: ground.messages()[0] >= 4, "messages in the broker")
            gone += sum(ground.messages())
            ground.flush()
            ground.injected += 1
            ground.resume()
            ground.settle()
    score.note = f"{gone} messages thrown away"
    return score


@row(7, "a worker that dies between BRPOP and its note in `unacked`")
def lost_message(stage: Stage) -> Score:
    score, ground = Score(), stage.shared
    ground.twin(0, GRAM)
    lost = 0
    with judged(ground, score, seconds=180):
        tries = 0
        while lost < (1 if stage.quick else 10) and tries < 60:
            tries += 1
            before = ground.messages()
            for name in ground.workers:
                ground.signal(name, signal.SIGSTOP)  # with their BRPOP waiting at the server
            orders = [ground.order() for _ in ground.workers]
            ground.until(lambda orders=orders: ground.announced(orders), "the announcements")  # type: ignore[misc]
            waiting, unacked = ground.messages()
            # Handed over by the server, and written down by nobody.
            vanished = before[0] + before[1] + len(orders) - waiting - unacked
            if vanished > 0:
                lost += vanished
                ground.injected += vanished
                for name in ground.workers:
                    ground.kill(name)
            ground.resume()
            if tries % 3 == 0:
                ground.settle()
    score.note = f"{lost} messages lost for ever, in {tries} tries"
    if not lost:
        score.wrong("lost", "the fault never happened: every message was written down")
    return score


@row(8, "a poison job that kills its process each time")
def poison(stage: Stage) -> Score:
    score = Score()
    with stage.ground("poison", workers=1, SAFEGRAFT_MAX_ATTEMPTS="3") as ground:
        ground.twin(0, GRAM)
        with judged(ground, score):
            for _ in stage.rounds(3):
                orders: list[str] = []
                act = lambda orders=orders: orders.append(ground.order(outcomes=("dead", "succeeded")))  # noqa: E731
                ground.strike("worker.patching", "kill", act, times=3)
                job = ground.finish(orders[0])
                if (job["status"], (job["error"] or {}).get("class"), job["attempt"]) != ("failed", "system", 3):
                    score.wrong("wrong", f"a poison job is shown as {job}")
                # The next ones are served, and so is this one when an operator tries again.
                following = [ground.order(tenant) for tenant in TENANTS]
                for order in following:
                    ground.finish(order)
                ground._command("admin", "requeue", orders[0])
                ground.until(lambda orders=orders: ground.states()[orders[0]] == "succeeded", "the requeued job")  # type: ignore[misc]
    score.note = "dead after three attempts, the others served, done when queued again"
    return score


@row(9, "disk full while an upload arrives, while it is stored, while a result is")
def full_disk(stage: Stage) -> Score:
    score, ground = Score(), stage.shared
    ground.twin(0, GRAM)
    refused = 0
    with judged(ground, score):
        for _ in stage.rounds(5):
            for point in ("gateway.receiving", "store.publish"):
                said: list[httpx.Response] = []

                def send(said: list[httpx.Response] = said) -> None:
                    files = files_of(ground.material.adapters[0])
                    said.append(ground.ask(TENANTS[0], "POST", "/v1/adapters", files=files))

                ground.strike(point, "error", send)
                if (said[0].status_code, said[0].json()["error"]["code"]) != (507, "disk_full"):
                    score.wrong("wrong", f"{point}: {said[0].status_code} {said[0].text}")
                refused += 1
                ground.order(adapter_id=ground.upload(TENANTS[0], 0))  # there is room again
            ground.settle()
            orders: list[str] = []
            ground.strike("store.publish", "error", lambda orders=orders: orders.append(ground.order()))  # type: ignore[misc]
            job = ground.finish(orders[0])
            if job["attempt"] != 2:
                score.wrong("wrong", f"a full disk took {job['attempt']} attempts")
    score.note = f"{refused} uploads answered with 507"
    return score


@row(10, "200 parallel uploads, half of them cut off")
def cut_uploads(stage: Stage) -> Score:
    score, ground = Score(), stage.shared
    count = 20 if stage.quick else 200
    with judged(ground, score):
        folder = ground.material.adapters[0]
        padded = Path(tempfile.mkdtemp(dir=stage.folder)) / "adapter"
        padded.mkdir()
        for path in folder.iterdir():
            (padded / path.name).write_bytes(path.read_bytes())
        # Longer than one piece of the sender's, so that there is something to cut: a companion that is kept.
        (padded / "tokenizer.json").write_bytes(b"{" + b" " * 2**19 + b"}")
        seen = asyncio.run(cut(ground, padded, count))
        ground.injected += seen.cut
        for line in seen.failed:
            score.wrong("wrong", line)
        for adapter_id, sha256 in seen.stored.items():
            answer = ground.ask(TENANTS[0], "GET", f"/v1/adapters/{adapter_id}")
            sent = {item["name"]: item["sha256"] for item in answer.json()["files"]}
            if sent.get(WEIGHTS) != sha256:
                score.wrong("wrong", f"{adapter_id}: other weights than were sent")
            ground.ledger.uploads[adapter_id] = (TENANTS[0], sent)
        score.tried += len(seen.stored)
        if len(seen.stored) != count - seen.cut:
            score.wrong("lost", f"{len(seen.stored)} uploads of {count - seen.cut} arrived")
    score.note = f"{seen.cut} cut off, {len(seen.stored)} stored with their SHA-256, {seen.refused} told to wait"
    return score


async def cut(ground: Ground, folder: Path, count: int) -> load.Seen:
    """Like the load's sender, with a companion in each form."""
    seen = load.Seen()
    chance = random.Random(1)
    bodies = []
    for number in range(count):
        parts = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        parts[WEIGHTS] = parts[WEIGHTS][:-4] + number.to_bytes(2, "little") + b"\x00\x00"
        body = b"".join(load.part(name, data) for name, data in parts.items()) + b"--" + load.BOUNDARY + b"--\r\n"
        at = chance.randrange(1, len(body) - load.PIECE) if number % 2 else None
        bodies.append(load.upload(ground.port, ground.key(TENANTS[0]), body, sha256(parts[WEIGHTS]), at, seen))
    await asyncio.gather(*bodies)
    return seen


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@row(11, "idempotency race, 50 keys × 20 clients, on SQLite and Postgres")
def race(stage: Stage) -> Score:
    score = Score()
    keys, clients = (5, 20) if stage.quick else (50, 20)
    databases = ["SQLite"]
    raced(stage.shared, score, keys, clients)
    if not stage.quick:
        try:
            with postgres_server() as url, stage.ground("postgres", database_url=url) as ground:
                raced(ground, score, keys, clients)
                databases.append("Postgres")
        except Missing as missing:
            score.left_out = str(missing)
    score.note = f"{keys} keys × {clients} requests on {' and '.join(databases)}"
    return score


def raced(ground: Ground, score: Score, keys: int, clients: int) -> None:
    twin = ground.twin(0, GRAM)
    with judged(ground, score, seconds=300):
        tenant = TENANTS[0]
        adapter_id = ground.own(tenant, 0)
        together = threading.Barrier(clients)
        lock = threading.Lock()
        answers: dict[str, list[httpx.Response]] = {}

        def client(number: int) -> None:
            with ground.client(tenant) as http:
                for count in range(keys):
                    together.wait(60)
                    key = f"race-{count}"
                    body = {"adapter_id": adapter_id, **request_of(GRAM)}
                    answer = http.post("/v1/realignments", json=body, headers={"idempotency-key": key})
                    with lock:
                        answers.setdefault(key, []).append(answer)

        with ThreadPoolExecutor(clients) as pool:
            for done in [pool.submit(client, number) for number in range(clients)]:
                done.result()
        for key, said in answers.items():
            for answer in said:
                ground.ledger.hear(tenant, answer)
            if {answer.status_code for answer in said} != {202}:
                score.wrong("wrong", f"{key}: {sorted(answer.status_code for answer in said)}")
            made = {answer.json()["id"] for answer in said if answer.status_code == 202}
            if len(made) != 1:
                score.wrong("doubled", f"{key}: {len(made)} jobs were told of")
            for job_id in made:
                ground.ledger.jobs[job_id] = Accepted(job_id, tenant, adapter_id, twin, key=key)
            if sum("idempotent-replayed" not in answer.headers for answer in said) != 1:
                score.wrong("doubled", f"{key}: not exactly one answer says that it is the first")
        other = {"adapter_id": adapter_id, "method": {"type": "none"}}
        answer = ground.ask(tenant, "POST", "/v1/realignments", json=other, headers={"idempotency-key": "race-0"})
        if answer.status_code != 422:
            score.wrong("doubled", f"another request under a used key: {answer.status_code}")
        ground.injected += keys * (clients - 1)


@row(12, "the corpus of hostile adapters")
def hostile(stage: Stage) -> Score:
    """tests/hostile holds each case against its own limits of time and memory; here, against the rest of the service.

    `tests.hostile.corpus.cases()`: objects with `id`, `write(folder)`, `code` (of the refusal; "": it is accepted) and
    `local` (it cannot be sent).
    """
    score = Score()
    try:
        corpus = importlib.import_module("tests.hostile.corpus")
    except ModuleNotFoundError:
        score.left_out = "tests/hostile has no corpus yet"
        return score
    ground = stage.shared
    refused = accepted = 0
    with judged(ground, score, seconds=300):
        for case in [case for case in corpus.cases() if not case.local]:
            with tempfile.TemporaryDirectory(dir=stage.folder) as name:
                case.write(Path(name))
                answer = ground.ask(TENANTS[0], "POST", "/v1/adapters", files=files_of(Path(name)))
            ground.injected += 1
            if case.code:
                refused += 1
                if answer.status_code not in (413, 422) or code_of(answer) != case.code:
                    score.wrong("wrong", f"{case.id}: {answer.status_code} {code_of(answer)}, not {case.code}")
            elif answer.status_code != 201:
                score.wrong("wrong", f"{case.id}: {answer.status_code} {answer.text[:200]}")
            else:
                accepted += 1
                adapter = answer.json()
                files = {item["name"]: item["sha256"] for item in adapter["files"]}
                ground.ledger.uploads[adapter["id"]] = (TENANTS[0], files)
        # And the service goes on.
        for tenant in TENANTS:
            ground.order(tenant, adapter_id=ground.upload(tenant, 0))
    score.tried += refused + accepted
    score.note = f"{refused} refused by their codes, {accepted} harmless ones accepted"
    return score


@row(13, "the worker's clock ten minutes ahead and behind")
def wrong_clock(stage: Stage) -> Score:
    score = Score()
    databases = []
    with suppress(Missing):
        with stage.ground("clock") as ground:
            skewed(stage, ground, score)
            databases.append("SQLite")
        if not stage.quick:
            with postgres_server() as url, stage.ground("clock", database_url=url) as ground:
                skewed(stage, ground, score)
                databases.append("Postgres")
    score.note = f"one worker at +600 s, one at −600 s, on {' and '.join(databases)}"
    return score


def skewed(stage: Stage, ground: Ground, score: Score) -> None:
    twin = ground.twin(0, GRAM)
    assert twin
    with judged(ground, score):
        for name, seconds in zip(ground.workers, (600, -600), strict=True):
            child = ground.children[name]
            path = f"{CLOCKS}{os.pathsep}{child.environment.get('PYTHONPATH', '')}"
            child.environment |= {"PYTHONPATH": path, "CHAOS_CLOCK_SECONDS": str(seconds)}
            ground.kill(name)
            ground.injected += 1
        ground.tend()
        for number in range(4 if stage.quick else 20):
            ground.order(TENANTS[number % 2])
        ground.settle()
        # A lease is neither too long nor too short by these clocks: a stopped worker's job is taken over in time.
        ground.strike("worker.published", "stop", ground.order)
        ground.until(lambda: ground.open_jobs() == 0, "the job of a stopped worker", 60)
        for name, seconds in zip(ground.workers, (600, -600), strict=True):
            if f"clock moved by {seconds}" not in ground.log(name):
                score.wrong("wrong", f"{name}: its clock was right")


@row(14, "every route × the ids of another tenant")
def foreign_ids(stage: Stage) -> Score:
    """tests/service/test_tenants.py is this row."""
    score = Score()
    with tempfile.TemporaryDirectory(dir=stage.folder) as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/service/test_tenants.py", f"--junitxml={junit}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        if not junit.exists():
            score.wrong("foreign", f"the tests did not run: {done.stdout[-500:]} {done.stderr[-500:]}")
            return score
        suite = next(xml.etree.ElementTree.parse(junit).getroot().iter("testsuite"))
    score.tried = int(suite.get("tests", "0"))
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            score.wrong("foreign", str(case.get("name")))
    if done.returncode and not score.found:
        score.wrong("foreign", done.stdout[-500:])
    score.faults = score.tried
    score.note = "cases of tests/service/test_tenants.py"
    return score


@row(15, "random chaos: 310 jobs, 100 faults")
def chaos(stage: Stage) -> Score:
    score = Score()
    plan = plans.make(stage.seed, *((24, 8) if stage.quick else (310, 100)), len(stage.material.adapters))
    stage.say(f"  seed {stage.seed}, plan {plan.digest()}: {told(Counter(fault.kind for fault in plan.faults))}")
    with stage.ground(f"chaos-{stage.seed}") as ground:
        for job in plan.jobs:
            ground.twin(job.adapter, job.method)
        with judged(ground, score, seconds=300):
            plans.run(plan, ground, stage.say)
            ground.settle(300)
            attempts = Counter(ground.job(job_id)["attempt"] for job_id in ground.ledger.jobs)
            score.note = f"plan {plan.digest()}; attempts per job: {told(attempts)}"
    return score


def told(counter: Counter[Any]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in sorted(counter.items(), key=lambda item: str(item[0])))
