"""How often a tenant asks: counted in the broker, so that all gateways together keep one limit.

While the broker does not answer each gateway counts by itself: requests are neither refused nor let through uncounted
because of it.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

from limits import RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

log = logging.getLogger("safegraft.gateway")
# A broker that hangs costs a request this long, once in RETRY_SECONDS.
ANSWER_SECONDS = 0.25
RETRY_SECONDS = 5.0
CONNECTIONS = 32
PREFIX = "safegraft:requests"


@dataclass(frozen=True)
class Counted:
    """within: may the request pass; left: how many more may at once; seconds: until that number grows."""

    within: bool
    left: int
    seconds: float


class Limiter:
    """A sliding window of one second for each tenant. Lives on the event loop."""

    def __init__(self, redis_url: str) -> None:
        self._alone = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._pool = _pool(redis_url)
        self._shared = _shared(self._pool)
        self._shared_from = 0.0  # by the monotonic clock: until then the broker is not asked
        self._room = asyncio.Semaphore(CONNECTIONS)

    async def hit(self, tenant: str, allowed: int) -> Counted:
        """Counts one request of the tenant, which may make `allowed` a second. One that is refused does not count."""
        rate = RateLimitItemPerSecond(allowed)
        if self._shared is not None:
            # Those who had to wait here look again whether the broker answers: they do not wait for it one by one.
            async with self._room:
                asked = time.monotonic()
                if asked >= self._shared_from:
                    try:
                        counted = await _hit(self._shared, rate, tenant)
                    except (RedisError, OSError, TimeoutError) as error:
                        self._away(error)
                    else:
                        self._back(asked)
                        return counted
        return await _hit(self._alone, rate, tenant)

    def _away(self, error: Exception) -> None:
        if not self._shared_from:
            log.warning("requests are counted by this gateway alone: the broker does not answer (%s)", error)
        self._shared_from = time.monotonic() + RETRY_SECONDS

    def _back(self, asked: float) -> None:
        if self._shared_from and asked >= self._shared_from:
            log.info("requests are counted in the broker again")
            self._shared_from = 0.0

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.aclose()


async def _hit(limiter: SlidingWindowCounterRateLimiter, rate: RateLimitItemPerSecond, tenant: str) -> Counted:
    within = await limiter.hit(rate, tenant)
    reset, left = await limiter.get_window_stats(rate, tenant)
    return Counted(within, left, max(0.0, reset - time.time()))


def _shared(pool: ConnectionPool | None) -> SlidingWindowCounterRateLimiter | None:
    if pool is None:
        return None
    # The address only names the kind of server; connections come from the pool.
    storage = RedisStorage("async+redis://", implementation="redispy", key_prefix=PREFIX, connection_pool=pool)  # type: ignore[arg-type]
    return SlidingWindowCounterRateLimiter(storage)


def _pool(url: str) -> ConnectionPool | None:
    """Connections to the broker; None where its address is of a kind that only Celery understands (sentinels)."""
    scheme, _, rest = url.partition("://")
    if scheme == "redis+socket":  # Celery's word for it
        url = f"unix://{rest.replace('virtual_host=', 'db=')}"
    elif scheme not in ("redis", "rediss"):
        log.warning("requests are counted by each gateway alone: the broker is no plain Redis")
        return None
    pool: ConnectionPool = ConnectionPool.from_url(
        url,
        max_connections=CONNECTIONS,
        socket_timeout=ANSWER_SECONDS,
        socket_connect_timeout=ANSWER_SECONDS,
        retry=Retry(NoBackoff(), 0),  # there is something else to do than to wait
    )
    return pool
