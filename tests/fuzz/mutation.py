"""Mutations that keep the outer form, so that what lies behind it is reached: JSON stays JSON, checksums stay right."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from tests.hostile.building import framed, retouched

Blindly = Callable[[bytes, int], bytes]
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 4, 2**31, 2**48, 2**63, 2**64, 10**30, 1e-320, 1e300, float("nan"), float("inf"), "",
    "a", "none", "q_proj", "LORA", "(a+)+", "(", "[a", "a{3}", ".*", r"\d", "|", "\0", "\ud800", "\u202e", "x" * 600,
    [], {}, [[]],
    [0], [0, 0], [0, 128], ["q_proj"], {"q_proj": 4}, {".*": 1.5}, "F32", "BF16", "F8_E5M2", "__metadata__",
]  # fmt: skip


def json_like(raw: bytes, rng: random.Random, known: list[str]) -> bytes:
    """JSON with one to three values changed, renamed, added, copied or removed; other bytes as they are."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    for _ in range(rng.randint(1, 3)):
        value = _changed(value, rng, known)
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return raw


def _changed(value: Any, rng: random.Random, known: list[str]) -> Any:
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(places) < 200:
        holder = waiting.pop()
        if isinstance(holder, dict | list):
            for key in holder if isinstance(holder, dict) else range(len(holder)):
                places.append((holder, key))
                waiting.append(holder[key])
    if not places:
        return _odd(rng)
    holder, key = rng.choice(places)
    how = rng.randrange(5)
    if how == 0:
        holder[key] = _odd(rng)
    elif how == 1 and isinstance(holder[key], int | float):
        holder[key] += rng.choice([-1, 1, 0.5, 2**16])
    elif how == 2:
        other, at = rng.choice(places)
        holder[key] = copy.deepcopy(other[at])
    elif how == 3:
        del holder[key]
    elif isinstance(holder, dict):
        name = rng.choice(known) if rng.random() < 0.8 else str(_odd(rng))
        holder[name] = copy.deepcopy(holder[key]) if rng.random() < 0.3 else _odd(rng)
    else:
        holder.append(_odd(rng))
    return value


def _odd(rng: random.Random) -> Any:
    # A copy: it may be changed itself.
    return copy.deepcopy(rng.choice(ODD))


def json_file(raw: bytes, most: int, rng: random.Random, blindly: Blindly, known: list[str]) -> bytes:
    return blindly(raw, most) if rng.random() < 0.3 else json_like(raw, rng, known)[:most]


def safetensors_file(raw: bytes, most: int, rng: random.Random, blindly: Blindly, known: list[str]) -> bytes:
    """The length before the header is right again, most of the time."""
    if rng.random() < 0.2 or len(raw) < 10:
        return blindly(raw, most)
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    header = blindly(header, most // 2) if rng.random() < 0.3 else json_like(header, rng, known)
    if rng.random() < 0.3:
        data = data[: rng.randrange(len(data) + 1)] + bytes(rng.choice([0, 0, 1, 4, 128]))
    return framed(header, data)[:most]


def archive_file(raw: bytes, most: int, rng: random.Random, blindly: Blindly) -> bytes:
    """Checksums of a tar's headers are right again, most of the time."""
    changed = blindly(raw, most)
    if raw[:2] == b"PK" or rng.random() < 0.1:
        return changed
    blocks = [changed[at : at + 512] for at in range(0, len(changed), 512)]
    return b"".join(
        retouched(block, 0, b"") if len(block) == 512 and block[257:262] == b"ustar" else block for block in blocks
    )
