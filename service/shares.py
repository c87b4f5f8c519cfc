"""What a gateway has few of, and no tenant may take all of: upload slots, event streams."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from safegraft.errors import UserError


class Shares:
    """`total` places in this process. One tenant gets at most three quarters of them, so that others find some."""

    def __init__(self, what: str, total: int) -> None:
        """what: in the plural, as messages and the error's code (`too_many_…`) name it."""
        self._what = what
        self._total = total
        self._most = total - total // 4
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        return self._held.total()

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """One place, until the end of the block. Raises UserError (`too_many_…`) where there is none."""
        with self._lock:
            if self._held.total() >= self._total or self._held[tenant] >= self._most:
                raise UserError(
                    f"Too many {self._what} at once.",
                    code=f"too_many_{self._what}",
                    hint="Try again in a few seconds.",
                )
            self._held[tenant] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[tenant] -= 1
                if not self._held[tenant]:
                    del self._held[tenant]
