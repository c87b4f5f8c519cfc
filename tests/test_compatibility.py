"""Do an adapter, a reference and a method fit together? Each way in which they may not has its code and its module."""

from typing import Any

import pytest

from safegraft.adapter import AdapterDescription, LoraModule, PeftConfig
from safegraft.compatibility import check_base, check_compatible
from safegraft.contracts.methods import GramParameters, NlsrParameters
from safegraft.contracts.reference import (
    AlignedAdapter,
    AlignedModule,
    BaseModelIdentity,
    BaseModule,
    BuildParameters,
    BundleFile,
    PromptSet,
    ReferenceManifest,
)
from safegraft.errors import Incompatible
from safegraft.header import Header, TensorEntry

Q, K, UP = "model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.0.up_proj"


def manifest(**changes: Any) -> ReferenceManifest:
    """A reference for q, k and up, whose aligned adapter has rank 4 on q and k."""
    prompts = PromptSet(sha256="0" * 64, conversations=1, tokens=2, response_tokens=1, answered_by_model=False)
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
        aligned=AlignedAdapter(
            sha256="0" * 64, config_sha256="0" * 64,
            modules={name: AlignedModule(rank=4, norm=1.0) for name in (Q, K)},
        ),
        safety_prompts=prompts,
        general_prompts=None,
        parameters=BuildParameters(
            amplification=0.9, sparsity=0.8, mask_scope="row", ridge=1e-4, smallest_pair=1e-3, max_tokens=9,
            answer_tokens=9, batch_size=1, skipped_prefix=0,
            dtype="float32", device="cpu",
        ),
        gram=None,
        methods=["nlsr", "gram"],
        lineages=["continued", "fresh"],
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


@pytest.mark.parametrize("parameters", [NlsrParameters(), GramParameters(), NlsrParameters(form="neuron")])
def test_an_adapter_of_the_same_modules_and_shapes_fits(parameters: NlsrParameters | GramParameters) -> None:
    check_compatible(adapter(Q, K), manifest(), parameters)


def test_fewer_modules_than_the_reference_s_fit() -> None:
    check_compatible(adapter(K), manifest(), NlsrParameters())


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
        ("a module without neurons", adapter(Q, UP), NlsrParameters(), {}, "module_not_in_reference", UP),
        ("another rank, by factors", adapter(Q, rank=8), NlsrParameters(form="factor"), {}, "rank_mismatch", Q),
        ("another rank, by the paper", adapter(Q, rank=8), NlsrParameters(form="paper"), {}, "rank_mismatch", Q),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    what: str,
    customer: AdapterDescription,
    parameters: NlsrParameters | GramParameters,
    changes: dict[str, Any],
    code: str,
    param: str,
) -> None:
    with pytest.raises(Incompatible) as caught:
        check_compatible(customer, manifest(**changes), parameters)
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize("parameters", [GramParameters(), NlsrParameters(form="neuron"), NlsrParameters(form="auto")])
def test_another_rank_fits_where_no_factors_are_mixed(parameters: NlsrParameters | GramParameters) -> None:
    check_compatible(adapter(Q, rank=8), manifest(), parameters)


def test_gram_serves_a_module_that_the_aligned_adapter_does_not_reach() -> None:
    check_compatible(adapter(UP), manifest(), GramParameters())


@pytest.mark.parametrize(("methods", "hinted"), [(["nlsr", "gram"], True), (["nlsr"], False)])
def test_gram_is_recommended_only_where_it_is_offered(methods: list[str], hinted: bool) -> None:
    with pytest.raises(Incompatible) as caught:
        check_compatible(adapter(UP), manifest(methods=methods), NlsrParameters())
    assert ("gram" in caught.value.hint) == hinted


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
