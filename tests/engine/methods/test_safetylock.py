"""SafetyLock against b = W·d and u = E[xxᵀ]⁻¹E[x] from raw activations, dense and in float64."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safegraft.compatibility import top_heads
from safegraft.contracts.methods import SafetyLockParameters
from safegraft.contracts.reference import HeadLayer, ReferenceManifest, SafetyLockStatistics
from safegraft.engine.bundle import CONSTANT_RIDGE, BuildSettings
from safegraft.engine.methods.base import Kinship, Module
from safegraft.engine.methods.safetylock import SafetyLock
from tests.engine.random_bundle import NAME, Toy, dense, repaired

KINSHIPS = {"continued": Kinship("continued", 0.9, True), "fresh": Kinship("fresh", 0.0, False)}
Sort = Literal["continued", "fresh"]
relaxed = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes: Mapping[str, Any] = {
    "d": st.integers(3, 14),
    "head_count": st.integers(1, 4),
    "size": st.integers(1, 4),
    "rank": st.integers(1, 4),
    "seed": st.integers(0, 2**16),
    "scaling": st.floats(0.05, 8),
    "strength": st.sampled_from([0.5, 6.0, 20.0]),
    "heads": st.integers(1, 5),
    "weak": st.sampled_from([0, 2]),
}
SERVED = [
    # What the statistics ran on, what the adapter sits on, and how much of Δ_a lies between them.
    ("adapter", "continued", 0.0),
    ("adapter", "fresh", 1.0),
    ("two_adapters", "fresh", 1.0),
    ("checkpoints", "continued", -1.0),
    ("checkpoints", "fresh", 0.0),
    ("none", "fresh", 0.0),
]


def displacement(toy: Toy, strength: float, heads: int) -> Tensor:
    """d (k,): α·σ·θ of the first `heads` heads, which the toy gives the best accuracies, and zeros for the others."""
    theta, sigma = toy.heads.directions.double(), toy.heads.sigma.double()
    sigma[heads:] = 0.0
    return torch.cat([strength * s * t for s, t in zip(sigma, theta, strict=True)])


def constant(toy: Toy) -> tuple[Tensor, Tensor, float]:
    """E[x], u and E(1 − uᵀx)² over the raw inputs of both prompt sets, half and half."""
    sets = [toy.x_s.double(), toy.x_g.double()]
    second = sum((x.T @ x / len(x) / 2 for x in sets), torch.zeros((), dtype=torch.float64))
    mean = sum((x.mean(dim=0) / 2 for x in sets), torch.zeros((), dtype=torch.float64))
    ridge = CONSTANT_RIDGE * second.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
    u = torch.linalg.inv(second + ridge) @ mean
    return mean, u, float(sum(float((1 - x @ u).square().mean()) / 2 for x in sets))


def made(toy: Toy, sort: Sort = "fresh", **parameters: object) -> SafetyLock:
    return SafetyLock(SafetyLockParameters.model_validate(parameters), toy.reference, KINSHIPS[sort])


def close(actual: Tensor, wanted: Tensor, terms: float = 0.0) -> None:
    """Up to float32's rounding of the largest of the terms that were added up."""
    assert float((actual.double() - wanted).norm()) <= 2e-5 * (terms + float(wanted.norm()))


@pytest.mark.parametrize(("source", "sort", "share"), SERVED)
@relaxed
@given(**shapes)
def test_every_output_carries_the_displacement_through_the_projection_as_it_is_served(
    tmp_path: Path, source: str, sort: Sort, share: float, d: int, head_count: int, size: int, rank: int, seed: int,
    scaling: float, strength: float, heads: int, weak: int,
) -> None:  # fmt: skip
    toy = Toy(
        tmp_path / "ref", d=d, k=head_count * size, r=2, seed=seed, settings=BuildSettings(), head_count=head_count,
        source=source, weak_rank=weak if source == "two_adapters" else 0,
    )  # fmt: skip
    module = toy.continued(scaling) if sort == "continued" else toy.fresh(rank, scaling)
    given = {"strength": strength, "heads": heads}
    push = displacement(toy, strength, heads)
    aligned = share * toy.b.double() @ toy.a.double()
    without_own = (toy.w_o.double() + aligned) @ push
    bias = without_own + dense(module) @ push
    terms = float(sum(part.norm() for part in (toy.w_o.double(), aligned, dense(module)))) * float(push.norm())

    exact = made(toy, sort, output="lora_bias", **given)
    proposal = exact.propose(module)
    assert proposal.bias is not None
    close(proposal.bias, bias, terms)
    assert torch.equal(proposal.b, module.b)
    assert torch.equal(proposal.a, module.a)
    assert exact.adds_biases
    assert exact.rank(NAME, module.rank) == module.rank
    assert exact.side_car() == {}

    _, u, _ = constant(toy)
    near = made(toy, sort, output="rank_one", **given)
    proposal = near.propose(module)
    assert proposal.bias is None
    assert not near.adds_biases
    assert len(proposal.a) == near.rank(NAME, module.rank) == module.rank + 1
    whole = module.with_factors(proposal.b, proposal.a)
    close(dense(whole), dense(module) + bias[:, None] * u, (terms + float(dense(module).norm())) * float(u.norm()))

    beside = made(toy, sort, output="side_car", **given)
    found = beside.side_car()
    assert set(found) == {f"{NAME}.displacement", f"{NAME}.bias"}
    close(found[f"{NAME}.displacement"], push)
    close(found[f"{NAME}.bias"], without_own, terms)
    assert not beside.adds_biases
    assert beside.select({NAME: 0.0}).names == set()


@relaxed
@given(**shapes)
def test_the_error_of_a_rank_one_update_is_what_the_manifest_says(
    tmp_path: Path, d: int, head_count: int, size: int, rank: int, seed: int, scaling: float, strength: float,
    heads: int, weak: int,
) -> None:  # fmt: skip
    toy = Toy(
        tmp_path / "ref", d=d, k=head_count * size, r=2, seed=seed, settings=BuildSettings(), head_count=head_count
    )
    mean, u, unexplained = constant(toy)
    assert toy.reference.manifest.safetylock is not None
    layer = toy.reference.manifest.safetylock.layers[NAME]
    assert layer.unexplained == pytest.approx(unexplained, abs=1e-4)
    # Of the push on raw inputs the same share is missing: b·uᵀx in place of b.
    assert 0.0 < layer.unexplained < 1.0
    assert layer.heads == head_count
    known = toy.reference.heads(NAME)
    close(known.mean, mean, 1.0)
    assert float((known.constant.double() - u).norm()) <= 1e-3 * float(u.norm())
    # On the mean input the wanted push arrives but for 1 − uᵀE[x].
    module = toy.fresh(rank, scaling)
    method = made(toy, strength=strength, heads=heads)
    proposal = method.propose(module)
    whole = module.with_factors(proposal.b, proposal.a)
    assert method.similarity(module) == 0.0
    assert method.similarity_after(module, whole) == pytest.approx(float(u @ mean), abs=1e-3)
    patched = repaired(method, module)
    aligned = toy.b.double() @ toy.a.double()
    bias = (toy.w_o.double() + aligned + dense(module)) @ displacement(toy, strength, heads)
    added = (dense(patched.module) - dense(module)) @ mean
    arrived = float(added @ bias / bias.square().sum())
    assert method.similarity_after(module, patched.module) == pytest.approx(arrived, abs=1e-3 * (1 + abs(arrived)))
    assert patched.module.rank == rank


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "ref", d=10, k=12, r=2, seed=1, settings=BuildSettings(), head_count=4)


def test_biases_and_side_cars_are_exact(toy: Toy) -> None:
    module = toy.fresh(2, 1.0)
    for output in ("lora_bias", "side_car"):
        assert made(toy, output=output).similarity_after(module, module) == 1.0
    assert set(SafetyLock.fidelity) == {"lora_bias", "side_car", "rank_one"}


def test_fewer_heads_push_less_and_none_push_beyond_those_that_there_are(toy: Toy) -> None:
    def push(heads: int) -> Tensor:
        return made(toy, output="side_car", heads=heads).side_car()[f"{NAME}.displacement"].reshape(4, 3)

    for heads in range(1, 5):
        assert push(heads).norm(dim=1).gt(0).tolist() == [True] * heads + [False] * (4 - heads)
        assert made(toy, heads=heads).resolved == {"heads": f"{NAME}: {', '.join(map(str, range(heads)))}"}
    assert torch.equal(push(5), push(4))
    assert made(toy, heads=3).explanation.startswith("3 attention heads")
    # Of the length that was asked for: α standard deviations.
    assert torch.allclose(push(4).norm(dim=1), 6.0 * toy.heads.sigma)


def test_a_strength_of_zero_changes_nothing(toy: Toy) -> None:
    for output in ("rank_one", "lora_bias", "side_car"):
        method = made(toy, output=output, strength=0.0)
        assert method.select({NAME: 0.0}).names == set()
        assert all(not bool(tensor.any()) for tensor in method.side_car().values())
    for output, names in (("rank_one", {NAME}), ("lora_bias", {NAME}), ("side_car", set())):
        assert made(toy, output=output, strength=0.1).select({NAME: 0.0}).names == names


def test_the_push_grows_with_the_strength_and_nothing_else_does(toy: Toy) -> None:
    module = toy.fresh(2, 0.5)
    single, double = (made(toy, strength=strength).propose(module) for strength in (3.0, 6.0))
    assert torch.equal(single.a, double.a)
    assert torch.equal(single.b[:, :2], double.b[:, :2])
    assert torch.allclose(2.0 * single.b[:, 2], double.b[:, 2], rtol=1e-5, atol=1e-6)


def test_only_layers_with_a_chosen_head_are_reached(toy: Toy) -> None:
    assert made(toy).reaches(NAME)
    assert not made(toy).reaches("layers.0.mlp.down_proj")
    with_heads(toy, {NAME: [0.0] * 4, "layers.1.self_attn.o_proj": [0.9]})
    assert not made(toy).reaches(NAME)


def with_heads(toy: Toy, accuracy: dict[str, list[float]]) -> ReferenceManifest:
    layers = {
        name: HeadLayer(heads=len(found), accuracy=found, separation=[1.0] * len(found), unexplained=0.1)
        for name, found in accuracy.items()
    }
    statistics = SafetyLockStatistics(source="measured", layers=layers)
    toy.reference.manifest = toy.reference.manifest.model_copy(update={"safetylock": statistics})
    return toy.reference.manifest


def test_the_heads_that_tell_answers_apart_best_are_chosen_over_all_layers(toy: Toy) -> None:
    manifest = with_heads(toy, {"b": [0.6, 0.9, 0.7], "a": [0.8, 0.5, 0.95]})
    assert top_heads(manifest, 1) == {"a": [2]}
    assert top_heads(manifest, 2) == {"b": [1], "a": [2]}
    assert top_heads(manifest, 3) == {"b": [1], "a": [0, 2]}
    assert top_heads(manifest, 100) == {"b": [0, 1, 2], "a": [0, 1, 2]}
    # Layers come in the model's order, whatever their names and the accuracy of their heads.
    assert list(top_heads(manifest, 3)) == ["b", "a"]


def test_equally_good_heads_are_taken_in_the_models_order(toy: Toy) -> None:
    manifest = with_heads(toy, {"b": [0.9, 0.9, 0.9], "a": [0.9, 1.0, 0.9]})
    assert top_heads(manifest, 1) == {"a": [1]}
    assert top_heads(manifest, 3) == {"b": [0, 1], "a": [1]}
    assert top_heads(manifest, 5) == {"b": [0, 1, 2], "a": [0, 1]}


def test_heads_that_a_published_table_leaves_out_are_never_chosen(toy: Toy) -> None:
    manifest = with_heads(toy, {"b": [0.0, 1.0, 0.0], "a": [0.0, 0.0, 0.0]})
    assert top_heads(manifest, 100) == {"b": [1]}


@pytest.mark.parametrize("power", [-60, 60])
def test_how_the_factors_share_the_size_of_the_update_does_not_matter(toy: Toy, power: int) -> None:
    module, split = toy.fresh(3, 0.5), torch.tensor(power)
    other = Module(NAME, torch.ldexp(module.a, split), torch.ldexp(module.b, -split), module.scaling)
    for output in ("rank_one", "lora_bias"):
        method = made(toy, output=output)
        one, two = method.propose(module), method.propose(other)
        whole = dense(module.with_factors(one.b, one.a))
        assert float((dense(other.with_factors(two.b, two.a)) - whole).norm()) <= 1e-6 * float(whole.norm())
        if one.bias is not None:
            assert two.bias is not None
            assert torch.allclose(one.bias, two.bias, rtol=1e-5)
        patched = dense(repaired(method, module).module)
        assert float((dense(repaired(method, other).module) - patched).norm()) <= 1e-5 * float(patched.norm())
