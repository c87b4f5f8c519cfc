"""The same work on many modules, several at a time, with results that do not depend on how many.

One module's algebra runs on one thread: how a product is split between threads decides the order of its sums, and with
it the last bits. Modules are small and many, so this is also the faster way to use several cores, unless they are very
small: threads whose operations take microseconds wait for the interpreter, and for each other, longer than they work.
On two cores an adapter of 5 MB took twice as long with two threads as with one.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
# Seconds of a module's work in which its thread needs the interpreter, more or less: what takes less than twice that is
# done sooner by one thread than by two. Measured: docs/decisions/0012-threads.md.
HELD = 0.002
# So many items are tried on one thread first: a layer's, which are of different sizes.
TRIED = 7


def each(items: Iterable[Item], work: Callable[[Item], Result], workers: int) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in the order of the items, by as many threads up to `workers` as are worth it. An error, or
    leaving the loop, stops what has not begun."""

    def one(item: Item) -> Result:
        # Inference mode belongs to a thread.
        with torch.inference_mode():
            return work(item)

    items = list(items)
    took: list[float] = []
    done = 0
    while done < len(items) and not _enough(took, workers):
        began = time.perf_counter()
        result = one(items[done])
        took.append(time.perf_counter() - began)
        yield items[done], result
        done += 1
    rest = items[done:]
    workers = min(worthwhile(took, workers), len(rest))
    if workers <= 1:
        for item in rest:
            yield item, one(item)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="module")
    try:
        yield from zip(rest, pool.map(one, rest), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def worthwhile(took: list[float], workers: int) -> int:
    """How many threads are worth it for items of which the first took so many seconds each on one."""
    # The lower one of two: the first of all may have waited for what is only loaded once.
    return max(1, min(workers, int(statistics.median_low(took) / HELD))) if took else 1


def _enough(took: list[float], workers: int) -> bool:
    """Whether it is known how long items take. With long ones no time is lost: two of them say it."""
    return workers == 1 or len(took) >= TRIED or (len(took) > 1 and sum(took) > TRIED * workers * HELD)


@contextmanager
def one_thread_each(device: str) -> Iterator[int]:
    """Sets torch to one thread an operation for the length of the block; yields how many modules may run at once."""
    threads = torch.get_num_threads()
    if device != "cpu" or threads == 1:
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
