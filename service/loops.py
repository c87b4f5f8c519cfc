"""Threads that do one thing again and again: announce jobs, send webhooks, collect garbage.

Every gateway runs them all; what they do is guarded by the records, so that several of them are harmless.
"""

import logging
import threading
from collections.abc import Callable, Collection

log = logging.getLogger("safegraft.loops")
FAULT_SECONDS = 2.0


class Loop:
    """Calls `turn` every `pause` seconds, and at once when it is woken. A turn that fails is logged, not the end."""

    def __init__(self, name: str, turn: Callable[[], object], pause: float) -> None:
        self.name = name
        self._turn = turn
        self._pause = pause
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something to do: do not wait for the next turn."""
        self._wake.set()

    def end(self) -> None:
        """Begins no further turn. Returns at once."""
        self._stop.set()
        self._wake.set()

    def stop(self) -> None:
        """Ends it, and waits for the turn that runs."""
        self.end()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._turn()
            except Exception:
                # Whatever went wrong (database, broker), the next turn starts from the records again.
                log.exception("%s failed; trying again", self.name)
                self._stop.wait(FAULT_SECONDS)
            self._wake.wait(self._pause)
            self._wake.clear()


def stop_all(loops: Collection[Loop]) -> None:
    """Tells all of them before it waits for the first: their last turns run at the same time."""
    for loop in loops:
        loop.end()
    for loop in loops:
        loop.stop()
