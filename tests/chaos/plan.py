"""Row 15: a seed makes a plan, and the plan says before which job which fault happens. No clock has a say in it."""

import hashlib
import json
import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from tests.chaos.ground import TENANTS, Ground, Stuck

METHODS: tuple[dict[str, Any], ...] = (
    {"type": "gram"},
    {"type": "gram", "strengths": [0.3, 3.0]},
    {"type": "nlsr", "form": "neuron"},
    {"type": "safelora"},
    {"type": "none"},
)
FAULTS = {
    "worker killed": 22,
    "worker killed, its pool process lives on": 10,
    "pool process killed": 22,
    "pool process stopped": 14,
    "worker stopped": 6,
    "gateway killed": 12,
    "Redis killed": 8,
    "FLUSHALL": 6,
}
# So many jobs may be open at a time: what a fault can hit.
OPEN = 8
# How many jobs later a stopped process goes on, at most.
PAUSE = 6


@dataclass(frozen=True)
class Job:
    tenant: str
    adapter: int
    method: dict[str, Any]


@dataclass(frozen=True)
class Fault:
    before: int  # the number of a job
    kind: str
    worker: int
    until: int  # the job before which what was stopped goes on


@dataclass(frozen=True)
class Plan:
    seed: int
    jobs: tuple[Job, ...]
    faults: tuple[Fault, ...]

    def digest(self) -> str:
        """The same for the same plan."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def make(seed: int, jobs: int, faults: int, adapters: int) -> Plan:
    chance = random.Random(seed)
    ordered = tuple(
        Job(chance.choice(TENANTS), chance.randrange(adapters), chance.choice(METHODS)) for _ in range(jobs)
    )
    places = sorted(chance.randrange(1, jobs) for _ in range(faults))
    kinds = chance.choices(list(FAULTS), list(FAULTS.values()), k=faults)
    made = tuple(
        Fault(place, kind, chance.randrange(2), place + chance.randint(1, PAUSE))
        for place, kind in zip(places, kinds, strict=True)
    )
    return Plan(seed, ordered, made)


def run(plan: Plan, ground: Ground, say: Callable[[str], None]) -> None:
    """Orders the jobs one after the other, never more than OPEN at a time, and hurts the service in between."""
    waking: dict[int, list[int]] = {}
    ground.stalled = lambda: _wake_next(waking)
    for number, job in enumerate(plan.jobs):
        for process in waking.pop(number, []):
            _signal(process, signal.SIGCONT)
        for fault in plan.faults:
            if fault.before == number:
                _strike(ground, fault, waking)
        _await_room(ground, waking)
        ground.order(job.tenant, job.adapter, job.method)
        if number % 50 == 49:
            say(f"  {number + 1} jobs ordered, {ground.injected} faults")


def _await_room(ground: Ground, waking: dict[int, list[int]]) -> None:
    """Until another job may be ordered. Where both workers are stopped nothing moves: the next one then goes on."""
    while True:
        try:
            ground.until(lambda: ground.open_jobs() < OPEN, "room for a job", 20 if waking else 300)
            return
        except Stuck:
            if not waking:
                raise
        _wake_next(waking)


def _wake_next(waking: dict[int, list[int]]) -> None:
    for process in waking.pop(min(waking)) if waking else ():
        _signal(process, signal.SIGCONT)


def _strike(ground: Ground, fault: Fault, waking: dict[int, list[int]]) -> None:
    name = ground.workers[fault.worker]
    process = ground.children[name].process
    assert process is not None
    match fault.kind:
        case "worker killed":
            ground.kill(name)
        case "worker killed, its pool process lives on":
            ground.kill(name, group=False)
        case "pool process killed":
            for child in ground.pool(name):
                _signal(child, signal.SIGKILL)
        case "pool process stopped":
            for child in ground.pool(name):
                _signal(child, signal.SIGSTOP)
                waking.setdefault(fault.until, []).append(child)
        case "worker stopped":
            _signal(process.pid, signal.SIGSTOP)
            waking.setdefault(fault.until, []).append(process.pid)
        case "gateway killed":
            ground.kill("gateway")
        case "Redis killed":
            ground.kill("broker")
            ground.tend()
            ground.until(ground.broker_up, "the broker")
        case "FLUSHALL":
            ground.until(ground.broker_up, "the broker")
            ground.flush()
    ground.injected += 1


def _signal(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)
