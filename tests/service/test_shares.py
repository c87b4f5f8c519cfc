"""Nobody takes all of what there is little of."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from safegraft.contracts.realignment import RealignmentCreate
from safegraft.errors import UserError
from safegraft.stores.jobs import JobStore
from service.routes import realignments
from service.shares import Shares
from tests.service.answers import refused
from tests.service.conftest import database_of
from tests.service.gateway import Gateway


@pytest.mark.parametrize(("total", "most"), [(1, 1), (2, 2), (3, 3), (4, 3), (32, 24)])
def test_one_tenant_gets_three_quarters_and_others_the_rest(total: int, most: int) -> None:
    shares = Shares("uploads", total)
    with ExitStack() as stack:
        for _ in range(most):
            stack.enter_context(shares.place("greedy"))
        with pytest.raises(UserError, match="Too many uploads at once") as refusal, shares.place("greedy"):
            pass
        assert refusal.value.code == "too_many_uploads"
        assert shares.taken == most
        for number in range(total - most):
            stack.enter_context(shares.place(f"other{number}"))
        with pytest.raises(UserError), shares.place("late"):
            pass
    assert shares.taken == 0
    with shares.place("late"):
        assert shares.taken == 1


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    running = Gateway(tmp_path_factory.mktemp("shares") / "data", SAFEGRAFT_MAX_EVENT_STREAMS="4")
    yield running
    running.stop()


@pytest.fixture
def waiting(gateway: Gateway) -> Iterator[str]:
    """The events of a job that nobody works at."""
    engine = database_of(gateway.data)
    jobs = JobStore(engine, lease_seconds=30, max_attempts=3)
    job_id = jobs.create("default", "ref_1", RealignmentCreate(adapter_id="adp_1")).job.id
    yield f"/v1/realignments/{job_id}/events"
    jobs.cancel("default", job_id)
    engine.dispose()


STREAM = {"accept": "text/event-stream"}


def test_streams_are_counted_and_their_places_come_back(gateway: Gateway, waiting: str) -> None:
    with gateway.client() as client:
        for _ in range(3):  # more of them than there are places
            with ExitStack() as stack:
                open_ = []
                for _ in range(3):
                    answer = stack.enter_context(client.stream("GET", waiting, headers=STREAM))
                    assert answer.status_code == 200
                    open_.append(answer.iter_lines())  # kept: a forgotten iterator closes its connection
                    assert next(open_[-1]).startswith("id: ")
                refusal = client.get(waiting, headers=STREAM)
                refused(refusal, 429, "too_many_streams")
                assert int(refusal.headers["retry-after"]) > 0
                # As a list there is no limit to them.
                assert client.get(waiting).status_code == 200
            deadline = time.monotonic() + 10
            while not streams(client, waiting):
                assert time.monotonic() < deadline
                time.sleep(0.1)


def streams(client: httpx.Client, url: str) -> bool:
    with client.stream("GET", url, headers=STREAM) as answer:
        return answer.status_code == 200


def test_a_stream_with_nothing_to_say_says_so(waiting: str, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realignments, "KEEP_ALIVE", 2)
    engine = database_of(gateway.data)

    class Here:
        jobs = JobStore(engine, lease_seconds=30, max_attempts=3)

    class Asked:
        async def is_disconnected(self) -> bool:
            return False

    async def listen() -> list[str]:
        here: Any = Here()
        asked: Any = Asked()
        found = []
        async for piece in realignments._stream(here, "default", waiting.split("/")[3], 0, asked):
            found.append(piece)
            if len(found) == 4:
                break
        return found

    created, progress, *comments = asyncio.run(listen())
    assert created.startswith("id: ")
    assert progress.startswith("event: progress\n")
    assert comments == [": still here\n\n"] * 2
    engine.dispose()
