"""Reads the published `.safelock` files: SafetyLock's directions for well-known models.

They are pickles inside of a torch archive, and a pickle may run anything. This reads the one stream in it with an
unpickler that knows what numbers are written with and nothing else; every other name or instruction in a file ends the
reading. Form: {"model.layers.<n>.self_attn.head_out": [(head, direction (size,), standard deviation), …]}.
"""

import io
import math
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from safegraft.errors import InvalidParameter

# A table of every head of a model with 80 layers of 64 takes 2 MB.
MAX_BYTES = 16 * 2**20
_LAYER = re.compile(r"model\.layers\.([0-9]{1,4})\.self_attn\.head_out")
_KINDS = {"f2", "f4", "f8", "i4", "i8"}
_INSTRUCTIONS = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "EMPTY_DICT", "EMPTY_LIST",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT",
    "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "PERSID",
    "BINPERSID",
}  # fmt: skip
Numbers = np.ndarray[Any, Any]
Direction = tuple[int, Numbers, float]


def read_safelock(path: Path) -> dict[int, list[Direction]]:
    """Layer → (head, unit direction float64, standard deviation).

    Raises InvalidParameter: `unsafe_pickle` where a file asks for more than numbers, else `bad_safelock`.
    """
    try:
        stream = _stream(path)
        _check_instructions(stream)
        table = _Unpickler(io.BytesIO(stream)).load()
    except InvalidParameter:
        raise
    except Exception as error:  # a pickle can fail in as many ways as it has instructions
        raise _bad(path, f"it cannot be read ({type(error).__name__})") from error
    if not isinstance(table, dict) or not table:
        raise _bad(path, "it holds no table of layers")
    found: dict[int, list[Direction]] = {}
    size = 0
    for name, heads in table.items():
        layer = _layer(path, name)
        if layer in found:
            raise _bad(path, f"it names layer {layer} twice")
        found[layer] = []
        for item in _items(path, heads):
            direction = _direction(path, item)
            found[layer].append(direction)
            # A file may refer to one array a million times.
            size += direction[1].nbytes
            if size > 4 * MAX_BYTES:
                raise _bad(path, f"its directions take more than {4 * MAX_BYTES} bytes")
    return found


def _stream(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise _bad(path, f"it has more than {MAX_BYTES} bytes")
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = [item for item in archive.infolist() if item.filename.endswith("/data.pkl")]
        if len(names) != 1:
            raise _bad(path, "the archive holds no single data.pkl")
        if names[0].file_size > MAX_BYTES:
            raise _bad(path, f"its data unpack to more than {MAX_BYTES} bytes")
        return archive.read(names[0])


def _check_instructions(stream: bytes) -> None:
    """Reads without doing: a few bytes could otherwise claim gigabytes, or reach objects that no name stands for."""
    for instruction, argument, _ in pickletools.genops(stream):
        if instruction.name not in _INSTRUCTIONS:
            raise _unsafe(f"uses the instruction {instruction.name}")
        # The unpickler keeps a list as long as the highest number under which anything is put aside.
        if instruction.name == "LONG_BINPUT" and argument is not None and argument > len(stream):
            raise _unsafe(f"puts an object aside as number {argument}")


class _Unpickler(pickle.Unpickler):
    """Knows the names under which numpy writes arrays and scalars, and gives them to classes of its own: numpy's would
    take everything that a file says about a dtype, flags of objects in memory included."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")
        # Functions made anew for every file: a file may set attributes on them.
        known = {
            ("numpy", "dtype"): _Kind,
            # Only ever an argument of _reconstruct, which needs none.
            ("numpy", "ndarray"): None,
            ("numpy.core.multiarray", "_reconstruct"): _Array,
            ("numpy.core.multiarray", "scalar"): lambda kind, raw: _numbers(kind, raw, (1,)).item(),
            ("_codecs", "encode"): lambda text, encoding: text.encode({"latin1": "latin1"}[encoding]),
        }
        if (module, name) not in known:
            raise _unsafe(f"asks for {module[:60]}.{name[:60]}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _unsafe("refers to tensors outside of itself")


class _Kind:
    """`numpy.dtype`: a kind of numbers, and the byte order that its state brings."""

    __slots__ = ("code",)

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _KINDS:
            raise ValueError(f"dtype {str(code)[:20]!r}")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.code = {"<": "<", ">": ">", "=": "="}[state[1]] + self.code[-2:]


class _Array:
    """`numpy.ndarray`: empty, until its state brings (version, shape, dtype, order, bytes)."""

    __slots__ = ("numbers",)

    def __init__(self, *_: Any) -> None:
        self.numbers: Numbers = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, _, raw = state
        self.numbers = _numbers(kind, raw, shape)


def _numbers(kind: Any, raw: Any, shape: tuple[int, ...]) -> Numbers:
    """The numbers in `raw`, flat. Raises ValueError or TypeError."""
    if not isinstance(kind, _Kind) or not isinstance(raw, bytes):
        raise TypeError("an array is made from a dtype and bytes")
    numbers = np.frombuffer(raw, dtype=kind.code)
    if len(numbers) != math.prod(shape):
        raise ValueError(f"{len(numbers)} numbers in an array of {math.prod(shape)}")
    return numbers


def _layer(path: Path, name: Any) -> int:
    match = _LAYER.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise _bad(path, f"{str(name)[:80]!r} names no layer's heads")
    return int(match[1])


def _items(path: Path, heads: Any) -> list[Any]:
    if not isinstance(heads, list):
        raise _bad(path, "a layer's heads are no list")
    return heads


def _direction(path: Path, item: Any) -> Direction:
    try:
        head, direction, sigma = item
        if not (isinstance(head, int) and isinstance(direction, _Array)):
            raise TypeError("a head is a number and an array")
        vector = direction.numbers.astype(np.float64)
        sigma = float(sigma.numbers.item() if isinstance(sigma, _Array) else sigma)
    except (TypeError, ValueError, OverflowError) as error:
        raise _bad(path, "a head is not (number, direction, standard deviation)") from error
    length = float(np.linalg.norm(vector))
    if head < 0 or not (0 < length < math.inf and 0 <= sigma < math.inf):
        raise _bad(path, f"head {head} has no finite direction and standard deviation")
    return head, vector / length, sigma


def _unsafe(what: str) -> InvalidParameter:
    return InvalidParameter(
        f"The file {what}, which no table of numbers needs; it was not read further.",
        code="unsafe_pickle",
        param="safelock",
    )


def _bad(path: Path, why: str) -> InvalidParameter:
    return InvalidParameter(f"{path}: not a usable .safelock file: {why}.", code="bad_safelock", param="safelock")
