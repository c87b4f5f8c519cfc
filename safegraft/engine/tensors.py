"""One tensor at a time out of a safetensors file, and into a new one.

Reads with `pread` instead of a memory map: what is dropped is really gone, so the resident memory stays that of one
module however large the file is.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from safegraft.errors import InvalidTensors
from safegraft.header import Header, TensorEntry, read_header

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Bytes that are copied or compared at once: so few that the memory stays in the processor's cache, and is used again.
PIECE = 2**18


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
        raw = bytearray(entry.end - entry.start)
        self._fill(memoryview(raw), name, entry.start)
        return raw

    def pieces(self, name: str) -> Iterator[bytearray]:
        """`bytes`, a piece at a time in memory that the next piece takes."""
        entry = self.header.tensors[name]
        piece = bytearray(min(PIECE, entry.end - entry.start))
        for at in range(entry.start, entry.end, PIECE):
            if entry.end - at < len(piece):
                piece = bytearray(entry.end - at)
            self._fill(memoryview(piece), name, at)
            yield piece

    def holds(self, name: str, raw: memoryview) -> bool:
        """Whether the tensor's bytes are these; what comes after the first difference is not read."""
        entry = self.header.tensors[name]
        if len(raw) != entry.end - entry.start:
            return False
        pieces = self.pieces(name)
        # A bytearray compares itself with any buffer at once, a memory view item by item.
        return all(piece == raw[at : at + PIECE] for at, piece in zip(range(0, len(raw), PIECE), pieces, strict=True))

    def tensor(self, name: str) -> Tensor:
        """The tensor in its own dtype; the caller owns its memory."""
        entry = self.header.tensors[name]
        # PyTorch's memory and not Python's, which is filled with zeros before it is read into.
        found = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        if entry.elements:
            self._fill(view_of_bytes(found), name, entry.start)
        return found

    def _fill(self, view: memoryview, name: str, at: int) -> None:
        assert self._file is not None, "TensorReader is used as a context manager"
        while view:
            read = os.preadv(self._file.fileno(), [view], at)
            if read == 0:
                raise InvalidTensors(f"{self.path.name} ends in {name}.", code="truncated_file", param=name)
            view, at = view[read:], at + read


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

    def write(self, name: str, data: Tensor | bytes | bytearray | memoryview) -> None:
        """Writes one tensor (on any device, of the announced dtype) or its raw bytes. Each name once."""
        raw = view_of_bytes(data) if isinstance(data, Tensor) else memoryview(data)
        start = self._begin(name, len(raw))
        self._put(raw, start)

    def copy(self, name: str, reader: TensorReader) -> None:
        """Writes the bytes that another file has under the same name."""
        entry = reader.header.tensors[name]
        at = self._begin(name, entry.end - entry.start)
        for piece in reader.pieces(name):
            self._put(memoryview(piece), at)
            at += len(piece)

    def _begin(self, name: str, size: int) -> int:
        start, end = self._left.pop(name)
        if size != end - start:
            raise ValueError(f"{name}: {size} bytes do not fill {end - start}.")
        return int(self._start + start)

    def _put(self, view: memoryview, at: int) -> None:
        # At its place, not at the file's position: several threads may write different tensors at once.
        while view:
            written = os.pwrite(self._file.fileno(), view, at)
            view, at = view[written:], at + written

    def close(self) -> None:
        """Raises ValueError where an announced tensor was never written."""
        if self._left:
            raise ValueError(f"never written: {sorted(self._left)[:3]}")


def view_of_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in C order: its own memory where it lies so on the CPU, which the view keeps alive."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(cast(Any, flat.view(torch.uint8).numpy())) if flat.numel() else memoryview(b"")
