"""The header of a safetensors file: names, dtypes, shapes and places of its tensors. Pure Python, capped.

Knows the format's first bytes and nothing of what the tensors mean. Reads at most `MAX_HEADER_BYTES` however large
the file is, so that a hostile file costs no more than an honest one.

Format: 8 bytes little-endian length N, N bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the data without
gaps (https://github.com/huggingface/safetensors, "Format").
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from safegraft.errors import InvalidTensors

MAX_HEADER_BYTES = 4 * 2**20
MAX_TENSORS = 50_000
MAX_NAME = 512
BYTES_PER_ELEMENT = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
# No path separators, no control characters, nothing outside ASCII: names end up in reports and on screens.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
# A zip (PyTorch since 1.6) and pickle protocols 2 to 5.
PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor; `start` and `end` count bytes from the beginning of the *file*."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A file's tensors in the order of their bytes, and its free-form metadata."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    file_bytes: int


def read_header(path: Path) -> Header:
    """Reads and checks the header of `path`. Raises InvalidTensors with one code per fault."""
    with path.open("rb") as file:
        return header_of(file)


def header_of(file: BinaryIO) -> Header:
    """Reads and checks the header of an open file that can seek. Raises like `read_header`."""
    size = file.seek(0, 2)
    file.seek(0)
    return parse_header(file, size)


def parse_header(file: BinaryIO, size: int) -> Header:
    """Parses from an open file at its beginning; `size` is the whole file's, in bytes."""
    start = file.read(8)
    if size == 0:
        _refuse("empty_file", "The safetensors file is empty.")
    length = int.from_bytes(start, "little")
    # An honest header of 640 bytes begins with \x80\x02 too; what follows in a pickle makes the number enormous.
    if start[:2] in PICKLES and (len(start) < 8 or length > MAX_HEADER_BYTES):
        _refuse(
            "pickle_file",
            "This is a PyTorch pickle, not a safetensors file; it was not opened.",
            hint="Save with `model.save_pretrained(..., safe_serialization=True)`, or convert it on your side with "
            "`safetensors.torch.save_file(torch.load(path, weights_only=True), out)`.",
        )
    if len(start) < 8:
        _refuse("truncated_file", f"The file has {size} bytes; a safetensors file has at least 8.")
    if length > MAX_HEADER_BYTES:
        shorter = "The file is shorter than that; it is probably no safetensors file, but text or a Git LFS pointer."
        _refuse(
            "header_too_large",
            f"The header claims {length} bytes; at most {MAX_HEADER_BYTES} are read.",
            hint=shorter if 8 + length > size else "",
        )
    if 8 + length > size:
        _refuse("truncated_file", f"The header needs {8 + length} bytes, the file has {size}.")
    raw = file.read(length)
    if len(raw) != length:
        _refuse("truncated_file", f"The header needs {length} bytes, {len(raw)} could be read.")
    return _check(_load(raw), 8 + length, size)


def _load(raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            _refuse("duplicate_tensor", f"The key '{shown(twice)}' stands twice in the header.", param=shown(twice))
        return found

    if raw[:1] != b"{":
        _refuse("header_not_json", "The header is not a JSON object.")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        raise InvalidTensors(f"The header is not JSON ({type(error).__name__}).", code="header_not_json") from error
    assert isinstance(header, dict), "what begins with a brace is an object"
    return header


def _check(raw: dict[str, Any], data_start: int, size: int) -> Header:
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse("bad_metadata", "`__metadata__` must map strings to strings.")
    if len(raw) > MAX_TENSORS:
        _refuse("too_many_tensors", f"The file lists {len(raw)} tensors; at most {MAX_TENSORS} are accepted.")
    entries = sorted((_entry(name, item, data_start) for name, item in raw.items()), key=lambda e: (e.start, e.end))
    end = data_start
    for entry in entries:
        if entry.start != end:
            word = "overlaps the tensor before it" if entry.start < end else "leaves a gap before it"
            _refuse("bad_offsets", f"{entry.name!r} {word}.", param=entry.name)
        end = entry.end
    if end > size:
        _refuse("truncated_file", f"The tensors need {end} bytes, the file has {size}.")
    if end < size:
        _refuse("bad_offsets", f"The file has {size - end} bytes after its last tensor.")
    return Header({entry.name: entry for entry in entries}, metadata, size)


def _entry(name: str, item: Any, data_start: int) -> TensorEntry:
    if len(name) > MAX_NAME or not NAME.fullmatch(name):
        _refuse("bad_tensor_name", f"'{shown(name)}' is not an acceptable tensor name.", param=shown(name))
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        _refuse("bad_tensor_entry", f"{name!r}: expected dtype, shape and data_offsets.", param=name)
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES_PER_ELEMENT:
        what = shown(dtype) if isinstance(dtype, str) else type(dtype).__name__
        _refuse("bad_dtype", f"{name!r}: unknown dtype '{what}'.", param=name)
    if not _counts(shape) or len(shape) > 8:
        _refuse("bad_shape", f"{name!r}: the shape must be a list of at most 8 counts.", param=name)
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(
            "bad_offsets", f"{name!r}: data_offsets must be two counts, the first not above the second.", param=name
        )
    if math.prod(shape) * BYTES_PER_ELEMENT[dtype] != offsets[1] - offsets[0]:
        _refuse("bad_offsets", f"{name!r}: shape {shape} as {dtype} does not fill its bytes exactly.", param=name)
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)


def shown(text: str) -> str:
    """A customer's text as it may stand in messages, logs and JSON: short, printable ASCII."""
    return ascii(text[:80])[1:-1]


def _refuse(code: str, message: str, *, param: str | None = None, hint: str = "") -> NoReturn:
    raise InvalidTensors(message, code=code, param=param, hint=hint)
