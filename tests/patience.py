"""For what holds only while the machine keeps pace: it is tried again where the machine did not."""

import time
from collections.abc import Callable
from typing import TypeVar

TRIES = 10
T = TypeVar("T")


def within(seconds: float, attempt: Callable[[int], T], before: Callable[[], None] = lambda: None) -> T:
    """What `attempt` gives in a try that took less than so many seconds; it gets the try's number.

    `before` each try something else may be done, whose time does not count.

    A limit of requests in a second, for one, can be seen only where the requests come within a second. On a busy
    machine they may not; then nothing is known, and the next try is made.

    Raises:
        AssertionError: no try was that quick.
    """
    for number in range(TRIES):
        before()
        began = time.monotonic()
        found = attempt(number)
        if time.monotonic() - began < seconds:
            return found
    raise AssertionError(f"not once in {TRIES} tries in less than {seconds} s")
