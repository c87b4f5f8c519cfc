"""What an adapter folder says is read as PEFT reads it; what PEFT would load wrongly or silently is refused by name."""

import json
import pickle
import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key, match_target_against_key
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from safegraft import adapter
from safegraft.adapter import (
    COMPANIONS,
    CONFIG,
    MAX_CONFIG_BYTES,
    WEIGHTS,
    Targets,
    describe,
    is_companion,
    parse_config,
)
from safegraft.contracts.adapter import Origin
from safegraft.errors import InvalidAdapter, UnsupportedAdapter, UserError
from safegraft.records import adapter_record, compatibility
from tests import tiny

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def as_peft_loads(base: Path, folder: Path) -> dict[str, tuple[int, float]]:
    """Module → (rank, scaling), out of the layers that PEFT makes of the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(folder))
    return {
        name.removeprefix(PREFIX): (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def as_we_read(folder: Path) -> dict[str, tuple[int, float]]:
    return {module.name: (module.rank, module.scaling) for module in describe(folder).modules}


def plain(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A folder as PEFT writes it, by hand: one module of rank 4."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**PLAIN, **config}))
    save_file(factors(Q) if tensors is None else tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def factors(*names: str, rank: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{name}.lora_{side}.weight": torch.ones((rank, 8) if side == "A" else (6, rank), dtype=dtype)
        for name in names
        for side in "AB"
    }


def refusal(folder: Path) -> UserError:
    with pytest.raises((InvalidAdapter, UnsupportedAdapter)) as caught:
        describe(folder)
    return caught.value


# --- the same reading as PEFT's ---

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1 and a fraction as alpha": {"rank": 1, "alpha": 0.5},
    "rsLoRA": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5}},
    "both patterns under rsLoRA": {
        "use_rslora": True, "rank_pattern": {"down_proj": 7}, "alpha_pattern": {"down_proj": 2.5},
    },
    "patterns as regular expressions": {
        "rank_pattern": {r".*\.0\..*(q|k)_proj": 2, "self_attn.*": 6}, "alpha_pattern": {r"layers\.[1-9]\..*": 1},
    },
    "overlapping patterns, of which the first counts": {"rank_pattern": {"proj": 9, ".*_proj": 3, "q_proj": 5}},
    "an anchored pattern": {"rank_pattern": {f"^{Q}": 2, "^self_attn.q_proj": 3}},
    "a pattern that is the end of a word only": {"rank_pattern": {"_proj": 2, "roj": 3}},
    "patterns with a dot for any character": {"rank_pattern": {"self.attn.q.proj": 2}},
    "one layer": {"layers_to_transform": 1},
    "a list of layers": {"layers_to_transform": [0]},
    "a list of layers and their pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "several layers' patterns": {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "targets as a regular expression": {"targets": r".*\.1\.(self_attn|mlp)\..*(q|v|down)_proj"},
    "targets by their whole names": {"targets": [Q, "model.layers.1.mlp.up_proj"]},
    "whole names are not asked for their layer": {"targets": [Q, "v_proj"], "layers_to_transform": [1]},
    "all linear layers": {"targets": "all-linear"},
    "excluded names": {"exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]},
    "excluded by a regular expression": {"exclude_modules": r".*layers\.0.*"},
    "Gaussian initialisation": {"init_lora_weights": "gaussian"},
    "random initialisation": {"init_lora_weights": False},
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_ranks_and_scalings_are_those_that_peft_uses(base: Path, tmp_path: Path, what: str) -> None:
    wanted = dict(CONFIGS[what])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = tiny.save_adapter(base, tmp_path / "a", **wanted)
    read = as_we_read(folder)
    assert read
    assert read == as_peft_loads(base, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_each_floating_dtype_is_read(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny.save_adapter(base, tmp_path / "a", dtype=dtype)
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    assert describe(folder).dtype == names[dtype]


def test_shapes_and_counts_are_those_of_the_model_s_layers(base: Path, aligned: Path) -> None:
    description = describe(aligned)
    layers = dict(LlamaForCausalLM.from_pretrained(base).named_modules())
    assert len(description.modules) == tiny.LAYERS * len(tiny.TARGETS)
    for module in description.modules:
        assert (module.outputs, module.inputs) == tuple(layers[module.name].weight.shape)
    assert description.kinds == sorted(tiny.TARGETS)
    assert description.parameters == sum(m.rank * (m.inputs + m.outputs) for m in description.modules)


def test_modules_come_in_the_order_of_layers(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (10, 9, 0, 100)]
    read = describe(plain(tmp_path, factors(*names)))
    assert [m.name.split(".")[2] for m in read.modules] == ["0", "9", "10", "100"]


def test_a_config_of_the_oldest_form_is_read(tmp_path: Path) -> None:
    old: dict[str, Any] = {
        "base_model_name_or_path": "x", "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_dropout": 0.05, "modules_to_save": None, "task_type": "CAUSAL_LM",
        "layers_pattern": None, "layers_to_transform": None,
    }  # fmt: skip
    assert as_we_read(plain(tmp_path, **old)) == {Q: (4, 2.0)}


def test_a_byte_order_mark_before_the_config_is_skipped() -> None:
    assert parse_config(b"\xef\xbb\xbf" + json.dumps(PLAIN).encode()).r == 4


# RE2 and Python's re agree on every pattern of this grammar.
atoms = st.sampled_from(["a", "b", "c", "d", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "0", "1", "^", "$", r"\b"])
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,}", "*?", "+?"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
    ),
    max_leaves=8,
)
module_names = st.lists(st.sampled_from(["a", "b", "ab", "layers", "0", "1", "12", "a_b"]), min_size=1, max_size=5)


@given(patterns, patterns, module_names.map(".".join))
@settings(deadline=None, max_examples=300)
def test_patterns_match_what_peft_s_matching_does(first: str, second: str, name: str) -> None:
    ranks = {first: 2, second: 3}
    targets = Targets(parse_config(json.dumps({**PLAIN, "target_modules": first, "rank_pattern": ranks}).encode()))
    assert targets.include(name) == bool(match_target_against_key(first, name))
    assert targets.rank(name) == ranks.get(get_pattern_key(list(ranks), name), 4)


@pytest.mark.parametrize(
    "name", ["layers.0.q_proj", "model.layers.0.q_proj", "a.0.b.1.q_proj", "0.q_proj", "q_proj", "a.0.1.q_proj"]
)
@pytest.mark.parametrize("pattern", [None, "", [], "layers", ["a", "b"], "[a-z]+"])
@pytest.mark.parametrize("layers", [None, [], 0, 1, [0], [1, 5]])
def test_layers_are_found_where_peft_finds_them(name: str, pattern: Any, layers: Any) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = LoraConfig(target_modules=["q_proj"], layers_to_transform=layers)
    theirs.layers_pattern = pattern
    raw = {**PLAIN, "layers_to_transform": layers, "layers_pattern": pattern}
    assert Targets(parse_config(json.dumps(raw).encode())).include(name) == bool(
        check_target_module_exists(theirs, name)
    )


# --- what PEFT made and no linear repair can treat ---


@pytest.mark.parametrize(
    ("what", "config", "code"),
    [
        ("DoRA", {"use_dora": True}, "dora_unsupported"),
        ("a bias in the factors", {"lora_bias": True}, "bias_unsupported"),
        ("biases of the base", {"bias": "all"}, "bias_unsupported"),
        ("biases of LoRA layers only", {"bias": "lora_only"}, "bias_unsupported"),
        ("whole modules", {"modules_to_save": ["lm_head"]}, "modules_to_save_unsupported"),
        ("PiSSA", {"init_lora_weights": "pissa"}, "init_unsupported"),
        ("OLoRA", {"init_lora_weights": "olora"}, "init_unsupported"),
        ("trained tokens", {"trainable_token_indices": [1, 2]}, "variant_unsupported"),
        ("parameters", {"target_parameters": ["q_proj.weight"], "targets": ["k_proj"]}, "variant_unsupported"),
        ("aLoRA", {"alora_invocation_tokens": [1]}, "variant_unsupported"),
        ("an embedding", {"targets": ["embed_tokens", "q_proj"]}, "embedding_unsupported"),
    ],
)  # fmt: skip
def test_peft_s_own_variants_are_refused_by_name(
    base: Path, tmp_path: Path, what: str, config: dict[str, Any], code: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = tiny.save_adapter(base, tmp_path / "a", **config)
    error = refusal(folder)
    assert isinstance(error, UnsupportedAdapter)
    assert error.code == code


@pytest.mark.parametrize(
    ("config", "key", "code"),
    [
        ({"use_dora": True, "r": 8}, "use_dora", "dora_unsupported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save", "modules_to_save_unsupported"),
        *(({key: {"a": 1}}, key, "variant_unsupported") for key in adapter.UNSOUND_KEYS if key != "modules_to_save"),
        ({"use_foo": True}, "use_foo", "variant_unsupported"),
        ({"use_foo": {"rank": 1}}, "use_foo", "variant_unsupported"),
        ({"use_qalora": True}, "use_qalora", "variant_unsupported"),
        *(
            ({"init_lora_weights": init}, "init_lora_weights", "init_unsupported")
            for init in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "PiSSA", "")
        ),
        ({"peft_type": "LOHA"}, "peft_type", "peft_type_unsupported"),
        ({"peft_type": "lora"}, "peft_type", "peft_type_unsupported"),
    ],
)
def test_a_config_that_means_more_than_plain_lora_is_unsupported(config: dict[str, Any], key: str, code: str) -> None:
    with pytest.raises(UnsupportedAdapter) as caught:
        parse_config(json.dumps({**PLAIN, **config}).encode())
    assert (caught.value.code, caught.value.param) == (code, key)


@pytest.mark.parametrize("key", ["use_foo", "use_dora", "lora_bias", *adapter.UNSOUND_KEYS])
def test_a_variant_that_is_switched_off_is_plain_lora(key: str) -> None:
    off: Any = None if key in adapter.UNSOUND_KEYS else False
    assert parse_config(json.dumps({**PLAIN, key: off}).encode()).r == 4


# --- hostile or broken configurations ---

BAD_CONFIGS: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "nothing": (b"", "config_not_json"),
    "a list": (b"[]", "config_not_json"),
    "a string": (b'"LORA"', "config_not_json"),
    "half of JSON": (b'{"r": 4', "config_not_json"),
    "UTF-16": (json.dumps(PLAIN).encode("utf-16"), "config_not_json"),
    "bytes that are not UTF-8": (b'{"a": "\xff"}', "config_not_json"),
    "deep JSON": (b'{"a":' * 100_000, "config_not_json"),
    "a number of 5000 digits": (b'{"r":' + b"9" * 5000 + b"}", "config_not_json"),
    "half a surrogate pair as value": ({"base_model_name_or_path": "\ud800"}, "config_not_json"),
    "half a surrogate pair as key": ({"use_\ud800": True}, "config_not_json"),
    "half a surrogate pair as pattern": ({"rank_pattern": {"\ud800": 1}}, "config_not_json"),
    "too large": (json.dumps({**PLAIN, "x": "a" * MAX_CONFIG_BYTES}).encode(), "config_too_large"),
    "no peft_type": (b'{"r": 4, "lora_alpha": 8}', "config_invalid"),
    "a list as peft_type": ({"peft_type": ["LORA"]}, "config_invalid"),
    "text as rank": ({"r": "4"}, "config_invalid"),
    "a fraction as rank": ({"r": 4.5}, "config_invalid"),
    "true as rank": ({"r": True}, "config_invalid"),
    "no rank": ({"r": None}, "config_invalid"),
    "text as switch": ({"use_dora": "false"}, "config_invalid"),
    "a number as target": ({"target_modules": [1]}, "config_invalid"),
    "an enormous whole number as alpha": ({"lora_alpha": 10**400}, "config_invalid"),
    "a label of 5000 characters": ({"base_model_name_or_path": "x" * 5000}, "config_invalid"),
    "rank 0": ({"r": 0}, "bad_rank"),
    "a negative rank": ({"r": -1}, "bad_rank"),
    "rank 5000": ({"r": 5000}, "bad_rank"),
    "a rank of 4000 digits": ({"r": 10**4000}, "bad_rank"),
    "rank 0 in a pattern": ({"rank_pattern": {"q_proj": 0}}, "bad_rank"),
    "alpha 0": ({"lora_alpha": 0}, "bad_alpha"),
    "a negative alpha": ({"lora_alpha": -8}, "bad_alpha"),
    "a huge alpha": ({"lora_alpha": 1e7}, "bad_alpha"),
    "alpha beyond all floats": (json.dumps(PLAIN).replace("8", "1e999", 1).encode(), "bad_alpha"),
    "NaN as alpha": ({"lora_alpha": float("nan")}, "bad_alpha"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "bad_alpha"),
    "NaN in a pattern": ({"alpha_pattern": {"q_proj": float("nan")}}, "bad_alpha"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_a_broken_config_is_refused_with_its_code(what: str) -> None:
    given_, code = BAD_CONFIGS[what]
    raw = given_ if isinstance(given_, bytes) else json.dumps({**PLAIN, **given_}).encode()
    with pytest.raises(InvalidAdapter) as caught:
        parse_config(raw)
    assert caught.value.code == code
    assert len(caught.value.message) < 600


@pytest.mark.parametrize("depth", range(850, 1000, 3))
def test_nesting_just_below_python_s_limit_never_escapes(depth: int) -> None:
    nested = "[" * depth + "]" * depth
    for key in ("peft_type", "r", "rank_pattern", "use_foo", "other"):
        raw = json.dumps({**PLAIN, key: "?"}).replace('"?"', nested).encode()
        try:
            parse_config(raw)
        except (InvalidAdapter, UnsupportedAdapter) as error:
            assert error.code in {"config_not_json", "config_invalid", "variant_unsupported"}  # noqa: PT017


HOSTILE = "\x1b[31m\u202e" + "x" * 100_000


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": HOSTILE},
        {"bias": HOSTILE},
        {"init_lora_weights": HOSTILE},
        {f"use_{HOSTILE}": True},
        {"rank_pattern": {HOSTILE: 0}},
        {"rank_pattern": {HOSTILE: "x"}},
        {"alpha_pattern": {HOSTILE: -1}},
        {"rank_pattern": {HOSTILE + "(": 1}},
    ],
    ids=lambda config: ascii(next(iter(config)))[:20],
)
def test_what_is_shown_of_hostile_text_is_short_printable_ascii(tmp_path: Path, config: dict[str, Any]) -> None:
    error = refusal(plain(tmp_path, **config))
    for text in (error.param or "", error.message):
        assert text.replace("·", "").isascii()
        assert text.isprintable()
        assert len(text) < 400


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(
    leaves, lambda i: st.lists(i, max_size=2) | st.dictionaries(st.text(max_size=3), i, max_size=2), max_leaves=5
)
keys = st.sampled_from([*adapter.PeftConfig.model_fields, *adapter.UNSOUND_KEYS, "use_x"]) | st.text(max_size=5)


@given(st.dictionaries(keys, anything, max_size=4))
@settings(deadline=None, max_examples=200)
def test_odd_values_raise_nothing_but_user_errors(config: dict[str, Any]) -> None:
    try:
        Targets(parse_config(json.dumps({**PLAIN, **config}).encode())).include(Q)
    except (InvalidAdapter, UnsupportedAdapter) as error:
        assert error.code != error.default_code  # noqa: PT017


# --- patterns from a customer's file ---


@pytest.mark.parametrize(
    "pattern", ["(?!x)q_proj", "(?=q)q_proj", "(?<=q)_proj", "(?<!x)q_proj", r"(q)_proj\1", "q_proj(", "[", "**",
                "a{,3}", "[[:alpha:]]", "x{5000}", "(((x{100}){100}){100})"],
)  # fmt: skip
@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_patterns_that_re2_cannot_run_as_peft_would_are_refused(tmp_path: Path, pattern: str, key: str) -> None:
    config: dict[str, Any] = {key: {pattern: 4} if key in ("rank_pattern", "alpha_pattern") else pattern}
    if key == "layers_pattern":
        config["layers_to_transform"] = [0]
    error = refusal(plain(tmp_path, **config))
    assert error.code == "pattern_unsupported"
    assert error.param


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(a|aa)+b", "(.*a){30}b", "(x+x+)+y", ".*.*.*.*.*b"])
def test_patterns_that_backtrack_for_ever_elsewhere_return_at_once(tmp_path: Path, pattern: str) -> None:
    name = "a" * 400
    start = time.perf_counter()
    error = refusal(plain(tmp_path, factors(name), target_modules=pattern))
    assert error.code == "untargeted_module"
    assert as_we_read(plain(tmp_path, factors(name), target_modules=[name], rank_pattern={pattern: 2})) == {
        name: (4, 2.0)
    }
    assert time.perf_counter() - start < 2


MANY = factors(*(f"model.layers.{i}.{'x' * 300}.q_proj" for i in range(1500)), rank=1)


@pytest.mark.parametrize(
    ("what", "config", "code"),
    [
        ("60,000 names", {"r": 1, "target_modules": [*(f"n{i}" for i in range(60_000)), "q_proj"]}, None),
        ("100,000 layers", {"r": 1, "layers_to_transform": list(range(100_000, -1, -1))}, None),
        ("60,000 patterns", {"r": 1, "rank_pattern": {f"n{i}": 1 for i in range(60_000)}}, "pattern_unsupported"),
        ("large patterns", {"rank_pattern": {f"x{{{i}}}": 1 for i in range(1, 1001)}}, "pattern_unsupported"),
        ("one pattern too slow", {"r": 1, "target_modules": "(.*.*x){900}y"}, "untargeted_module"),
        ("patterns too slow", {"rank_pattern": {f"(.*x){{{i}}}y": 1 for i in range(600, 620)}}, "pattern_unsupported"),
    ],
)  # fmt: skip
def test_many_names_and_patterns_cost_seconds_at_the_most(
    tmp_path: Path, what: str, config: dict[str, Any], code: str | None
) -> None:
    folder = plain(tmp_path, MANY, **config)
    start = time.perf_counter()
    if code is None:
        assert len(describe(folder).modules) == 1500
    else:
        assert refusal(folder).code == code
    assert time.perf_counter() - start < 12


def test_patterns_that_name_every_module_of_the_largest_dense_model_are_accepted(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.{kind}" for i in range(126) for kind in tiny.TARGETS]
    folder = plain(
        tmp_path, factors(*names), target_modules=tiny.TARGETS,
        rank_pattern=dict.fromkeys(names, 4), alpha_pattern=dict.fromkeys(names, 2),
    )  # fmt: skip
    assert set(as_we_read(folder).values()) == {(4, 0.5)}


# --- keys and shapes ---


A, B, ONE = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight", torch.ones(4)
BAD_WEIGHTS: dict[str, tuple[dict[str, torch.Tensor], str, str | None]] = {
    "no factors": ({}, "no_factors", WEIGHTS),
    "only A": ({A: torch.ones(4, 8)}, "missing_factor", Q),
    "only B": ({B: torch.ones(6, 4)}, "missing_factor", Q),
    "a key without PEFT's prefix": ({**factors(Q), f"{Q}.lora_A.weight": ONE}, "unexpected_key", f"{Q}.lora_A.weight"),
    "a weight of the base": ({**factors(Q), f"{PREFIX}{Q}.weight": ONE}, "unexpected_key", f"{PREFIX}{Q}.weight"),
    "a parameter without .weight": ({**factors(Q), f"{PREFIX}x.lora_A": ONE}, "unexpected_key", f"{PREFIX}x.lora_A"),
    "the same factor under two adapters' names": (
        {**factors(Q), A.replace(".weight", ".default.weight"): torch.ones(4, 8)}, "duplicate_factor", None,
    ),
    "a DoRA magnitude": ({**factors(Q), f"{PREFIX}{Q}.lora_magnitude_vector": ONE}, "dora_unsupported", None),
    "an embedding": ({**factors(Q), f"{PREFIX}e.lora_embedding_A": ONE}, "embedding_unsupported", None),
    "a saved module": ({**factors(Q), f"{PREFIX}h.modules_to_save.weight": ONE}, "modules_to_save_unsupported", None),
    "a bias of B": ({**factors(Q), f"{PREFIX}{Q}.lora_B.bias": ONE}, "bias_unsupported", None),
    "a bias of the base": ({**factors(Q), f"{PREFIX}{Q}.bias": ONE}, "bias_unsupported", None),
    "integers": (factors(Q, dtype=torch.int8), "dtype_unsupported", A),
    "double precision": (factors(Q, dtype=torch.float64), "dtype_unsupported", A),
    "an empty A, as ZeRO-3 leaves it": ({**factors(Q), A: torch.empty(0)}, "empty_tensor", A),
    "an empty B": ({**factors(Q), B: torch.empty(0, 4)}, "empty_tensor", B),
    "a convolution": ({**factors(Q), A: torch.ones(4, 8, 1, 1)}, "shape_unsupported", A),
    "a vector": ({**factors(Q), B: ONE}, "shape_unsupported", B),
    "a rank that the config does not know": (factors(Q, rank=3), "rank_disagrees", Q),
    "A and B of different ranks": ({A: torch.ones(4, 8), B: torch.ones(6, 5)}, "rank_disagrees", Q),
    "A and B of different dtypes": ({**factors(Q), B: torch.ones(6, 4).half()}, "dtype_disagrees", Q),
    "a module that the config does not target": (factors(Q, "model.x.k_proj"), "untargeted_module", "model.x.k_proj"),
    "a module whose name only ends alike": (factors("model.my_q_proj"), "untargeted_module", "model.my_q_proj"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_WEIGHTS)
def test_factors_that_peft_would_drop_or_misread_are_refused_by_name(tmp_path: Path, what: str) -> None:
    tensors, code, param = BAD_WEIGHTS[what]
    error = refusal(plain(tmp_path, tensors))
    assert error.code == code
    if param is not None:
        assert error.param == param


@pytest.mark.parametrize(
    ("what", "config", "code"),
    [("missing config", None, "missing_config"), ("missing weights", b"{}", "missing_weights")],
)
def test_an_incomplete_folder_is_refused(tmp_path: Path, what: str, config: bytes | None, code: str) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({}))
    if config is not None:
        (tmp_path / CONFIG).write_bytes(config)
    assert refusal(tmp_path).code == code


@pytest.mark.parametrize(
    ("what", "content", "code"),
    [
        ("an empty file", b"", "empty_file"),
        ("half a file", (9999).to_bytes(8, "little") + b"{}", "truncated_file"),
        ("a legacy PyTorch pickle", None, "pickle_file"),
        ("a PyTorch zip", "zip", "pickle_file"),
    ],
)
def test_a_weights_file_of_another_kind_is_refused_unopened(tmp_path: Path, what: str, content: Any, code: str) -> None:
    folder = plain(tmp_path)
    if isinstance(content, bytes):
        (folder / WEIGHTS).write_bytes(content)
    else:
        torch.save({"a": torch.ones(3)}, folder / WEIGHTS, _use_new_zipfile_serialization=content == "zip")
    assert refusal(folder).code == code


def test_every_code_of_the_module_is_tested() -> None:
    words = set(re.findall(r'"([a-z]+(?:_[a-z]+)+)"', Path(adapter.__file__).read_text()))
    codes = {
        word for word in words if word.startswith(("bad_", "missing_", "no_", "config_", "duplicate_", "unexpected_"))
    }
    codes |= {word for word in words if word.endswith(("_unsupported", "_disagrees", "_tensor", "_module"))}
    mine = Path(__file__).read_text()
    assert len(codes) == 25
    assert {code for code in codes if f'"{code}"' not in mine} == set()


# --- keys with an adapter's name ---


@pytest.mark.parametrize("name", ["default", "my-adapter_2"])
def test_keys_with_an_adapter_name_are_read_but_no_server_loads_them(base: Path, tmp_path: Path, name: str) -> None:
    folder = tiny.save_adapter(base, tmp_path / "a")
    before = as_we_read(folder)
    tiny.change_tensors(folder, lambda all_: {k.replace(".weight", f".{name}.weight"): t for k, t in all_.items()})
    description = describe(folder)
    assert {m.name: (m.rank, m.scaling) for m in description.modules} == before
    shown = compatibility(description)
    assert [shown.peft.ok, shown.vllm.ok, shown.lorax.ok, shown.tgi.ok] == [False] * 4
    assert as_peft_loads(base, folder) == before


# --- the record ---


def test_the_record_says_what_the_files_say(base: Path, tmp_path: Path) -> None:
    folder = tiny.save_adapter(base, tmp_path / "a", rank=4, alpha=6, use_rslora=True, targets=["q_proj"])
    record = adapter_record("adp_1", "", folder, describe(folder), dropped=["x.py"], origin=Origin())
    assert (record.name, record.rank, record.alpha, record.modules) == ("adp_1", 4, 6, tiny.LAYERS)
    assert (record.dtype, record.target_modules, record.dropped_files) == ("BF16", ["q_proj"], ["x.py"])
    assert record.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert [file.name for file in record.files] == [CONFIG, WEIGHTS]
    assert record.sha256 == record.files[1].sha256


@pytest.mark.parametrize(
    ("config", "rank", "vllm", "reason"),
    [
        ({}, 16, True, None),
        ({}, 17, True, "--max-lora-rank 32"),
        ({}, 512, True, "--max-lora-rank 512"),
        ({}, 513, False, "above vLLM's largest"),
        ({"rank_pattern": {"k_proj": 4}}, 4, True, None),
        ({"alpha_pattern": {"k_proj": 4}}, 4, False, "differ between modules"),
    ],
)
def test_the_record_says_which_servers_can_load_it(
    tmp_path: Path, config: dict[str, Any], rank: int, vllm: bool, reason: str | None
) -> None:
    tensors = factors("a.q_proj", "a.k_proj", rank=rank)
    shown = compatibility(describe(plain(tmp_path, tensors, r=rank, target_modules=["q_proj", "k_proj"], **config)))
    assert shown.peft.ok
    assert shown.vllm.ok == vllm
    assert (shown.vllm.reason is None) if reason is None else (reason in (shown.vllm.reason or ""))
    assert shown.lorax.ok == shown.tgi.ok == (config.get("alpha_pattern") is None)


# --- companions ---


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template_tools.jinja",
     "chat_template.json", "README.md"],
)  # fmt: skip
def test_files_that_travel_along_are_known(name: str) -> None:
    assert is_companion(name)


@pytest.mark.parametrize(
    "name",
    ["training_args.bin", "model.py", "tokenizer.py", "tokenizer/../../x.json", "chat_template/../../etc/cron.d/x",
     "chat_template", "chat_template\n", "chat_template\\x", "tokenizer\u202e.json",
     "tokenizer" + "x" * 300 + ".json", "", ".."],
)  # fmt: skip
def test_other_files_and_names_that_hide_a_path_do_not_travel(name: str) -> None:
    assert not is_companion(name)


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt", "pth", "pkl", "ckpt", "gguf", "py", "so", "html", "sh"])
def test_nothing_that_is_loaded_or_run_travels_under_the_name_of_a_companion(suffix: str) -> None:
    for pattern in COMPANIONS:
        for name in (pattern, pattern.rpartition(".")[0]):
            assert not is_companion(f"{name.replace('*', '')}.{suffix}")
            assert not is_companion(f"{name.replace('*', '_x')}.{suffix}")
            assert not is_companion(f"{name.replace('*', '.jinja.json')}.{suffix}")


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"layers_to_transform": "0"}, "layers_to_transform", "valid list, or: Input should be a valid integer"),
        ({"target_modules": 5}, "target_modules", "valid list, or: Input should be a valid string"),
        ({"target_modules": ["q_proj", 1]}, "target_modules.1", "valid string"),
        ({"init_lora_weights": 5}, "init_lora_weights", "valid boolean, or: Input should be a valid string"),
        ({"target_modules": "(?<=x)y"}, "(?<=x)y", "The pattern '(?<=x)y' cannot be used ("),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "(", "The pattern '(' cannot be used (missing ))."),
        ({"rank_pattern": {"(": 4}}, "(", "The pattern '(' cannot be used (missing ))."),
    ],
)
def test_a_fault_is_told_by_the_field_and_in_words(
    tmp_path: Path, changes: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(InvalidAdapter) as error:
        describe(plain(tmp_path, **changes))
    assert error.value.param == param
    assert said in error.value.message
    assert not re.search(r"b'|\[int\]|\[str\]|idx", error.value.message)


def test_a_number_that_python_does_not_read_is_told_without_python() -> None:
    with pytest.raises(InvalidAdapter) as error:
        parse_config(b'{"r": ' + b"1" * 10_000 + b"}")
    assert "digits" in error.value.message
    assert "sys." not in error.value.message
