"""Large pages of memory for PyTorch's tensors."""

import os


def prefer_large_pages() -> None:
    """Has PyTorch ask Linux for pages of 2 MiB, unless the environment says otherwise.

    A module's factors are some thousands of small pages, and having them anew can cost more than what is written into
    them. To be called before the process has its first tensor: PyTorch reads the variable then, and not again.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
