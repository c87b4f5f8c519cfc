"""Requests counted in a real broker: by several gateways together, and by each alone while it is away."""

import asyncio
import contextlib
import logging
import math
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from safegraft.launch import find_broker
from service import limiter as module
from service.limiter import Limiter
from tests.patience import TRIES, within
from tests.service.conftest import free_port


@dataclass
class Broker:
    """A Valkey that can be stopped, started again and put to sleep."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/3"

    @property
    def socket(self) -> Path:
        return self.folder / "sock"

    def start(self) -> None:
        command = [str(find_broker()), "--port", str(self.port), "--unixsocket", str(self.socket)]
        self.process = subprocess.Popen(
            [*command, "--save", "", "--dir", str(self.folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 10
        with redis.Redis(port=self.port) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path, free_port())
    broker.start()
    yield broker
    broker.stop()


@contextlib.asynccontextmanager
async def limiters(*urls: str) -> AsyncIterator[list[Limiter]]:
    made = [Limiter(url) for url in urls]
    try:
        yield made
    finally:
        for limiter in made:
            await limiter.close()


async def passed(limiter: Limiter, tenant: str, number: int, allowed: int = 5) -> int:
    """How many of so many requests pass."""
    return sum([(await limiter.hit(tenant, allowed)).within for _ in range(number)])


@pytest.mark.parametrize("kind", ["broker", "socket", "alone"])
def test_so_many_pass_in_a_second_and_the_rest_do_not_count(broker: Broker, kind: str) -> None:
    url = {"broker": broker.url, "socket": f"redis+socket://{broker.socket}?virtual_host=1", "alone": "sentinel://x"}

    async def run() -> None:
        async with limiters(url[kind]) as [limiter]:
            for number in range(TRIES):
                tenant, began = f"t{number}", time.monotonic()
                counted = [await limiter.hit(tenant, 5) for _ in range(9)]
                another = await passed(limiter, f"another{number}", 9)
                if time.monotonic() - began < 1.0:
                    break
            else:
                pytest.fail("the machine is too busy to see what passes in a second")
            assert [one.within for one in counted] == [True] * 5 + [False] * 4
            assert [one.left for one in counted] == [4, 3, 2, 1, 0, 0, 0, 0, 0]
            assert all(0 <= one.seconds <= 1 for one in counted)
            assert another == 5
            await asyncio.sleep(1.0)
            assert await passed(limiter, tenant, 1) == 1
            await asyncio.sleep(2.0)
            assert await passed(limiter, tenant, 9) >= 5

    asyncio.run(run())


def test_two_gateways_keep_one_limit(broker: Broker) -> None:
    async def run(tenant: str) -> int:
        async with limiters(broker.url, broker.url) as [one, two]:
            return sum(await asyncio.gather(*[passed(limiter, tenant, 50, allowed=20) for limiter in (one, two) * 3]))

    assert within(1.0, lambda number: asyncio.run(run(f"t{number}"))) == 20


def test_what_is_kept_goes_by_itself(broker: Broker) -> None:
    async def run() -> None:
        async with limiters(broker.url) as [limiter]:
            for number in range(50):
                await limiter.hit(f"tenant{number}", 5)

    asyncio.run(run())
    with redis.Redis(port=broker.port, db=3) as client:
        names = list(client.scan_iter())
        assert len(names) == 50
        assert all(name.startswith(b"safegraft:requests") for name in names)
        assert all(0 < client.pttl(name) <= 2000 for name in names)


def test_memory_is_given_back(tmp_path: Path) -> None:
    """A gateway that has counted thousands of tenants does not remember them."""

    async def run() -> None:
        async with limiters("none://") as [limiter]:
            for number in range(3000):
                await limiter.hit(f"tenant{number}", 5)
            await asyncio.sleep(2.1)
            await limiter.hit("t", 5)
            await asyncio.sleep(0.1)
            await limiter.hit("t", 5)
            await asyncio.sleep(0.1)
            storage: Any = limiter._alone.storage
            for kept in (storage.storage, storage.expirations, storage.locks):
                assert len(kept) < 10

    asyncio.run(run())


def test_a_broker_that_is_away_stops_nobody_and_counts_again_when_it_is_back(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.3)
    caplog.set_level(logging.INFO, logger="safegraft.gateway")

    async def run() -> None:
        async with limiters(broker.url, broker.url) as [one, two]:
            assert await passed(one, "t", 9) == 5
            broker.stop()
            # Each by itself now, and still with a limit.
            assert await passed(one, "u", 9) == 5
            assert await passed(two, "u", 9) == 5
            await asyncio.sleep(0.4)
            assert await passed(one, "v", 9) == 5
            assert caplog.text.count("by this gateway alone") == 2
            broker.start()
            await asyncio.sleep(0.4)
            assert await passed(one, "w", 3) == 3
            assert await passed(two, "w", 9) == 2
            assert caplog.text.count("in the broker again") == 2

    asyncio.run(run())


def test_a_broker_that_hangs_costs_a_moment_once(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Long enough to be told from what a busy machine needs; one after the other they would take many times that.
    monkeypatch.setattr(module, "ANSWER_SECONDS", 3.0)

    async def run() -> None:
        async with limiters(broker.url) as [limiter]:
            await limiter.hit("t", 5)
            broker.send(signal.SIGSTOP)
            began = time.monotonic()
            try:
                # Also those that had to wait for a connection.
                await asyncio.gather(*[limiter.hit("t", 5) for _ in range(300)])
            finally:
                broker.send(signal.SIGCONT)
            assert time.monotonic() - began < 3 * module.ANSWER_SECONDS
            began = time.monotonic()
            await asyncio.gather(*[limiter.hit("t", 5) for _ in range(300)])
            assert time.monotonic() - began < module.ANSWER_SECONDS
            assert caplog.text.count("by this gateway alone") == 1

    asyncio.run(run())


def test_two_thousand_at_once_are_no_failure_of_the_broker(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # On a machine that is busy otherwise one answer may well take the half second that is usual here.
    monkeypatch.setattr(module, "ANSWER_SECONDS", 4 * module.ANSWER_SECONDS)

    async def run() -> None:
        async with limiters(broker.url) as [limiter]:
            began = time.monotonic()
            counted = await asyncio.gather(*[limiter.hit("t", 500) for _ in range(2000)])
            # 500 in every second that it took, and in the one in which it began.
            seconds = math.ceil(time.monotonic() - began)
            assert 500 <= sum(one.within for one in counted) <= 500 * (1 + seconds)
        assert caplog.text == ""

    asyncio.run(run())


@pytest.mark.parametrize("fault", ["full", "wrong password", "not there"])
def test_a_broker_that_refuses_stops_nobody(broker: Broker, fault: str) -> None:
    urls = {"full": broker.url, "wrong password": f"redis://:no@127.0.0.1:{broker.port}/0"}
    if fault == "full":
        with redis.Redis(port=broker.port) as client:
            client.config_set("maxmemory", "1")

    async def run() -> None:
        async with limiters(urls.get(fault, f"redis://127.0.0.1:{free_port()}/0")) as [limiter]:
            assert await passed(limiter, "t", 9) == 5

    asyncio.run(run())
