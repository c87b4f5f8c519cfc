"""Bytes of adapters and archives, by hand: what honest libraries refuse to write is wanted here. No torch."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegraft.adapter import CONFIG, WEIGHTS

Write = Callable[[Path], None]
MODULE = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{MODULE}.lora_{side}.weight" for side in "AB")
RANK, INPUTS, OUTPUTS = 4, 8, 6
SOUND: dict[str, Any] = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "tiny",
    "bias": "none",
}


# Weights.


def framed(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file: the header's length, the header, the data."""
    return len(header).to_bytes(8, "little") + header + data


def blob(header: Any, data: int = 0) -> bytes:
    return framed(json.dumps(header).encode(), bytes(data))


def entry(shape: Iterable[Any], start: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def tensors(*named: tuple[str, str, list[int], bytes], metadata: Any = None) -> bytes:
    """A sound file of (name, dtype, shape, bytes)."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, dtype, shape, raw in named:
        header[name] = entry(shape, len(data), len(data) + len(raw), dtype)
        data += raw
    return framed(json.dumps(header).encode(), data)


def ones(count: int, value: float = 0.5) -> bytes:
    return struct.pack("<f", value) * count


def factor(name: str, raw: bytes | None = None, *, dtype: str = "F32") -> tuple[str, str, list[int], bytes]:
    """A or B of the module, or of another that the name says."""
    shape = [RANK, INPUTS] if ".lora_A" in name else [OUTPUTS, RANK]
    return name, dtype, shape, ones(shape[0] * shape[1]) if raw is None else raw


def weights(*more: tuple[str, str, list[int], bytes], a: Any = None, b: Any = None, metadata: Any = None) -> bytes:
    """The sound file, with another A, another B, or more tensors."""
    return tensors(a or factor(A), b or factor(B), *more, metadata=metadata)


def header(**changes: Any) -> bytes:
    """The sound file's header as JSON with fields of A changed; the data stay."""
    found: dict[str, Any] = {A: entry([RANK, INPUTS], 0, 128), B: entry([OUTPUTS, RANK], 128, 224)}
    found[A].update(changes)
    return blob(found, 224)


# Folders.


def config(**changes: Any) -> bytes:
    return json.dumps({**SOUND, **changes}).encode()


def adapter(*, config: bytes | None = config(), weights: bytes | None = weights(), **others: bytes) -> Write:
    """A folder with both files (None: without) and others, whose names have `__` for a dot."""

    def write(folder: Path) -> None:
        for name, raw in {CONFIG: config, WEIGHTS: weights}.items():
            if raw is not None:
                (folder / name).write_bytes(raw)
        for name, raw in others.items():
            (folder / name.replace("__", ".")).write_bytes(raw)

    return write


def archive(raw: bytes | Callable[[], bytes], name: str = "adapter.tar") -> Write:
    """A folder with one archive."""
    return lambda folder: void((folder / name).write_bytes(raw if isinstance(raw, bytes) else raw()))


def void(_: object) -> None:
    pass


Files = list[tuple[str, bytes]]


def sound_files() -> Files:
    return [(CONFIG, config()), (WEIGHTS, weights())]


# Tars.


def tar_header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "", **fields: Any) -> bytes:
    """One header block, not longer than a block whatever the name."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")[-512:]


def padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % 512)


def tar_file(name: str, raw: bytes, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    return tar_header(name, len(raw), kind, link) + padded(raw)


def tar(*parts: bytes, files: Files | None = None, end: bytes = bytes(1024)) -> bytes:
    """Raw parts before the sound files (or others), and the end."""
    return b"".join([*parts, *(tar_file(*file) for file in (sound_files() if files is None else files)), end])


def pax(**records: str) -> bytes:
    """A pax header for the next member; `__` in a key for a dot."""
    return tar_file("././@PaxHeader", b"".join(pax_record(k.replace("__", "."), v) for k, v in records.items()), b"x")


def pax_record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = len(rest) + 1
    while length != len(str(length)) + len(rest):
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def long_name(name: bytes) -> bytes:
    return tar_file("././@LongLink", name + b"\0", tarfile.GNUTYPE_LONGNAME)


def retouched(block: bytes, at: int, field: bytes) -> bytes:
    """A header block with other bytes, and the checksum that fits."""
    raw = bytearray(block)
    raw[at : at + len(field)] = field
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


# Zips.


@dataclass(frozen=True)
class Member:
    """One member as both of its headers tell it; `local…` is what only the local one says."""

    name: bytes
    data: bytes = b""
    method: int = 0
    packed: bytes | None = None
    flags: int = 0
    mode: int = 0
    extra: bytes = b""
    version: int = 20
    size: int | None = None
    packed_size: int | None = None
    crc: int | None = None
    local_name: bytes | None = None
    local_size: int | None = None
    descriptor: bool = False
    at: int | None = None


def deflated(raw: bytes, level: int = 9) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    return packer.compress(raw) + packer.flush()


def zipped(
    *members: Member,
    comment: bytes = b"",
    count: int | None = None,
    directory_size: int | None = None,
    directory_at: int | None = None,
    disk: int = 0,
) -> bytes:
    """A zip of members; the keywords are what the record at its end claims instead of the truth."""
    out, directory = io.BytesIO(), io.BytesIO()
    for member in members:
        packed = member.packed if member.packed is not None else member.data
        if member.method == 8 and member.packed is None:
            packed = deflated(member.data)
        size = len(member.data) if member.size is None else member.size
        packed_size = len(packed) if member.packed_size is None else member.packed_size
        crc = zlib.crc32(member.data) if member.crc is None else member.crc
        flags = member.flags | (8 if member.descriptor else 0)
        at = out.tell() if member.at is None else member.at
        fixed = struct.pack("<HHHHH", member.version, flags, member.method, 0, 33)
        sizes = struct.pack("<LLL", crc, packed_size, size)
        if member.descriptor:
            local_sizes = bytes(12)
        elif member.local_size is not None:
            local_sizes = struct.pack("<LLL", crc, member.local_size, member.local_size)
        else:
            local_sizes = sizes
        local = member.name if member.local_name is None else member.local_name
        if member.at is None:
            out.write(b"PK\3\4" + fixed + local_sizes + struct.pack("<HH", len(local), 0) + local + packed)
            if member.descriptor:
                out.write(b"PK\7\10" + sizes)
        lengths = struct.pack("<HHHHH", len(member.name), len(member.extra), 0, 0, 0)
        directory.write(b"PK\1\2" + struct.pack("<H", 3 << 8 | 20) + fixed + sizes + lengths)
        directory.write(struct.pack("<LL", member.mode << 16, at) + member.name + member.extra)
    began = out.tell()
    many = len(members) if count is None else count
    out.write(directory.getvalue())
    out.write(
        b"PK\5\6"
        + struct.pack(
            "<HHHHLLH",
            disk,
            disk,
            many,
            many,
            directory.tell() if directory_size is None else directory_size,
            began if directory_at is None else directory_at,
            len(comment),
        )
        + comment
    )
    return out.getvalue()


def zip_files(*more: Member, files: Files | None = None, **claims: Any) -> bytes:
    """The sound files (or others), then more members."""
    found = sound_files() if files is None else files
    return zipped(*(Member(name.encode(), raw) for name, raw in found), *more, **claims)
