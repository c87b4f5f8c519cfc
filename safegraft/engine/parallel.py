"""The same work on many modules, several at a time, with results that do not depend on how many.

One module's algebra runs on one thread: how a product is split between threads decides the order of its sums, and with
it the last bits. Modules are small and many, so this is also the faster way to use several cores.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(items: Iterable[Item], work: Callable[[Item], Result], workers: int) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in the order of the items. An error, or leaving the loop, stops what has not begun."""

    def one(item: Item) -> Result:
        # Inference mode belongs to a thread.
        with torch.inference_mode():
            return work(item)

    items = list(items)
    if workers == 1:
        for item in items:
            yield item, one(item)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="module")
    try:
        yield from zip(items, pool.map(one, items), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread_each(device: str) -> Iterator[int]:
    """Sets torch to one thread an operation for the length of the block; yields how many modules run at once."""
    threads = torch.get_num_threads()
    if device != "cpu" or threads == 1:
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
