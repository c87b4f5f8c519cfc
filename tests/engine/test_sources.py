"""The aligned update from one adapter, from two, and from two checkpoints, against dense differences."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safegraft.adapter import WEIGHTS, is_adapter
from safegraft.engine import models, sources
from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
from safegraft.engine.bundle import BuildSettings
from safegraft.engine.reference import LoadedReference
from safegraft.engine.sources import AlignedUpdate, from_adapters, from_checkpoints, truncate
from safegraft.errors import Incompatible, InvalidParameter, InvalidTensors
from safegraft.files import sha256_file
from tests import tiny

PROMPTS = BuildPrompts(safety=tiny.HARMFUL[:4], general=tiny.GENERAL[:4])
BETA = 0.7
RANK = 5


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shapes(base: Path) -> dict[str, tuple[int, int]]:
    return models.linear_modules(models.load_model(base))


@pytest.fixture(scope="module")
def weak(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another rank and scaling, in float32, on some of the modules."""
    return tiny.save_adapter(
        base, tmp_path_factory.mktemp("adapters") / "weak", rank=2, alpha=6, seed=9, dtype=torch.float32,
        targets=["q_proj", "o_proj", "down_proj"],
    )  # fmt: skip


def delta(folder: Path, name: str, scaling: float) -> Tensor:
    """ΔW of a module in float64 from the file; zero where it does not reach it."""
    tensors = load_file(folder / WEIGHTS)
    a, b = (tensors.get(f"base_model.model.{name}.lora_{side}.weight") for side in "AB")
    return torch.zeros(()) if a is None or b is None else scaling * b.double() @ a.double()


def product(update: tuple[Tensor, Tensor] | None) -> Tensor:
    assert update is not None
    return update[0].double() @ update[1].double()


def close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    """Products of float32 factors against float64 ones."""
    assert float((actual - wanted).norm()) <= tolerance * float(wanted.norm())


def test_an_adapter_is_told_from_a_model_by_its_configuration(base: Path, aligned: Path, tmp_path: Path) -> None:
    assert is_adapter(aligned)
    assert not is_adapter(base)
    assert not is_adapter(tmp_path / "nothing")


def test_one_adapter_is_taken_as_it_was_trained(base: Path, aligned: Path, shapes: dict[str, tuple[int, int]]) -> None:
    update = from_adapters(aligned, None, shapes)
    assert update.source == "adapter"
    assert set(update.factors) == set(shapes)
    assert update.labels == [str(base)]
    assert update.files == {name: sha256_file(aligned / name) for name in (WEIGHTS, "adapter_config.json")}
    tensors = load_file(aligned / WEIGHTS)
    for name, factors in update.factors.items():
        assert torch.equal(factors.a, tensors[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(factors.b, tensors[f"base_model.model.{name}.lora_B.weight"])
        assert factors.a.dtype == torch.bfloat16
        assert (factors.scaling, factors.weak, factors.truncation_error) == (2.0, None, 0.0)
        assert torch.equal(factors.stacked_a, factors.a.float())
        close(product(factors.update), delta(aligned, name, 2.0))


def test_a_weak_adapter_is_extrapolated_from_exactly(
    base: Path, aligned: Path, weak: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    manifest = build_reference(
        tmp_path / "out",
        sources=BuildSources(aligned=aligned, base=base, weak=weak),
        prompts=PROMPTS,
        settings=BuildSettings(amplification=BETA, sparsity=0.5),
    )
    assert manifest.origin.source == "two_adapters"
    assert manifest.origin.files == {
        f"{prefix}{name}": sha256_file(folder / name)
        for prefix, folder in (("", aligned), ("weak/", weak))
        for name in (WEIGHTS, "adapter_config.json")
    }
    reference = LoadedReference(tmp_path / "out")
    reached = {name for name in shapes if name.rpartition(".")[2] in ("q_proj", "o_proj", "down_proj")}
    assert {name for name, item in manifest.aligned.items() if item.weak_rank == 2} == reached
    for name, item in manifest.aligned.items():
        strong, behind = delta(aligned, name, 2.0), delta(weak, name, 3.0)
        for beta in (0.0, BETA, 2.0):
            close(product(reference.amplified(name, beta)), (1 + beta) * strong - beta * behind)
        assert item.norm == pytest.approx(float(((1 + BETA) * strong - BETA * behind).norm()), rel=1e-5)
        tensors = load_file(aligned / WEIGHTS)
        a = tensors[f"base_model.model.{name}.lora_A.weight"].double()
        off = behind - behind @ torch.linalg.pinv(a) @ a if name in reached else torch.zeros(1)
        size = float(behind.norm()) or 1.0
        assert item.off_basis == pytest.approx(float(off.norm()) / size, abs=1e-5)
        assert (item.off_basis > 0.5) == (name in reached)


def test_a_weak_adapter_that_reaches_further_than_the_strong_one_is_refused(
    base: Path, weak: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    strong = tiny.save_adapter(base, tmp_path / "strong", targets=["q_proj", "o_proj"])
    with pytest.raises(Incompatible) as caught:
        from_adapters(strong, weak, shapes)
    assert (caught.value.code, caught.value.param) == ("weak_mismatch", "model.layers.0.mlp.down_proj")
    # Nothing stands in the way of a weak one that reaches less far.
    fewer = tiny.save_adapter(base, tmp_path / "fewer", targets=["q_proj"])
    assert from_adapters(strong, fewer, shapes).source == "two_adapters"


@pytest.mark.parametrize("which", ["aligned", "weak"])
def test_an_adapter_for_other_shapes_is_refused(
    aligned: Path, weak: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path, which: str
) -> None:
    name = "model.layers.1.mlp.down_proj"
    folders = {"aligned": aligned, "weak": weak}
    folders[which] = Path(shutil.copytree(folders[which], tmp_path / which))
    key = f"base_model.model.{name}.lora_A.weight"
    tiny.change_tensors(folders[which], lambda tensors: tensors | {key: torch.cat([tensors[key]] * 2, dim=1)})
    with pytest.raises(Incompatible) as caught:
        from_adapters(folders["aligned"], folders["weak"], shapes)
    assert (caught.value.code, caught.value.param) == ("base_mismatch", name)
    assert f"the {which} adapter is for 32x96, the base model has (32, 48)" in caught.value.message
    with pytest.raises(Incompatible) as caught:
        from_adapters(aligned, None, {key: shape for key, shape in shapes.items() if key != name})
    assert "the base model has no such layer" in caught.value.message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_values_that_are_no_numbers_is_refused(
    aligned: Path, weak: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path, value: float
) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[key][1, 1] = value
        return tensors

    bad = {which: Path(shutil.copytree(folder, tmp_path / which)) for which, folder in (("a", aligned), ("w", weak))}
    for folder in bad.values():
        tiny.change_tensors(folder, spoil)
    for strong, behind in ((bad["a"], None), (aligned, bad["w"])):
        with pytest.raises(InvalidTensors) as caught:
            from_adapters(strong, behind, shapes)
        assert (caught.value.code, caught.value.param) == ("non_finite", key)


# Two checkpoints


def noise(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    """What alignment added: three strong directions and a little everywhere. One projection was left alone."""
    if weight.ndim != 2 or "proj" not in name or "layers.1.self_attn.k_proj" in name:
        return weight
    d, k = weight.shape
    low = torch.randn(d, 3, generator=generator) @ torch.randn(3, k, generator=generator)
    return weight + 0.05 * low + 0.01 * torch.randn(d, k, generator=generator)


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full aligned model, in float32, so that the small noise is not lost in rounding."""
    folder = tmp_path_factory.mktemp("tuned") / "tiny-aligned"
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(4)
    tensors = load_file(folder / "model.safetensors")
    changed = {name: noise(name, tensor.float(), generator) for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def sharded(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in many files."""
    folder = tmp_path_factory.mktemp("tuned") / "sharded"
    models.load_model(tuned, dtype=torch.float32).save_pretrained(folder, max_shard_size="20KB")
    shutil.copyfile(tuned / "tokenizer.json", folder / "tokenizer.json")
    shutil.copyfile(tuned / "tokenizer_config.json", folder / "tokenizer_config.json")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


def differences(before: Path, after: Path) -> dict[str, Tensor]:
    one, other = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    return {name: other[name].double() - one[name].double() for name in one}


def check_factors(update: AlignedUpdate, dense: dict[str, Tensor]) -> None:
    for name, factors in update.factors.items():
        wanted = dense[f"{name}.weight"]
        found = product(factors.update)
        assert factors.a.shape[0] == factors.b.shape[1] == RANK
        error = float((found - wanted).norm()) / float(wanted.norm())
        assert factors.truncation_error == pytest.approx(error, rel=1e-4)
        # The randomised decomposition is as good as the exact one to a thousandth of what that leaves.
        sigma = torch.linalg.svdvals(wanted)
        best = float((sigma[RANK:].square().sum() / sigma.square().sum()).sqrt())
        assert best <= error * (1 + 1e-6)
        assert error <= best * (1 + 1e-3)
        assert 0.05 < error < 0.5


def test_the_difference_of_two_checkpoints_is_truncated_with_the_error_that_is_reported(
    base: Path, tuned: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    update = from_checkpoints(base, tuned, shapes, RANK)
    assert update.source == "checkpoints"
    assert update.labels == []
    check_factors(update, differences(base, tuned))
    # What does not differ has no update.
    assert shapes.keys() - update.factors.keys() == {"model.layers.1.self_attn.k_proj"}
    assert update.files == {
        "base/model.safetensors": sha256_file(base / "model.safetensors"),
        "aligned/model.safetensors": sha256_file(tuned / "model.safetensors"),
    }


def test_checkpoints_in_many_files_give_the_same(
    base: Path, tuned: Path, sharded: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    whole, parts = (from_checkpoints(base, folder, shapes, RANK) for folder in (tuned, sharded))
    assert whole.factors.keys() == parts.factors.keys()
    for name, factors in whole.factors.items():
        assert torch.equal(factors.a, parts.factors[name].a)
        assert torch.equal(factors.b, parts.factors[name].b)
    shards = {f"aligned/{path.name}": sha256_file(path) for path in sharded.glob("*.safetensors")}
    assert {name: digest for name, digest in parts.files.items() if name.startswith("aligned/")} == shards
    # In both places.
    turned = from_checkpoints(sharded, base, shapes, RANK)
    for name, factors in whole.factors.items():
        close(product(turned.factors[name].update), -product(factors.update), 1e-3)


def test_a_rank_that_holds_everything_cuts_nothing_off(
    base: Path, tuned: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    update = from_checkpoints(base, tuned, shapes, 64)
    for name, wanted in differences(base, tuned).items():
        factors = update.factors.get(name.removesuffix(".weight"))
        if factors is not None:
            assert factors.a.shape[0] == min(wanted.shape)
            close(product(factors.update), wanted, 1e-5)
            # The root of what float32 leaves of one minus one.
            assert factors.truncation_error < 1e-3


def test_truncating_repeats_and_leaves_the_random_numbers_of_others_alone() -> None:
    difference = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    first = truncate(difference, 4)
    assert torch.equal(torch.rand(3), wanted)
    second = truncate(difference, 4)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    # Balanced: both factors carry the root of the singular values.
    assert torch.allclose(first[0].norm(dim=0), first[1].norm(dim=1), rtol=1e-4)


def test_a_reference_from_two_checkpoints_says_what_it_lost(
    base: Path, sharded: Path, tuned: Path, tmp_path: Path
) -> None:
    manifest = build_reference(
        tmp_path / "out",
        sources=BuildSources(aligned=sharded, base=base),
        prompts=PROMPTS,
        settings=BuildSettings(rank=RANK, sparsity=0.5, dtype="float32"),
    )
    assert manifest.origin.source == "checkpoints"
    assert manifest.parameters.rank == RANK
    assert manifest.methods == ["nlsr", "gram", "safelora", "antidote", "safetylock", "none"]
    assert manifest.lineages == ["continued", "fresh", "foreign"]
    # Neither folder knows a name for the model but its own.
    assert manifest.base_model.labels == ["sharded"]
    assert len(manifest.aligned) == 13
    assert len(manifest.base_model.modules) == 14
    reference, dense = LoadedReference(tmp_path / "out"), differences(base, tuned)
    for name, item in manifest.aligned.items():
        wanted = dense[f"{name}.weight"]
        error = float((product(reference.aligned(name)) - wanted).norm() / wanted.norm())
        assert item.truncation_error == pytest.approx(error, rel=1e-4)
        assert item.norm == pytest.approx(float(product(reference.amplified(name, 0.9)).norm()), rel=1e-4)
    assert reference.aligned("model.layers.1.self_attn.k_proj") is None


def test_a_checkpoint_of_the_bare_transformer_is_the_same_model(
    base: Path, tuned: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    tensors = load_file(base / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    bare, full = (from_checkpoints(folder, tuned, shapes, RANK) for folder in (tmp_path, base))
    for name, factors in full.factors.items():
        assert torch.equal(factors.b, bare.factors[name].b)


def test_identical_checkpoints_are_refused(base: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    shutil.copyfile(base / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(InvalidParameter) as caught:
        from_checkpoints(base, tmp_path, shapes, RANK)
    assert caught.value.code == "no_aligned_update"
    assert "leave --base out" in caught.value.hint


def altered(base: Path, folder: Path, change: Any) -> Path:
    tensors = load_file(base / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}


def wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "model.layers.1.mlp.up_proj.weight"
    return tensors | {name: torch.zeros(49, 32, dtype=torch.bfloat16)}


def spoiled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("inf")
    return tensors


@pytest.mark.parametrize("place", ["base", "aligned"])
@pytest.mark.parametrize(
    ("change", "code"), [(without, "weight_missing"), (wider, "base_mismatch"), (spoiled, "non_finite")]
)
def test_checkpoints_that_do_not_fit_the_model_are_refused(
    base: Path, tuned: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path, place: str, change: Any, code: str
) -> None:
    other = altered(base, tmp_path, change)
    with pytest.raises(Incompatible) as caught:
        from_checkpoints(*((other, tuned) if place == "base" else (tuned, other)), shapes, RANK)
    assert caught.value.code == code
    assert caught.value.param is not None
    assert caught.value.param.removesuffix(".weight") == "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": "../model.safetensors"}},
        {"weight_map": {"a": "/etc/hostname"}},
        {"weight_map": {"a": "b/model.safetensors"}},
        {"weight_map": {"a": ".."}},
        {"weight_map": {"a": ""}},
        {"weight_map": {"a": "nowhere.safetensors"}},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": "model-1.safetensors", "b": None}},
        {"weight_map": ["model-1.safetensors"]},
        {"weights": {}},
        [],
        None,
    ],
)
def test_an_index_that_names_other_than_files_beside_it_is_refused(
    base: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path, index: Any
) -> None:
    folder = tmp_path / "model"
    (folder / "b").mkdir(parents=True)
    # All of these exist, so that only the name can be what is refused.
    for place in (tmp_path / "model.safetensors", folder / "b" / "model.safetensors", folder / "model-1.safetensors"):
        shutil.copyfile(base / "model.safetensors", place)
    (folder / "model.safetensors.index.json").write_text("{" if index is None else json.dumps(index))
    with pytest.raises(InvalidParameter) as caught:
        from_checkpoints(base, folder, shapes, RANK)
    assert (caught.value.code, caught.value.param) == ("base_not_found", str(folder))


def test_a_folder_without_weights_is_refused(base: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter) as caught:
        from_checkpoints(tmp_path, base, shapes, RANK)
    assert caught.value.code == "base_not_found"


def test_progress_counts_the_modules(base: Path, tuned: Path, shapes: dict[str, tuple[int, int]]) -> None:
    seen: list[tuple[int, int]] = []
    sources.from_checkpoints(base, tuned, shapes, RANK, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(at, len(shapes)) for at in range(1, len(shapes) + 1)]
