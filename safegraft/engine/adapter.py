"""The weights of a PEFT adapter, one module at a time, in and out.

Knows how `safegraft.adapter`'s description maps onto tensors, and how the configuration and keys of an adapter change
where a repair is asked for in its exact rank or brings biases; does not know what is done to the weights.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safegraft.adapter import CONFIG, WEIGHTS, AdapterDescription, LoraModule
from safegraft.engine.methods.base import Module
from safegraft.engine.tensors import TORCH_DTYPES, TensorReader, TensorWriter, view_of_bytes
from safegraft.errors import InvalidTensors
from safegraft.files import atomic_file
from safegraft.header import TensorEntry


class AdapterReader:
    """Modules of an adapter folder in float32. Use as a context manager; safe to read from several threads."""

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
            if not _finite(tensor):
                raise InvalidTensors(f"{entry.name} holds NaN or infinity.", code="non_finite", param=entry.name)
            factors.append(tensor)
        return Module(module.name, factors[0], factors[1], module.scaling)

    def tensor(self, name: str) -> Tensor:
        """One tensor in its own dtype."""
        return self._tensors.tensor(name)

    def holds(self, name: str, raw: memoryview) -> bool:
        """Whether these are one tensor's bytes as the customer sent them."""
        return self._tensors.holds(name, raw)

    def copy(self, name: str, writer: TensorWriter) -> None:
        """Writes one tensor's bytes as the customer sent them."""
        writer.copy(name, self._tensors)


def _finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. The sum, which is one pass, tells; where it overflows, entry by entry."""
    return math.isfinite(float(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


@dataclass(frozen=True)
class Layout:
    """What an output file holds: the ranks of its modules, and whether they have biases. None of either: as it came."""

    description: AdapterDescription
    ranks: Mapping[str, int] | None = None
    biases: bool = False

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Key → (safetensors dtype, shape), in the order of the customer's file."""
        modules = {entry.name: module for module in self.description.modules for entry in (module.a, module.b)}
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for entry in sorted(self.description.header.tensors.values(), key=lambda entry: entry.start):
            module = modules[entry.name]
            rank = self.rank(module)
            shape = (rank, module.inputs) if entry is module.a else (module.outputs, rank)
            found[entry.name] = (entry.dtype, shape)
            if self.biases and entry is module.b:
                found[bias_key(module)] = (entry.dtype, (module.outputs,))
        return found

    def rank(self, module: LoraModule) -> int:
        return module.rank if self.ranks is None else self.ranks[module.name]

    def config(self, raw: bytes) -> bytes:
        """adapter_config.json for this layout; the customer's own bytes where nothing in it changes."""
        changed = {module.name: self.rank(module) for module in self.description.modules}
        grown = any(changed[module.name] != module.rank for module in self.description.modules)
        if not grown and not self.biases:
            return raw
        config = json.loads(raw.decode("utf-8-sig"))
        if self.biases:
            config["lora_bias"] = True
            # How training began no longer matters, and PEFT takes biases with no other initialisation.
            if not isinstance(config.get("init_lora_weights"), bool):
                config["init_lora_weights"] = True
        if grown:
            config |= self._patterns(changed)
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()

    def _patterns(self, ranks: Mapping[str, int]) -> dict[str, object]:
        """r, lora_alpha and, where they differ between modules, their patterns, so that every scaling stays."""
        root = self.description.config.use_rslora
        alphas = {
            module.name: module.scaling * (math.sqrt(ranks[module.name]) if root else ranks[module.name])
            for module in self.description.modules
        }
        first = self.description.modules[0].name
        own: dict[str, object] = {"r": ranks[first], "lora_alpha": _number(alphas[first])}
        if len(set(ranks.values())) == 1 and len({round(alpha, 9) for alpha in alphas.values()}) == 1:
            return own | {"rank_pattern": {}, "alpha_pattern": {}}
        named = {name.replace(".", r"\."): name for name in ranks}
        return own | {
            "rank_pattern": {pattern: ranks[name] for pattern, name in named.items()},
            "alpha_pattern": {pattern: _number(alphas[name]) for pattern, name in named.items()},
        }


def _number(alpha: float) -> float | int:
    rounded = round(alpha)
    return rounded if abs(alpha - rounded) < 1e-9 * max(1.0, abs(alpha)) else alpha


def bias_key(module: LoraModule) -> str:
    """The key under which PEFT saves the bias of lora_B."""
    return module.b.name.removesuffix("weight") + "bias"


class AdapterWriter:
    """Writes an adapter of a given layout. Safe to use from several threads, each module once."""

    def __init__(self, writer: TensorWriter, layout: Layout) -> None:
        self._writer = writer
        self._layout = layout

    def keep(self, module: LoraModule, before: Module, reader: AdapterReader) -> None:
        """Copies both factors' bytes unchanged, or filled up with zeros where the layout has a higher rank."""
        if self._layout.rank(module) != module.rank:
            self.replace(module, before, before, reader)
            return
        for entry in (module.a, module.b):
            reader.copy(entry.name, self._writer)
        self._write_bias(module, None)

    def replace(
        self, module: LoraModule, before: Module, patched: Module, reader: AdapterReader, bias: Tensor | None = None
    ) -> tuple[Module, bool]:
        """Writes new factors in the customer's dtype, filled up with zeros to the layout's rank.

        before: the module as it was read. bias (d,): added to the layer's output, without the scaling. Returns the
        module as it was rounded, and whether any byte differs from the customer's.
        """
        missing = self._layout.rank(module) - patched.rank
        parts = (
            (module.a, before.a, patched.a, (0, 0, 0, missing)),
            (module.b, before.b, patched.b, (0, missing)),
        )
        rounded, changed = [], False
        for entry, own, new, padding in parts:
            if new is own and not missing:
                # A factor that the repair left alone: the customer's very bytes.
                reader.copy(entry.name, self._writer)
                rounded.append(own)
                continue
            if missing:
                new = torch.nn.functional.pad(new, padding)
            stored = new.to(TORCH_DTYPES[entry.dtype])
            rounded.append(self._fitting(entry.name, stored, entry.dtype))
            raw = view_of_bytes(stored)
            changed = changed or not self._is(stored, entry, raw, reader)
            self._writer.write(entry.name, raw)
        changed = self._write_bias(module, bias) or changed
        return before.with_factors(rounded[1], rounded[0]), changed

    def _is(self, stored: Tensor, entry: TensorEntry, raw: memoryview, reader: AdapterReader) -> bool:
        """Whether a factor is the customer's, perhaps filled up with zeros."""
        if tuple(stored.shape) == entry.shape:
            return reader.holds(entry.name, raw)
        own = reader.tensor(entry.name)
        filled = torch.zeros_like(stored, device="cpu")
        filled[: own.shape[0], : own.shape[1]] = own
        return torch.equal(filled, stored.cpu())

    def _write_bias(self, module: LoraModule, bias: Tensor | None) -> bool:
        if not self._layout.biases:
            return False
        value = torch.zeros(module.outputs) if bias is None else bias / module.scaling
        stored = value.to(TORCH_DTYPES[module.b.dtype])
        self._fitting(bias_key(module), stored, module.b.dtype)
        self._writer.write(bias_key(module), stored)
        return bool(value.any())

    def _fitting(self, name: str, stored: Tensor, dtype: str) -> Tensor:
        """What was rounded, in float32."""
        rounded = stored.float()
        if not _finite(rounded):
            raise InvalidTensors(
                f"{name}: the repaired values do not fit into {dtype}.",
                code="out_of_range",
                param=name,
                hint="Save the adapter as bfloat16 or float32.",
            )
        return rounded


@contextmanager
def adapter_writer(folder: Path, layout: Layout, source: Path) -> Iterator[AdapterWriter]:
    """A writer of `folder`'s weights and configuration. They appear only when every tensor was written."""
    with atomic_file(folder / WEIGHTS) as file:
        writer = TensorWriter(file, layout.entries())
        yield AdapterWriter(writer, layout)
        writer.close()
    (folder / CONFIG).write_bytes(layout.config((source / CONFIG).read_bytes()))
