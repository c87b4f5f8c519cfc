"""How a process that works on tensors asks the system for memory."""

import ctypes
import os

# mallopt's name for the number of arenas, in glibc's malloc.h.
_M_ARENA_MAX = -8


def prepare_memory() -> None:
    """Large pages, and one heap for all threads; unless the environment says otherwise.

    To be called before the process has its first tensor: PyTorch reads the variable then, and not again.
    """
    # Has PyTorch ask Linux for pages of 2 MiB. A module's factors are some thousands of small pages, and having them
    # anew can cost more than what is written into them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "MALLOC_ARENA_MAX" not in os.environ:
        _one_arena()


def _one_arena() -> None:
    """glibc else gives every thread a heap of its own, and each keeps what its thread has let go for that thread alone:
    on an adapter of an eight-billion-parameter model a hundred megabytes, and no time is gained by it."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # Another system's library, which keeps its heaps as it likes.
    mallopt(_M_ARENA_MAX, 1)
