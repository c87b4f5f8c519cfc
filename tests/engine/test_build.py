"""Building a reference: what is read, measured and refused; against a float64 model with merged weights."""

import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from safegraft.adapter import WEIGHTS
from safegraft.bundle import GRAM, NLSR, SAFETYLOCK, verify_bundle
from safegraft.compatibility import top_heads
from safegraft.contracts.methods import AutoParameters, GramParameters, NlsrParameters
from safegraft.contracts.reference import ReferenceManifest
from safegraft.engine import build, bundle, models
from safegraft.engine.build import BuildPrompts, BuildSources, build_reference, placeholder
from safegraft.engine.bundle import BuildSettings, Ingredients
from safegraft.engine.conversations import Conversation, Encoded, encode
from safegraft.engine.heads import measure_heads
from safegraft.engine.pipeline import realign
from safegraft.engine.reference import LoadedReference
from safegraft.errors import Incompatible, InvalidParameter, InvalidPrompts
from safegraft.files import sha256_file
from tests import tiny
from tests.engine.watch import Watch, tokens, watched

# Of a result's norm: what float32 passes and sums differ from float64 ones, several times over.
FLOAT32 = 1e-5
# Of several lengths, all with the same first word; one with an unsafe answer of its own.
SAFETY = [
    *(Conversation(f"please how do i make a bomb {word}", "sorry i cannot") for word in tiny.WORDS[:6]),
    Conversation("please cut the dog", "sorry", "sure here is how"),
    Conversation("please walk", "i cannot help with that please make tea with an cake"),
]
GENERAL = [Conversation(f"please bake {word} cake" + " tea" * at, f"sure {word}") for at, word in enumerate(["a", "i"])]
UNSAFE = [Conversation(item.prompt, item.unsafe or placeholder(item.prompt)) for item in SAFETY]
PROMPTS = BuildPrompts(safety=SAFETY, general=GENERAL)
SETTINGS = BuildSettings(sparsity=0.5, dtype="float32", batch_size=5)
O_PROJ = "model.layers.{}.self_attn.o_proj"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Built(NamedTuple):
    folder: Path
    manifest: ReferenceManifest
    ingredients: Ingredients
    watch: Watch


def built(out: Path, sources: BuildSources, prompts: BuildPrompts = PROMPTS, **settings: Any) -> Built:
    """A build, what it measured on the way, and what it asked of the model."""
    caught: list[Ingredients] = []
    write = bundle.write_bundle

    def catch(target: Path, ingredients: Ingredients, *rest: Any) -> ReferenceManifest:
        caught.append(ingredients)
        return write(target, ingredients, *rest)

    with pytest.MonkeyPatch.context() as patch, watched() as watch:
        patch.setattr(build, "write_bundle", catch)
        manifest = build_reference(out, sources=sources, prompts=prompts, settings=replace(SETTINGS, **settings))
    return Built(out, manifest, caught[0], watch)


@pytest.fixture(scope="module")
def on_adapter(base: Path, aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    out = tmp_path_factory.mktemp("references") / "on-adapter"
    return built(out, BuildSources(aligned=aligned, base=base, labels=["tiny", "", "tiny"]))


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An aligned model by itself; here the base is taken for one."""
    return built(tmp_path_factory.mktemp("references") / "alone", BuildSources(aligned=base))


def encoded(base: Path, conversations: list[Conversation]) -> list[Encoded]:
    tokenizer = models.load_tokenizer(base)
    return [encode(tokenizer, item) for item in conversations]


@pytest.fixture(scope="module")
def merged(base: Path, aligned: Path) -> Any:
    """The aligned model in float64, Δ_a added to its weights."""
    model = models.load_model(base, dtype=torch.float64)
    tensors = load_file(aligned / WEIGHTS)
    with torch.no_grad():
        for name in models.linear_modules(model):
            a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
            model.get_submodule(name).weight += 2.0 * b @ a  # α/r
    return model


def raw_inputs(model: Any, items: list[Encoded]) -> dict[str, list[Tensor]]:
    """Layer → its inputs in each conversation, read one by one."""
    seen: dict[str, list[Tensor]] = {name: [] for name in models.linear_modules(model)}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, x, into=inputs: into.append(x[0][0]))
        for name, inputs in seen.items()
    ]
    with torch.inference_mode():
        for item in items:
            model(input_ids=torch.tensor([item.ids]))
    for hook in hooks:
        hook.remove()
    return seen


def close(actual: Tensor, wanted: Tensor) -> None:
    assert actual.shape == wanted.shape
    assert float((actual.double() - wanted.double()).norm()) <= FLOAT32 * float(wanted.norm())


def last_tokens(inputs: list[Tensor], items: list[Encoded]) -> Tensor:
    found = torch.zeros(len(items), 5, inputs[0].shape[-1], dtype=torch.float64)
    for row, (x, item) in enumerate(zip(inputs, items, strict=True)):
        answer = x[item.response_start :][-5:]
        # A shorter answer's first token stands for those that are missing.
        found[row] = torch.cat([answer[:1]] * (5 - len(answer)) + [answer])
    return found


def refused(
    error: type[Exception], sources: BuildSources, out: Path, prompts: BuildPrompts = PROMPTS, **settings: Any
) -> Any:
    """The refusal, which comes before the model has read anything and leaves nothing behind."""
    with watched() as watch, pytest.raises(error) as caught:
        build_reference(out, sources=sources, prompts=prompts, settings=replace(SETTINGS, **settings))
    assert not watch.read
    assert not watch.answered
    assert not list(out.parent.glob(f"{out.name}*"))
    return caught.value


def test_every_conversation_is_read_once_for_its_set_and_not_once_per_layer(base: Path, on_adapter: Built) -> None:
    assert on_adapter.watch.read == tokens(base, [*SAFETY, *GENERAL, *UNSAFE])
    assert on_adapter.watch.answered == 0
    manifest = on_adapter.manifest
    sets = {"safety": manifest.safety_prompts, "general": manifest.general_prompts, "unsafe": manifest.unsafe_prompts}
    for (name, found), conversations in zip(sets.items(), (SAFETY, GENERAL, UNSAFE), strict=True):
        assert found is not None, name
        items = encoded(base, conversations)
        assert found.forward_passes == 1
        assert found.conversations == len(items)
        assert found.tokens == sum(len(item.ids) - 1 for item in items)  # but for the first word, which all share
        assert found.response_tokens == sum(len(item.ids) - item.response_start for item in items)
        assert not found.answered_by_model


def test_gradients_of_the_safe_answers_cost_no_pass_of_their_own(base: Path, aligned: Path, tmp_path: Path) -> None:
    found = built(tmp_path / "out", BuildSources(aligned=aligned, base=base), snip=True)
    assert found.watch.read == tokens(base, [*SAFETY, *GENERAL, *UNSAFE])


def test_gradients_of_preferences_read_every_pair_twice_with_and_without_the_adapter(
    base: Path, aligned: Path, tmp_path: Path
) -> None:
    found = built(tmp_path / "out", BuildSources(aligned=aligned, base=base), preference_snip=True)
    pairs = [*SAFETY, *UNSAFE]
    assert found.watch.read == tokens(base, [*SAFETY, *GENERAL, *UNSAFE, *pairs, *pairs])


@pytest.mark.parametrize("which", ["safety", "general"])
def test_statistics_are_those_of_the_aligned_model(base: Path, on_adapter: Built, merged: Any, which: str) -> None:
    items = encoded(base, SAFETY if which == "safety" else GENERAL)
    statistics = getattr(on_adapter.ingredients, which)
    factors = on_adapter.ingredients.aligned.factors
    for name, inputs in raw_inputs(merged, items).items():
        counted = torch.cat([x[1:] for x in inputs])
        answers = torch.cat([x[item.response_start :] for x, item in zip(inputs, items, strict=True)])
        site = statistics.sites[name]
        close(statistics.second_moments[site], counted.T @ counted / len(counted))
        close(statistics.means[site], counted.mean(dim=0))
        close(statistics.response_squares[site], answers.square().sum(dim=0))
        if which == "safety":
            z = answers @ factors[name].a.double().T
            close(statistics.grams[name], z.T @ z)


def test_the_bundle_holds_what_was_measured(base: Path, on_adapter: Built, merged: Any) -> None:
    items = encoded(base, SAFETY)
    tensors = load_file(on_adapter.folder / NLSR)
    heads = load_file(on_adapter.folder / SAFETYLOCK)
    inputs = raw_inputs(merged, items)
    general = raw_inputs(merged, encoded(base, GENERAL))
    for name in models.linear_modules(merged):
        answers = torch.cat([x[item.response_start :] for x, item in zip(inputs[name], items, strict=True)])
        z = answers @ tensors[f"{name}.A"].double().T
        close(tensors[f"{name}.G"], z.T @ z)
    for layer in range(tiny.LAYERS):
        name = O_PROJ.format(layer)
        means = [torch.cat([x[1:] for x in found[name]]).mean(dim=0) for found in (inputs, general)]
        close(heads[f"{name}.mean"], (means[0] + means[1]) / 2)


def test_heads_are_judged_by_the_last_tokens_of_safe_and_unsafe_answers_to_the_same_prompts(
    base: Path, on_adapter: Built, merged: Any
) -> None:
    safe, unsafe = encoded(base, SAFETY), encoded(base, UNSAFE)
    of_safe, of_unsafe = raw_inputs(merged, safe), raw_inputs(merged, unsafe)
    tensors = load_file(on_adapter.folder / SAFETYLOCK)
    weights = models.load_model(base, dtype=torch.float64)
    found = on_adapter.manifest.safetylock
    assert found is not None
    assert found.source == "measured"
    assert list(found.layers) == [O_PROJ.format(layer) for layer in range(tiny.LAYERS)]
    for name, layer in found.layers.items():
        wanted = measure_heads(last_tokens(of_safe[name], safe), last_tokens(of_unsafe[name], unsafe), 4)
        # A direction is a difference of means some ten times as long as it is: that much more of float32's error.
        torch.testing.assert_close(tensors[f"{name}.directions"].double(), wanted.directions, atol=1e-4, rtol=0)
        torch.testing.assert_close(tensors[f"{name}.sigma"].double(), wanted.sigma, atol=1e-5, rtol=1e-4)
        assert layer.accuracy == pytest.approx(wanted.accuracy.tolist())
        # The weights of the model without the adapter.
        w_o = weights.get_submodule(name).weight
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            pushed = w_o[:, part] @ tensors[f"{name}.directions"][head].double()
            torch.testing.assert_close(tensors[f"{name}.shift"][head].double(), pushed, atol=1e-6, rtol=1e-5)


def test_the_manifest_says_what_was_built_from_what(base: Path, aligned: Path, on_adapter: Built) -> None:
    manifest = on_adapter.manifest
    model = models.load_model(base)
    assert verify_bundle(on_adapter.folder) == manifest
    assert {path.name for path in on_adapter.folder.iterdir()} == {"manifest.json", NLSR, GRAM, SAFETYLOCK}
    assert manifest.name == "on-adapter"
    # Given labels first, each of them once, then the adapter's own.
    assert manifest.base_model.labels == ["tiny", str(base)]
    assert manifest.base_model.architecture == "LlamaForCausalLM"
    assert manifest.base_model.config_sha256 == models.config_hash(base)
    shapes = {name: (item.outputs, item.inputs) for name, item in manifest.base_model.modules.items()}
    assert shapes == models.linear_modules(model)
    assert set(manifest.aligned) == set(shapes)
    assert manifest.origin.source == "adapter"
    assert manifest.origin.files == {
        name: sha256_file(aligned / name) for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    assert manifest.methods == ["nlsr", "gram", "safelora", "antidote", "safetylock", "none"]
    assert manifest.lineages == ["continued", "fresh", "foreign"]
    recorded = manifest.parameters.model_dump()
    for name in ("amplification", "sparsity", "ridge", "smallest_pair", "max_pairs", "batch_size", "dtype", "device"):
        assert recorded[name] == getattr(SETTINGS, name), name
    assert recorded["skipped_prefix"] == 1
    assert recorded["rank"] is None
    # Nothing is left beside it.
    assert [path.name for path in on_adapter.folder.parent.iterdir()] == ["on-adapter"]


def test_without_general_prompts_there_is_no_gram(base: Path, aligned: Path, tmp_path: Path) -> None:
    sources = BuildSources(aligned=aligned, base=base)
    found = built(tmp_path / "out", sources, BuildPrompts(safety=SAFETY))
    assert found.watch.read == tokens(base, [*SAFETY, *UNSAFE])
    assert found.manifest.methods == ["nlsr", "safelora", "safetylock", "none"]
    assert found.manifest.gram is None
    assert found.manifest.general_prompts is None
    assert set(found.manifest.files) == {NLSR, SAFETYLOCK}


def test_no_more_pairs_of_answers_are_compared_than_heads_need(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "HEAD_PAIRS", 5)
    found = built(tmp_path / "out", BuildSources(aligned=base))
    assert found.watch.read == tokens(base, [*SAFETY, *GENERAL, *UNSAFE[:5]])
    unsafe = found.manifest.unsafe_prompts
    assert unsafe is not None
    assert unsafe.conversations == 5
    other = built(tmp_path / "other", BuildSources(aligned=base), BuildPrompts(safety=SAFETY[:5], general=GENERAL))
    assert other.manifest.unsafe_prompts == unsafe
    # Neither does memory grow with what is not compared.
    assert {len(kept) for kept in found.ingredients.safety.last.values()} == {5}


def test_prompts_without_answers_are_answered_by_the_aligned_model(
    base: Path, aligned: Path, merged: Any, tmp_path: Path
) -> None:
    tokenizer = models.load_tokenizer(base)

    def greedy(prompt: str) -> str:
        ids = encode(tokenizer, Conversation(prompt)).ids
        start = len(ids)
        with torch.inference_mode():
            for _ in range(4):
                ids.append(int(merged(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
        text: str = tokenizer.decode(ids[start:], skip_special_tokens=True)
        return text.strip()

    open_ones = [replace(item, response=None) if at % 2 else item for at, item in enumerate(SAFETY)]
    answered = [replace(item, response=item.response or greedy(item.prompt)) for item in open_ones]
    sources = BuildSources(aligned=aligned, base=base)
    asked = built(tmp_path / "asked", sources, BuildPrompts(safety=open_ones, general=GENERAL), answer_tokens=4)
    given = built(tmp_path / "given", sources, BuildPrompts(safety=answered, general=GENERAL), answer_tokens=4)
    assert (asked.watch.answered, given.watch.answered) == (len(SAFETY) // 2, 0)
    assert asked.watch.read == given.watch.read == tokens(base, [*answered, *GENERAL, *UNSAFE])
    flags = [found.manifest.safety_prompts.answered_by_model for found in (asked, given)]
    assert flags == [True, False]
    assert asked.manifest.general_prompts == given.manifest.general_prompts
    # The prompt set is the answered one, and so is everything that follows from it.
    assert asked.manifest.safety_prompts.sha256 == given.manifest.safety_prompts.sha256
    assert asked.manifest.files == given.manifest.files


@pytest.mark.parametrize("which", ["safety", "general"])
def test_a_prompt_with_no_room_for_its_answer_is_refused(base: Path, tmp_path: Path, which: str) -> None:
    long = Conversation("please " + "tea " * 20, "sure")
    prompts = {"safety": SAFETY, "general": GENERAL}
    prompts[which] = [*prompts[which], long]
    sources, asked = BuildSources(aligned=base), BuildPrompts(**prompts)
    error = refused(InvalidPrompts, sources, tmp_path / "out", asked, max_tokens=21)
    assert (error.code, error.param) == ("no_answer", which)
    assert "within 21 tokens" in error.message
    # One more, and the answer's first token counts.
    assert built(tmp_path / "out", sources, asked, max_tokens=22).manifest.parameters.max_tokens == 22


def test_an_aligned_model_alone_serves_what_works_from_prompts(base: Path, alone: Built) -> None:
    manifest = alone.manifest
    assert manifest.methods == ["gram", "antidote", "safetylock", "none"]
    assert manifest.lineages == ["fresh", "foreign"]
    assert (manifest.aligned, manifest.scorers) == ({}, [])
    assert manifest.origin.source == "none"
    assert manifest.origin.files == {"aligned/model.safetensors": sha256_file(base / "model.safetensors")}
    assert set(manifest.files) == {GRAM, SAFETYLOCK}
    assert alone.watch.read == tokens(base, [*SAFETY, *GENERAL, *UNSAFE])
    assert not alone.ingredients.safety.grams


def test_statistics_of_an_aligned_model_alone_are_its_own(base: Path, alone: Built) -> None:
    items = encoded(base, GENERAL)
    general = alone.ingredients.general
    assert general is not None
    for name, inputs in raw_inputs(models.load_model(base, dtype=torch.float64), items).items():
        counted = torch.cat([x[1:] for x in inputs])
        close(general.second_moments[general.sites[name]], counted.T @ counted / len(counted))


def test_a_reference_without_an_update_repairs_by_gram_and_says_what_else_would_serve(
    alone: Built, fresh: Path, tmp_path: Path
) -> None:
    reference = LoadedReference(alone.folder)
    report = realign(fresh, reference, GramParameters(), tmp_path / "out")
    assert report.summary.repaired == len(report.modules) == 14
    assert report.summary.similarity_after.median > report.summary.similarity_before.median
    assert realign(fresh, reference, AutoParameters(), None).method.type == "gram"
    with pytest.raises(Incompatible) as caught:
        realign(fresh, reference, NlsrParameters(), tmp_path / "other")
    assert caught.value.code == "method_not_offered"
    assert "These methods would serve: gram, antidote, safetylock." in caught.value.hint


def test_a_reference_always_has_a_label_by_which_reports_name_the_base(alone: Built, fresh: Path) -> None:
    assert alone.manifest.base_model.labels == ["tiny-llama"]
    report = realign(fresh, LoadedReference(alone.folder), GramParameters(), None)
    assert report.base_model == "tiny-llama"
    # The adapter names another one, so it is not known to sit on this model.
    assert report.lineage == "foreign"


def safelock(path: Path, **layers: list[tuple[int, list[float], float]]) -> Path:
    """A file in the published form."""
    table = {
        f"model.layers.{layer.removeprefix('layer')}.self_attn.head_out": [
            (np.int64(head), np.array(direction, dtype=np.float16), np.float16(sigma))
            for head, direction, sigma in heads
        ]
        for layer, heads in layers.items()
    }
    path.write_bytes(pickle.dumps(table, protocol=2))
    return path


def test_published_directions_take_the_place_of_measured_ones(base: Path, aligned: Path, tmp_path: Path) -> None:
    up, right = [0.0, 0, 0, 4, 0, 0, 0, 0], [3.0, 4, 0, 0, 0, 0, 0, 0]
    file = safelock(tmp_path / "tiny.safelock", layer1=[(2, up, 0.5), (0, right, 0.25)])
    found = built(tmp_path / "out", BuildSources(aligned=aligned, base=base, safelock=file))
    # No unsafe answer is read where nothing is measured from it, and no last tokens are kept.
    assert found.watch.read == tokens(base, [*SAFETY, *GENERAL])
    assert found.manifest.unsafe_prompts is None
    assert not found.ingredients.safety.last
    heads = found.manifest.safetylock
    assert heads is not None
    assert heads.source == sha256_file(file)
    assert {name: layer.accuracy for name, layer in heads.layers.items()} == {O_PROJ.format(1): [1.0, 0.0, 1.0, 0.0]}
    assert top_heads(found.manifest, 24) == {O_PROJ.format(1): [0, 2]}
    kept = LoadedReference(found.folder).heads(O_PROJ.format(1))
    directions = torch.zeros(4, 8)
    directions[0, :2], directions[2, 3] = torch.tensor([0.6, 0.8]), 1.0
    torch.testing.assert_close(kept.directions, directions)
    assert kept.sigma.tolist() == [0.25, 0.0, 0.5, 0.0]
    w_o = models.load_model(base, dtype=torch.float32).get_submodule(O_PROJ.format(1)).weight
    torch.testing.assert_close(kept.shift[0], 0.6 * w_o[:, 0] + 0.8 * w_o[:, 1])
    torch.testing.assert_close(kept.shift[2], w_o[:, 19])
    assert not kept.shift[1].any()


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ({"layer2": [(0, [1.0] * 8, 0.5)]}, "layer 2"),
        ({"layer0": [(4, [1.0] * 8, 0.5)]}, "head 4"),
        ({"layer0": [(0, [1.0] * 16, 0.5)]}, "direction of 16"),
    ],
)
def test_published_directions_for_heads_that_the_model_lacks_are_refused_before_it_works(
    base: Path, tmp_path: Path, layers: Any, why: str
) -> None:
    file = safelock(tmp_path / "tiny.safelock", **layers)
    # Prompts that would be answered first, too.
    prompts = BuildPrompts(safety=[Conversation("please")], general=GENERAL)
    error = refused(Incompatible, BuildSources(aligned=base, safelock=file), tmp_path / "out", prompts)
    assert error.param == "safelock"
    assert why in error.message


def test_parts_that_do_not_go_together_are_refused(base: Path, aligned: Path, fresh: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    error = refused(InvalidParameter, BuildSources(aligned=aligned), out)
    assert (error.code, error.param) == ("base_missing", "base")
    error = refused(InvalidParameter, BuildSources(aligned=base, weak=fresh), out)
    assert (error.code, error.param) == ("weak_mismatch", "weak")
    assert refused(InvalidParameter, BuildSources(aligned=base), out, snip=True).code == "snip_needs_adapter"
    assert refused(InvalidParameter, BuildSources(aligned=base), out, preference_snip=True).code == "snip_needs_adapter"
    error = refused(InvalidParameter, BuildSources(aligned=base), out, device="cuda:77")
    assert error.code == "device_unavailable"


def test_nothing_is_overwritten(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        build_reference(tmp_path / "out", sources=BuildSources(aligned=base), prompts=PROMPTS, settings=SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def with_a_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models get a linear layer that no text reaches, as a vision tower has many."""
    load = models.load_model

    def loading(*arguments: Any, **named: Any) -> Any:
        model = load(*arguments, **named)
        model.tower = nn.Linear(6, 5, bias=False, dtype=model.dtype).requires_grad_(False)
        return model

    monkeypatch.setattr(models, "load_model", loading)


@pytest.mark.usefixtures("with_a_tower")
def test_layers_that_no_token_reaches_are_left_out(base: Path, aligned: Path, tmp_path: Path) -> None:
    found = built(tmp_path / "out", BuildSources(aligned=aligned, base=base))
    assert "tower" not in found.manifest.base_model.modules
    assert len(found.manifest.base_model.modules) == 14


@pytest.mark.usefixtures("with_a_tower")
def test_an_aligned_adapter_on_a_layer_that_no_token_reaches_is_refused(
    base: Path, aligned: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(aligned, tmp_path / "aligned"))
    key = "base_model.model.tower.lora_{}.weight"
    tiny.change_tensors(folder, lambda t: t | {key.format("A"): torch.ones(4, 6), key.format("B"): torch.ones(5, 4)})
    tiny.change_config(folder, target_modules=[*tiny.TARGETS, "tower"])
    with pytest.raises(Incompatible) as caught:
        built(tmp_path / "out", BuildSources(aligned=folder, base=base))
    assert (caught.value.code, caught.value.param) == ("module_unused", "tower")
