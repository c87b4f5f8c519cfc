"""Every method on every architecture and lineage: what comes out loads in PEFT and is what the report says it is."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safegraft.adapter import CONFIG, WEIGHTS, describe
from safegraft.contracts.methods import (
    STRENGTH,
    AntidoteParameters,
    GramParameters,
    Method,
    NlsrParameters,
    SafeLoraParameters,
    SafetyLockParameters,
    strength_name,
)
from safegraft.contracts.report import Report
from safegraft.engine import models, parallel
from safegraft.engine.build import placeholder
from safegraft.engine.conversations import Conversation, encode
from safegraft.engine.pipeline import SIDE_CAR, OutputRank, realign
from safegraft.engine.reference import LoadedReference
from safegraft.errors import InvalidParameter
from safegraft.files import side_car_folder
from tests import tiny
from tests.engine.families import COLUMNS, FAMILIES, HEADS, ROWS, Stand, Workshop, shared

# float32 factors against a dense float64 target: the rounding of a few dozen terms, and of the factors themselves.
FLOAT32 = 2e-6
# A side car or a bias against the same push made inside of the model: two ways to the same float32 logits.
LOGITS = 2e-5
# The report takes the difference of two updates from float32 factors: its square cancels to some 10⁻⁷ of theirs, and an
# edit of zero shows as the root of that.
EDIT = 1e-3

families = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return shared(tmp_path_factory.getbasetemp() / "families")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def factors(folder: Path) -> dict[str, Tensor]:
    """ΔW of every module from nothing but the file and the scaling that safegraft reads from the configuration."""
    tensors = load_file(folder / WEIGHTS)
    return {
        module.name: (tensors[module.b.name].float() @ tensors[module.a.name].float()) * module.scaling
        for module in describe(folder).modules
    }


def check(stand: Stand, source: Path, out: Path, report: Report, *, on_update: bool) -> None:
    """`out` loads in PEFT on the base, without a key too many or too few, and is there what file and report say."""
    continued = report.lineage == "continued"
    on_aligned = on_update and not continued
    before, plain = stand.seen(source, on_aligned=on_aligned)
    with stand.served.loaded(out, on_aligned=on_aligned) as served:
        after, biases, logits = served.updates(), served.biases(), served.logits()
    assert set(after) == {line.name for line in report.modules}
    old, new = load_file(source / WEIGHTS), load_file(out / WEIGHTS)
    assert {key: (t.shape, t.dtype) for key, t in old.items()} == {
        key: (t.shape, t.dtype) for key, t in new.items() if not key.endswith("bias")
    }
    if not biases:
        assert (out / CONFIG).read_bytes() == (source / CONFIG).read_bytes()
        written = factors(out)
        assert all(torch.equal(after[name], written[name]) for name in after)
    for line in report.modules:
        bias = biases.get(line.name)
        same = torch.equal(before[line.name], after[line.name]) and (bias is None or not bool(bias.any()))
        assert line.repaired != same, line.name
        aligned = stand.served.aligned.get(line.name, torch.zeros(())) if continued else torch.zeros(())
        size, difference = (before[line.name] - aligned).norm(), (after[line.name] - before[line.name]).norm()
        assert line.edit == pytest.approx(float(difference / size), rel=1e-3, abs=EDIT)
    assert bool(torch.isfinite(logits).all())
    assert torch.equal(plain, logits) == (report.summary.repaired == 0)


# What the reference finds in a model.


@families
def test_a_reference_knows_every_linear_layer_and_the_aligned_update_on_it(workshop: Workshop, name: str) -> None:
    stand = workshop.stands[name]
    model = models.load_model(stand.base)
    for reference in (stand.reference, stand.alone):
        known = reference.manifest.base_model.modules
        assert set(known) == set(stand.family.modules)
        for module, found in known.items():
            assert (found.outputs, found.inputs) == tuple(model.get_submodule(module).weight.shape)
    assert set(stand.reference.manifest.aligned) == set(stand.family.modules)
    assert stand.alone.manifest.aligned == {}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_that_share_an_input_are_measured_once(workshop: Workshop, name: str) -> None:
    stand = workshop.stands[name]
    manifest = stand.reference.manifest
    assert {module: found.site for module, found in manifest.base_model.modules.items()} == stand.family.modules
    assert manifest.gram is not None
    assert set(manifest.gram.pairs) == set(stand.family.modules.values())


@families
def test_a_build_reads_every_conversation_once_and_not_once_per_layer(workshop: Workshop, name: str) -> None:
    stand = workshop.stands[name]
    tokenizer = models.load_tokenizer(stand.base)
    unsafe = [Conversation(item.prompt, placeholder(item.prompt)) for item in tiny.HARMFUL]
    wanted = Counter(tuple(encode(tokenizer, item).ids) for item in [*tiny.HARMFUL, *tiny.GENERAL, *unsafe])
    for kind in ("reference", "alone"):
        manifest = getattr(stand, kind).manifest
        assert stand.read[kind] == wanted
        sets = (manifest.safety_prompts, manifest.general_prompts, manifest.unsafe_prompts)
        assert [item.forward_passes for item in sets] == [1, 1, 1]


@families
def test_attention_outputs_are_found_with_their_heads(workshop: Workshop, name: str) -> None:
    stand = workshop.stands[name]
    outputs = [f"{stand.family.block}.{layer}.{stand.family.outputs}" for layer in range(tiny.LAYERS)]
    for reference in (stand.reference, stand.alone):
        assert reference.manifest.safetylock is not None
        layers = reference.manifest.safetylock.layers
        assert list(layers) == outputs
        for output in outputs:
            directions = reference.heads(output).directions
            assert tuple(directions.shape) == (HEADS, stand.family.size)
            assert layers[output].heads == len(layers[output].accuracy) == HEADS
            assert torch.allclose(directions.norm(dim=1), torch.ones(HEADS))


# Every cell of the table in docs/methods.md.


@families
@pytest.mark.parametrize("column", COLUMNS)
def test_every_method_works_as_reported_or_is_refused_by_name(workshop: Workshop, name: str, column: str) -> None:
    stand = workshop.stands[name]
    customer, on_update = COLUMNS[column]
    for (method, form), parameters in ROWS.items():
        outcome = stand.outcome(column, parameters)
        if outcome.report is None:
            assert outcome.refused in ("lineage_mismatch", "rank_mismatch", "method_not_offered")
            assert "These methods would serve: " in outcome.hint
            assert not outcome.out.exists()
            continue
        report = outcome.report
        assert report.method.type == method
        assert report.lineage == customer.partition(",")[0]
        nothing = method == "none" or form == "side_car"
        assert (report.summary.repaired == 0) == nothing
        check(stand, outcome.source, outcome.out, report, on_update=on_update)


# What safetylock delivers, against the push itself: a displacement of the heads' outputs inside of the model.


@families
@pytest.mark.parametrize("customer", ["continued", "fresh"])
def test_biases_and_side_cars_do_what_pushing_the_heads_does(
    workshop: Workshop, tmp_path: Path, name: str, customer: str
) -> None:
    stand = workshop.stands[name]
    on_aligned = customer == "fresh"
    source = stand.precise[customer]
    outs = {form: tmp_path / form for form in ("lora_bias", "side_car")}
    for form, out in outs.items():
        report = realign(source, stand.reference, SafetyLockParameters.model_validate({"output": form}), out)
        assert report.lineage == customer
    car = load_file(side_car_folder(outs["side_car"]) / SIDE_CAR)
    assert (outs["side_car"] / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    outputs = [f"{stand.family.block}.{layer}.{stand.family.outputs}" for layer in range(tiny.LAYERS)]
    assert set(car) == {f"{output}.{part}" for output in outputs for part in ("displacement", "bias")}
    handles = []
    with stand.served.loaded(source, on_aligned=on_aligned) as served:
        plain = served.logits()
        for output in outputs:
            displacement, heads = car[f"{output}.displacement"], stand.reference.heads(output)
            # All heads are wanted: the models have fewer than the default asks for.
            wanted = SafetyLockParameters().strength * heads.sigma[:, None] * heads.directions
            assert torch.allclose(displacement, wanted.reshape(-1), rtol=1e-6)
            layer = served.layer(output)
            weight = layer.base_layer.weight + (layer.get_delta_weight("aligned") if on_aligned else 0)
            assert torch.allclose(car[f"{output}.bias"], weight @ displacement, atol=1e-6)
            handles.append(layer.register_forward_pre_hook(pushing(displacement)))
        pushed = served.logits()
        for handle in handles:
            handle.remove()
    with stand.served.loaded(outs["lora_bias"], on_aligned=on_aligned) as served:
        assert set(served.biases()) == set(served.updates())
        biased = served.logits()
    push = float((pushed - plain).norm())
    assert push > 0.01
    assert float((biased - pushed).norm()) <= LOGITS * float(pushed.norm())


def pushing(displacement: Tensor) -> Any:
    def before(layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] + displacement, *inputs[1:])

    return before


def test_a_bias_loads_whatever_the_customers_initialisation_was(workshop: Workshop, tmp_path: Path) -> None:
    stand = workshop.stands["Llama"]
    source = stand.adapter("gaussian", seed=6, init_lora_weights="gaussian")
    report = realign(source, stand.reference, SafetyLockParameters(output="lora_bias"), tmp_path / "out")
    check(stand, source, tmp_path / "out", report, on_update=True)


# Ranks, scalings, targets and dtypes that customers send.


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.float32, {"use_rslora": True}),
        (torch.float16, {"rank_pattern": {"first": 2}, "alpha_pattern": {"first": 32, "second": 5}}),
        (torch.bfloat16, {"use_rslora": True, "rank_pattern": {"second": 1}}),
    ],
    ids=["rslora-fp32", "patterns-fp16", "both-bf16"],
)
@pytest.mark.parametrize("name", ["Gemma", "Phi-3"])
def test_other_ranks_scalings_and_dtypes_work_likewise(
    workshop: Workshop, tmp_path: Path, name: str, dtype: torch.dtype, config: dict[str, Any]
) -> None:
    stand = workshop.stands[name]
    names = dict(zip(("first", "second"), (stand.family.targets[0], stand.family.targets[-1]), strict=True))
    config = {
        key: {names[kind]: number for kind, number in value.items()} if isinstance(value, dict) else value
        for key, value in config.items()
    }
    source = stand.adapter(tmp_path.name, seed=8, rank=3, dtype=dtype, **config)
    for number, ((_, form), parameters) in enumerate(ROWS.items()):
        if form in ("factor", "paper"):
            continue
        out = tmp_path / str(number)
        check(stand, source, out, realign(source, stand.reference, parameters, out), on_update=True)


@pytest.mark.parametrize("name", ["GPT-NeoX", "Phi"])
def test_adapters_on_some_layers_work_unless_they_cannot_carry_the_push(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    stand = workshop.stands[name]
    attention = [target for target in stand.family.targets if target != "dense"]
    partial = {
        # Attention outputs of one layer only, and no attention outputs at all.
        "one layer": stand.adapter("one-layer", seed=9, layers_to_transform=[1], layers_pattern="layers"),
        "no outputs": stand.adapter("no-outputs", seed=9, targets=attention),
    }
    for kind, source in partial.items():
        for (method, form), parameters in ROWS.items():
            out = tmp_path / kind / f"{method}-{form}"
            outcome = stand.attempt(source, stand.reference, parameters, out)
            if form in ("factor", "paper"):
                assert outcome.refused == "lineage_mismatch"
            elif form in ("rank_one", "lora_bias"):
                assert outcome.refused == "module_not_in_adapter"
            else:
                assert outcome.report is not None
                check(stand, source, out, outcome.report, on_update=True)


@pytest.mark.parametrize("customer", ["continued", "fresh"])
def test_modules_that_the_aligned_adapter_does_not_reach_are_left_alone_by_what_transplants(
    tmp_path: Path, customer: str
) -> None:
    stand = Stand(tmp_path / "stand", FAMILIES["Qwen2"], aligned_on=["q_proj", "v_proj", "o_proj"])
    source = stand.adapter("wide", seed=7)
    if customer == "continued":
        kin = load_file(stand.continued("kin", torch.bfloat16) / WEIGHTS)
        tiny.change_tensors(source, lambda tensors: tensors | kin)
    for (method, form), parameters in ROWS.items():
        outcome = stand.attempt(source, stand.reference, parameters, tmp_path / f"{method}-{form}")
        if outcome.report is None:
            assert (customer, outcome.refused) == ("fresh", "lineage_mismatch")
            continue
        report = outcome.report
        assert report.lineage == customer
        check(stand, source, outcome.out, report, on_update=True)
        outside = [line for line in report.modules if line.name not in stand.reference.manifest.aligned]
        assert len(outside) == 8
        assert {line.repaired for line in outside} == {method in ("gram", "antidote")}
        said = {warning.code for warning in report.warnings}
        assert ("modules_not_reached" in said) == (method in ("nlsr", "safelora"))


def test_a_float32_model_and_its_reference_work_like_others(workshop: Workshop, tmp_path: Path) -> None:
    stand = Stand(tmp_path / "stand", FAMILIES["Llama"], "float32")
    assert models.load_model(stand.base, dtype="auto").dtype == torch.float32  # type: ignore[arg-type]
    assert stand.reference.manifest.parameters.dtype == "float32"
    for column in ("continued", "fresh"):
        for parameters in ROWS.values():
            outcome = stand.outcome(column, parameters)
            if outcome.report is not None:
                check(stand, outcome.source, outcome.out, outcome.report, on_update=True)
            assert outcome.text == workshop.stands["Llama"].outcome(column, parameters).text


# Forms and scorers beyond the table's rows.

FORMS: list[Method] = [
    *(NlsrParameters(scorer=scorer, skip_share=0.3) for scorer in ("wanda", "snip", "preference_snip", "magnitude")),
    NlsrParameters(scorer="random", selection="bernoulli", seed=3),
    NlsrParameters(selection="highest", amplification=0.0),
    NlsrParameters(selection="random", seed=1),
    GramParameters(amplification=0.5, pairs=3),
    SafeLoraParameters(projector="orthogonal", threshold=1.0),
    SafeLoraParameters(projector="orthogonal", selection="lowest", modules=2),
    AntidoteParameters(basis="stored", spare="general", density=0.3),
    AntidoteParameters(basis="rows", spare="safety", density=0.3),
    AntidoteParameters(basis="rows", spare="general", density=0.3),
    SafetyLockParameters(heads=3, strength=2.0),
]


@pytest.mark.parametrize("name", ["Phi-3", "GPT-NeoX"])
def test_every_form_and_scorer_works_on_fused_layers_too(tmp_path: Path, name: str) -> None:
    stand = Stand(tmp_path / "stand", FAMILIES[name], gradients=True)
    assert stand.reference.manifest.scorers == ["low_rank", "wanda", "snip", "preference_snip"]
    for column in ("continued", "fresh"):
        for parameters in FORMS:
            outcome = stand.outcome(column, parameters)
            assert outcome.report is not None, (outcome.refused, parameters)
            assert outcome.report.summary.repaired > 0
            check(stand, outcome.source, outcome.out, outcome.report, on_update=True)


# The rank that loses nothing.

EXACT: list[tuple[str, Method]] = [
    ("continued", NlsrParameters(form="paper", skip_share=0.0)),
    ("continued", NlsrParameters(form="neuron", skip_share=0.5)),
    ("continued", GramParameters()),
    ("continued", SafetyLockParameters()),
    ("fresh", NlsrParameters(form="neuron", skip_share=0.5)),
    ("fresh", GramParameters()),
    ("fresh", GramParameters(amplification=0.9)),
    ("fresh", SafeLoraParameters(threshold=1.0)),
    ("fresh", SafetyLockParameters()),
    ("patterns", NlsrParameters(form="neuron", skip_share=0.5)),
    ("patterns", GramParameters(amplification=0.9)),
    ("patterns", SafetyLockParameters()),
]


@pytest.mark.parametrize("name", ["Qwen2", "Gemma", "Phi-3"])
@pytest.mark.parametrize(
    ("customer", "parameters"), EXACT, ids=[f"{kind}-{own.type}-{number}" for number, (kind, own) in enumerate(EXACT)]
)
def test_the_exact_rank_loads_in_peft_and_is_the_definition_to_float32(
    workshop: Workshop, tmp_path: Path, name: str, customer: str, parameters: Method
) -> None:
    stand = workshop.stands[name]
    source = stand.precise[customer]
    report = realign(source, stand.reference, parameters, tmp_path / "out", output_rank="exact")
    continued = report.lineage == "continued"
    assert continued == (customer == "continued")
    assert report.summary.truncation_error == 0.0
    assert report.summary.repaired > 0
    # Where the customer had one rank there is one again: not every server reads patterns.
    assert bool(json.loads((tmp_path / "out" / CONFIG).read_text())["rank_pattern"]) == (customer == "patterns")
    before, plain = stand.seen(source, on_aligned=not continued)
    with stand.served.loaded(tmp_path / "out", on_aligned=not continued) as served:
        after, logits = served.updates(), served.logits()
        weights = {module: served.layer(module).base_layer.weight.double() for module in after}
    assert bool(torch.isfinite(logits).all())
    assert not torch.equal(logits, plain)
    for line in report.modules:
        wanted = before[line.name].double()
        if line.repaired:
            wanted = dense(parameters, stand.reference, line.name, wanted, weights[line.name], source, continued)
        assert float((after[line.name] - wanted).norm()) <= FLOAT32 * float(wanted.norm()), line.name


def dense(
    parameters: Method,
    reference: LoadedReference,
    module: str,
    customer: Tensor,
    weight: Tensor,
    source: Path,
    continued: bool,
) -> Tensor:
    """What a method wants of one module, from its formula, in float64, with all products formed."""
    b_a, a_a = (factor.double() for factor in reference.aligned(module) or ())
    aligned, beta = b_a @ a_a, reference.amplification
    match parameters:
        case NlsrParameters(form="neuron"):
            rows = reference.neurons(module, "low_rank").rows[:, None]
            return torch.where(rows, (1 + beta) * aligned if continued else beta * aligned, customer)
        case NlsrParameters():
            masks = reference.neurons(module, "low_rank")
            own = next(item for item in describe(source).modules if item.name == module)
            tensors = load_file(source / WEIGHTS)
            a_t, b_t = tensors[own.a.name].double(), tensors[own.b.name].double() * own.scaling
            theirs = (masks.mask_b * (1 + beta) * b_a) @ (masks.mask_a * a_a)
            return theirs + (~masks.mask_b * b_t) @ (~masks.mask_a * a_t)
        case GramParameters():
            pairs = reference.pairs(module)
            mu, v, w = pairs.mu.double(), pairs.v.double(), pairs.w.double()
            k = (w * (1 / (1 + (parameters.general_weight / mu) ** parameters.steepness))) @ v.T
            beta = parameters.amplification
            return customer - customer @ k + ((1 + beta) * aligned if continued else beta * aligned) @ k
        case SafeLoraParameters():
            projected: Tensor = aligned @ aligned.T @ customer / aligned.norm()
            return projected
        case SafetyLockParameters():
            heads = reference.heads(module)
            push = (parameters.strength * heads.sigma[:, None] * heads.directions).double().reshape(-1)
            bias = (weight + customer + (0 if continued else aligned)) @ push
            return customer + bias[:, None] @ heads.constant.double()[None]
    raise AssertionError(parameters)


# One run for several strengths, and runs that can be repeated.

STRENGTHS: list[tuple[str, str, Method, list[float]]] = [
    ("Llama", "continued", NlsrParameters(), [0.2, 0.5, 1.0]),
    ("Gemma", "fresh", GramParameters(), [0.05, 0.3]),
    ("Mistral", "fresh", SafeLoraParameters(), [0.1, 1.0]),
    ("Phi-3", "foreign", AntidoteParameters(), [0.0, 0.1, 0.4]),
    ("GPT-NeoX", "fresh", SafetyLockParameters(), [3.0, 6.0]),
    ("Phi", "fresh", SafetyLockParameters(output="lora_bias"), [0.0, 6.0]),
    ("Qwen2", "continued", SafetyLockParameters(output="side_car"), [3.0, 6.0]),
]


@pytest.mark.parametrize("output_rank", ["customer", "exact"])
@pytest.mark.parametrize(
    ("name", "column", "parameters", "strengths"), STRENGTHS, ids=[f"{row[2].type}-{row[0]}" for row in STRENGTHS]
)
def test_several_strengths_at_once_are_the_single_runs_byte_for_byte(
    workshop: Workshop,
    tmp_path: Path,
    name: str,
    column: str,
    parameters: Method,
    strengths: list[float],
    output_rank: OutputRank,
) -> None:
    stand = workshop.stands[name]
    source = stand.customers[column]
    report = realign(
        source, stand.reference, parameters, tmp_path / "all", strengths=strengths, output_rank=output_rank
    )
    assert report.strength_parameter == STRENGTH[parameters.type]
    assert [variant.strength for variant in report.variants] == strengths
    assert {path.name for path in (tmp_path / "all").iterdir()} == set(map(strength_name, strengths))
    outputs = set()
    for strength, variant in zip(strengths, report.variants, strict=True):
        own = parameters.model_copy(update={STRENGTH[parameters.type]: strength})
        out = tmp_path / f"single-{strength:g}"
        single = realign(source, stand.reference, own, out, output_rank=output_rank)
        assert contents(tmp_path / "all" / strength_name(strength)) == contents(out)
        assert (variant.output, variant.summary) == (single.output, single.summary)
        cars = side_car_folder(tmp_path / "all") / f"{strength_name(strength)}.safetensors", side_car_folder(out)
        if single.method.parameters.model_dump().get("output") == "side_car":
            assert cars[0].read_bytes() == (cars[1] / SIDE_CAR).read_bytes()
            outputs.add(cars[0].read_bytes())
        else:
            assert not cars[0].exists()
            outputs.add((out / WEIGHTS).read_bytes())
    assert len(outputs) == len(strengths)


def test_what_has_no_strength_says_so(workshop: Workshop, tmp_path: Path) -> None:
    stand = workshop.stands["Llama"]
    with pytest.raises(InvalidParameter, match="none has no strength"):
        realign(stand.customers["fresh"], stand.reference, ROWS["none", ""], tmp_path / "out", strengths=[0.5])


def test_the_number_of_threads_changes_neither_a_byte_nor_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In matrices so wide that torch splits their products between threads, which changes the order of sums."""
    # However little modules take, several are worked on at once.
    monkeypatch.setattr(parallel, "HELD", 1e-9)
    wide = {"hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": 1}
    llama = FAMILIES["Llama"]
    stand = Stand(tmp_path / "stand", replace(llama, settings=llama.settings | wide))
    source = stand.adapter("wide", seed=3, rank=96, dtype=torch.float32)
    reference = stand.reference
    found: dict[int, list[object]] = {1: [], 2: []}
    for count, outcomes in found.items():
        torch.set_num_threads(count)
        for number, parameters in enumerate(ROWS.values()):
            out = tmp_path / f"{count}-{number}"
            outcome = stand.attempt(source, reference, parameters, out)
            if outcome.report is not None:
                outcomes.append((contents(out), outcome.report.model_dump(exclude={"timings"})))
    assert len(found[1]) == len(ROWS) - 2  # the forms on factors refuse another rank
    assert found[1] == found[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
