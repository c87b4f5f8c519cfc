"""The safetensors header: one code per fault, nothing else escapes, and agreement with the reference implementation."""

import io
import json
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as save_numpy

from safegraft.errors import InvalidTensors
from safegraft.header import (
    BYTES_PER_ELEMENT,
    MAX_HEADER_BYTES,
    MAX_NAME,
    MAX_TENSORS,
    Header,
    parse_header,
    read_header,
)

GOOD = {"a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def framed(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def blob(header: Any, data: int = 0) -> bytes:
    return framed(json.dumps(header).encode(), bytes(data))


def parse(raw: bytes) -> Header:
    return parse_header(io.BytesIO(raw), len(raw))


def theirs(raw: bytes) -> dict[str, Any]:
    """Name → dtype, shape and data, by the reference implementation."""
    return dict(deserialize(raw))  # type: ignore[no-untyped-call]


def refusal(raw: bytes) -> InvalidTensors:
    with pytest.raises(InvalidTensors) as caught:
        parse(raw)
    return caught.value


def entry(**changes: Any) -> dict[str, Any]:
    return {"a.weight": {**GOOD["a.weight"], **changes}}


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", b"x" * 100)
    return out.getvalue()


REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty_file"),
    "seven bytes": (b"1234567", "truncated_file"),
    "a header longer than the file": ((100).to_bytes(8, "little") + b"{}", "truncated_file"),
    "data shorter than the tensors": (blob(GOOD, 15), "truncated_file"),
    "a PyTorch zip": (zipped(), "pickle_file"),
    **{f"a pickle of protocol {p}": (pickle.dumps([1.5] * 99, p), "pickle_file") for p in (2, 3, 4, 5)},
    "a pickle of six bytes": (pickle.dumps({}, 2), "pickle_file"),
    "a header beyond the cap": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "header_too_large"),
    "a header of 2⁶⁴-1 bytes": (b"\xff" * 8 + b"{}", "header_too_large"),
    "text": (framed(b"hello"), "header_not_json"),
    "half of JSON": (framed(b'{"a": '), "header_not_json"),
    "bytes that are not UTF-8": (framed(b'{"\xff": 1}'), "header_not_json"),
    "a list": (blob([]), "header_not_json"),
    "a space before the brace": (framed(b" {}"), "header_not_json"),
    "deep lists": (framed(b'{"a":' + b"[" * 100_000), "header_not_json"),
    "deep objects": (framed(b'{"a":' * 100_000), "header_not_json"),
    "a number of 5000 digits": (framed(b'{"a":' + b"9" * 5000 + b"}"), "header_not_json"),
    "a name twice": (framed(b'{"a":1,"b":2,"a":3}'), "duplicate_tensor"),
    "a field twice": (framed(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "duplicate_tensor"),
    "metadata that is a list": (blob({"__metadata__": []}), "bad_metadata"),
    "metadata with a number": (blob({"__metadata__": {"a": 1}}), "bad_metadata"),
    "100,000 tensors": (blob({str(i): 0 for i in range(100_000)}), "too_many_tensors"),
    "one tensor too many": (blob({str(i): 0 for i in range(MAX_TENSORS + 1)}), "too_many_tensors"),
    "a name with a path": (blob({"../../etc/passwd": GOOD["a.weight"]}, 16), "bad_tensor_name"),
    "an empty name": (blob({"": GOOD["a.weight"]}, 16), "bad_tensor_name"),
    "a name with a line break": (blob({"a\n": GOOD["a.weight"]}, 16), "bad_tensor_name"),
    "a name outside ASCII": (blob({"ä": GOOD["a.weight"]}, 16), "bad_tensor_name"),
    "half a surrogate pair": (blob({"\ud800": GOOD["a.weight"]}, 16), "bad_tensor_name"),
    "a name too long": (blob({"a" * (MAX_NAME + 1): GOOD["a.weight"]}, 16), "bad_tensor_name"),
    "an entry that is a number": (blob({"a": 1}), "bad_tensor_entry"),
    "an entry without a shape": (blob({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4), "bad_tensor_entry"),
    "an entry with more": (blob(entry(more=1), 16), "bad_tensor_entry"),
    "an unknown dtype": (blob(entry(dtype="F31"), 16), "bad_dtype"),
    "a dtype that is a list": (blob(entry(dtype=["F32"]), 16), "bad_dtype"),
    "a shape that is a number": (blob(entry(shape=4), 16), "bad_shape"),
    "a negative dimension": (blob(entry(shape=[-2, -2]), 16), "bad_shape"),
    "a fraction as dimension": (blob(entry(shape=[2.0, 2]), 16), "bad_shape"),
    "true as dimension": (blob(entry(shape=[True, 4]), 16), "bad_shape"),
    "a dimension of 2⁶⁰": (blob(entry(shape=[2**60, 0]), 16), "bad_shape"),
    "nine dimensions": (blob(entry(shape=[1] * 8 + [4]), 16), "bad_shape"),
    "one offset": (blob(entry(data_offsets=[16]), 16), "bad_offsets"),
    "offsets in reverse": (blob(entry(data_offsets=[16, 0]), 16), "bad_offsets"),
    "negative offsets": (blob(entry(data_offsets=[-16, 0]), 16), "bad_offsets"),
    "a shape that does not fill its bytes": (blob(entry(shape=[2, 3]), 16), "bad_offsets"),
    "a gap before the first tensor": (blob(entry(data_offsets=[4, 20]), 20), "bad_offsets"),
    "overlapping tensors": (blob({**GOOD, "b": GOOD["a.weight"]}, 16), "bad_offsets"),
    "bytes after the last tensor": (blob(GOOD, 17), "bad_offsets"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_each_fault_has_its_code_and_is_found_at_once(what: str) -> None:
    raw, code = REFUSED[what]
    start = time.perf_counter()
    assert refusal(raw).code == code
    assert time.perf_counter() - start < 2


def test_every_code_of_the_module_is_tested() -> None:
    source = Path(parse_header.__code__.co_filename).read_text()
    named = {word for word in source.replace("(", " ").replace(",", " ").split() if word.startswith('"')}
    codes = {word.strip('"') for word in named if word.strip('"').count("_") and word.strip('"').isidentifier()}
    codes -= {"data_offsets", "__metadata__", "F8_E4M3", "F8_E5M2"}
    assert codes == {code for _, code in REFUSED.values()}


def test_a_duplicate_among_300000_names_is_found_at_once() -> None:
    names = [*(f'"{i}":0' for i in range(300_000)), '"299999":0']
    start = time.perf_counter()
    error = refusal(framed(f"{{{','.join(names)}}}".encode()))
    assert (error.code, error.param) == ("duplicate_tensor", "299999")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("depth", range(850, 1000, 3))
def test_nesting_just_below_python_s_limit_is_refused_too(depth: int) -> None:
    raw = json.dumps(entry(dtype="?")).replace('"?"', "[" * depth + "]" * depth).encode()
    assert refusal(framed(raw, bytes(16))).code in {"bad_dtype", "header_not_json"}


@pytest.mark.parametrize("name", ["\x1b[31m", "\ud800", "\u202e", "x" * 100_000 + "!"], ids=ascii)
def test_what_is_shown_of_a_hostile_name_is_short_printable_ascii(name: str) -> None:
    for raw in (blob({name: 1}), framed(f"{{{json.dumps(name)}:1,{json.dumps(name)}:2}}".encode())):
        error = refusal(raw)
        assert error.param is not None
        for text in (error.param, error.message):
            assert text.isascii()
            assert text.isprintable()
            assert len(text) < 600


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x4B50])
def test_a_header_whose_length_begins_like_a_pickle_is_read(length: int) -> None:
    raw = json.dumps(GOOD).encode()
    assert list(parse(framed(raw.ljust(length), bytes(16))).tensors) == ["a.weight"]


def test_a_file_of_fifty_thousand_tensors_is_read() -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    assert len(parse(blob({f"t{i}": empty for i in range(MAX_TENSORS)})).tensors) == MAX_TENSORS


def test_a_file_without_tensors_is_read() -> None:
    assert parse(blob({"__metadata__": {"format": "pt"}})).metadata == {"format": "pt"}


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {
        "z": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "empty": {"dtype": "U8", "shape": [3, 0], "data_offsets": [1, 1]},
        "a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
    }
    (tmp_path / "x").write_bytes(blob(dict(reversed(header.items())), 3))
    read = read_header(tmp_path / "x")
    assert list(read.tensors) == ["z", "empty", "a"]
    assert read.file_bytes == (tmp_path / "x").stat().st_size
    assert [read.tensors[name].elements for name in header] == [1, 0, 2]


NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "F16": "f2", "U32": "u4", "I32": "i4", "F32": "f4",
    "U64": "u8", "I64": "i8", "F64": "f8",
}  # fmt: skip
tensors = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,30}", fullmatch=True),
    st.tuples(st.sampled_from(list(NUMPY)), st.lists(st.integers(0, 5), max_size=4)),
    max_size=6,
)


@given(tensors, st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=3))
@settings(deadline=None, max_examples=100)
def test_files_that_safetensors_wrote_are_read_as_it_reads_them(
    wanted: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None
) -> None:
    raw = save_numpy({name: np.ones(shape, NUMPY[kind]) for name, (kind, shape) in wanted.items()}, metadata)
    header = parse(raw)
    assert header.metadata == (metadata or {})
    expected = theirs(raw)
    assert header.tensors.keys() == expected.keys()
    for name, mine in header.tensors.items():
        assert (mine.dtype, list(mine.shape)) == (expected[name]["dtype"], expected[name]["shape"])
        assert raw[mine.start : mine.end] == expected[name]["data"]


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=150)
def test_random_bytes_raise_nothing_but_invalid_tensors(raw: bytes) -> None:
    for candidate in (raw, framed(raw), framed(b"{" + raw + b"}")):
        try:
            parse(candidate)
        except InvalidTensors as error:
            assert error.code != error.default_code, "every fault has its own code"  # noqa: PT017


numbers = st.integers(-3, 40) | st.sampled_from([2**48, 2**64, 10**30]) | st.floats(allow_nan=True)
leaves = st.none() | st.booleans() | numbers | st.text(max_size=4)
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=6)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*BYTES_PER_ELEMENT, "F4", "C64"]) | anything,
        "shape": st.lists(st.integers(0, 4), max_size=3) | anything,
        "data_offsets": st.lists(st.integers(0, 32), min_size=2, max_size=2) | anything,
        "more": anything,
    },
)


@given(
    st.dictionaries(st.sampled_from(["a", "b", "a/b", "", "__metadata__"]), entries | anything, max_size=3),
    st.binary(max_size=40),
)
@settings(deadline=None, max_examples=300)
def test_headers_of_odd_values_raise_nothing_but_invalid_tensors(header: dict[str, Any], data: bytes) -> None:
    try:
        parse(framed(json.dumps(header).encode(), data))
    except InvalidTensors as error:
        assert error.code != error.default_code  # noqa: PT017


VALID = blob(
    {"__metadata__": {"format": "pt"}, **GOOD, "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}, 22
)


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=3), st.integers(0, 30))
@settings(deadline=None, max_examples=500)
def test_what_is_accepted_of_mutated_files_safetensors_accepts_too(changes: list[tuple[int, int]], cut: int) -> None:
    raw = bytearray(VALID)
    for at, value in changes:
        raw[at] = value
    mutated = bytes(raw[: len(raw) - cut] if cut < 5 else raw)
    try:
        header = parse(mutated)
    except InvalidTensors:
        return
    try:
        assert header.tensors.keys() == theirs(mutated).keys()
    except SafetensorError as error:
        pytest.fail(f"accepted here, refused by safetensors: {error}")
