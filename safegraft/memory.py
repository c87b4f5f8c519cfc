"""How a process that works on tensors asks the system for memory."""

import ctypes
import os

# mallopt's name for the number of arenas, in glibc's malloc.h.
_M_ARENA_MAX = -8


def prepare_memory() -> None:
    """Large pages, and one heap for all threads; to be called before the process has its first tensor, and before it is
    confined, which forbids the second."""
    prefer_large_pages()
    share_one_heap()


def prefer_large_pages() -> None:
    """Has PyTorch ask Linux for pages of 2 MiB, unless the environment says otherwise.

    A module's factors are some thousands of small pages, and having them anew can cost more than what is written into
    them. PyTorch reads the variable when it makes its first tensor, and not again.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def share_one_heap() -> None:
    """Has glibc's malloc keep one heap for all threads, unless the environment says otherwise; other systems' libraries
    keep theirs as they like.

    With a heap for each, what a thread has let go stays with that thread: on an adapter of an eight-billion-parameter
    model a hundred megabytes, and no time is gained by it.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_ARENA_MAX, 1)
