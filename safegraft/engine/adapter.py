"""The weights of a PEFT adapter, one module at a time, in and out.

Knows how `safegraft.adapter`'s description maps onto tensors; does not know what is done to them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from safegraft.adapter import WEIGHTS, AdapterDescription, LoraModule
from safegraft.engine.methods.base import Module
from safegraft.engine.tensors import TORCH_DTYPES, TensorReader, TensorWriter, to_bytes
from safegraft.errors import InvalidTensors
from safegraft.files import atomic_file


class AdapterReader:
    """Modules of an adapter folder in float32. Use as a context manager."""

    def __init__(self, folder: Path, description: AdapterDescription, device: str = "cpu") -> None:
        self.description = description
        self._tensors = TensorReader(folder / WEIGHTS, description.header)
        self._device = device

    def __enter__(self) -> "AdapterReader":
        self._tensors.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._tensors.__exit__(None, None, None)

    def module(self, module: LoraModule) -> Module:
        """Reads one module. Raises InvalidTensors (`non_finite`) with the tensor's name."""
        factors = []
        for entry in (module.a, module.b):
            tensor = self._tensors.tensor(entry.name).to(self._device).float()
            if not bool(torch.isfinite(tensor).all()):
                raise InvalidTensors(f"{entry.name} holds NaN or infinity.", code="non_finite", param=entry.name)
            factors.append(tensor)
        return Module(module.name, factors[0], factors[1], module.scaling)

    def bytes(self, name: str) -> bytearray:
        """One tensor's bytes as the customer sent them."""
        return self._tensors.bytes(name)


class AdapterWriter:
    """Writes an adapter with the same keys, shapes, dtypes and order as the one that was described."""

    def __init__(self, writer: TensorWriter) -> None:
        self._writer = writer

    def keep(self, module: LoraModule, reader: AdapterReader) -> None:
        """Copies both factors' bytes unchanged."""
        for entry in (module.a, module.b):
            self._writer.write(entry.name, reader.bytes(entry.name))

    def replace(self, module: LoraModule, patched: Module, reader: AdapterReader) -> tuple[Module, bool]:
        """Writes new factors in the customer's dtype.

        Returns the module as it was rounded, and whether any byte differs from the customer's.
        """
        rounded, changed = [], False
        for entry, tensor in ((module.a, patched.a), (module.b, patched.b)):
            stored = tensor.to(TORCH_DTYPES[entry.dtype])
            if not bool(torch.isfinite(stored).all()):
                raise InvalidTensors(
                    f"{entry.name}: the repaired values do not fit into {entry.dtype}.",
                    code="out_of_range",
                    param=entry.name,
                    hint="Save the adapter as bfloat16 or float32.",
                )
            raw = to_bytes(stored)
            changed = changed or raw != reader.bytes(entry.name)
            self._writer.write(entry.name, raw)
            rounded.append(stored.float())
        return patched.with_factors(rounded[0], rounded[1]), changed


@contextmanager
def adapter_writer(path: Path, description: AdapterDescription) -> Iterator[AdapterWriter]:
    """A writer whose file appears as `path` only when every tensor was written."""
    entries = sorted(description.header.tensors.values(), key=lambda entry: entry.start)
    with atomic_file(path) as file:
        writer = TensorWriter(file, {entry.name: (entry.dtype, entry.shape) for entry in entries})
        yield AdapterWriter(writer)
        writer.close()
