"""One tensor at a time out of a safetensors file, and into a new one.

Reads with `pread` instead of a memory map: what is dropped is really gone, so the resident memory stays that of one
module however large the file is.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from safegraft.errors import InvalidTensors
from safegraft.header import Header, TensorEntry, read_header

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class TensorReader:
    """Tensors of a file by name. Use as a context manager; `header` is checked when it opens."""

    def __init__(self, path: Path, header: Header | None = None) -> None:
        self.path = path
        self.header = header or read_header(path)
        self._file: BinaryIO | None = None

    def __enter__(self) -> "TensorReader":
        self._file = self.path.open("rb", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def bytes(self, name: str) -> bytearray:
        """The tensor's bytes as they lie in the file. Raises InvalidTensors where the file has become shorter."""
        entry = self.header.tensors[name]
        assert self._file is not None, "TensorReader is used as a context manager"
        raw = bytearray(entry.end - entry.start)
        view, at = memoryview(raw), entry.start
        while view:
            read = os.preadv(self._file.fileno(), [view], at)
            if read == 0:
                raise InvalidTensors(f"{self.path.name} ends in {name}.", code="truncated_file", param=name)
            view, at = view[read:], at + read
        return raw

    def tensor(self, name: str) -> Tensor:
        """The tensor in its own dtype; the caller owns its memory."""
        entry = self.header.tensors[name]
        if not entry.elements:
            return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        return torch.frombuffer(self.bytes(name), dtype=TORCH_DTYPES[entry.dtype]).reshape(entry.shape)


class TensorWriter:
    """Writes tensors in any order into a file whose header is known from the start.

    `file` is a new, open, empty file; the caller decides when and under which name it appears.
    """

    def __init__(self, file: BinaryIO, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """shapes: name → (safetensors dtype, shape), in the order in which the bytes shall lie."""
        self._file = file
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, (dtype, shape) in shapes.items():
            size = TensorEntry(name, dtype, shape, 0, 0).elements * TORCH_DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.flush()
        self._start = file.tell()
        self._left = {name: item["data_offsets"] for name, item in header.items() if name != "__metadata__"}  # type: ignore[index]
        file.truncate(self._start + at)

    def write(self, name: str, data: Tensor | bytes | bytearray) -> None:
        """Writes one tensor (on any device, of the announced dtype) or its raw bytes. Each name once."""
        raw = data if isinstance(data, bytes | bytearray) else to_bytes(data)
        start, end = self._left.pop(name)
        if len(raw) != end - start:
            raise ValueError(f"{name}: {len(raw)} bytes do not fill {end - start}.")
        # At its place, not at the file's position: several threads may write different tensors at once.
        view, at = memoryview(raw), self._start + start
        while view:
            written = os.pwrite(self._file.fileno(), view, at)
            view, at = view[written:], at + written

    def close(self) -> None:
        """Raises ValueError where an announced tensor was never written."""
        if self._left:
            raise ValueError(f"never written: {sorted(self._left)[:3]}")


def to_bytes(tensor: Tensor) -> bytes:
    """A tensor's bytes in C order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
