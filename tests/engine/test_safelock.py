"""Published tables of directions are read; whatever else a pickle may ask for is refused before it happens."""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safegraft.engine import safelock
from safegraft.engine.safelock import read_safelock
from safegraft.errors import InvalidParameter

LAYER = "model.layers.12.self_attn.head_out"
KEY = b"X" + struct.pack("<I", len(LAYER)) + LAYER.encode()


def archive(path: Path, stream: bytes, name: str = "Model-8B/data.pkl") -> Path:
    """A file as torch writes it: the pickle beside a few small entries."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, stream)
        file.writestr("Model-8B/byteorder", "little")
        file.writestr("Model-8B/version", "3\n")
    return path


def published(table: Any, protocol: int = 2) -> bytes:
    """The pickle of a table, with numpy's names as numpy 1 wrote them (from protocol 4 on they have a length)."""
    stream = pickle.dumps(table, protocol=protocol)
    return stream if protocol > 3 else stream.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def head(number: int, *values: float, sigma: float = 0.5) -> tuple[Any, Any, Any]:
    return np.int64(number), np.array(values, dtype=np.float16), np.float16(sigma)


def refusal(path: Path) -> InvalidParameter:
    with pytest.raises(InvalidParameter) as caught:
        read_safelock(path)
    assert caught.value.param == "safelock"
    return caught.value


def test_a_table_in_the_published_form_is_read(tmp_path: Path) -> None:
    table = {
        "model.layers.31.self_attn.head_out": [head(7, 3.0, 0.0, 4.0, 0.0, sigma=0.25)],
        "model.layers.2.self_attn.head_out": [head(0, 1.0, 1.0, 1.0, 1.0), head(15, 0.0, 0.0, -2.0, 0.0, sigma=2.0)],
    }
    found = read_safelock(archive(tmp_path / "a.safelock", published(table)))
    assert list(found) == [31, 2]
    assert [(number, sigma) for number, _, sigma in found[31]] == [(7, 0.25)]
    assert [(number, sigma) for number, _, sigma in found[2]] == [(0, 0.5), (15, 2.0)]
    # Directions have unit length, whatever they had in the file.
    assert found[31][0][1].dtype == np.float64
    np.testing.assert_allclose(found[31][0][1], [0.6, 0.0, 0.8, 0.0])
    np.testing.assert_allclose(found[2][0][1], [0.5] * 4)
    np.testing.assert_allclose(found[2][1][1], [0.0, 0.0, -1.0, 0.0])


@pytest.mark.parametrize("kind", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_every_kind_of_float_and_byte_order_is_read_in_the_protocols_that_numpy_uses(
    tmp_path: Path, kind: str, protocol: int
) -> None:
    table = {LAYER: [(3, np.array([[1.0, 2.0, -2.0]], dtype=kind), np.array([0.75], dtype=kind))]}
    [(number, direction, sigma)] = read_safelock(archive(tmp_path / "a", published(table, protocol)))[12]
    assert (number, sigma) == (3, 0.75)
    np.testing.assert_allclose(direction, [1 / 3, 2 / 3, -2 / 3])


def test_names_of_the_present_numpy_and_a_pickle_without_an_archive_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "bare.safelock"
    path.write_bytes(pickle.dumps({LAYER: [head(1, 1.0, 0.0)]}, protocol=2))
    assert b"numpy._core" in path.read_bytes()
    np.testing.assert_allclose(read_safelock(path)[12][0][1], [1.0, 0.0])


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_that_would_run_something_is_refused_and_nothing_runs(
    tmp_path: Path, protocol: int, inside: bool
) -> None:
    ran = tmp_path / "ran"
    for evil in (
        Calls(os.system, f"touch {ran}"),
        Calls(eval, f"open({str(ran)!r}, 'w')"),
        Calls(exec, f"open({str(ran)!r}, 'w')"),
        Calls(open, str(ran), "w"),
        Calls(getattr, "text", "upper"),
    ):
        # Alone, or where a standard deviation belongs.
        table = {LAYER: [(1, np.ones(2, dtype=np.float16), evil)]} if inside else evil
        error = refusal(archive(tmp_path / "evil", pickle.dumps(table, protocol=protocol)))
        assert error.code == "unsafe_pickle"
        assert "was not read further" in error.message
    assert not ran.exists()


def test_the_refusal_names_what_the_file_asked_for(tmp_path: Path) -> None:
    message = refusal(archive(tmp_path / "evil", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")).message
    assert "asks for os.system" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "name",
    ["numpy\nload", "numpy\nfromfile", "numpy\nfrombuffer", "numpy.core.multiarray\narray", "builtins\ngetattr",
     "numpy\ndtype.mro", "torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict", "_codecs\ndecode"],
)  # fmt: skip
def test_names_that_no_array_is_written_with_are_refused_even_where_nothing_is_called(
    tmp_path: Path, name: str
) -> None:
    assert refusal(archive(tmp_path / "evil", b"\x80\x02c" + name.encode() + b"\n.")).code == "unsafe_pickle"


@pytest.mark.parametrize("persistent", [b"Pstorage\n.", b"X\x07\x00\x00\x00storageQ."])
def test_tensors_outside_of_the_pickle_are_refused(tmp_path: Path, persistent: bytes) -> None:
    error = refusal(archive(tmp_path / "evil", b"\x80\x02" + persistent))
    assert error.code == "unsafe_pickle"
    assert "tensors outside of itself" in error.message


@pytest.mark.parametrize(
    ("instruction", "stream"),
    [
        ("INST", b"(X\x04\x00\x00\x00trueios\nsystem\n."),
        ("OBJ", b"(cnumpy\ndtype\nX\x02\x00\x00\x00f8o."),
        ("NEWOBJ", b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x85\x81."),
        ("EXT1", b"\x82\x01."),
        ("BYTEARRAY8", b"\x96" + struct.pack("<Q", 4) + b"abcd."),
        ("NEXT_BUFFER", b"\x97."),
        ("DUP", b"]2."),
    ],
)
def test_instructions_that_no_table_needs_are_refused_before_the_first_is_carried_out(
    tmp_path: Path, instruction: str, stream: bytes
) -> None:
    error = refusal(archive(tmp_path / "evil", b"\x80\x02" + stream))
    assert error.code == "unsafe_pickle"
    assert f"uses the instruction {instruction}," in error.message


def test_an_object_cannot_be_put_aside_under_a_number_that_would_claim_memory(tmp_path: Path) -> None:
    """The unpickler's list is as long as its highest number; five bytes would have taken a gigabyte here."""
    error = refusal(archive(tmp_path / "evil", b"\x80\x02}r" + struct.pack("<I", 2**26) + b"."))
    assert error.code == "unsafe_pickle"
    assert "67108864" in error.message


def dtype(kind: bytes, order: bytes = b"<", flags: int = 0) -> bytes:
    """The instructions of numpy.dtype(kind) and its state."""
    state = b"(K\x03X\x01\x00\x00\x00" + order + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK" + bytes([flags]) + b"t"
    return b"cnumpy\ndtype\nX" + struct.pack("<I", len(kind)) + kind + b"\x89\x88\x87R" + state + b"b"


def array(kind: bytes, shape: bytes, raw: bytes) -> bytes:
    """The instructions of an array of `raw` (ASCII) with a dtype and a shape of the file's choice."""
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + encoded(b"b") + b"\x87R"
    return empty + b"(K\x01" + shape + kind + b"\x89" + encoded(raw) + b"tb"


def encoded(raw: bytes) -> bytes:
    """The instructions of bytes, which protocol 2 has none for."""
    return b"c_codecs\nencode\nX" + struct.pack("<I", len(raw)) + raw + b"X\x06\x00\x00\x00latin1\x86R"


def table(direction: bytes, number: bytes = b"K\x01", sigma: bytes = b"K\x02") -> bytes:
    return b"\x80\x02}" + KEY + b"](" + number + direction + sigma + b"tas."


TWO = b"K\x02\x85"


def test_the_instructions_below_make_a_sound_table(tmp_path: Path) -> None:
    stream = table(array(dtype(b"f8"), TWO, b"AAAAAAAA" * 2))
    [(number, direction, sigma)] = read_safelock(archive(tmp_path / "a", stream))[12]
    assert (number, sigma) == (1, 2.0)
    np.testing.assert_allclose(direction, [0.5**0.5] * 2)


@pytest.mark.parametrize("flags", [1, 4, 45, 63])
def test_flags_of_a_dtype_which_would_make_numpy_take_numbers_for_objects_do_nothing(
    tmp_path: Path, flags: int
) -> None:
    stream = table(array(dtype(b"f8", flags=flags), TWO, b"AAAAAAAA" * 2))
    [(_, direction, _)] = read_safelock(archive(tmp_path / "a", stream))[12]
    np.testing.assert_allclose(direction, [0.5**0.5] * 2)
    assert direction.dtype.flags == np.dtype("f8").flags == 0


@pytest.mark.parametrize(
    "direction",
    [
        array(dtype(b"f8"), b"\x8a\x08" + struct.pack("<q", 2**60) + b"\x85", b"AAAAAAAA" * 2),
        array(dtype(b"f8"), b"J\xff\xff\xff\xff\x85", b"AAAAAAAA" * 2),
        array(dtype(b"f8"), b"K\x03\x85", b"AAAAAAAA" * 2),
        array(dtype(b"f8"), TWO, b"AAAAAAAA" * 2 + b"A"),
        array(dtype(b"f8", order=b"?"), TWO, b"AAAAAAAA" * 2),
        array(dtype(b"O8"), TWO, b"AAAAAAAA" * 2),
        array(dtype(b"V8"), TWO, b"AAAAAAAA" * 2),
        array(dtype(b"S8"), TWO, b"AAAAAAAA" * 2),
        array(dtype(b"c16"), TWO, b"AAAAAAAA" * 4),
        array(b"X\x02\x00\x00\x00f8", TWO, b"AAAAAAAA" * 2),
        b"cnumpy\nndarray\n\x8a\x08" + struct.pack("<q", 2**60) + b"\x85\x85R",
        # What makes arrays and scalars, called or given a state where none belongs.
        b"cnumpy.core.multiarray\n_reconstruct\n}X\x04\x00\x00\x00evilK\x01sb",
        b"cnumpy.core.multiarray\nscalar\nX\x03\x00\x00\x00i8,X\x01\x00\x00\x00a\x86R",
        b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R",
    ],
)
def test_arrays_that_are_not_what_they_claim_are_refused(tmp_path: Path, direction: bytes) -> None:
    error = refusal(archive(tmp_path / "evil", table(direction)))
    assert error.code == "bad_safelock"
    assert "it cannot be read" in error.message


def test_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    for item in (2.0, Calls(os.system, f"touch {tmp_path / 'ran'}")):
        objects = np.array([1.0, item], dtype=object)
        assert refusal(archive(tmp_path / "evil", published({LAYER: [(1, objects, 0.5)]}))).code == "bad_safelock"
    assert not (tmp_path / "ran").exists()


def test_a_file_leaves_nothing_behind_in_the_functions_that_read_it(tmp_path: Path) -> None:
    for name in (b"_codecs\nencode", b"numpy.core.multiarray\nscalar", b"numpy.core.multiarray\n_reconstruct"):
        # A state of (None, attributes) sets attributes, and a plain one fills the object's dictionary.
        for state in (b"}X\x04\x00\x00\x00evilK\x01s", b"N}X\x04\x00\x00\x00evilK\x01s\x86"):
            refusal(archive(tmp_path / "evil", table(b"c" + name + b"\n" + state + b"b")))
    for value in vars(safelock).values():
        assert not hasattr(value, "evil")
    assert read_safelock(archive(tmp_path / "a", published({LAYER: [head(1, 1.0)]})))[12][0][0] == 1


def test_an_archive_without_a_single_pickle_is_refused(tmp_path: Path) -> None:
    stream = published({LAYER: [head(1, 1.0)]})
    inner = archive(tmp_path / "inner", stream).read_bytes()
    for path in (
        archive(tmp_path / "nested", inner, name="Model-8B/archive.zip"),
        archive(tmp_path / "unnamed", stream, name="data.pkl"),
        archive(tmp_path / "other", stream, name="Model-8B/weights.pkl"),
    ):
        assert "no single data.pkl" in refusal(path).message
    with zipfile.ZipFile(tmp_path / "unnamed", "a") as file:
        file.writestr("a/data.pkl", stream)
        file.writestr("b/data.pkl", stream)
    assert "no single data.pkl" in refusal(tmp_path / "unnamed").message


def test_a_file_that_ends_too_early_or_is_no_pickle_is_refused(tmp_path: Path) -> None:
    stream = published({LAYER: [head(1, 1.0, 2.0)]})
    for cut in range(0, len(stream), 7):
        assert refusal(archive(tmp_path / "cut", stream[:cut])).code == "bad_safelock"
    whole = archive(tmp_path / "whole", stream).read_bytes()
    for content in (b"", b"no pickle", whole[: len(whole) // 2], b"{}", "ü".encode()):
        (tmp_path / "other").write_bytes(content)
        assert refusal(tmp_path / "other").code in {"bad_safelock", "unsafe_pickle"}
    assert "FileNotFoundError" in refusal(tmp_path / "missing").message


def test_a_file_that_is_or_unpacks_to_more_than_the_limit_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(100_000_000)
    assert "more than 16777216 bytes" in refusal(tmp_path / "large").message
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("Model-8B/data.pkl", b"\x80\x02" + b"N" * 100_000_000)
    assert (tmp_path / "bomb").stat().st_size < 200_000
    assert "unpack to more than 16777216 bytes" in refusal(tmp_path / "bomb").message


def test_claims_of_memory_that_do_not_follow_are_refused(tmp_path: Path) -> None:
    claims = [b"B" + struct.pack("<I", 100_000_000), b"X" + struct.pack("<I", 2**31), b"\x8b\xff\xff\xff\x7f"]
    for claim in (*claims, b"\x95" + struct.pack("<Q", 2**40), b"\x96" + struct.pack("<Q", 2**40)):
        assert refusal(archive(tmp_path / "evil", b"\x80\x03" + claim + b"abc.")).code == "bad_safelock"


def test_one_array_that_is_named_again_and_again_counts_every_time(tmp_path: Path) -> None:
    shared = np.ones(2**20, dtype=np.float16)
    table = {LAYER: [(number, shared, 0.5) for number in range(40)]}
    assert len(published(table)) < 6_000_000
    assert "its directions take more than" in refusal(archive(tmp_path / "bomb", published(table))).message


GOOD = head(1, 1.0, 2.0)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([], "holds no table of layers"),
        ({}, "holds no table of layers"),
        (3, "holds no table of layers"),
        ({"model.layers.1.self_attn.q_proj": [GOOD]}, "'model.layers.1.self_attn.q_proj' names no layer's heads"),
        ({"model.layers.12345.self_attn.head_out": [GOOD]}, "names no layer's heads"),
        ({"model.layers.٣.self_attn.head_out": [GOOD]}, "names no layer's heads"),
        ({12: [GOOD]}, "'12' names no layer's heads"),
        ({LAYER: [GOOD], "model.layers.012.self_attn.head_out": [GOOD]}, "it names layer 12 twice"),
        ({LAYER: GOOD}, "a layer's heads are no list"),
        ({LAYER: {1: GOOD}}, "a layer's heads are no list"),
        ({LAYER: [1]}, "a head is not (number, direction, standard deviation)"),
        ({LAYER: [GOOD[:2]]}, "a head is not (number, direction, standard deviation)"),
        ({LAYER: [(*GOOD, 1)]}, "a head is not (number, direction, standard deviation)"),
        ({LAYER: [("1", *GOOD[1:])]}, "a head is not (number, direction, standard deviation)"),
        ({LAYER: [(float("inf"), *GOOD[1:])]}, "a head is not (number, direction, standard deviation)"),
        ({LAYER: [(1, [1.0, 2.0], 0.5)]}, "a head is not (number, direction, standard deviation)"),
        ({LAYER: [(*GOOD[:2], None)]}, "a head is not (number, direction, standard deviation)"),
        ({LAYER: [(*GOOD[:2], 2**2000)]}, "a head is not (number, direction, standard deviation)"),
        ({LAYER: [(*GOOD[:2], np.array([1.0, 2.0]))]}, "a head is not (number, direction, standard deviation)"),
        ({LAYER: [(-1, *GOOD[1:])]}, "head -1 has no finite direction and standard deviation"),
        ({LAYER: [head(4, 0.0, 0.0)]}, "head 4 has no finite direction"),
        ({LAYER: [head(4, float("nan"), 1.0)]}, "head 4 has no finite direction"),
        ({LAYER: [head(4, float("inf"), 1.0)]}, "head 4 has no finite direction"),
        ({LAYER: [head(4, 1.0, sigma=float("nan"))]}, "head 4 has no finite direction and standard deviation"),
        ({LAYER: [head(4, 1.0, sigma=-1.0)]}, "head 4 has no finite direction and standard deviation"),
    ],
)  # fmt: skip
def test_a_table_of_another_structure_is_refused_with_what_is_wrong(tmp_path: Path, content: Any, why: str) -> None:
    error = refusal(archive(tmp_path / "a", published(content)))
    assert error.code == "bad_safelock"
    assert "not a usable .safelock file" in error.message
    assert why in error.message


def test_a_list_within_itself_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    loop: list[Any] = []
    loop.append((1, loop, 0.5))
    pickle.Pickler(stream, protocol=2).dump({LAYER: loop})
    assert refusal(archive(tmp_path / "a", stream.getvalue())).code in {"bad_safelock", "unsafe_pickle"}
