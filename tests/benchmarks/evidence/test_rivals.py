from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.evidence import rivals
from benchmarks.evidence.measure import _sum
from benchmarks.evidence.subject import Subject
from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
from safegraft.engine.bundle import BuildSettings
from safegraft.engine.reference import LoadedReference
from tests import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("rivals")
    tiny.save_model(folder / "base")
    aligned = tiny.save_adapter(folder / "base", folder / "aligned", seed=3)
    tiny.save_adapter(folder / "base", folder / "fresh", seed=4)
    tiny.continue_adapter(aligned, folder / "continued")
    build_reference(
        folder / "reference",
        sources=BuildSources(aligned=aligned, base=folder / "base", labels=["base"]),
        prompts=BuildPrompts(safety=tiny.HARMFUL, general=tiny.GENERAL),
        settings=BuildSettings(),
    )
    reference, subject = LoadedReference(folder / "reference"), Subject(folder / "base")

    def setting(name: str) -> rivals.Setting:
        return rivals.Setting(
            adapter=folder / name, aligned=aligned, base=folder / "base", on_aligned=name == "fresh",
            reference=reference, subject=subject, safety=tiny.HARMFUL,
        )  # fmt: skip

    return setting


def total(updates: Any) -> dict[str, Tensor]:
    return _sum(updates)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


@pytest.mark.parametrize("lineage", ["fresh", "continued"])
def test_interpolation_goes_from_the_customers_model_to_the_aligned_one(made: Any, lineage: str) -> None:
    setting = made(lineage)
    customers = total([*rivals.dense(setting.adapter), *rivals.below(setting)])
    aligned = dict(rivals.dense(setting.aligned))
    assert same(total(rivals.interpolated(setting, 0.0)), customers)
    assert same(total(rivals.interpolated(setting, 1.0)), aligned)
    assert not same(total(rivals.interpolated(setting, 0.5)), customers)


def test_the_controls_change_as_much_as_gram_does(made: Any) -> None:
    setting = made("fresh")
    low = dict(rivals.dense(setting.aligned))
    smaller, shifted = (total(function(setting)) for function in (rivals.rescaled, rivals.perturbed))
    for name, own, repaired in rivals._before_and_after(setting):
        kept = float((own * repaired).sum() / own.square().sum())
        assert (smaller[name] - low[name]).norm() == pytest.approx(
            max(0.0, min(1.0, kept)) * float(own.norm()), rel=1e-3
        )
        assert (shifted[name] - low[name] - own).norm() == pytest.approx(float((repaired - own).norm()), rel=1e-4)


@pytest.mark.parametrize("lineage", ["fresh", "continued"])
def test_something_else_decides_where_gram_repairs(made: Any, lineage: str) -> None:
    setting = made(lineage)
    below = total(rivals.below(setting))
    pairs = {name: (own, repaired) for name, own, repaired in rivals._before_and_after(setting)}

    def repaired_in(where: rivals.Where) -> set[str]:
        """Modules that are as `gram` leaves them; the others are as they were."""
        found = total(rivals.combined(setting, where))
        chosen = set()
        for name, (own, repaired) in pairs.items():
            left = found[name] - below.get(name, 0.0)
            chosen |= {name} if torch.allclose(left, repaired, atol=1e-6) else set()
            assert name in chosen or torch.allclose(left, own, atol=1e-6)
        return chosen

    mlp, attention, half = repaired_in("mlp"), repaired_in("attention"), repaired_in("half")
    assert mlp
    assert attention == set(pairs) - mlp
    assert len(half) == (len(pairs) + 1) // 2
    neurons, weighted = (total(rivals.combined(setting, where)) for where in ("neurons", "similarity"))
    rows = {name: setting.reference.neurons(name, "low_rank").rows for name in pairs}
    for name, (own, repaired) in pairs.items():
        left = neurons[name] - below.get(name, 0.0)
        assert torch.allclose(left[rows[name]], repaired[rows[name]], atol=1e-6)
        assert torch.allclose(left[~rows[name]], own[~rows[name]], atol=1e-6)
        assert not torch.allclose(left, own, atol=1e-6)
        assert (weighted[name] - below.get(name, 0.0) - own).norm() > 0


@pytest.mark.parametrize("lineage", ["fresh", "continued"])
def test_zeroing_takes_out_what_nlsr_would_replace(made: Any, lineage: str) -> None:
    setting = made(lineage)
    zeroed = total(rivals.zeroed(setting))
    low = dict(rivals.dense(setting.aligned))
    for name, own in rivals.dense(setting.adapter):
        left = zeroed[name] - (low[name] if lineage == "fresh" else 0.0)
        assert 0 < left.norm() < own.norm()


def test_a_gradient_patch_moves_the_adapter_a_little(made: Any) -> None:
    setting = made("fresh")
    before = total([*rivals.dense(setting.adapter), *rivals.below(setting)])
    after = total(rivals.gradient_patch(setting, steps=2))
    assert before.keys() == after.keys()
    moved = [float((after[name] - before[name]).norm() / before[name].norm()) for name in before]
    assert 0 < max(moved) < 0.5


@pytest.mark.parametrize("lineage", ["fresh", "continued"])
def test_safe_delta_between_nothing_and_all(made: Any, lineage: str) -> None:
    setting = made(lineage)
    aligned = dict(rivals.dense(setting.aligned))
    assert same(total(rivals.safe_delta(setting, threshold=0.0)), aligned)
    customers = total([*rivals.dense(setting.adapter), *rivals.below(setting)])

    def away(threshold: float) -> float:
        kept = total(rivals.safe_delta(setting, threshold=threshold))
        return sum(float((kept[name] - customers[name]).square().sum()) for name in customers)

    # Fifteen per cent of the columns are never kept.
    # Compensation may lead away from the customer's update where little is kept; where all may be, it is near it.
    nothing, most = away(0.0), away(1e9)
    assert 0 < most < 0.9 * nothing


def test_what_safe_delta_drops_is_made_up_for() -> None:
    """The safety loss tr(E·H·Eᵀ) of what is kept is smaller than that of keeping the same entries alone."""
    torch.manual_seed(0)
    x = torch.randn(400, 24) @ torch.randn(24, 24)
    h, delta = x.T @ x / 400, torch.randn(16, 24)
    kept = rivals._select_and_compensate(torch.zeros(16, 24), delta, h.clone(), 300.0, 0.15, 24)
    alone = torch.where((kept - delta).abs() < 1e-6, delta, torch.zeros(()))
    assert 0 < (alone != 0).sum() < alone.numel()
    assert torch.trace(kept @ h @ kept.T) < torch.trace(alone @ h @ alone.T)


def test_moments_are_the_safety_inputs_own(made: Any) -> None:
    setting = made("fresh")
    moments = rivals._moments(setting)
    assert moments.keys() == setting.reference.manifest.base_model.modules.keys()
    for name, own in setting.reference.manifest.base_model.modules.items():
        assert moments[name].shape == (own.inputs, own.inputs)
        assert torch.equal(moments[name], moments[own.site])
        assert torch.linalg.eigvalsh(moments[name].double()).min() > -1e-6
    again = rivals._moments(setting)
    assert all(torch.equal(moments[name], again[name]) for name in moments)
