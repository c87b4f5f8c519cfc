"""SafeLoRA against C = V·Vᵀ/‖V‖_F and the projector onto V's columns, both dense and in float64."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safegraft.contracts.methods import SafeLoraParameters
from safegraft.engine import lowrank
from safegraft.engine.bundle import BuildSettings
from safegraft.engine.methods.base import Kinship, Module
from safegraft.engine.methods.safelora import SafeLora, column_space
from tests.engine.random_bundle import NAME, Toy, dense, repaired

CONTINUED = Kinship("continued", 0.9, True)
FRESH = Kinship("fresh", 0.0, False)
Projector = Literal["paper", "orthogonal"]
relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = {
    "d": st.integers(2, 14),
    "k": st.integers(2, 14),
    "r": st.integers(1, 6),
    "rank": st.integers(1, 6),
    "seed": st.integers(0, 2**16),
    "scaling": st.floats(0.05, 8),
}


def projection(toy: Toy, projector: Projector) -> Tensor:
    """C (d, d)."""
    v = toy.b.double() @ toy.a.double()
    c: Tensor = v @ v.T / v.norm()
    if projector == "orthogonal":
        u, sigma, _ = torch.linalg.svd(v, full_matrices=False)
        u = u[:, sigma > 1e-6 * sigma[0]]
        c = u @ u.T
    return c


def cosine(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()))


def cancelled(b: Tensor, a: Tensor) -> float:
    """How many times the terms of ‖BA‖² = Σ (BᵀB)⊙(AAᵀ) outweigh their sum; 1 where nothing cancels."""
    terms = (b.double().T @ b.double()) * (a.double() @ a.double().T)
    return float(terms.abs().sum() / terms.sum().clamp_min(1e-30))


def made(toy: Toy, kinship: Kinship = FRESH, **parameters: object) -> SafeLora:
    return SafeLora(SafeLoraParameters.model_validate(parameters), toy.reference, kinship)


@pytest.mark.parametrize("projector", ["paper", "orthogonal"])
@relaxed
@given(**shapes)
def test_the_update_becomes_its_projection_and_the_similarity_is_their_cosine(
    tmp_path: Path, projector: Projector, d: int, k: int, r: int, rank: int, seed: int, scaling: float
) -> None:
    toy = Toy(tmp_path / "ref", d=d, k=k, r=r, seed=seed, settings=BuildSettings())
    method, module = made(toy, projector=projector), toy.fresh(rank, scaling)
    wanted = projection(toy, projector) @ dense(module)
    patched = repaired(method, module)
    # V's smallest direction decides the projector, so what float32 tells of it is what V's condition leaves.
    sigma = torch.linalg.svdvals(toy.b.double() @ toy.a.double())
    loss = float(sigma[0] / sigma[min(r, d, k) - 1]) if projector == "orthogonal" else 1.0
    tolerance = 1e-5 * loss * float(dense(module).norm() if projector == "orthogonal" else wanted.norm())
    assert float((dense(patched.module) - wanted).norm()) <= tolerance
    # Only B moves: same keys, same rank.
    assert torch.equal(patched.module.a, module.a)
    assert patched.module.rank == method.rank(NAME, rank) == rank
    assert patched.truncation_error == 0.0
    # Norms come from r×r products of the factors: float32 loses what cancels in them.
    lost = loss * max(cancelled(module.b, module.a), cancelled(patched.module.b, patched.module.a))
    assert method.similarity(module) == pytest.approx(cosine(wanted, dense(module)), abs=2e-6 * lost)
    assert method.similarity_after(module, patched.module) == pytest.approx(
        cosine(projection(toy, projector) @ wanted, wanted), abs=2e-5 * lost
    )


@relaxed
@given(**shapes)
def test_what_was_projected_orthogonally_stays_where_it_is(
    tmp_path: Path, d: int, k: int, r: int, rank: int, seed: int, scaling: float
) -> None:
    toy = Toy(tmp_path / "ref", d=d, k=k, r=r, seed=seed, settings=BuildSettings())
    method = made(toy, projector="orthogonal")
    once = repaired(method, toy.fresh(rank, scaling)).module
    twice = repaired(method, once).module
    assert float((dense(twice) - dense(once)).norm()) <= 1e-5 * float(dense(once).norm())
    assert method.similarity(once) == pytest.approx(1.0, abs=1e-5)


def by_hand(tmp_path: Path) -> Toy:
    """V = diag(3, 4, 0): ‖V‖_F = 5 and C = V·Vᵀ/5 = diag(9/5, 16/5, 0)."""
    v = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    return Toy(tmp_path / "ref", d=3, k=3, r=2, seed=0, settings=BuildSettings(), aligned=v)


def test_an_example_by_hand(tmp_path: Path) -> None:
    toy = by_hand(tmp_path)
    # ΔW = 2·b·a with b = (1, 1, 1)ᵀ and a = (1, 0, 0): its only column is (2, 2, 2)ᵀ.
    module = Module(NAME, torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(3, 1), 2.0)
    paper = made(toy)
    assert dense(repaired(paper, module).module)[:, 0].tolist() == pytest.approx([3.6, 6.4, 0.0])
    # cos((3.6, 6.4, 0), (2, 2, 2)) = 20 / (√53.92·√12).
    assert paper.similarity(module) == pytest.approx(20 / (53.92 * 12) ** 0.5, abs=1e-6)
    orthogonal = made(toy, projector="orthogonal")
    assert dense(repaired(orthogonal, module).module)[:, 0].tolist() == pytest.approx([2.0, 2.0, 0.0])
    assert orthogonal.similarity(module) == pytest.approx((2 / 3) ** 0.5, abs=1e-6)
    # What lies outside of V's columns altogether is deleted.
    outside = Module(NAME, torch.ones(1, 3), torch.tensor([[0.0], [0.0], [5.0]]), 1.0)
    for method in (paper, orthogonal):
        assert float(dense(repaired(method, outside).module).norm()) == pytest.approx(0.0, abs=1e-6)
        assert method.similarity(outside) == pytest.approx(0.0, abs=1e-6)


def test_the_published_matrix_shrinks_and_stretches_while_the_projector_does_neither(tmp_path: Path) -> None:
    """C's eigenvalues are σ²/‖V‖_F: of the size of V, not 0 or 1."""
    toy = by_hand(tmp_path)
    module = Module(NAME, torch.eye(3), torch.eye(3), 1.0)
    eigenvalues = torch.linalg.eigvalsh(dense(repaired(made(toy), module).module))
    assert eigenvalues.tolist() == pytest.approx([0.0, 9 / 5, 16 / 5])
    projected = torch.linalg.eigvalsh(dense(repaired(made(toy, projector="orthogonal"), module).module))
    assert projected.tolist() == pytest.approx([0.0, 1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("factor", ["a", "b", "zero columns"])
def test_the_projector_leaves_out_directions_that_a_deficient_update_does_not_have(factor: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    b, a = random(200, 8), random(8, 120)
    if factor == "a":
        a = random(8, 3) @ random(3, 120)
    elif factor == "b":
        b = random(200, 3) @ random(3, 8)
    else:
        b[:, 3:] = 0.0
    u = column_space(b, a)
    assert u.shape == (200, 3)
    wide, _, _ = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    exact = wide[:, :3] @ wide[:, :3].T
    assert float((u.double() @ u.T.double() - exact).norm()) < 1e-4
    assert float((u.T @ u - torch.eye(3)).norm()) < 1e-5


@pytest.mark.parametrize("projector", ["paper", "orthogonal"])
def test_an_alignment_that_is_zero_somewhere_leaves_nothing_there(tmp_path: Path, projector: str) -> None:
    zero = torch.zeros(6, 2), torch.ones(2, 7)
    toy = Toy(tmp_path / "ref", d=6, k=7, r=2, seed=0, settings=BuildSettings(), aligned=zero)
    method, module = made(toy, projector=projector), toy.fresh(2, 1.0)
    assert method.similarity(module) == 0.0
    assert float(dense(repaired(method, module).module).norm()) == 0.0


@pytest.mark.parametrize("projector", ["paper", "orthogonal"])
@pytest.mark.parametrize(("power", "of_reference"), [(-60, 0), (60, 0), (-110, 14), (110, 14), (-110, -14)])
def test_how_the_factors_share_the_size_of_the_update_does_not_matter(
    tmp_path: Path, projector: str, power: int, of_reference: int
) -> None:
    """Not even where products in between would leave float32's range, as A_a·A_aᵀ times B_aᵀ·B_t does at 2¹¹⁰."""
    given = {"d": 10, "k": 12, "r": 3, "seed": 4, "settings": BuildSettings()}
    plain = Toy(tmp_path / "plain", **given)  # type: ignore[arg-type]
    apart = torch.tensor(of_reference)
    aligned = torch.ldexp(plain.b, -apart), torch.ldexp(plain.a, apart)
    toy = Toy(tmp_path / "ref", **given, aligned=aligned)  # type: ignore[arg-type]
    method, module = made(toy, projector=projector), toy.fresh(4, 0.5)
    wanted = dense(repaired(method, module).module)
    alternating = torch.tensor([power, -power, power, -power])
    for split in (torch.tensor([power] * 4), alternating):
        other = module.with_factors(torch.ldexp(module.b, -split), torch.ldexp(module.a, split[:, None]))
        assert float((dense(other) - dense(module)).norm()) == 0.0
        assert method.similarity(other) == pytest.approx(method.similarity(module), abs=1e-6)
        patched = repaired(method, other).module
        assert torch.equal(patched.a, other.a)
        assert float((dense(patched) - wanted).norm()) < 1e-6 * float(wanted.norm())


def test_an_update_of_zero_stays_zero(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "ref", d=6, k=7, r=2, seed=0, settings=BuildSettings())
    module = Module(NAME, toy.random(2, 7), torch.zeros(6, 2), 1.0)
    for projector in ("paper", "orthogonal"):
        method = made(toy, projector=projector)
        assert torch.equal(repaired(method, module).module.b, module.b)
        assert method.similarity(module) == 0.0


SCORES = {"d": 0.9, "c": 0.1, "b": 0.5, "a": 0.5}


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "ref", d=6, k=7, r=2, seed=0, settings=BuildSettings())


def test_modules_at_or_below_the_threshold_are_projected(toy: Toy) -> None:
    assert made(toy).select(SCORES).names == {"a", "b", "c"}
    assert made(toy, threshold=0.49).select(SCORES).names == {"c"}
    assert made(toy, threshold=0.05).select(SCORES).names == set()
    assert made(toy, threshold=1.0).select(SCORES).names == set(SCORES)
    assert made(toy, threshold=-1.0).select({"a": -1.0, "b": 0.0}).names == {"a"}
    assert made(toy).select(SCORES).probability is None


def test_the_least_similar_modules_are_projected_and_ties_go_by_name(toy: Toy) -> None:
    for count, names in enumerate([set(), {"c"}, {"c", "a"}, {"c", "a", "b"}, set(SCORES), set(SCORES)]):
        assert made(toy, selection="lowest", modules=count, threshold=-1.0).select(SCORES).names == names


def test_the_lineage_does_not_matter_and_layers_out_of_reach_are_left_alone(toy: Toy) -> None:
    module = toy.fresh(3, 2.0)
    fresh, continued = made(toy), made(toy, CONTINUED)
    assert torch.equal(fresh.propose(module).b, continued.propose(module).b)
    assert fresh.similarity(module) == continued.similarity(module)
    assert fresh.reaches(NAME)
    assert not fresh.reaches("layers.0.mlp.up_proj")
    assert fresh.seed is None
    assert set(SafeLora.fidelity) == {"paper", "orthogonal"}


def test_the_product_through_the_factors_equals_that_with_the_dense_matrix() -> None:
    """C·B_t = B_a[(A_a·A_aᵀ)(B_aᵀ·B_t)]·s/‖B_a·A_a‖ of the aligned adapter's scaling s, in float64."""
    generator = torch.Generator().manual_seed(0)
    b_a, a_a, b_t = (torch.randn(*shape, generator=generator).double() for shape in ((30, 4), (4, 20), (30, 6)))
    scaling = 2.5
    v = scaling * b_a @ a_a
    through = b_a @ ((a_a @ a_a.T) @ (b_a.T @ b_t)) * scaling / lowrank.norm(b_a, a_a)
    assert float((v @ v.T / v.norm() @ b_t - through).norm()) < 1e-12 * float(through.norm())
