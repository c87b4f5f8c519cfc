"""Do an adapter, a reference and a method fit together? Each way in which they may not has its code and its module."""

from typing import Any

import pytest

from safegraft.adapter import AdapterDescription, LoraModule, PeftConfig
from safegraft.compatibility import check_base, check_compatible, recommend, top_heads
from safegraft.contracts.methods import (
    AntidoteParameters,
    AutoParameters,
    GramParameters,
    NlsrParameters,
    NoneParameters,
    SafeLoraParameters,
    SafetyLockParameters,
)
from safegraft.contracts.reference import (
    AlignedModule,
    BaseModelIdentity,
    BaseModule,
    BuildParameters,
    BundleFile,
    HeadLayer,
    Origin,
    PromptSet,
    ReferenceManifest,
    SafetyLockStatistics,
)
from safegraft.errors import Incompatible
from safegraft.header import Header, TensorEntry

Q, K, UP = "model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.0.up_proj"


def manifest(**changes: Any) -> ReferenceManifest:
    """A reference for q, k and up, whose aligned adapter has rank 4 on q and k."""
    prompts = PromptSet(
        sha256="0" * 64, conversations=1, tokens=2, response_tokens=1, answered_by_model=False, forward_passes=1
    )
    whole = ReferenceManifest(
        name="tiny",
        created_at=1,
        safegraft_version="0",
        base_model=BaseModelIdentity(
            labels=["tiny"],
            config_sha256="0" * 64,
            architecture="LlamaForCausalLM",
            modules={name: BaseModule(outputs=6, inputs=8, site=name) for name in (Q, K, UP)},
        ),
        origin=Origin(source="adapter", files={}),
        aligned={name: AlignedModule(rank=4, scaling=2.0, norm=1.0) for name in (Q, K)},
        scorers=["low_rank", "wanda"],
        safety_prompts=prompts,
        general_prompts=None,
        unsafe_prompts=None,
        parameters=BuildParameters(
            amplification=0.9, sparsity=0.8, mask_scope="row", ridge=1e-4, smallest_pair=1e-3, max_tokens=9,
            answer_tokens=9, batch_size=1, skipped_prefix=0, max_pairs=None, rank=None, dtype="float32", device="cpu",
        ),
        gram=None,
        safetylock=SafetyLockStatistics(
            source="measured",
            layers={
                Q: HeadLayer(heads=2, accuracy=[0.9, 0.7], separation=[2.0, 2.0], unexplained=0.1),
                UP: HeadLayer(heads=2, accuracy=[0.9, 0.0], separation=[2.0, 2.0], unexplained=0.1),
            },
        ),
        methods=["nlsr", "gram", "safelora", "antidote", "safetylock", "none"],
        lineages=["continued", "fresh", "foreign"],
        files={"nlsr.safetensors": BundleFile(sha256="0" * 64, bytes=1)},
    )  # fmt: skip
    return whole.model_copy(update=changes)


def adapter(
    *names: str, rank: int = 4, inputs: int = 8, outputs: int = 6, label: str | None = None
) -> AdapterDescription:
    entry = TensorEntry("x", "F32", (1, 1), 0, 4)
    config = PeftConfig(peft_type="LORA", r=rank, lora_alpha=8.0, base_model_name_or_path=label)
    modules = tuple(LoraModule(name, rank, inputs, outputs, 2.0, entry, entry) for name in names)
    return AdapterDescription(config, Header({}, {}, 0), modules)


@pytest.mark.parametrize(
    "parameters",
    [
        AutoParameters(), NlsrParameters(), NlsrParameters(form="neuron"), GramParameters(), SafeLoraParameters(),
        AntidoteParameters(), SafetyLockParameters(heads=1), NoneParameters(),
    ],
)  # fmt: skip
def test_an_adapter_of_the_same_modules_and_shapes_fits(parameters: Any) -> None:
    check_compatible(adapter(Q, K), manifest(), parameters)


def test_fewer_modules_than_the_reference_s_fit() -> None:
    check_compatible(adapter(K), manifest(), NlsrParameters())


def test_modules_beyond_the_aligned_adapter_s_reach_fit_as_long_as_it_reaches_one() -> None:
    check_compatible(adapter(Q, UP), manifest(), NlsrParameters())
    check_compatible(adapter(Q, UP), manifest(), SafeLoraParameters())


@pytest.mark.parametrize(
    ("what", "customer", "parameters", "changes", "code", "param"),
    [
        ("no such module", adapter(Q, "model.layers.9.q_proj"), GramParameters(), {}, "module_not_in_base",
         "model.layers.9.q_proj"),
        ("other inputs", adapter(Q, inputs=9), GramParameters(), {}, "base_mismatch", Q),
        ("other outputs", adapter(Q, outputs=7), GramParameters(), {}, "base_mismatch", Q),
        ("inputs and outputs swapped", adapter(Q, inputs=6, outputs=8), GramParameters(), {}, "base_mismatch", Q),
        ("a method that was not built", adapter(Q), GramParameters(), {"methods": ["nlsr"]}, "method_not_offered",
         "method.type"),
        ("no module with neurons", adapter(UP), NlsrParameters(), {}, "module_not_in_reference", UP),
        ("no module with an alignment", adapter(UP), SafeLoraParameters(), {}, "module_not_in_reference", UP),
        ("no module to amplify", adapter(UP), GramParameters(amplification=0.5), {}, "module_not_in_reference", UP),
        ("nothing to amplify", adapter(Q), GramParameters(amplification=0.5), {"aligned": {}}, "no_aligned_update",
         "method.amplification"),
        ("another rank, by factors", adapter(Q, rank=8), NlsrParameters(form="factor"), {}, "rank_mismatch", Q),
        ("another rank, by the paper", adapter(Q, rank=8), NlsrParameters(form="paper"), {}, "rank_mismatch", Q),
        ("a scorer that was not built", adapter(Q), NlsrParameters(scorer="snip"), {}, "scorer_not_offered",
         "method.scorer"),
        ("neurons spared among entries", adapter(Q), AntidoteParameters(spare="safety"), {}, "parameters_conflict",
         "method.spare"),
        ("neurons spared that are unknown", adapter(Q), AntidoteParameters(spare="safety", basis="rows"),
         {"methods": ["antidote"]}, "method_not_offered", "method.spare"),
        ("a head without factors", adapter(Q), SafetyLockParameters(heads=2), {}, "module_not_in_adapter", UP),
        ("the same, as a bias", adapter(Q), SafetyLockParameters(heads=2, output="lora_bias"), {},
         "module_not_in_adapter", UP),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    what: str, customer: AdapterDescription, parameters: Any, changes: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(Incompatible) as caught:
        check_compatible(customer, manifest(**changes), parameters)
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize("lineage", ["fresh", "foreign"])
@pytest.mark.parametrize("form", ["factor", "paper"])
def test_forms_on_factors_refuse_every_lineage_but_continued(form: Any, lineage: Any) -> None:
    check_compatible(adapter(Q), manifest(), NlsrParameters(form=form), "continued")
    with pytest.raises(Incompatible) as caught:
        check_compatible(adapter(Q), manifest(), NlsrParameters(form=form), lineage)
    assert caught.value.code == "lineage_mismatch"
    assert "neuron" in caught.value.hint
    assert "gram" in caught.value.hint


@pytest.mark.parametrize("parameters", [GramParameters(), NlsrParameters(form="neuron"), NlsrParameters(form="auto")])
def test_another_rank_fits_where_no_factors_are_mixed(parameters: NlsrParameters | GramParameters) -> None:
    check_compatible(adapter(Q, rank=8), manifest(), parameters)


def test_gram_serves_a_module_that_the_aligned_adapter_does_not_reach() -> None:
    check_compatible(adapter(UP), manifest(), GramParameters())


def test_a_side_car_needs_no_factors_where_the_heads_are() -> None:
    check_compatible(adapter(K), manifest(), SafetyLockParameters(output="side_car"))


def test_a_refusal_names_the_methods_that_would_serve() -> None:
    with pytest.raises(Incompatible) as caught:
        check_compatible(adapter(UP), manifest(), NlsrParameters())
    # The heads lie on q as well, which this adapter does not have.
    assert caught.value.hint == "These methods would serve: gram, antidote."
    with pytest.raises(Incompatible) as caught:
        check_compatible(adapter(UP), manifest(methods=["nlsr"]), NlsrParameters())
    assert caught.value.hint == ""


@pytest.mark.parametrize(
    ("methods", "recommended", "because"),
    [
        (["nlsr", "gram", "safetylock"], "gram", "gram serves a fresh adapter"),
        (["nlsr", "safelora", "safetylock", "none"], "nlsr", "no statistics of general prompts"),
        (["safetylock", "none"], "safetylock", "Neither gram nor nlsr"),
        (["antidote", "none"], "antidote", "antidote"),
    ],
)
def test_the_recommendation_follows_what_the_reference_offers(
    methods: list[str], recommended: str, because: str
) -> None:
    method, reason = recommend(adapter(Q, K, UP), manifest(methods=methods), "fresh")
    assert method == recommended
    assert because in reason


def test_nothing_is_recommended_where_nothing_would_serve() -> None:
    with pytest.raises(Incompatible) as caught:
        recommend(adapter(Q), manifest(methods=["safelora", "none"]), "fresh")
    assert caught.value.code == "no_method"
    assert "safelora" in caught.value.hint


def test_the_best_heads_come_first_then_those_further_apart_then_the_model_s_order() -> None:
    assert top_heads(manifest(), 1) == {Q: [0]}
    assert top_heads(manifest(), 2) == {Q: [0], UP: [0]}
    known = manifest().safetylock
    assert known is not None
    layers = known.layers | {UP: HeadLayer(heads=1, accuracy=[0.9], separation=[3.0], unexplained=0.1)}
    apart = manifest(safetylock=SafetyLockStatistics(source="measured", layers=layers))
    assert top_heads(apart, 1) == {UP: [0]}
    # A head whose probe is never right is no head to push.
    assert top_heads(manifest(), 99) == {Q: [0, 1], UP: [0]}


def test_a_rank_above_both_sides_of_a_layer_is_refused() -> None:
    with pytest.raises(Incompatible) as caught:
        check_base(adapter(Q, rank=9), manifest())
    assert (caught.value.code, caught.value.param) == ("rank_above_layer", Q)


def test_an_adapter_that_peft_wrapped_twice_is_told_so() -> None:
    with pytest.raises(Incompatible, match="twice"):
        check_base(adapter(f"base_model.model.{Q}"), manifest())


def test_a_reference_without_modules_fits_nothing() -> None:
    empty = manifest().base_model.model_copy(update={"modules": {}})
    with pytest.raises(Incompatible) as caught:
        check_base(adapter(Q), manifest(base_model=empty))
    assert caught.value.code == "module_not_in_base"
