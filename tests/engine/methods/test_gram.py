"""gram against its definition: a dense, float64 minimiser over raw inputs."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safegraft.contracts.methods import GramParameters
from safegraft.engine.methods.base import Kinship
from safegraft.engine.methods.gram import Gram
from safegraft.engine.reference import BuildSettings, generalized_eigenpairs
from tests.engine.random_bundle import Toy, dense

CONTINUED = Kinship("continued", 0.9, True)
FRESH = Kinship("fresh", 0.0, False)
relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = {
    "d": st.integers(3, 12),
    "k": st.integers(3, 12),
    "r": st.integers(1, 4),
    "seed": st.integers(0, 2**16),
    "scaling": st.floats(0.05, 8),
    "weight": st.sampled_from([0.03, 0.3, 1.0, 10.0]),
}
# The bundle keeps eigenpairs as bfloat16 (8 bits of mantissa), and that bounds what can be expected of K.
BF16 = 0.03


def everything(ridge: float = 1e-2) -> BuildSettings:
    """No pair is dropped, so that the definition holds exactly up to rounding."""
    return BuildSettings(ridge=ridge, smallest_pair=0.0)


def moments(toy: Toy) -> tuple[Tensor, Tensor]:
    c_s = toy.x_s.double().T @ toy.x_s.double() / len(toy.x_s)
    c_g = toy.x_g.double().T @ toy.x_g.double() / len(toy.x_g)
    return c_s, c_g + toy.settings.ridge * c_g.diagonal().mean() * torch.eye(len(c_g))


def close(actual: Tensor, wanted: Tensor, scale: Tensor) -> None:
    assert float((actual - wanted).norm()) <= BF16 * float(scale.norm())


@given(k=st.integers(2, 12), seed=st.integers(0, 2**16), ridge=st.sampled_from([1e-4, 1e-2]))
@settings(deadline=None)
def test_eigenpairs_rebuild_both_moments_and_k(k: int, seed: int, ridge: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_s = torch.randn(k, k, generator=generator, dtype=torch.float64)
    x_g = torch.randn(3 * k, k, generator=generator, dtype=torch.float64)
    c_s, c_g = x_s.T @ x_s, x_g.T @ x_g
    mu, v, w = generalized_eigenpairs(c_s, c_g, ridge)
    regular = c_g + ridge * c_g.diagonal().mean() * torch.eye(k)
    assert bool((mu[:-1] >= mu[1:]).all())
    assert torch.allclose(w @ w.T, regular, atol=1e-8 * float(regular.norm()))
    assert torch.allclose((w * mu) @ w.T, c_s, atol=1e-8 * float(c_s.norm()))
    assert torch.allclose(v.T @ w, torch.eye(k, dtype=torch.float64), atol=1e-6)
    direct = c_s @ torch.linalg.inv(c_s + 0.3 * regular)
    assert torch.allclose((w * (mu / (mu + 0.3))) @ v.T, direct, atol=1e-6 * (1 + float(direct.norm())))


@relaxed
@given(**shapes, rank=st.integers(1, 5))
def test_a_fresh_adapter_becomes_a_times_one_minus_k(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, weight: float, rank: int
) -> None:
    toy = Toy(tmp_path / "ref", d=d, k=k, r=r, seed=seed, settings=everything())
    module = toy.fresh(rank, scaling)
    patched = Gram(GramParameters(general_weight=weight), toy.reference, FRESH).patch(module)
    assert torch.equal(patched.module.b, module.b)
    assert patched.module.rank == rank
    assert patched.truncation_error == 0.0
    c_s, c_g = moments(toy)
    through = dense(module) @ c_s @ torch.linalg.inv(c_s + weight * c_g)
    close(dense(patched.module), dense(module) - through, dense(module).norm() + through)


@relaxed
@given(**shapes)
def test_a_continued_adapter_goes_back_to_the_aligned_update_where_safety_prompts_lie(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, weight: float
) -> None:
    toy = Toy(tmp_path / "ref", d=d, k=k, r=r, seed=seed, settings=everything())
    module = toy.continued(scaling)
    method = Gram(GramParameters(general_weight=weight), toy.reference, CONTINUED)
    patched = method.patch(module)
    c_s, c_g = moments(toy)
    delta_a = toy.b.double() @ toy.a.double()
    through = (delta_a - dense(module)) @ c_s @ torch.linalg.inv(c_s + weight * c_g)
    exact = dense(module) + through
    error = patched.truncation_error * float(exact.norm())
    # Recompression loses exactly what it reports.
    assert float((dense(patched.module) - exact).norm()) <= error + BF16 * float(exact.norm() + through.norm())
    assert patched.module.rank == r


@relaxed
@given(**shapes)
def test_it_is_the_minimum_of_its_objective(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, weight: float
) -> None:
    """E_s‖Δx‖² + λ·E_g‖(Δ − Δ_t)x‖² over raw inputs: no other update that was tried does better."""
    toy = Toy(tmp_path / "ref", d=d, k=k, r=r, seed=seed, settings=everything(1e-4))
    module = toy.fresh(2, scaling)
    found = dense(Gram(GramParameters(general_weight=weight), toy.reference, FRESH).patch(module).module)

    def objective(update: Tensor) -> float:
        safety = (toy.x_s.double() @ update.T).square().sum() / len(toy.x_s)
        general = (toy.x_g.double() @ (update - dense(module)).T).square().sum() / len(toy.x_g)
        return float(safety + weight * general)

    least = objective(found)
    assert least <= objective(dense(module)) * (1 + 1e-3)
    assert least <= objective(torch.zeros_like(found)) * (1 + 1e-3)
    for step in (0.1, -0.1):
        other = found + step * float(found.norm() / d**0.5) * toy.random(*found.shape).double()
        assert least <= objective(other) * (1 + 1e-3)


@relaxed
@given(**shapes)
def test_the_similarity_is_the_share_of_the_effect_on_general_inputs(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, weight: float
) -> None:
    toy = Toy(tmp_path / "ref", d=d, k=k, r=r, seed=seed, settings=everything(1e-4))
    module = toy.fresh(2, scaling)
    method = Gram(GramParameters(general_weight=weight), toy.reference, FRESH)
    on_safety = float((toy.x_s.double() @ dense(module).T).square().sum()) / len(toy.x_s)
    on_general = float((toy.x_g.double() @ dense(module).T).square().sum()) / len(toy.x_g)
    wanted = (on_general / (on_general + on_safety)) ** 0.5
    assert method.similarity(module) == pytest.approx(wanted, abs=0.03)
    assert method.similarity(method.patch(module).module) >= method.similarity(module) - 0.01


def test_a_smaller_weight_repairs_more(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "ref", d=8, k=8, r=2, seed=5, settings=everything())
    module = toy.fresh(2, 1.0)

    def left_on_safety(weight: float) -> float:
        patched = Gram(GramParameters(general_weight=weight), toy.reference, FRESH).patch(module)
        return float((toy.x_s.double() @ dense(patched.module).T).norm())

    assert left_on_safety(0.01) < left_on_safety(0.3) < left_on_safety(10.0)
