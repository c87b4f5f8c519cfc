"""Hostile adapters and archives by name: what each is, what has to be answered, and why somebody would send it.

Everything is made when it is asked for; nothing of it lies in the repository. A case writes a folder: the files of one
delivery, which are an adapter's, or one archive. `code` is the stable code that it is refused with; "" where it has to
be accepted, because nothing in it does harm here. Secrets and targets outside are named as `outside`, a file beside
the folder that nobody may touch.
"""

import bz2
import gzip
import json
import lzma
import os
import pickle
import stat
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegraft.adapter import CONFIG, MAX_CONFIG_BYTES, WEIGHTS
from safegraft.archive import MAX_MEMBERS
from safegraft.header import MAX_HEADER_BYTES, MAX_TENSORS
from safegraft.ingest import ARCHIVES, MAX_COMPANION_BYTES
from tests.hostile.building import (
    MODULE,
    RANK,
    SOUND,
    A,
    B,
    Member,
    Write,
    adapter,
    archive,
    blob,
    config,
    deflated,
    entry,
    factor,
    framed,
    header,
    long_name,
    ones,
    padded,
    pax,
    pax_record,
    retouched,
    sound_files,
    tar,
    tar_file,
    tar_header,
    tensors,
    weights,
    zip_files,
    zipped,
)


@dataclass(frozen=True)
class Case:
    """`large`: many megabytes, or written to take long. `local`: only a folder on a disk can hold it."""

    id: str
    write: Write
    code: str
    why: str
    large: bool = False
    local: bool = False

    @property
    def kind(self) -> str:
        return self.id.partition("/")[0]


NAN, INFINITY = b"\0\0\xc0\x7f", b"\0\0\x80\x7f"
ZERO_SIZED = '{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
DUPLICATED = f'{{"{A}":1,"{A}":1}}'.encode()


def cases() -> list[Case]:
    """All of them, in a fixed order."""
    return [
        *_headers(),
        *_names(),
        *_pickles(),
        *_values(),
        *_shapes(),
        *_configs(),
        *_hooks(),
        *_patterns(),
        *_labels(),
        *_tars(),
        *_tar_headers(),
        *_zips(),
        *_bombs(),
        *_archives(),
        *_folders(),
    ]


def _weights(name: str, raw: bytes, code: str, why: str) -> Case:
    return Case(name, adapter(weights=raw), code, why)


def _headers() -> list[Case]:
    """Headers of safetensors files that lie."""
    return [
        _weights("header/empty-file", b"", "empty_file", "an upload that was cut off at once"),
        _weights("header/seven-bytes", b"\1" * 7, "truncated_file", "too short for a length"),
        _weights("header/no-header", framed(b""), "header_not_json", "a length of zero"),
        _weights("header/longer-than-file", (99).to_bytes(8, "little") + b"{}", "truncated_file", "reads past the end"),
        _weights("header/length-of-2^64", b"\xff" * 8 + b"{}", "header_too_large", "a reader that reserves it dies"),
        _weights(
            "header/length-of-2^63", b"\0" * 7 + b"\x80{}", "header_too_large", "negative for readers of signed numbers"
        ),
        _weights(
            "header/79-megabytes-claimed", (79 << 20).to_bytes(8, "little") + b"{}", "header_too_large", "see above"
        ),
        Case(
            "header/79-megabytes",
            lambda folder: _sparse(folder, adapter(weights=None), (79 << 20).to_bytes(8, "little") + b"{", 79 << 20),
            "header_too_large",
            "a header that really is so long; some readers accept 100 MB",
            large=True,
        ),
        Case(
            "header/500000-tensors",
            lambda folder: adapter(weights=_many(500_000))(folder),
            "header_too_large",
            "each tensor costs its reader an object",
            large=True,
        ),
        Case(
            "header/60000-tensors",
            lambda folder: adapter(weights=_many(60_000))(folder),
            "too_many_tensors",
            "more than any adapter has, in a header of allowed length",
            large=True,
        ),
        Case(
            "header/as-many-tensors-as-allowed",
            lambda folder: adapter(weights=_many(MAX_TENSORS))(folder),
            "unexpected_key",
            "the most that is looked at",
            large=True,
        ),
        Case(
            "header/4-megabytes-of-empty-lists",
            lambda folder: adapter(weights=_filled(b"[],"))(folder),
            "bad_tensor_entry",
            "three bytes of JSON cost a parser 64",
            large=True,
        ),
        Case(
            "header/4-megabytes-of-empty-objects",
            lambda folder: adapter(weights=_filled(b"{},"))(folder),
            "bad_tensor_entry",
            "three bytes of JSON cost a parser 72",
            large=True,
        ),
        Case(
            "header/4-megabytes-of-objects",
            lambda folder: adapter(weights=_filled(b'{"":0},'))(folder),
            "bad_tensor_entry",
            "seven bytes of JSON cost a parser 240",
            large=True,
        ),
        _weights("header/json-list", blob([]), "header_not_json", "another type than was expected"),
        _weights("header/space-before-brace", framed(b" {}"), "header_not_json", "readers differ on it"),
        _weights("header/two-documents", framed(b"{}{}"), "header_not_json", "readers differ on which counts"),
        _weights("header/half-of-json", framed(b'{"a": '), "header_not_json", "half-written"),
        _weights("header/not-utf-8", framed(b'{"\xff":1}'), "header_not_json", "bytes that are no text"),
        _weights("header/overlong-utf-8", framed(b'{"\xc0\xae":1}'), "header_not_json", "a dot in disguise"),
        _weights("header/utf-16", framed('{"a":1}'.encode("utf-16")), "header_not_json", "another encoding"),
        _weights("header/byte-order-mark", framed(b"\xef\xbb\xbf{}"), "header_not_json", "readers differ on it"),
        _weights("header/deep-lists", framed(b'{"a":' + b"[" * 10**5), "header_not_json", "overflows a parser's stack"),
        _weights("header/deep-objects", framed(b'{"a":' * 10**5), "header_not_json", "overflows a parser's stack"),
        _weights(
            "header/nested-990-deep",
            framed(b'{"a":' + b"[" * 990 + b"]" * 990 + b"}"),
            "header_not_json",
            "just below Python's limit: it parses, but what comes after may not",
        ),
        _weights("header/5000-digits", framed(b'{"a":' + b"9" * 5000 + b"}"), "header_not_json", "quadratic to read"),
        _weights("header/nan-as-entry", framed(b'{"a":NaN}'), "bad_tensor_entry", "no JSON, though Python reads it"),
        _weights("header/nan-as-dimension", header(shape=[float("nan"), 8]), "bad_shape", "compares with nothing"),
        _weights(
            "header/9e9-as-dimension",
            header(shape=["?", 8]).replace(b'"?"', b"9e9"),
            "bad_shape",
            "a float where a count belongs",
        ),
        _weights(
            "header/1e999-as-offset",
            framed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}}', bytes(4)),
            "bad_offsets",
            "infinite once it is read",
        ),
        _weights("header/tensor-twice", framed(DUPLICATED), "duplicate_tensor", "readers differ on which counts"),
        _weights(
            "header/tensor-twice-by-escape",
            framed(DUPLICATED.replace(b'"base', b'"\\u0062ase', 1)),
            "duplicate_tensor",
            "the same name in two spellings",
        ),
        _weights(
            "header/field-twice",
            framed(b'{"a":{"dtype":"F32","dtype":"F16","shape":[0],"data_offsets":[0,0]}}'),
            "duplicate_tensor",
            "readers differ on which counts",
        ),
        _weights(
            "header/metadata-twice",
            framed(b'{"__metadata__":{},"__metadata__":{}}'),
            "duplicate_tensor",
            "readers differ on which counts",
        ),
        _weights("header/metadata-of-numbers", weights(metadata={"a": 1}), "bad_metadata", "another type"),
        _weights("header/metadata-list", weights(metadata=[1]), "bad_metadata", "another type"),
        _weights(
            "header/metadata-of-a-megabyte",
            weights(metadata={"format": "pt", "\ud800\0": "\x1b[31m" * 150_000}),
            "",
            "is read by nobody, but kept",
        ),
        _weights(
            "header/overlap",
            blob({A: entry([4, 8], 0, 128), B: entry([6, 4], 64, 160)}, 160),
            "bad_offsets",
            "two tensors share bytes",
        ),
        _weights(
            "header/all-tensors-the-same-bytes",
            blob({A: entry([8, 4], 0, 128), B: entry([8, 4], 0, 128)}, 128),
            "bad_offsets",
            "few bytes that claim to be many",
        ),
        _weights(
            "header/gap",
            blob({A: entry([4, 8], 0, 128), B: entry([6, 4], 200, 296)}, 296),
            "bad_offsets",
            "a place to hide bytes",
        ),
        _weights("header/gap-at-the-beginning", header(data_offsets=[8, 136]), "bad_offsets", "a place to hide bytes"),
        _weights("header/trailing-bytes", weights() + b"PK\5\6" + bytes(18), "bad_offsets", "a zip behind the tensors"),
        _weights("header/cut-in-the-data", weights()[:-1], "truncated_file", "half-written"),
        _weights("header/cut-in-the-header", weights()[:60], "truncated_file", "half-written"),
        _weights(
            "header/beyond-the-end",
            blob({A: entry([2**30, 8], 0, 2**35)}, 16),
            "truncated_file",
            "reads other memory where it is mapped",
        ),
        _weights(
            "header/offset-of-2^63", header(data_offsets=[2**63, 2**63 + 128]), "bad_offsets", "overflows when added"
        ),
        _weights(
            "header/offset-of-10^4000", header(data_offsets=[0, 10**4000]), "bad_offsets", "overflows, and is long"
        ),
        _weights(
            "header/negative-offsets", header(data_offsets=[-128, 0]), "bad_offsets", "reads before the beginning"
        ),
        _weights("header/offsets-in-reverse", header(data_offsets=[128, 0]), "bad_offsets", "a negative length"),
        _weights("header/one-offset", header(data_offsets=[128]), "bad_offsets", "another form"),
        _weights(
            "header/shape-that-overflows",
            header(shape=[2**32, 2**32], data_offsets=[0, 0]),
            "bad_offsets",
            "2⁶⁴ elements are none in 64 bits",
        ),
        _weights("header/shape-of-2^60-times-0", header(shape=[2**60, 0]), "bad_shape", "no bytes, but huge"),
        _weights(
            "header/nine-dimensions", header(shape=[1] * 8 + [32]), "bad_shape", "more than readers have room for"
        ),
        _weights("header/negative-shape", header(shape=[-4, -8]), "bad_shape", "its product is right"),
        _weights("header/true-as-dimension", header(shape=[True, 32]), "bad_shape", "a number to Python alone"),
        _weights("header/fraction-as-dimension", header(shape=[4.0, 8]), "bad_shape", "a number to some"),
        _weights("header/unknown-dtype", header(dtype="F31"), "bad_dtype", "of unknown width"),
        _weights("header/dtype-list", header(dtype=["F32"]), "bad_dtype", "cannot be a key of a table"),
        _weights("header/dtype-of-100-kilobytes", header(dtype="F" * 10**5), "bad_dtype", "fills logs"),
        _weights("header/extra-field", header(codec="zip"), "bad_tensor_entry", "a format of tomorrow"),
    ]


def _many(count: int) -> bytes:
    return framed(("{" + ",".join(f'"t{i}":{ZERO_SIZED}' for i in range(count)) + "}").encode())


def _filled(piece: bytes) -> bytes:
    head, tail = b'{"a":[', b"0]}"
    return framed(head + piece * ((MAX_HEADER_BYTES - len(head) - len(tail)) // len(piece)) + tail)


def _sparse(folder: Path, write: Write, begin: bytes, size: int, name: str = WEIGHTS) -> None:
    """A file of `size` bytes that begins with `begin` and takes no room on the disk."""
    write(folder)
    with (folder / name).open("wb") as file:
        file.write(begin)
        file.truncate(size + 8)


def _names() -> list[Case]:
    """Names of tensors, which end up in reports, logs and on screens."""
    named = {
        "path": "../../etc/passwd",
        "absolute-path": "/etc/passwd",
        "drive": "C:\\a",
        "nul": f"{A}\0",
        "line-break": f"{A}\n",
        "escape-sequence": f"\x1b]0;pwned\a{A}",
        "right-to-left": f"\u202e{A}",
        "homoglyph": A.replace("lora_A", "lora_А"),
        "full-width": A.replace("q_proj", "ｑ_proj"),
        "combining": A.replace("model", "mode\u0301l", 1),
        "zero-width": A.replace("lora", "lo\u200bra"),
        "lone-surrogate": f"\ud800{A}",
        "empty": "",
        "of-100-kilobytes": "a" * 10**5,
        "markup": "<script>alert(1)</script>",
        "template": "{{config}}${jndi:ldap://x}",
    }
    return [
        _weights(
            f"name/{what}", weights((name, "F32", [1], ones(1))), "bad_tensor_name", "names end up in paths and pages"
        )
        for what, name in named.items()
    ]


class _Opens:
    """Would create a file where a pickle is opened."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def _pickles() -> list[Case]:
    """Pickles under other names: whoever opens one runs what it says. These would create a file `opened`."""

    def pickled(protocol: int, name: str = WEIGHTS) -> Write:
        def write(folder: Path) -> None:
            adapter(weights=weights() if name == CONFIG else None)(folder)
            (folder / name).write_bytes(pickle.dumps([_Opens(str(folder.parent / "opened"))] * 20, protocol))

        return write

    torch_zip = zipped(Member(b"archive/data.pkl", b"\x80\x02cos\nsystem\n."), Member(b"archive/data/0", bytes(64)))
    return [
        *(
            Case(f"pickle/protocol-{p}", pickled(p), "pickle_file", "an old .bin under a new name")
            for p in (2, 3, 4, 5)
        ),
        Case("pickle/protocol-0", pickled(0), "header_too_large", "text, whose first letters are a huge length"),
        _weights("pickle/torch-zip", torch_zip, "pickle_file", "what torch.save writes"),
        Case("pickle/as-config", pickled(4, CONFIG), "config_not_json", "the other file"),
        Case("pickle/as-bin", pickled(4, "adapter_model.bin"), "missing_weights", "never opened, never kept"),
        Case(
            "pickle/beside-sound-files",
            lambda folder: (adapter()(folder), pickled(4, "training_args.bin")(folder), adapter()(folder))[0],
            "",
            "what the Trainer leaves: dropped",
        ),
        _weights(
            "pickle/sound-file-that-begins-like-one",
            framed(weights()[8:].partition(b"}}")[0].ljust(0x280 - 2) + b"}}", bytes(224)),
            "",
            "a header of 640 bytes begins with \\x80\\x02; it is none",
        ),
        _weights("pickle/gguf", b"GGUF\3\0\0\0" + bytes(64), "header_too_large", "another format of weights"),
        _weights(
            "pickle/hdf5", b"\x89HDF\r\n\x1a\n" + bytes(64), "header_too_large", "another format, with code in it"
        ),
        _weights("pickle/elf", b"\x7fELF\2\1\1\0" + bytes(64), "header_too_large", "a program"),
        _weights(
            "pickle/git-lfs-pointer",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "header_too_large",
            "no weights at all",
        ),
    ]


def _values() -> list[Case]:
    """Values that make an adapter, or whoever multiplies by it, answer nonsense."""

    def b_of(raw: bytes, count: int = 24) -> bytes:
        return weights(b=factor(B, ones(count - 1) + raw))

    def half(dtype: str, raw: bytes) -> bytes:
        return weights(a=factor(A, bytes(64), dtype=dtype), b=factor(B, bytes(46) + raw, dtype=dtype))

    return [
        _weights("value/nan", b_of(NAN), "non_finite", "PEFT loads it and answers like the base model"),
        _weights("value/signalling-nan", b_of(b"\1\0\x80\x7f"), "non_finite", "the NaN of other bits"),
        _weights("value/infinity", b_of(INFINITY), "non_finite", "times zero it is NaN"),
        _weights("value/minus-infinity", b_of(b"\0\0\x80\xff"), "non_finite", "see above"),
        _weights("value/nan-in-half-precision", half("F16", b"\1\x7c"), "non_finite", "other exponents"),
        _weights("value/infinity-in-bfloat16", half("BF16", b"\x80\x7f"), "non_finite", "other exponents"),
        _weights("value/denormals", weights(b=factor(B, b"\1\0\0\0" * 24)), "", "slow on some processors, but numbers"),
        _weights("value/minus-zero", weights(b=factor(B, b"\0\0\0\x80" * 24)), "", "an adapter that does nothing"),
        _weights(
            "value/largest-floats",
            weights(a=factor(A, b"\xff\xff\x7f\x7f" * 32), b=factor(B, b"\xff\xff\x7f\x7f" * 24)),
            "",
            "finite each, but their product is not; the worker's affair",
        ),
    ]


def _shapes() -> list[Case]:
    """Tensors that are no two factors of a linear layer."""

    def only(*named: tuple[str, str, list[int], bytes]) -> bytes:
        return tensors(*named)

    other = A.replace("q_proj", "k_proj")
    return [
        _weights("shape/zero-size", weights(a=(A, "F32", [0, 8], b"")), "empty_tensor", "what ZeRO-3 leaves"),
        _weights(
            "shape/zero-size-and-huge",
            weights(a=(A, "F32", [2**47, 0], b"")),
            "empty_tensor",
            "whoever multiplies dimensions first reserves it",
        ),
        _weights("shape/rank-0", weights(a=(A, "F32", [], ones(1))), "shape_unsupported", "a number"),
        _weights("shape/rank-1", weights(a=(A, "F32", [32], ones(32))), "shape_unsupported", "a vector"),
        _weights("shape/convolution", weights(a=(A, "F32", [4, 8, 1, 1], ones(32))), "shape_unsupported", "not linear"),
        _weights("shape/no-tensors", only(), "no_factors", "PEFT loads it without a word"),
        _weights("shape/a-without-b", only(factor(A)), "missing_factor", "half a pair"),
        _weights("shape/b-without-a", only(factor(B)), "missing_factor", "half a pair"),
        _weights("shape/transposed", weights(a=(A, "F32", [8, 4], ones(32))), "rank_disagrees", "as other tools save"),
        _weights(
            "shape/int8", weights(a=(A, "I8", [4, 8], bytes(32))), "dtype_unsupported", "quantised, without scale"
        ),
        _weights("shape/double", weights(a=(A, "F64", [4, 8], bytes(256))), "dtype_unsupported", "another dtype"),
        _weights("shape/float8", weights(a=(A, "F8_E4M3", [4, 8], bytes(32))), "dtype_unsupported", "another dtype"),
        _weights(
            "shape/bool", weights(a=(A, "BOOL", [4, 8], b"\2" * 32)), "dtype_unsupported", "neither true nor false"
        ),
        _weights("shape/mixed-dtypes", weights(a=(A, "BF16", [4, 8], bytes(64))), "dtype_disagrees", "readers convert"),
        _weights("shape/untargeted", weights((other, "F32", [4, 8], ones(32))), "missing_factor", "smuggled along"),
        _weights(
            "shape/whole-weight-smuggled",
            weights((f"base_model.model.{MODULE}.weight", "F32", [6, 8], ones(48))),
            "unexpected_key",
            "replaces a layer of the base model where keys are loaded loosely",
        ),
        _weights(
            "shape/base-layer-smuggled",
            weights((f"base_model.model.{MODULE}.base_layer.weight", "F32", [6, 8], ones(48))),
            "embedding_unsupported",
            "replaces a layer of the base model",
        ),
        _weights(
            "shape/prefix-missing", only(*_renamed("base_model.model.", "")), "unexpected_key", "PEFT drops such keys"
        ),
        _weights(
            "shape/prefix-doubled",
            only(*_renamed("base_model.", "base_model.model.base_model.")),
            "",
            "matches no layer of any base model: refused when it is to be realigned",
        ),
        _weights(
            "shape/suffix-doubled", only(*_renamed(".weight", ".weight.weight")), "", "an adapter of the name `weight`"
        ),
        _weights("shape/other-case", only(*_renamed("q_proj", "Q_PROJ")), "untargeted_module", "not what is targeted"),
        _weights(
            "shape/same-factor-twice",
            weights(factor(A.replace(".weight", ".default.weight"))),
            "duplicate_factor",
            "under two adapters' names",
        ),
        _weights(
            "shape/two-adapters-mixed",
            only(factor(A.replace(".weight", ".x.weight")), factor(B.replace(".weight", ".y.weight"))),
            "adapter_names_disagree",
            "A of one adapter, B of another",
        ),
        _weights(
            "shape/layer-of-400-digits",
            only(*_renamed("layers.0", "layers." + "9" * 400)),
            "",
            "a number only to those who make one of it; matches no base model",
        ),
    ]


def _renamed(old: str, new: str) -> list[tuple[str, str, list[int], bytes]]:
    return [(name.replace(old, new, 1), *rest) for name, *rest in (factor(A), factor(B))]  # type: ignore[misc]


def _config(name: str, given: bytes | dict[str, Any], code: str, why: str) -> Case:
    raw = given if isinstance(given, bytes) else config(**given)
    return Case(f"config/{name}", adapter(config=raw), code, why)


def _configs() -> list[Case]:
    """adapter_config.json: broken, or of numbers that are none."""
    plain = json.dumps(SOUND).encode()

    def number(name: str, text: str) -> bytes:
        return config(**{name: "?"}).replace(b'"?"', text.encode())

    return [
        _config("empty", b"", "config_not_json", "half-written"),
        _config("cut", plain[:40], "config_not_json", "half-written"),
        _config("list", b"[]", "config_not_json", "another type"),
        _config("number", b"1e999", "config_not_json", "another type"),
        _config("yaml", b"!!python/object/apply:os.system ['true']", "config_not_json", "code to a reader of YAML"),
        _config("python", b"{'r': __import__('os')}", "config_not_json", "code to eval"),
        _config("not-utf-8", b'{"r": "\xff"}', "config_not_json", "bytes that are no text"),
        _config("utf-16", plain.decode().encode("utf-16"), "config_not_json", "another encoding"),
        _config("byte-order-mark", b"\xef\xbb\xbf" + plain, "", "Windows writes it, and PEFT's users have it"),
        _config("deep", b'{"a":' * 10**5, "config_not_json", "overflows a parser's stack"),
        _config("of-two-megabytes", plain + b" " * MAX_CONFIG_BYTES, "config_too_large", "fills memory"),
        Case(
            "config/of-empty-lists",
            lambda folder: adapter(config=config(x=0)[:-2] + b"[" + b"[]," * 340_000 + b"0]}")(folder),
            "",
            "three bytes of JSON cost a parser 64",
            large=True,
        ),
        _config("nul", {"base_model_name_or_path": "a\0b"}, "config_not_json", "ends a string elsewhere"),
        _config("lone-surrogate", {"task_type": "\ud800"}, "config_not_json", "no database can hold it"),
        _config("5000-digits", number("x", "9" * 5000), "config_not_json", "quadratic to read"),
        _config("key-twice", plain[:-1] + b', "lora_alpha": 16}', "config_invalid", "readers differ on which counts"),
        _config(
            "key-twice-by-escape",
            plain[:-1] + b', "lora_alph\\u0061": 16}',
            "config_invalid",
            "the same name in two spellings",
        ),
        _config("rank-0", {"r": 0}, "bad_rank", "divides by zero"),
        _config("rank-negative", {"r": -1}, "bad_rank", "a negative size"),
        _config("rank-huge", {"r": 2**40}, "bad_rank", "whoever reserves it dies"),
        _config("rank-of-4000-digits", number("r", "9" * 4000), "bad_rank", "overflows"),
        _config("rank-fraction", {"r": 4.5}, "config_invalid", "no count"),
        _config("rank-nan", {"r": float("nan")}, "config_invalid", "no number"),
        _config("rank-true", {"r": True}, "config_invalid", "a number to Python alone"),
        _config("rank-text", {"r": "4"}, "config_invalid", "a number to some"),
        _config("rank-wrong", {"r": 8}, "rank_disagrees", "another scaling than the factors were trained with"),
        _config("rank-pattern-wrong", {"rank_pattern": {"q_proj": 2}}, "rank_disagrees", "see above"),
        _config("rank-pattern-negative", {"rank_pattern": {"q_proj": -4}}, "bad_rank", "a negative size"),
        _config("alpha-nan", {"lora_alpha": float("nan")}, "bad_alpha", "makes every weight NaN"),
        _config("alpha-infinite", {"lora_alpha": float("inf")}, "bad_alpha", "makes every weight infinite"),
        _config("alpha-1e999", number("lora_alpha", "1e999"), "bad_alpha", "infinite once it is read"),
        _config("alpha-huge", {"lora_alpha": 1e30}, "bad_alpha", "drowns the base model"),
        _config("alpha-tiny", {"lora_alpha": 1e-300}, "bad_alpha", "vanishes in half precision"),
        _config("alpha-negative", {"lora_alpha": -8}, "bad_alpha", "subtracts what was trained"),
        _config("alpha-zero", {"lora_alpha": 0}, "bad_alpha", "an adapter that does nothing"),
        _config("alpha-of-400-digits", number("lora_alpha", "9" * 400), "config_invalid", "beyond every float"),
        _config("alpha-pattern-nan", {"alpha_pattern": {"q_proj": float("nan")}}, "bad_alpha", "of one module alone"),
        _config("alpha-pattern-list", {"alpha_pattern": [["q_proj", 1]]}, "config_invalid", "another type"),
        _config("type-dict", {"peft_type": {"__class__": "os"}}, "config_invalid", "another type"),
        _config("type-missing", b'{"r": 4, "lora_alpha": 8}', "config_invalid", "no adapter"),
        _config("type-other", {"peft_type": "PROMPT_TUNING"}, "peft_type_unsupported", "no factors"),
        _config("dora", {"use_dora": True}, "dora_unsupported", "means more than its factors"),
        _config("dora-as-text", {"use_dora": "true"}, "config_invalid", "true to some"),
        _config("pissa", {"init_lora_weights": "pissa"}, "init_unsupported", "changes the base model"),
        _config("biases", {"bias": "lora_only"}, "bias_unsupported", "means more than its factors"),
        _config("variant-of-tomorrow", {"use_magic": {"a": 1}}, "variant_unsupported", "means something else"),
        _config("saved-modules", {"modules_to_save": ["lm_head"]}, "modules_to_save_unsupported", "whole layers"),
        _config("layers-of-nan", {"layers_to_transform": [float("nan")]}, "config_invalid", "no count"),
        _config(
            "text-for-screens", {"bias": "\x1b]0;x\a\u202e" + "x" * 9999}, "bias_unsupported", "writes to terminals"
        ),
    ]


def _hooks() -> list[Case]:
    """Keys by which a reader may be made to import or run something. What is not acted on here is accepted."""

    def hook(name: str, given: dict[str, Any], code: str, why: str) -> Case:
        return Case(f"hook/{name}", adapter(config=config(**given)), code, why)

    custom = {"base_model_class": "system", "parent_library": "antigravity"}
    return [
        hook("auto-mapping", {"auto_mapping": custom}, "", "PEFT's AutoPeftModel imports it; nothing here does"),
        hook("megatron-core", {"megatron_core": "antigravity"}, "", "PEFT imports it if megatron_config is set"),
        hook(
            "megatron-config",
            {"megatron_core": "antigravity", "megatron_config": {"a": 1}},
            "variant_unsupported",
            "makes PEFT import megatron_core",
        ),
        hook("custom-modules", {"_custom_modules": {"torch.nn.Linear": "os.system"}}, "", "PEFT never saves it"),
        hook("trust-remote-code", {"trust_remote_code": True, "auto_map": {"AutoModel": "x.py--X"}}, "", "unknown"),
        hook("layer-replication", {"layer_replication": [[0, 10**9]]}, "variant_unsupported", "a model of 10⁹ layers"),
        hook("target-parameters", {"target_parameters": ["q_proj.weight"]}, "variant_unsupported", "no linear layers"),
        hook("trained-tokens", {"trainable_token_indices": [10**12]}, "variant_unsupported", "an index beyond the end"),
        hook("loftq", {"loftq_config": {"loftq_bits": 10**9}, "init_lora_weights": "loftq"}, "init_unsupported", "-"),
        Case(
            "hook/code-beside",
            adapter(
                modeling_x__py=b"raise SystemExit", setup__py=b"raise SystemExit", conftest__py=b"raise SystemExit"
            ),
            "",
            "dropped",
        ),
        Case(
            "hook/tokenizer-with-code",
            adapter(tokenizer_config__json=b'{"auto_map": {"AutoTokenizer": ["x.py--X", null]}}', tokenizer__json=b"{"),
            "",
            "companions travel unread",
        ),
        Case(
            "hook/template-with-code",
            adapter(chat_template__jinja=b"{{ ''.__class__.__mro__[1].__subclasses__() }}"),
            "",
            "companions travel unread",
        ),
    ]


def _patterns() -> list[Case]:
    """Regular expressions out of a configuration."""

    def pattern(name: str, given: dict[str, Any], code: str, why: str, *, large: bool = False) -> Case:
        return Case(f"pattern/{name}", adapter(config=config(**given), weights=long), code, why, large=large)

    module = "a" * 400 + ".q_proj"
    long = tensors(*_renamed(MODULE, module))
    slow = "backtracks for ever elsewhere"
    return [
        pattern("nested-repeats-in-ranks", {"rank_pattern": {"(a+)+b": 2}}, "", slow),
        pattern("alternatives-in-alphas", {"alpha_pattern": {"(a|a)*b": 2, "(a|aa)+$x": 3}}, "", slow),
        pattern("nested-repeats-in-targets", {"target_modules": "(a+)+b"}, "untargeted_module", slow),
        pattern("dots-in-exclusions", {"exclude_modules": ".*.*.*.*.*.*.*=b"}, "", slow),
        pattern("everything", {"target_modules": ".*"}, "", "targets whatever there is"),
        pattern("everything-excluded", {"exclude_modules": ".*"}, "untargeted_module", "PEFT would ignore the factors"),
        pattern("nothing", {"target_modules": ""}, "untargeted_module", "PEFT would ignore the factors"),
        pattern("look-ahead", {"target_modules": "(?=(a+))a*b"}, "pattern_unsupported", "cannot be run in linear time"),
        pattern("back-reference", {"target_modules": r"(a+)\1+b"}, "pattern_unsupported", "see above"),
        pattern("unbalanced", {"rank_pattern": {"a)|(.*": 4}}, "", "breaks out of the brackets that are put around it"),
        pattern("half", {"target_modules": "("}, "pattern_unsupported", "is none"),
        pattern("huge-repeats", {"target_modules": "((a{100}){100}){100}"}, "pattern_unsupported", "a program of 10⁶"),
        pattern("a-megabyte", {"target_modules": "(a|b)" * 150_000}, "pattern_unsupported", "long", large=True),
        pattern("deep-brackets", {"target_modules": "(" * 10**5 + ")" * 10**5}, "untargeted_module", "deep"),
        pattern("20000", {"rank_pattern": {f"n{i}": 4 for i in range(20_000)}}, "", "many", large=True),
        pattern(
            "slow-for-every-engine", {"target_modules": "(.*.*a){900}y"}, "untargeted_module", "much work", large=True
        ),
        pattern(
            "layers-pattern", {"layers_to_transform": [0], "layers_pattern": "("}, "pattern_unsupported", "is none"
        ),
        pattern("full-width", {"target_modules": ["ｑ_proj"]}, "untargeted_module", "the same after normalisation"),
    ]


def _labels() -> list[Case]:
    """Labels of the base model, which nobody may open because a file names them. The registry does not know them."""
    labels = {
        "path": "/etc/passwd",
        "climbing-path": "../../../../outside",
        "file-url": "file:///etc/passwd",
        "metadata-service": "http://169.254.169.254/latest/meta-data/",
        "windows-share": "\\\\127.0.0.1\\share\\x",
        "option": "--help",
        "shell": "$(touch outside);`touch outside`|touch outside",
        "sql": "'; DROP TABLE adapters; --",
        "markup": "<script>alert(1)</script>",
        "right-to-left": "\u202emoc.elpmaxe",
        "escape-sequence": "\x1b[2J\x1b]0;x\a",
        "another-model": "meta-llama/Llama-3.1-405B",
    }
    return [
        *(
            Case(f"label/{what}", adapter(config=config(base_model_name_or_path=label)), "", "only ever compared")
            for what, label in labels.items()
        ),
        Case(
            "label/of-5000-letters",
            adapter(config=config(base_model_name_or_path="x" * 5000)),
            "config_invalid",
            "longer than any",
        ),
    ]


def _tars() -> list[Case]:
    """Tars whose members lead elsewhere or are no files."""
    slip = "writes outside the folder where archives are unpacked by their names"
    special = "is no file; what is written through it lands elsewhere"
    names = {
        "climbing": "../outside",
        "climbing-within": f"a/../../{CONFIG}",
        "absolute": "/outside",
        "absolute-config": f"/{CONFIG}",
        "drive": f"C:{CONFIG}",
        "backslash": f"..\\{CONFIG}",
        "right-to-left": f"a/\u202e{CONFIG}",
        "line-break": f"a\n/{CONFIG}",
        "lone-bytes": f"a\udcff/{CONFIG}",
    }
    kinds = {
        "symlink": (tarfile.SYMTYPE, CONFIG, "../outside"),
        "symlink-elsewhere": (tarfile.SYMTYPE, "x", "/"),
        "hardlink": (tarfile.LNKTYPE, CONFIG, "/etc/passwd"),
        "hardlink-to-itself": (tarfile.LNKTYPE, CONFIG, CONFIG),
        "character-device": (tarfile.CHRTYPE, CONFIG, ""),
        "block-device": (tarfile.BLKTYPE, WEIGHTS, ""),
        "fifo": (tarfile.FIFOTYPE, WEIGHTS, ""),
        "contiguous": (tarfile.CONTTYPE, CONFIG, ""),
        "sparse": (tarfile.GNUTYPE_SPARSE, WEIGHTS, ""),
        "second-volume": (b"M", WEIGHTS, ""),
        "unknown-kind": (b"Z", CONFIG, ""),
    }

    def absolute(folder: Path) -> None:
        archive(tar(pax(path=str(folder.parent / "outside")) + tar_file("x", b"x")))(folder)

    def through_link(folder: Path) -> None:
        link = tar_header("d", 0, tarfile.SYMTYPE, str(folder.parent))
        archive(tar(link + tar_file("d/outside", b"x")))(folder)

    prefixed = retouched(tar_header("x", 1), 345, b"../../a")
    prefixed = retouched(prefixed, 257, b"ustar\x0000")
    return [
        *(
            Case(f"tar/{what}", archive(tar(tar_file(name, b"x"))), "archive_unsafe_path", slip)
            for what, name in names.items()
        ),
        Case("tar/absolute-to-a-real-file", absolute, "archive_unsafe_path", slip),
        Case("tar/climbing-folder", archive(tar(tar_header("../x", 0, tarfile.DIRTYPE))), "archive_unsafe_path", slip),
        Case("tar/climbing-by-prefix", archive(tar(prefixed + padded(b"x"))), "archive_unsafe_path", slip),
        *(
            Case(f"tar/{what}", archive(tar(tar_header(name, 0, kind, link))), "archive_unsafe_member", special)
            for what, (kind, name, link) in kinds.items()
        ),
        Case("tar/symlink-and-through-it", through_link, "archive_unsafe_member", special),
        Case(
            "tar/config-is-a-folder",
            archive(tar(tar_header(CONFIG, 0, tarfile.DIRTYPE), files=sound_files()[1:])),
            "missing_config",
            "of the wrong kind",
        ),
        Case(
            "tar/weights-are-a-folder-with-bytes",
            archive(
                tar(
                    tar_header(f"{WEIGHTS}/", 512, tarfile.AREGTYPE) + b"x" * 512,
                    files=[*sound_files()[:1], ("y", b"")],
                )
            ),
            "missing_weights",
            "of the wrong kind",
        ),
        Case("tar/file-twice", archive(tar(tar_file(CONFIG, b"{}"))), "archive_duplicate", "readers differ on it"),
        Case(
            "tar/file-twice-by-dot",
            archive(tar(tar_file(f"././/{CONFIG}", b"{}"))),
            "archive_duplicate",
            "the same place by two names",
        ),
        Case("tar/two-folders", archive(tar(tar_file(f"a/{CONFIG}", b"{}"))), "archive_ambiguous", "two adapters"),
        Case(
            "tar/other-case", archive(tar(tar_file(CONFIG.upper(), b"{"))), "", "the same file on some disks; dropped"
        ),
        Case(
            "tar/homoglyph",
            archive(tar(tar_file("аdapter_config.json", b"{"))),
            "",
            "looks the same, is dropped and listed",
        ),
        Case(
            "tar/normalisation",
            archive(tar(tar_file("tokenizer_e\u0301.json", b"{"), tar_file("tokenizer_\xe9.json", b"["))),
            "",
            "the same file on some disks; dropped",
        ),
    ]


def _tar_headers() -> list[Case]:
    """Tars whose headers lie: sizes, checksums, pax records, long names."""
    broken = "a reader that believes it reads elsewhere, or for ever"
    ext = tarfile.XHDTYPE

    def lies(
        name: str, *parts: bytes, code: str = "archive_unreadable", why: str = broken, large: bool = False
    ) -> Case:
        return Case(f"tar-header/{name}", archive(tar(*parts)), code, why, large=large)

    negative = retouched(tar_header("x"), 124, b"\xff" * 12)
    enormous = retouched(tar_header("x"), 124, b"\x80" + b"\xff" * 11)
    wrong = tar_header("x", 1)
    return [
        lies("size-beyond-the-file", tar_header(WEIGHTS, 2**33 - 1)),
        lies("size-negative", negative + tar_file("y", b"")),
        lies("size-of-2^87", enormous),
        lies("size-no-number", retouched(tar_header("x"), 124, b"zzzzzzzzzzz\0")),
        lies("checksum", b"y" + wrong[1:] + padded(b"x")),
        lies("pax-size-beyond-the-file", pax(size="99999999999") + tar_file("x", b"")),
        lies("pax-size-negative", pax(size="-512") + tar_file("x", b"")),
        lies("pax-size-of-5000-digits", pax(size="9" * 5000) + tar_file("x", b"")),
        lies("pax-record-longer-than-block", tar_file("h", b"99999 path=x\n", ext)),
        lies("pax-record-of-no-length", tar_file("h", b"0 path=x\n", ext)),
        lies(
            "pax-record-of-its-own-digits",
            tar_file("h", b"3 a", ext),
            code="",
            why="a record without a key; says nothing",
        ),
        lies("pax-digits-only", tar_file("h", b"1" * 60_000, ext), why="makes tarfile backtrack (CVE-2024-6232)"),
        lies("pax-of-a-megabyte", tar_file("h", pax_record("comment", "x" * 10**6), ext), why="fills memory"),
        lies("pax-climbing", pax(path=f"../{CONFIG}") + tar_file("x", b"x"), code="archive_unsafe_path"),
        lies("pax-nul", pax(path=f"{CONFIG}\0.bin") + tar_file("x", b"x"), code="archive_unsafe_path"),
        lies("pax-not-utf-8", pax(path="a\udcff") + tar_file("x", b"x"), code="archive_unsafe_path"),
        lies(
            "pax-sparse",
            pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize=str(10**15))
            + tar_file(WEIGHTS, b""),
            code="archive_unsafe_member",
            why="a petabyte in no bytes",
        ),
        lies(
            "pax-sparse-of-old",
            pax(GNU__sparse__size=str(10**15), GNU__sparse__numblocks="0") + tar_file(WEIGHTS, b""),
            code="archive_unsafe_member",
            why="a petabyte in no bytes",
        ),
        lies(
            "pax-global-path",
            tar_file("g", pax_record("path", "../outside"), tarfile.XGLTYPE),
            code="",
            why="names of all members at once; ignored",
        ),
        lies(
            "pax-names-a-pickle-config",
            pax(path=CONFIG) + tar_file("training_args.bin", b"{}"),
            code="archive_duplicate",
            why="two names for one member",
        ),
        lies(
            "pax-link-of-a-file",
            pax(linkpath="../outside") + tar_file("x", b""),
            code="",
            why="a file does not link",
        ),
        lies(
            "long-name-climbing", long_name(b"../" * 60 + b"outside") + tar_file("x", b""), code="archive_unsafe_path"
        ),
        lies("long-name-of-a-megabyte", long_name(b"a" * 10**6) + tar_file("x", b""), why="fills memory"),
        lies(
            "long-name-of-900",
            long_name(b"a/" * 450 + CONFIG.encode()) + tar_file("x", b""),
            code="archive_unsafe_path",
        ),
        lies(
            "long-name-of-the-config", long_name(b"x"), code="missing_config", why="names the member after it otherwise"
        ),
        lies(
            "extensions-without-end",
            tar_file("h", b"", ext) * (MAX_MEMBERS + 1),
            code="archive_too_many_members",
            why="headers of headers of headers",
        ),
        lies(
            "members-without-end",
            b"".join(tar_header(f"{i}.bin") for i in range(MAX_MEMBERS + 1)),
            code="archive_too_many_members",
            why="names fill memory and inodes",
        ),
    ]


def _zips() -> list[Case]:
    """Zips whose members lead elsewhere, or whose two tables of contents differ."""
    slip = "writes outside the folder where archives are unpacked by their names"
    differ = "readers differ on which of the two counts"
    c, w = CONFIG.encode(), WEIGHTS.encode()
    names = {
        "climbing": b"../outside",
        "absolute": b"/outside",
        "drive": b"C:\\outside",
        "backslash": b"..\\outside",
        "nul": c + b"\0.exe",
        "nul-in-other": b"x\0/../../outside",
        "folder-climbing": b"../x/",
        "long": b"a" * 60_000,
    }
    modes = {
        "symlink": stat.S_IFLNK,
        "fifo": stat.S_IFIFO,
        "character-device": stat.S_IFCHR,
        "block-device": stat.S_IFBLK,
        "socket": stat.S_IFSOCK,
    }

    def lies(name: str, raw: bytes, code: str = "archive_unreadable", why: str = differ, large: bool = False) -> Case:
        return Case(f"zip/{name}", archive(raw, "adapter.zip"), code, why, large=large)

    zip64 = struct.pack("<HHQQ", 1, 16, 2**63, 2**63)
    unicode_path = b"../outside"
    info_zip = struct.pack("<HHBL", 0x7075, 5 + len(unicode_path), 1, zlib.crc32(c)) + unicode_path
    first = Member(c, config())
    second = Member(w, weights())
    return [
        *(lies(what, zip_files(Member(name, b"x")), "archive_unsafe_path", slip) for what, name in names.items()),
        *(
            lies(what, zipped(Member(c, b"/etc/passwd", mode=mode | 0o777), second), "archive_unsafe_member", slip)
            for what, mode in modes.items()
        ),
        lies("encrypted", zipped(Member(c, config(), flags=1), second), "archive_encrypted", "cannot be judged"),
        lies("strongly-encrypted", zipped(Member(c, config(), flags=0x41), second), "archive_encrypted", "see above"),
        lies("patched-data", zipped(Member(c, config(), flags=0x20), second), why="a difference to something else"),
        *(
            lies(f"compression-{number}", zipped(Member(c, config(), method=number), second), why=why)
            for number, why in {
                9: "unknown",
                12: "bzip2: slow",
                14: "LZMA: memory as the archive likes",
                93: "zstd",
                98: "PPMd",
                0xFFFF: "unknown",
            }.items()
        ),
        lies("version-99", zipped(Member(c, config(), version=999), second), why="needs a reader of tomorrow"),
        lies("names-differ", zipped(Member(c, config(), local_name=b"x" * len(c)), second)),
        lies(
            "names-differ-and-are-long",
            zipped(first, Member(b"tokenizer.json", b"", local_name=b"\x1b" * 60_000), second),
            why="zipfile quotes both in its message",
        ),
        lies("sizes-differ", zipped(Member(c, config(), local_size=5), second), "", "only the directory's count"),
        lies("crc-wrong", zipped(Member(c, config(), crc=1), second), why="half-written, or exchanged"),
        lies(
            "size-too-large",
            zipped(Member(c, config(), size=2**31), second),
            "",
            "a reader that reserves it dies; its checksum is right",
        ),
        lies(
            "size-too-small", zipped(Member(w, bytes(10**5), 8, size=10), first), why="unpacks to more than it claims"
        ),
        lies(
            "packed-size-beyond-file", zipped(Member(c, config(), packed_size=2**31), second), why="reads past the end"
        ),
        lies(
            "zip64-sizes",
            zipped(Member(c, config(), size=2**32 - 1, packed_size=2**32 - 1, extra=zip64), second),
            why="negative for readers of signed numbers",
        ),
        lies(
            "zip64-cut", zipped(Member(c, config(), size=2**32 - 1, extra=b"\1\0\x08\0\1"), second), why="half a field"
        ),
        lies(
            "extra-beyond-the-end", zipped(Member(c, config(), extra=b"\1\0\xff\xff"), second), why="reads past the end"
        ),
        lies("unicode-path", zipped(Member(c, config(), extra=info_zip), second), "", "a second name; ignored"),
        lies("not-utf-8", zipped(Member(b"\xff" + c, b"", flags=0x800), first, second), why="bytes that are no text"),
        lies("data-descriptor", zipped(Member(c, config(), 8, descriptor=True), second), "", "as streams are written"),
        lies(
            "overlapping",
            zipped(first, Member(w, packed=b"", data=b"", at=0, size=9, packed_size=9)),
            why="shared bytes",
        ),
        lies("member-at-2^32", zipped(first, Member(w, at=2**32 - 2)), why="reads past the end"),
        lies("twice", zip_files(Member(c, b"{}")), "archive_duplicate"),
        lies("two-folders", zip_files(Member(b"a/" + c, b"{}")), "archive_ambiguous", "two adapters"),
        lies("count-too-small", zip_files(count=1), "", "the directory itself is read"),
        lies("count-too-large", zip_files(count=60_000), "", "the directory itself is read"),
        lies("directory-too-long", zip_files(directory_size=2**31), why="reads before the beginning"),
        lies("directory-elsewhere", zip_files(directory_at=2**31), why="reads before the beginning"),
        lies("disk-7", zip_files(disk=7), "", "says it is a part of a set; all is there"),
        lies("second-directory-in-comment", zip_files(comment=zipped(Member(c, b"{}"))), "missing_weights", "two ends"),
        lies("trailing-bytes", zip_files() + b"x" * 1000, "", "ignored, as by every reader"),
        lies("before-it-a-program", b"MZ" + bytes(500) + zip_files(), why="a program that is a zip as well"),
        lies("end-only", zipped(), "missing_config", "an empty archive"),
        lies("cut", zip_files()[:-30], why="half-written"),
        lies("cut-in-a-member", zip_files()[:100], why="half-written"),
        lies("broken-deflate", zipped(Member(c, config(), 8, packed=b"\xff" * 50), second), why="no stream"),
        lies(
            "members-without-end",
            zip_files(*(Member(b"%d" % i) for i in range(MAX_MEMBERS))),
            "archive_too_many_members",
            "names fill memory and inodes",
        ),
        Case(
            "zip/60000-members",
            archive(lambda: zipped(*(Member(b"%d" % i) for i in range(60_000))), "adapter.zip"),
            "archive_unreadable",
            "a directory of 3 MB",
            large=True,
        ),
        lies("config-is-a-folder", zipped(Member(c + b"/"), second), "missing_config", "of the wrong kind"),
    ]


def _bombs() -> list[Case]:
    """Small archives that unpack to much."""

    def layers(depth: int) -> bytes:
        """42.zip in small: each zip holds ten of the next."""
        raw = deflated_zeros
        for _ in range(depth):
            inner = zipped(Member(b"x.zip", raw, 8))
            raw = zipped(*(Member(b"%d.zip" % i, inner, 8) for i in range(10)))
        return raw

    megabytes = 200
    deflated_zeros = zipped(Member(b"0", bytes(10**6), 8))
    w = WEIGHTS.encode()

    def bomb() -> bytes:
        raw = bytes(megabytes << 20)
        return zipped(Member(CONFIG.encode(), config()), Member(w, raw, 8, packed=deflated(raw, 1)))

    def kernels() -> bytes:
        """Many members over one kernel of bytes, so that each byte counts a hundred times."""
        raw = bytes(2**20)
        packed = deflated(raw)
        first = Member(b"tokenizer0.json", raw, 8, packed=packed)
        return zipped(
            first,
            *(
                Member(b"tokenizer%d.json" % i, raw, 8, packed=packed, at=0, local_name=b"tokenizer0.json")
                for i in range(1, 100)
            ),
        )

    def companion(folder: Path) -> None:
        raw = tar(tar_header("tokenizer.json", MAX_COMPANION_BYTES + 1), files=[], end=b"")
        _sparse(folder, archive(b""), raw, MAX_COMPANION_BYTES + 4096, "adapter.tar")

    return [
        Case("bomb/zip", archive(bomb, "a.zip"), "archive_too_large", "200 kB that become 200 MB", large=True),
        Case(
            "bomb/unwanted",
            archive(lambda: zip_files(Member(b"x.bin", bytes(10**8), 8, packed=deflated(bytes(10**8), 1))), "a.zip"),
            "",
            "what nobody wants is not unpacked",
            large=True,
        ),
        Case(
            "bomb/nested-zips", archive(lambda: layers(4), "a.zip"), "missing_config", "42.zip; no zip in it is opened"
        ),
        Case(
            "bomb/quine",
            archive(lambda: zip_files(Member(b"adapter.zip", zip_files()), Member(b"a.tar", tar()))),
            "",
            "archives within archives, for ever; none is opened",
        ),
        Case("bomb/overlapping", archive(kernels, "a.zip"), "archive_unreadable", "one stream, a hundred members"),
        Case(
            "bomb/gzip",
            archive(lambda: gzip.compress(bytes(10**8), 1), "a.tar.gz"),
            "archive_unreadable",
            "compressed tars are not taken, so none grows",
            large=True,
        ),
        Case(
            "bomb/gzip-of-many-streams",
            archive(lambda: gzip.compress(tar()) * 200, "a.tgz"),
            "archive_unreadable",
            "one stream after another",
        ),
        Case(
            "bomb/gzip-as-config",
            adapter(config=gzip.compress(config())),
            "config_not_json",
            "is not unpacked on the way",
        ),
        Case("bomb/bzip2", archive(lambda: bz2.compress(tar()), "a.tar.bz2"), "archive_unreadable", "see above"),
        Case("bomb/xz", archive(lambda: lzma.compress(tar()), "a.tar.xz"), "archive_unreadable", "see above"),
        Case("bomb/zstd", archive(b"\x28\xb5\x2f\xfd" + bytes(99), "a.tar.zst"), "archive_unreadable", "see above"),
        Case("bomb/companion", companion, "companion_too_large", "by a form it would be refused too", large=True),
    ]


def _archives() -> list[Case]:
    """Archives as a whole."""

    def whole(name: str, raw: bytes, code: str, why: str, filename: str = "adapter.tar") -> Case:
        return Case(f"archive/{name}", archive(raw, filename), code, why)

    dropped = [("training_args.bin", b"\x80\x04."), ("x.py", b"raise SystemExit"), ("__init__.py", b"")]
    return [
        whole("empty", b"", "archive_unreadable", "cut off at once"),
        whole("zeros", bytes(10240), "archive_unreadable", "a tar of nothing"),
        whole("noise", b"\xa5" * 5000, "archive_unreadable", "no archive"),
        whole("safetensors", weights(), "archive_unreadable", "no archive"),
        whole("cut-in-a-header", tar()[:300], "archive_unreadable", "half-written"),
        whole("cut-in-a-member", tar()[:600], "archive_unreadable", "half-written"),
        whole("cut-between-members", tar()[:1024], "missing_weights", "half-written, as if it were whole"),
        whole("without-end", tar(end=b""), "", "as old tools write"),
        whole("trailing-bytes", tar() + b"x" * 5000, "", "padding of tapes; not read"),
        whole("second-tar-behind", tar() + tar(tar_file("../x", b"")), "", "what is behind the end is not read"),
        whole("zip-behind-a-tar", tar() + zip_files(Member(b"../x")), "", "the beginning says what it is"),
        whole("zip-as-tar", zip_files(), "", "the beginning says what it is"),
        whole("tar-as-zip", tar(), "", "the beginning says what it is", "adapter.zip"),
        whole("tar-in-a-tar", tar(files=[("adapter.tar", tar())]), "missing_config", "is not opened"),
        whole("pickles-and-code", tar(files=[*sound_files(), *dropped]), "", "dropped and listed"),
        whole("pickles-only", tar(files=dropped), "missing_config", "nothing of it is opened"),
        whole(
            "pickled-weights",
            tar(files=[*sound_files()[:1], ("adapter_model.bin", b"\x80\x02.")]),
            "missing_weights",
            "never opened",
        ),
        whole(
            "spoiled-adapter",
            tar(files=[(CONFIG, config(r=RANK + 1)), (WEIGHTS, weights())]),
            "rank_disagrees",
            "an archive is judged like its files",
        ),
    ]


def _folders() -> list[Case]:
    """What only a folder on a disk can be, for the command line."""

    def fifo(name: str) -> Write:
        def write(folder: Path) -> None:
            adapter()(folder)
            (folder / name).unlink()
            os.mkfifo(folder / name)

        return write

    def instead(name: str, target: str | None) -> Write:
        def write(folder: Path) -> None:
            adapter()(folder)
            (folder / name).unlink()
            if target is None:
                (folder / name).mkdir()
            else:
                (folder / name).symlink_to(target)

        return write

    def local(name: str, write: Write, code: str, why: str) -> Case:
        return Case(f"folder/{name}", write, code, why, local=True)

    return [
        local("fifo-as-weights", fifo(WEIGHTS), "missing_weights", "whoever opens it waits for ever"),
        local("fifo-as-config", fifo(CONFIG), "missing_config", "whoever opens it waits for ever"),
        local("endless-config", instead(CONFIG, "/dev/zero"), "missing_config", "has no end"),
        local("endless-weights", instead(WEIGHTS, "/dev/zero"), "missing_weights", "has no end"),
        local("link-to-itself", instead(WEIGHTS, WEIGHTS), "missing_weights", "leads in circles"),
        local("link-to-nothing", instead(CONFIG, "nowhere"), "missing_config", "leads nowhere"),
        local("weights-are-a-folder", instead(WEIGHTS, None), "missing_weights", "of the wrong kind"),
        local("empty", lambda folder: None, "missing_config", "nothing"),
    ]


def files(name: str, most: int) -> Iterator[bytes]:
    """The bytes of every case's file of that name that has at most so many; the sound one first."""
    sound = dict(sound_files())
    if name in sound:
        yield sound[name]
    for case in cases():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "in").mkdir()
            if case.large or case.local:
                continue
            case.write(Path(folder) / "in")
            for path in sorted((Path(folder) / "in").iterdir()):
                if (path.name == name or (not name and path.name.endswith(ARCHIVES))) and path.stat().st_size <= most:
                    yield path.read_bytes()


def archives(most: int) -> Iterator[bytes]:
    """The same of every case's archive; a sound tar and a sound zip first."""
    yield tar()
    yield zip_files()
    yield from files("", most)
