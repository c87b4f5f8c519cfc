"""Which library multiplies float32 matrices on a CPU.

PyTorch's own choice is MKL, which reaches less than half of oneDNN's rate on processors that are not Intel's. PyTorch
takes oneDNN where products *may* be computed in bfloat16; oneDNN does so where a processor has units for it (AMX), and
in float32 elsewhere. So it is asked first: what comes out less precise than float32 is not used.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch

from safegraft.memory import prefer_large_pages

# (rows, inner, columns): a factor with itself, square, wide, few rows.
_SHAPES = ((64, 256, 64), (96, 96, 96), (16, 1024, 48), (4, 512, 256))
_SHAPES_KEPT = 64
# Of the result's norm. float32 gives some 3e-7 here, bfloat16 4e-3.
_FLOAT32 = 2e-6


@dataclass
class _Setting:
    """The process's one setting, and how many blocks want it: the first keeps what was there, the last puts it back."""

    lock: RLock = field(default_factory=RLock)
    blocks: int = 0
    exact: bool = False
    before: str = "none"


_setting = _Setting()


def _matmul() -> Any:
    """PyTorch's handle, None where it is too old or has no oneDNN."""
    library: Any = torch.backends.mkldnn
    found = getattr(library, "matmul", None) if library.is_available() else None
    return found if hasattr(found, "fp32_precision") else None


@contextmanager
def fast_products() -> Iterator[bool]:
    """For the length of the block, products of float32 matrices by oneDNN where that is float32; yields whether it is.

    The setting is the process's, not the thread's; blocks may overlap. On a GPU it has no effect.
    """
    matmul = _matmul()
    if matmul is None:
        yield False
        return
    with _setting.lock:
        # Read when oneDNN is first used. It keeps code and memory for every shape, 1024 of them if it is not told; an
        # adapter may have a rank of its own in every module, and that was a gigabyte.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_SHAPES_KEPT))
        prefer_large_pages()
        if _setting.blocks == 0:
            _setting.before = matmul.fp32_precision
            matmul.fp32_precision = "bf16"
            _setting.exact = _is_float32()
            if not _setting.exact:
                matmul.fp32_precision = _setting.before
        _setting.blocks += 1
        exact = _setting.exact
    try:
        yield exact
    finally:
        with _setting.lock:
            _setting.blocks -= 1
            if _setting.blocks == 0:
                matmul.fp32_precision = _setting.before


def product_library() -> str:
    """`oneDNN`, or `PyTorch's choice`: it decides the last bits, so reports name it."""
    with fast_products() as exact:
        return "oneDNN" if exact else "PyTorch's choice"


@contextmanager
def fast_layers(model: torch.nn.Module) -> Iterator[bool]:
    """For the length of the block, `fast_products` in the forward passes of the model's linear layers alone.

    The products of attention are many and small, and slower that way. Not for two models at a time.
    """
    with fast_products() as exact:
        pass
    if not exact:
        yield False
        return
    matmul = _matmul()
    before = matmul.fp32_precision

    def begin(*_: object) -> None:
        matmul.fp32_precision = "bf16"

    def end(*_: object) -> None:
        matmul.fp32_precision = before

    hooks = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            hooks += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end, always_call=True)]
    try:
        yield True
    finally:
        for hook in hooks:
            hook.remove()


def _is_float32() -> bool:
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in _SHAPES:
        a, b = (torch.randn(shape, generator=generator) for shape in ((rows, inner), (columns, inner)))
        for one, other in ((a, b.T), (a.T.contiguous().T, b.T.contiguous())):
            wanted = one.double() @ other.double()
            error = torch.linalg.vector_norm((one @ other).double() - wanted)
            if not float(error) <= _FLOAT32 * float(torch.linalg.vector_norm(wanted)):
                return False
    return True
