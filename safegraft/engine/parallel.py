"""The same work on many modules, several at a time, with results that do not depend on how many.

One module's algebra runs on one thread: how a product is split between threads decides the order of its sums, and with
it the last bits. Modules are small and many, so this is also the faster way to use several cores, unless they are very
small: threads whose operations take microseconds wait for the interpreter, and for each other, longer than they work.
On two cores an adapter of 5 MB took up to nearly twice as long with two threads as with one.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
# Seconds of a module's work in which its thread needs the interpreter, more or less: what takes less than twice that is
# done sooner by one thread than by two. Measured: docs/decisions/0012-threads.md.
HELD = 0.002
# So many items are looked at: a layer's, which are of different sizes.
TRIED = 7
# Items that are worth so many threads are long.
LONG = 4
# For each thread so many items are begun or done that nobody has taken yet.
AHEAD = 2


def each(items: Iterable[Item], work: Callable[[Item], Result], workers: int) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in the order of the items, by one thread until more are worth it, `workers` at most. An error,
    or leaving the loop, stops what has not begun."""

    def one(item: Item) -> Result:
        # Inference mode belongs to a thread.
        with torch.inference_mode():
            return work(item)

    left = iter(items)
    recent: deque[float] = deque(maxlen=TRIED)
    wanted = 1
    for item in left:
        began = time.perf_counter()
        result = one(item)
        # With what it waited for a disk, which several threads do at the same time.
        recent.append(time.perf_counter() - began)
        yield item, result
        wanted = worthwhile(recent)
        # With long items no time is lost; else a whole layer tells.
        if min(wanted, workers) > 1 and (len(recent) == TRIED or wanted >= LONG):
            break
    rest = list(left)
    if not rest:
        return
    threads = min(wanted, workers, len(rest))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="module")
    try:
        waiting = iter(rest)
        # No more than these are ahead of what takes the results: a slow disk would else fill the memory with them.
        begun = deque((item, pool.submit(one, item)) for item in islice(waiting, AHEAD * threads))
        while begun:
            item, future = begun.popleft()
            result = future.result()
            begun.extend((later, pool.submit(one, later)) for later in islice(waiting, 1))
            yield item, result
            # Not kept while the next one is waited for.
            del result, future
    finally:
        pool.shutdown(cancel_futures=True)


def worthwhile(took: Collection[float]) -> int:
    """How many threads are worth it for items of which these took so many seconds each on one."""
    if len(took) < 2:
        return 1
    # The mean, since modules that are left as they are take next to nothing; without the longest, which may have waited
    # for what is loaded once.
    usual = (sum(took) - max(took)) / (len(took) - 1)
    return max(1, int(usual / HELD))


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
