"""What a bundle holds: eigenpairs and how many are left out, factors in their own dtype, and all of it or nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from safegraft.adapter import WEIGHTS
from safegraft.bundle import GRAM, MANIFEST, NLSR, SAFETYLOCK
from safegraft.contracts.reference import GramStatistics
from safegraft.engine import bundle as module
from safegraft.engine.bundle import BuildSettings, Ingredients, served, write_bundle
from safegraft.engine.heads import Heads
from safegraft.engine.reference import LoadedReference
from safegraft.engine.sources import AlignedFactors, AlignedUpdate
from tests import tiny
from tests.engine.random_bundle import NAME, PROMPTS, Toy, statistics

relaxed = hypothesis_settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def toy(folder: Path, k: int = 8, seed: int = 1, **settings: Any) -> Toy:
    return Toy(folder, d=6, k=k, r=3, seed=seed, settings=BuildSettings(**settings), head_count=2)


def gram_of(toy: Toy) -> GramStatistics:
    found = toy.reference.manifest.gram
    assert found is not None
    return found


def all_mu(toy: Toy) -> Tensor:
    """Every μ of C_s·v = μ·(C_g + ε)·v in float64, the largest first."""
    c_s, c_g = (x.double().T @ x.double() / len(x) for x in (toy.x_s, toy.x_g))
    regular = c_g + toy.settings.ridge * c_g.diagonal().mean() * torch.eye(len(c_g), dtype=torch.float64)
    mu: Tensor = torch.linalg.eigvals(torch.linalg.solve(regular, c_s)).real.sort(descending=True).values
    return mu


@relaxed
@given(k=st.sampled_from([4, 8, 12]), seed=st.integers(0, 2**16), count=st.integers(1, 14))
def test_no_more_than_the_leading_eigenpairs_are_kept_and_the_manifest_says_what_they_hold(
    tmp_path: Path, k: int, seed: int, count: int
) -> None:
    everything = toy(tmp_path / "all", k, seed, smallest_pair=0.0)
    few = toy(tmp_path / "few", k, seed, smallest_pair=0.0, max_pairs=count)
    mu, kept = all_mu(few), min(count, k)
    assert gram_of(few).pairs == {NAME: kept}
    assert few.reference.manifest.parameters.max_pairs == count
    assert gram_of(few).energy[NAME] == pytest.approx(float(mu[:kept].sum() / mu.sum()), rel=1e-4)
    assert gram_of(everything).energy == {NAME: pytest.approx(1.0)}
    pairs, whole = few.reference.pairs(NAME), everything.reference.pairs(NAME)
    torch.testing.assert_close(pairs.mu.double(), mu[:kept], rtol=1e-3, atol=1e-5 * float(mu[0]))
    for one, other in ((pairs.mu, whole.mu[:kept]), (pairs.v, whole.v[:, :kept]), (pairs.w, whole.w[:, :kept])):
        assert torch.equal(one, other)


@relaxed
@given(k=st.sampled_from([4, 8, 12]), seed=st.integers(0, 2**16), smallest=st.sampled_from([1e-3, 0.1, 0.5, 2.0]))
def test_eigenpairs_below_the_smallest_are_left_out_but_for_the_first(
    tmp_path: Path, k: int, seed: int, smallest: float
) -> None:
    found = toy(tmp_path / "toy", k, seed, smallest_pair=smallest)
    mu = all_mu(found)
    # Where one lies on the limit itself, float32 decides.
    at_least, at_most = int((mu >= smallest * 1.001).sum()), int((mu >= smallest * 0.999).sum())
    assert max(1, at_least) <= gram_of(found).pairs[NAME] <= max(1, at_most)
    kept = found.reference.pairs(NAME).mu
    assert len(kept) == gram_of(found).pairs[NAME]
    assert gram_of(found).energy[NAME] == pytest.approx(float(mu[: len(kept)].sum() / mu.sum()), rel=1e-4)


def test_one_eigenpair_is_kept_where_all_are_below_the_smallest(tmp_path: Path) -> None:
    found = toy(tmp_path / "toy", smallest_pair=1e6)
    assert gram_of(found).pairs == {NAME: 1}
    assert 0.0 < gram_of(found).energy[NAME] < 1.0


def test_a_site_that_safety_prompts_leave_at_zero_has_one_pair_of_nothing(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.zeros(9, 4), torch.randn(9, 4, generator=generator)
    settings = BuildSettings(smallest_pair=5e-4)
    found = Toy(tmp_path / "toy", d=3, k=4, r=2, seed=1, settings=settings, inputs=inputs)
    assert found.reference.pairs(NAME).mu.tolist() == [0.0]
    assert gram_of(found).energy == {NAME: 1.0}


def ingredients(a: Tensor, b: Tensor, **others: Any) -> Ingredients:
    """One module with these aligned factors; what else it is made of does not matter here."""
    (d, _), k = b.shape, a.shape[1]
    x = torch.randn(3 * k, k, generator=torch.Generator().manual_seed(0))
    safety = statistics(x)
    safety.grams[NAME] = (a.float() @ (x.T @ x) @ a.float().T).double()
    given: dict[str, Any] = {
        "labels": ["toy"], "config_sha256": "0" * 64, "architecture": "Toy", "dtype": "float32",
        "shapes": {NAME: (d, k)}, "aligned": AlignedUpdate("adapter", {NAME: AlignedFactors(a=a, b=b, scaling=0.5)}),
        "skipped_prefix": 0, "safety": safety, "safety_prompts": PROMPTS, "general": statistics(x + 1.0),
        "general_prompts": PROMPTS,
    }  # fmt: skip
    return Ingredients(**(given | others))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_aligned_factors_are_kept_in_the_dtype_and_the_bits_in_which_they_came(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 5, generator=generator).to(dtype), torch.randn(4, 2, generator=generator).to(dtype)
    write_bundle(tmp_path / "out", ingredients(a, b), BuildSettings())
    tensors = load_file(tmp_path / "out" / NLSR)
    for name, wanted in ((f"{NAME}.A", a), (f"{NAME}.B", b)):
        assert tensors[name].dtype == dtype
        assert torch.equal(tensors[name], wanted)
    update = LoadedReference(tmp_path / "out").aligned(NAME)
    assert update is not None
    assert torch.equal(update[0], b.float() * 0.5)
    assert torch.equal(update[1], a.float())


def test_a_built_bundle_holds_the_adapters_own_bytes(bundle: Path, aligned: Path) -> None:
    tensors, own = load_file(bundle / NLSR), load_file(aligned / WEIGHTS)
    names = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
    assert len(names) == 7 * tiny.LAYERS
    for name in names:
        for side in "AB":
            wanted = own[f"base_model.model.{name}.lora_{side}.weight"]
            assert wanted.dtype == torch.bfloat16
            assert tensors[f"{name}.{side}"].dtype == torch.bfloat16
            assert torch.equal(tensors[f"{name}.{side}"], wanted)


def test_the_files_hold_what_the_documentation_lists(tmp_path: Path) -> None:
    settings = BuildSettings(max_pairs=5)
    Toy(tmp_path / "toy", d=6, k=8, r=3, seed=1, settings=settings, weak_rank=2, head_count=2)
    files = {name: load_file(tmp_path / "toy" / name) for name in (NLSR, GRAM, SAFETYLOCK)}
    shapes = {
        name: {key: (str(tensor.dtype).removeprefix("torch."), *tensor.shape) for key, tensor in tensors.items()}
        for name, tensors in files.items()
    }
    masks = {
        f"{NAME}.{kind}.{scorer}": ("uint8", size)
        for scorer in ("low_rank", "wanda", "snip", "preference_snip")
        for kind, size in (("mask_A", 3), ("mask_B", 3), ("rows", 1))
    }
    assert shapes[NLSR] == masks | {
        f"{NAME}.A": ("float32", 3, 8),
        f"{NAME}.B": ("float32", 6, 3),
        f"{NAME}.weak_A": ("float32", 2, 8),
        f"{NAME}.weak_B": ("float32", 6, 2),
        f"{NAME}.weak_on_A": ("float32", 6, 3),
        f"{NAME}.G": ("float64", 5, 5),
    }
    assert shapes[GRAM] == {
        f"{NAME}.mu": ("float32", 5),
        f"{NAME}.V": ("bfloat16", 8, 5),
        f"{NAME}.W": ("bfloat16", 8, 5),
    }
    assert shapes[SAFETYLOCK] == {
        f"{NAME}.directions": ("float32", 2, 4),
        f"{NAME}.sigma": ("float32", 2),
        f"{NAME}.shift": ("float32", 2, 6),
        f"{NAME}.mean": ("float32", 8),
        f"{NAME}.constant": ("float32", 8),
    }


def test_what_a_head_adds_to_the_output_is_its_part_of_the_projection_times_its_direction(tmp_path: Path) -> None:
    found = toy(tmp_path / "toy")
    kept = found.reference.heads(NAME)
    for head in range(2):
        d = torch.zeros(8)
        d[4 * head : 4 * head + 4] = found.heads.directions[head]
        torch.testing.assert_close(kept.shift[head], found.w_o @ d)
    assert torch.equal(kept.sigma, found.heads.sigma)
    layers = found.reference.manifest.safetylock
    assert layers is not None
    assert layers.layers[NAME].accuracy == found.heads.accuracy.tolist()
    assert layers.layers[NAME].heads == 2


@pytest.mark.parametrize(
    ("aligned", "gram", "heads", "methods"),
    [
        (True, True, True, ["nlsr", "gram", "safelora", "antidote", "safetylock", "none"]),
        (True, False, False, ["nlsr", "safelora", "none"]),
        (False, True, False, ["gram", "antidote", "none"]),
        (False, False, True, ["safetylock", "none"]),
        (False, False, False, ["none"]),
    ],
)
def test_the_methods_offered_are_those_for_which_there_is_something(
    aligned: bool, gram: bool, heads: bool, methods: list[str]
) -> None:
    lineages = ["continued", "fresh", "foreign"] if aligned else ["fresh", "foreign"]
    assert served(aligned, gram, heads) == (methods, lineages)


def test_parts_that_were_not_measured_have_no_file(tmp_path: Path) -> None:
    bare = ingredients(torch.ones(1, 4), torch.ones(3, 1), general=None, general_prompts=None)
    assert set(write_bundle(tmp_path / "a", bare, BuildSettings()).files) == {NLSR}
    alone = replace(bare, aligned=AlignedUpdate("none"))
    manifest = write_bundle(tmp_path / "b", alone, BuildSettings())
    assert manifest.files == {}
    assert manifest.methods == ["none"]
    assert manifest.scorers == []
    assert [path.name for path in (tmp_path / "b").iterdir()] == [MANIFEST]
    heads = Heads(torch.eye(2), torch.ones(2), torch.ones(2), torch.ones(2))
    alone = replace(alone, heads={NAME: heads}, projections={NAME: torch.ones(3, 4)})
    assert set(write_bundle(tmp_path / "c", alone, BuildSettings()).files) == {SAFETYLOCK}


def raising(*_: object) -> None:
    raise RuntimeError("stop")


@pytest.mark.parametrize("part", ["_write_nlsr", "_write_gram", "_write_heads", "sha256_file", "progress"])
def test_a_bundle_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    heads = Heads(torch.eye(2), torch.ones(2), torch.ones(2), torch.ones(2))
    given = ingredients(torch.ones(1, 4), torch.ones(3, 1), heads={NAME: heads}, projections={NAME: torch.ones(3, 4)})
    progress: Callable[..., None] = raising if part == "progress" else lambda stage, done, total: None
    if part != "progress":
        monkeypatch.setattr(module, part, raising)
    with pytest.raises(RuntimeError, match="stop"):
        write_bundle(tmp_path / "out", given, BuildSettings(), progress)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    write_bundle(tmp_path / "out", given, BuildSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FileExistsError):
        write_bundle(tmp_path / "out", given, BuildSettings())
