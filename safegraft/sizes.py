"""How large an adapter's update is, module by module. By numpy on the file's bytes, one module at a time, so that
`safegraft inspect` needs no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from safegraft.adapter import AdapterDescription, LoraModule
from safegraft.errors import InvalidTensors
from safegraft.header import TensorEntry


def update_sizes(
    weights: Path, description: AdapterDescription, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, float]:
    """Module name → ‖ΔW‖_F/√(d·k), the root mean square of the entries of ΔW = scaling·B·A.

    progress: called with modules done and in all. Raises InvalidTensors where the file ends in a tensor.
    """
    found = {}
    with weights.open("rb") as file:
        for index, module in enumerate(description.modules):
            found[module.name] = _size(file, module)
            progress(index + 1, len(description.modules))
    return found


def _size(file: BinaryIO, module: LoraModule) -> float:
    a, b = _read(file, module.a), _read(file, module.b)
    # ‖BA‖² = tr(BᵀB·AAᵀ): r × r, and never a product of d × k.
    square = float(np.sum((b.T @ b) * (a @ a.T)))
    return abs(module.scaling) * float(np.sqrt(max(square, 0.0) / (module.inputs * module.outputs)))


def _read(file: BinaryIO, entry: TensorEntry) -> NDArray[Any]:
    """One tensor as float64."""
    file.seek(entry.start)
    raw = file.read(entry.end - entry.start)
    if len(raw) != entry.end - entry.start:
        raise InvalidTensors(f"{entry.name}: the file ends in this tensor.", code="truncated_file")
    if entry.dtype == "BF16":
        # The upper half of a float32.
        values: NDArray[Any] = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[entry.dtype])
    return values.reshape(entry.shape).astype(np.float64)
