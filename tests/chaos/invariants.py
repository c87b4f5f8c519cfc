"""What must hold after any faults, asked of the database, of the bytes and of every answer that a client got.

It trusts none of the code that it judges beyond the tables: states, events and prefixes are read as rows, files are
hashed as files. `test_checker.py` breaks each invariant once and sees that this says so.
"""

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
from sqlalchemy import text
from sqlalchemy.engine import Engine

from safegraft.stores.garbage import ORPHAN_SECONDS, GarbageCollector
from safegraft.stores.objects import LocalObjects

Digests = Mapping[str, str]  # file name → SHA-256
Kind = Literal["lost", "doubled", "wrong", "foreign", "uncoded", "leftover"]
KINDS: tuple[Kind, ...] = ("lost", "doubled", "wrong", "foreign", "uncoded", "leftover")
TERMINAL = {"succeeded": "succeeded", "failed": "failed", "cancelled": "cancelled", "dead": "failed"}
ENDINGS = frozenset(TERMINAL.values())
IDS = re.compile(r"\b(?:adp|rlg)_[0-9a-z]{16,}\b")
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Accepted:
    """A job that a client has an answer for. twin: the files of each adapter that the same job made without faults."""

    id: str
    tenant: str
    adapter_id: str
    twin: tuple[Digests, ...] = ()
    outcomes: frozenset[str] = frozenset({"succeeded"})
    key: str | None = None


@dataclass(frozen=True)
class Said:
    """One answer, as a client saw it. ids: all that it names."""

    tenant: str
    request: str
    status: int
    code: str | None
    ids: frozenset[str] = frozenset()


@dataclass
class Ledger:
    """What the clients know."""

    jobs: dict[str, Accepted] = field(default_factory=dict)
    uploads: dict[str, tuple[str, Digests]] = field(default_factory=dict)  # adapter → its tenant, what was sent
    said: list[Said] = field(default_factory=list)
    hooks: dict[str, str] = field(default_factory=dict)  # tenant → an endpoint that hears of every end

    def hear(self, tenant: str, answer: httpx.Response) -> None:
        said = f"{answer.request.method} {answer.request.url.path}"
        self.said.append(Said(tenant, said, answer.status_code, code_of(answer), ids_of(answer)))


@dataclass(frozen=True)
class Fault:
    kind: Kind
    what: str


@dataclass
class Verdict:
    tried: int = 0
    answers: int = 0
    faults: list[Fault] = field(default_factory=list)

    def say(self, kind: Kind, what: str) -> None:
        self.faults.append(Fault(kind, what))

    def count(self, kind: Kind) -> int:
        return sum(fault.kind == kind for fault in self.faults)


def code_of(answer: httpx.Response) -> str | None:
    """`error.code` where the answer has the shape of our errors."""
    try:
        body = answer.json()
        code = body["error"]["code"]
        return code if isinstance(code, str) and body["status"] == answer.status_code else None
    except (ValueError, KeyError, TypeError):
        return None


def ids_of(answer: httpx.Response) -> frozenset[str]:
    if "json" not in answer.headers.get("content-type", ""):
        return frozenset()
    return frozenset(IDS.findall(answer.text))


def check(ledger: Ledger, engine: Engine, objects: Path, *, collect: bool = True) -> Verdict:
    """Judges a service that has come to rest. objects: the folder of the local object store.

    collect: afterwards all bytes are made two days old, the garbage collector runs, and nothing may be left over.
    """
    found = Verdict(tried=len(ledger.jobs), answers=len(ledger.said))
    store = _Rows(engine)
    for job in ledger.jobs.values():
        _job(found, job, store, objects)
    _all_jobs(found, ledger, store)
    _uploads(found, ledger, store, objects)
    _answers(found, ledger, store)
    if collect:
        age(objects)
        GarbageCollector(engine, LocalObjects(objects)).collect()
        # What was promised still holds when the collector has been there.
        for job in ledger.jobs.values():
            _bytes(found, job, store, objects)
        _leftovers(found, _Rows(engine), objects)
    return found


class _Rows:
    """The tables as they are now."""

    def __init__(self, engine: Engine) -> None:
        with engine.connect() as connection:

            def read(table: str) -> list[dict[str, Any]]:
                return [dict(row) for row in connection.execute(text(f"SELECT * FROM {table}")).mappings()]

            self.jobs = {row["id"]: row for row in read("realignments")}
            self.adapters = {row["id"]: _json(row, "body") for row in read("adapters")}
            self.events: dict[str, list[str]] = {}
            for row in sorted(read("events"), key=lambda row: row["sequence"]):
                self.events.setdefault(row["realignment_id"], []).append(row["type"])
            self.totals = {(row["name"], row["first"], row["second"]): row["value"] for row in read("totals")}
            self.messages = [_json(row, "payload") for row in read("webhook_deliveries")]
            self.prefixes = {row["prefix"] for table in ("files", "uploads") for row in read(table)}
        for job in self.jobs.values():
            _json(job, "result")
            _json(job, "error")

    def made(self, job_id: str) -> list[str]:
        """Adapters that say of themselves that this job made them."""
        return [key for key, row in self.adapters.items() if row["body"]["origin"].get("realignment_id") == job_id]


def _json(row: dict[str, Any], name: str) -> dict[str, Any]:
    if isinstance(row[name], str):  # SQLite
        row[name] = json.loads(row[name])
    return row


def _named(job: dict[str, Any]) -> list[str]:
    """The adapters that a job names as its result."""
    result = job["result"] or {}
    found = [item["adapter_id"] for item in result.get("variants", [])] or [result.get("adapter_id")]
    return [adapter_id for adapter_id in found if adapter_id]


def _job(found: Verdict, job: Accepted, store: _Rows, objects: Path) -> None:
    row = store.jobs.get(job.id)
    if row is None:
        found.say("lost", f"{job.id} was accepted and has no record")
        return
    if row["tenant"] != job.tenant:
        found.say("foreign", f"{job.id} of {job.tenant} belongs to {row['tenant']}")
    if row["state"] not in TERMINAL:
        found.say("lost", f"{job.id} never ended: {row['state']}, attempt {row['attempt']}")
        return
    kinds = store.events.get(job.id, [])
    last = kinds[len(kinds) - kinds[::-1].index("revived") :] if "revived" in kinds else kinds
    ended = [kind for kind in last if kind in ENDINGS]
    if len(ended) > 1:
        found.say("doubled", f"{job.id} ended {len(ended)} times: {ended}")
    if ended[-1:] != [TERMINAL[row["state"]]]:
        found.say("wrong", f"{job.id} is {row['state']} and its events say {ended}")
    if row["state"] not in job.outcomes:
        found.say("wrong", f"{job.id} is {row['state']} ({row['error']}), not {' or '.join(sorted(job.outcomes))}")
    if job.key is not None:
        same = [
            k for k, other in store.jobs.items() if (other["tenant"], other["idempotency_key"]) == (job.tenant, job.key)
        ]
        if len(same) != 1:
            found.say("doubled", f"{job.key} made {len(same)} jobs")
    named, made = _named(row), store.made(job.id)
    if len(made) > len(named) or len(set(named)) < len(named):
        found.say("doubled", f"{job.id} published {len(made)} adapters and names {len(named)}")
    if row["state"] == "succeeded" and len(named) != len(job.twin):
        found.say("wrong", f"{job.id} names {len(named)} adapters, its twin {len(job.twin)}")
    if row["state"] != "succeeded" and (named or made or row["result_attempt"] is not None):
        found.say("wrong", f"{job.id} is {row['state']} and has a result")
    _bytes(found, job, store, objects)


def _bytes(found: Verdict, job: Accepted, store: _Rows, objects: Path) -> None:
    """The result's files are those of the record and those of the twin, under the attempt that the record names."""
    row = store.jobs.get(job.id)
    if row is None or row["state"] != "succeeded":
        return
    prefix = f"tenants/{job.tenant}/realignments/{job.id}/{row['result_attempt']}"
    outputs = []
    for adapter_id, twin in zip(_named(row), job.twin, strict=False):
        record = store.adapters.get(adapter_id)
        if record is None:
            found.say("lost", f"{adapter_id}, the result of {job.id}, has no record")
            continue
        outputs.append(record["body"]["sha256"])
        if record["tenant"] != job.tenant or not record["prefix"].startswith(f"{prefix}/"):
            found.say("foreign", f"{adapter_id} of {record['tenant']} lies in {record['prefix']}, not below {prefix}")
        files = digests(objects / record["prefix"])
        recorded = {item["name"]: item["sha256"] for item in record["body"]["files"]}
        if files != recorded:
            found.say("wrong", f"{adapter_id}: other bytes than its record says: {_differing(files, recorded)}")
        elif files != dict(twin):
            found.say("wrong", f"{adapter_id}: other bytes than without faults: {_differing(files, twin)}")
    path = objects / prefix / "report" / "report.json"
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        found.say("wrong", f"{job.id} has no report: {error!r}")
        return
    told = [item["output"] for item in report.get("variants") or [report]]
    if outputs != [item["sha256"] for item in told if item]:
        found.say("wrong", f"{job.id}: its report tells of another output")


def _all_jobs(found: Verdict, ledger: Ledger, store: _Rows) -> None:
    """Over all jobs of the installation, also those that no client knows of: counters and the outbox."""
    ended = [row for row in store.jobs.values() if row["state"] in TERMINAL]
    revived = Counter(key for key, kinds in store.events.items() for kind in kinds if kind == "revived")
    counted = sum(value for (name, _, _), value in store.totals.items() if name == "jobs")
    if counted != len(ended) + revived.total():
        found.say("doubled", f"{len(ended)} jobs ended, {counted:g} ends were counted")
    told = Counter((row["endpoint_id"], row["payload"]["data"]["id"]) for row in store.messages)
    for row in ended:
        if (hook := ledger.hooks.get(row["tenant"])) is None:
            continue
        wanted, count = 1 + revived[row["id"]], told[hook, row["id"]]
        if count != wanted:
            found.say("doubled" if count > wanted else "lost", f"{row['id']}: {count} messages tell of its end")


def _uploads(found: Verdict, ledger: Ledger, store: _Rows, objects: Path) -> None:
    for adapter_id, (tenant, sent) in ledger.uploads.items():
        record = store.adapters.get(adapter_id)
        if record is None:
            found.say("lost", f"{adapter_id} was stored and has no record")
            continue
        if record["tenant"] != tenant or not record["prefix"].startswith(f"tenants/{tenant}/"):
            found.say("foreign", f"{adapter_id} of {tenant}: {record['tenant']}, {record['prefix']}")
        files = digests(objects / record["prefix"])
        if files != dict(sent):
            found.say("wrong", f"{adapter_id}: other bytes than were sent: {_differing(files, sent)}")


def _answers(found: Verdict, ledger: Ledger, store: _Rows) -> None:
    owner = {key: row["tenant"] for table in (store.jobs, store.adapters) for key, row in table.items()}
    for said in ledger.said:
        if said.status >= 500 and not said.code:
            found.say("uncoded", f"{said.request}: {said.status} without a code")
        for known in said.ids:
            if owner.get(known, said.tenant) != said.tenant:
                found.say("foreign", f"{said.request} told {said.tenant} of {known}, which is {owner[known]}'s")


def _leftovers(found: Verdict, store: _Rows, objects: Path) -> None:
    """After the collector every file belongs to a record, and scratch is empty."""
    known = {row["prefix"] for row in store.adapters.values()} | store.prefixes
    for row in store.jobs.values():
        if row["result_attempt"] is not None:
            known.add(f"tenants/{row['tenant']}/realignments/{row['id']}/{row['result_attempt']}")
    for path in _files(objects):
        name = path.relative_to(objects).as_posix()
        parts = name.split("/")
        above = {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        if not above & known:
            found.say("leftover", f"{name} belongs to no record")


def age(objects: Path) -> None:
    """Makes everything old enough for the collector."""
    then = time.time() - 2 * ORPHAN_SECONDS
    for folder, _, names in os.walk(objects, topdown=False):
        for path in (*(Path(folder) / name for name in names), Path(folder)):
            os.utime(path, (then, then), follow_symlinks=False)


def digests(folder: Path) -> dict[str, str]:
    """The files directly in a folder, whatever their names."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found if path.is_file()}


def _differing(one: Digests, other: Digests) -> str:
    return ", ".join(sorted(name for name in {*one, *other} if one.get(name) != other.get(name)))


def _files(objects: Path) -> Iterator[Path]:
    yield from (path for path in sorted(objects.rglob("*")) if path.is_file() and path != objects / "scratch")
