"""The fuzz targets on mutated cases of the hostile corpus, by hypothesis: a small budget, in every run of the tests.

`make fuzz` does the same for longer, guided by coverage.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safegraft.errors import InvalidAdapter, SystemFault, UserError
from tests.fuzz import __main__ as fuzz
from tests.fuzz import archive, config, header
from tests.fuzz.mutation import json_like
from tests.fuzz.oracle import MAX_SHOWN, only_user_errors
from tests.hostile.building import SOUND, A, B, Member, deflated, framed, pax_record, retouched, tar, tar_header, zipped
from tests.hostile.corpus import cases

TARGETS: dict[str, Any] = {"header": header, "config": config, "archive": archive}
SEEDS = {name: list(target.seeds()) for name, target in TARGETS.items()}
quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def blindly(rng: random.Random) -> Any:
    """What atheris' own mutation does, in small."""

    def change(raw: bytes, most: int) -> bytes:
        out = bytearray(raw or b"\0")
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(out) + 1)
            piece = rng.choice([b"", b"\0", b"\xff\xff\xff\xff", b"PK\1\2", b'"', b"{", rng.randbytes(3)])
            out[at : at + rng.choice([0, len(piece), 8])] = piece
        return bytes(out[:most])

    return change


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_passes(name: str) -> None:
    codes = {TARGETS[name].check(seed) for seed in SEEDS[name]}
    assert "" in codes
    assert len(codes) > 6


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
@settings(quick, max_examples=200)
def test_mutated_cases_raise_nothing_but_user_errors(name: str, data: st.DataObject) -> None:
    target = TARGETS[name]
    raw = data.draw(st.sampled_from(SEEDS[name]))
    rng = data.draw(st.randoms(use_true_random=False))
    for _ in range(data.draw(st.integers(1, 4))):
        raw = target.mutate(raw, target.SMALL, rng, blindly(rng))
    target.check(raw)


# By structure: what is right but for some of its parts.

odd = (
    st.none() | st.booleans() | st.integers(-2, 2**64) | st.floats() | st.text(max_size=4) | st.lists(st.integers(0, 9))
)
offsets = st.sampled_from([0, 64, 127, 128, 129, 224, 2**48, -128])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3", "F64"]) | odd,
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, 6, 8, 32, 2**32]), max_size=4) | odd,
        "data_offsets": st.lists(offsets, min_size=2, max_size=2) | odd,
    },
    optional={"more": odd},
)
names = st.sampled_from([A, B, A.replace("q_proj", "k_proj"), A.replace(".weight", ".x.weight"), "__metadata__"])


@given(st.dictionaries(names | st.text(max_size=8), entries | odd, max_size=4), st.sampled_from([0, 128, 224, 225]))
@settings(quick, max_examples=200)
def test_headers_of_odd_parts(found: dict[str, Any], size: int) -> None:
    header.check(framed(json.dumps(found).encode(), bytes(size)))


patterns = st.text("ab(|)*+?.[]{}0,1^$\\d-", max_size=30) | st.sampled_from([".*", "(a+)+", "a{900}", "q_proj"])
keys = st.sampled_from(config.KNOWN) | st.text(max_size=5)
values = odd | patterns | st.lists(patterns, max_size=3) | st.dictionaries(patterns, odd, max_size=3)


@given(st.dictionaries(keys, values, max_size=4))
@settings(quick, max_examples=200)
def test_configurations_of_odd_parts(changes: dict[str, Any]) -> None:
    config.check(json.dumps({**SOUND, **changes}).encode())


member_names = st.sampled_from(
    ["adapter_config.json", "adapter_model.safetensors", "README.md", "../x", "/x", "a/", "a/README.md", "x\0y", "ä"]
) | st.text(max_size=12)
few_bytes = st.binary(max_size=40)
sizes = st.none() | st.sampled_from([0, 1, 39, 10**6, 2**31, 2**32 - 1])


@st.composite
def members(draw: Any) -> Member:
    raw = draw(few_bytes)
    return Member(
        draw(member_names).encode("utf-8", "surrogatepass"),
        raw,
        method=draw(st.sampled_from([0, 0, 8, 8, 12, 14, 99])),
        packed=draw(st.sampled_from([None, None, raw, deflated(raw), deflated(bytes(5000))])),
        flags=draw(st.sampled_from([0, 0, 0, 1, 8, 0x20, 0x40, 0x800])),
        mode=draw(st.sampled_from([0, 0o644, 0o100644, 0o120777, 0o40755, 0o10600])),
        extra=draw(st.sampled_from([b"", b"", b"\1\0\x08\0" + bytes(8), b"\1\0\x04\0\1", b"up\0\0"])),
        size=draw(sizes),
        packed_size=draw(sizes),
        local_name=draw(st.none() | few_bytes),
        descriptor=draw(st.booleans()),
        at=draw(st.none() | st.sampled_from([0, 30, 2**32 - 1])),
    )


@given(st.lists(members(), max_size=4), sizes, sizes, st.none() | st.integers(0, 2**16 - 1), few_bytes)
@settings(quick, max_examples=200)
def test_zips_of_odd_parts(
    found: list[Member], size: int | None, at: int | None, count: int | None, end: bytes
) -> None:
    archive.check(zipped(*found, comment=end, count=count, directory_size=size, directory_at=at))


short = member_names.filter(lambda name: name.isprintable() and len(name.encode("utf-8")) < 90)
kinds = st.sampled_from([bytes([kind]) for kind in b"00\000123567DKLMSVgx"])
blocks = st.builds(
    lambda name, size, kind, body, field: (
        retouched(tar_header(name, size, kind), 124, field) + body + bytes(-len(body) % 512)
    ),
    short,
    st.sampled_from([0, 1, 40, 512, 2**33 - 1]),
    kinds,
    few_bytes
    | st.builds(pax_record, st.sampled_from(["path", "size", "linkpath", "GNU.sparse.major"]), st.text(max_size=9))
    | st.builds(lambda size, text: b"%d %s" % (size, text), st.integers(0, 99), few_bytes),
    st.sampled_from([b"", b"", b"", b"\xff" * 12, b"\x80" + bytes(11), b"zzz"]),
)  # fmt: skip


@given(st.lists(blocks, max_size=4), st.booleans())
@settings(quick, max_examples=200)
def test_tars_of_odd_parts(found: list[bytes], sound: bool) -> None:
    archive.check(tar(*found, files=None if sound else []))


# The oracle and the mutations themselves.


def test_the_oracle_lets_nothing_else_pass() -> None:
    def raising(error: Exception) -> Any:
        def parse() -> None:
            raise error

        return parse

    assert only_user_errors(lambda: 1) == ""
    assert only_user_errors(raising(InvalidAdapter("Said why.", code="bad_rank"))) == "bad_rank"
    for other in (KeyError("x"), SystemFault("x", code="y"), MemoryError()):
        with pytest.raises(type(other)):
            only_user_errors(raising(other))
    for bad in (
        UserError("No code."),
        InvalidAdapter("x" * MAX_SHOWN, code="a"),
        InvalidAdapter("\x1b[31m", code="a"),
        InvalidAdapter("x", code="a", param="\u202e"),
    ):
        with pytest.raises(AssertionError):
            only_user_errors(raising(bad))


def test_a_mutation_is_decided_by_its_seed_alone() -> None:
    raw = json.dumps(SOUND).encode()
    once = [json_like(raw, random.Random(seed), config.KNOWN) for seed in range(200)]
    assert once == [json_like(raw, random.Random(seed), config.KNOWN) for seed in range(200)]
    assert len(set(once)) > 100


def test_every_code_that_a_seed_has_is_one_of_the_corpus() -> None:
    wanted = {case.code for case in cases()}
    for name, target in TARGETS.items():
        # A target's own limit is lower, and its configuration targets every module.
        assert {target.check(seed) for seed in SEEDS[name]} <= wanted | {"archive_too_large"}


def test_the_page_shows_what_was_measured() -> None:
    root = Path(fuzz.__file__).parents[2]
    result = json.loads((root / "tests" / "fuzz" / "results.json").read_text())
    page = (root / "docs" / "fuzzing.md").read_text()
    assert fuzz.table(result) in page
    assert f"makes {len(cases())} hostile deliveries" in page
    assert f"{sum(not case.code for case in cases())} have to be accepted" in page
    assert f"may take {fuzz.INPUT_SECONDS} s, the whole process {fuzz.RSS_LIMIT} MiB" in page


@pytest.mark.parametrize("name", ["header"])
def test_atheris_runs_a_target(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("atheris", reason="`make fuzz` installs it")
    monkeypatch.setattr(fuzz, "VAR", tmp_path)
    found = fuzz.campaign(name, 120, "-runs=1000")
    assert found["findings"] == [], (tmp_path / name / "log").read_text()[-3000:]
    assert found["executions"] >= 1000 > found["seeds"] > 50
    assert re.search(r"#\d+\s+INITED", (tmp_path / name / "log").read_text())
    for module, lines in found["lines"].items():
        assert 0 < lines["run"] <= lines["of"], module
