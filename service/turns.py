"""Threads for work that waits: tenants take turns, and the slow work of one does not hold up the others."""

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class Turns:
    """At most `at_once` pieces of work at a time, those of one tenant at most all but one (or the only one).

    Of the tenants that wait, the one goes first of which least is running, then the one that was served longest ago; a
    tenant's own work goes in the order in which it came.
    """

    def __init__(self, at_once: int, name: str) -> None:
        self._at_once = at_once
        self._most = max(1, at_once - 1)
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix=name)
        self._lock = Lock()
        self._running: Counter[str] = Counter()
        self._count = 0
        self._served: dict[str, int] = {}  # the count at its last turn, of tenants that wait or of which something runs
        self._waiting: dict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = {}

    def submit(self, tenant: str, work: Callable[[], Answer]) -> Future[Answer]:
        """What `work` will return or raise. While it waits it can be cancelled."""
        future: Future[Answer] = Future()
        with self._lock:
            self._waiting.setdefault(tenant, deque()).append((future, work))
        self._advance()
        return future

    def close(self) -> None:
        """Cancels what waits. What runs goes on; nobody waits for it here."""
        with self._lock:
            left = [future for queue in self._waiting.values() for future, _ in queue]
            self._waiting.clear()
        for future in left:
            future.cancel()
        self._threads.shutdown(wait=False)

    def _advance(self) -> None:
        with self._lock:
            while (tenant := self._next()) is not None:
                future, work = self._waiting[tenant].popleft()
                if not self._waiting[tenant]:
                    del self._waiting[tenant]
                if future.set_running_or_notify_cancel():
                    self._count += 1
                    self._served[tenant] = self._count
                    self._running[tenant] += 1
                    self._threads.submit(self._run, tenant, future, work)
                else:
                    self._forget(tenant)

    def _next(self) -> str | None:
        free = [tenant for tenant in self._waiting if self._running[tenant] < self._most]
        if not free or self._running.total() >= self._at_once:
            return None
        return min(free, key=lambda tenant: (self._running[tenant], self._served.get(tenant, 0)))

    def _run(self, tenant: str, future: Future[Any], work: Callable[[], Any]) -> None:
        try:
            answer = work()
        except BaseException as error:
            self._ended(tenant)
            future.set_exception(error)
        else:
            self._ended(tenant)
            future.set_result(answer)

    def _ended(self, tenant: str) -> None:
        with self._lock:
            self._running[tenant] -= 1
            if not self._running[tenant]:
                del self._running[tenant]
            self._forget(tenant)
        self._advance()

    def _forget(self, tenant: str) -> None:
        if tenant not in self._waiting and tenant not in self._running:
            self._served.pop(tenant, None)
