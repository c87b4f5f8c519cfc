"""Target: adapter_config.json, and what its patterns say about modules."""

import random
from collections.abc import Iterator

from safegraft.adapter import CONFIG, MAX_RANK, UNSOUND_KEYS, PeftConfig, Targets, parse_config
from tests.fuzz.mutation import Blindly, json_file
from tests.fuzz.oracle import only_user_errors
from tests.hostile.building import MODULE

MODULES = ("safegraft.adapter",)
SMALL = 2**14
KNOWN = [*PeftConfig.model_fields, *UNSOUND_KEYS, "use_x", "auto_mapping", "q_proj", ".*"]
NAMES = (MODULE, "transformer.h.11.attn.c_attn", "a" * 200 + ".q_proj", "q_proj", "1.2.3")


def check(raw: bytes) -> str:
    return only_user_errors(lambda: _parse(raw))


def _parse(raw: bytes) -> None:
    config = parse_config(raw)
    targets = Targets(config)
    for name in NAMES:
        if targets.include(name):
            assert 1 <= targets.rank(name) <= MAX_RANK
            assert 0 < targets.alpha(name) < float("inf")


def seeds() -> Iterator[bytes]:
    from tests.hostile.corpus import files

    return files(CONFIG, SMALL)


def mutate(raw: bytes, most: int, rng: random.Random, blindly: Blindly) -> bytes:
    return json_file(raw, most, rng, blindly, KNOWN)
