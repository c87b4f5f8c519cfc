"""Target: a safetensors file, from its first byte to modules with ranks and scalings."""

import io
import random
from collections.abc import Iterator
from functools import cache

from safetensors import deserialize

from safegraft.adapter import WEIGHTS, PeftConfig, pair_modules, parse_config
from safegraft.header import parse_header
from tests.fuzz.mutation import Blindly, safetensors_file
from tests.fuzz.oracle import only_user_errors
from tests.hostile import building

MODULES = ("safegraft.header", "safegraft.adapter")
SMALL = 2**14
KNOWN = [building.A, building.B, "__metadata__", "dtype", "shape", "data_offsets", "format"]


def check(raw: bytes) -> str:
    """What is accepted has to be what the reference implementation reads: same names, dtypes, shapes, bytes."""
    return only_user_errors(lambda: _parse(raw))


def _parse(raw: bytes) -> None:
    header = parse_header(io.BytesIO(raw), len(raw))
    # No annotations in safetensors.
    theirs = dict(deserialize(raw))  # type: ignore[no-untyped-call]
    assert theirs.keys() == header.tensors.keys(), "another file than safetensors reads"
    for name, mine in header.tensors.items():
        assert (mine.dtype, list(mine.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
        assert raw[mine.start : mine.end] == theirs[name]["data"]
    pair_modules(_config(), header)


@cache
def _config() -> PeftConfig:
    return parse_config(building.config(target_modules=".*"))


def seeds() -> Iterator[bytes]:
    from tests.hostile.corpus import files

    return files(WEIGHTS, SMALL)


def mutate(raw: bytes, most: int, rng: random.Random, blindly: Blindly) -> bytes:
    return safetensors_file(raw, most, rng, blindly, KNOWN)
