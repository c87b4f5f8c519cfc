"""gram against its definition: a dense, float64 minimiser over raw inputs."""

from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safegraft.contracts.methods import GramParameters
from safegraft.engine.bundle import BuildSettings, generalized_eigenpairs
from safegraft.engine.methods import METHODS
from safegraft.engine.methods.base import Kinship, Method, Selection
from safegraft.engine.methods.gram import Gram
from safegraft.engine.reference import EigenPairs
from safegraft.stores import jobs
from tests.engine.random_bundle import NAME, Toy, dense, repaired

CONTINUED = Kinship("continued", 0.9, True)
FRESH = Kinship("fresh", 0.0, False)
relaxed = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    patched = repaired(
        Gram(GramParameters(general_weight=weight, steepness=1.0, amplification=0.0), toy.reference, FRESH), module
    )
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
    method = Gram(GramParameters(general_weight=weight, steepness=1.0, amplification=0.0), toy.reference, CONTINUED)
    patched = repaired(method, module)
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
    found = dense(
        repaired(
            Gram(GramParameters(general_weight=weight, steepness=1.0, amplification=0.0), toy.reference, FRESH), module
        ).module
    )

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
    method = Gram(GramParameters(general_weight=weight, steepness=1.0, amplification=0.0), toy.reference, FRESH)
    on_safety = float((toy.x_s.double() @ dense(module).T).square().sum()) / len(toy.x_s)
    on_general = float((toy.x_g.double() @ dense(module).T).square().sum()) / len(toy.x_g)
    wanted = (on_general / (on_general + on_safety)) ** 0.5
    assert method.similarity(module) == pytest.approx(wanted, abs=0.03)
    assert method.similarity(repaired(method, module).module) >= method.similarity(module) - 0.01


@relaxed
@given(**shapes)
def test_by_default_safety_inputs_count_the_more_the_less_general_ones_look_like_them(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, weight: float
) -> None:
    """p = 2 is the minimiser with C_s·C_g⁻¹·C_s in the place of C_s and λ² in that of λ."""
    toy = Toy(tmp_path / "ref", d=d, k=k, r=r, seed=seed, settings=everything())
    module = toy.fresh(2, scaling)
    c_s, c_g = moments(toy)
    steep = c_s @ torch.linalg.inv(c_g) @ c_s
    through = dense(module) @ steep @ torch.linalg.inv(steep + weight**2 * c_g)
    patched = repaired(Gram(GramParameters(general_weight=weight), toy.reference, FRESH), module)
    close(dense(patched.module), dense(module) - through, dense(module).norm() + through)


def test_no_gain_leaves_the_range(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "ref", d=8, k=8, r=2, seed=5, settings=everything())
    method = Gram(GramParameters(general_weight=1000.0, steepness=8.0), toy.reference, FRESH)
    mu = torch.tensor([3e38, 1e3, 1.0, 1e-38, 0.0, -1e-9])
    gain = method._gain(EigenPairs(mu, torch.zeros(8, 6), torch.zeros(8, 6)))
    assert gain.tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0, 0.0, 0.0], abs=1e-6)


def test_a_smaller_weight_repairs_more(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "ref", d=8, k=8, r=2, seed=5, settings=everything())
    module = toy.fresh(2, 1.0)

    def left_on_safety(weight: float) -> float:
        patched = repaired(
            Gram(GramParameters(general_weight=weight, steepness=1.0, amplification=0.0), toy.reference, FRESH), module
        )
        return float((toy.x_s.double() @ dense(patched.module).T).norm())

    assert left_on_safety(0.01) < left_on_safety(0.3) < left_on_safety(10.0)


@relaxed
@given(**shapes, weak=st.sampled_from([0, 0, 2]), beta=st.sampled_from([0.3, 0.9, 4.0]), rank=st.integers(1, 5))
def test_amplification_adds_what_lies_beyond_the_aligned_update_on_safety_prompts(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, weight: float, weak: int, beta: float, rank: int
) -> None:
    toy = Toy(tmp_path / "ref", d=d, k=k, r=r, seed=seed, settings=everything(), weak_rank=weak)
    c_s, c_g = moments(toy)
    through_k = c_s @ torch.linalg.inv(c_s + weight * c_g)
    delta_a = toy.b.double() @ toy.a.double()
    delta_0 = toy.weak[0].double() @ toy.weak[1].double() if toy.weak else torch.zeros_like(delta_a)
    parameters = GramParameters(general_weight=weight, steepness=1.0, amplification=beta)
    identity = torch.eye(k, dtype=torch.float64)

    method, module = Gram(parameters, toy.reference, FRESH), toy.fresh(rank, scaling)
    exact = dense(module) @ (identity - through_k) + beta * (delta_a - delta_0) @ through_k
    terms = dense(module).norm() + beta * (delta_a.norm() + delta_0.norm())
    proposal = method.propose(module)
    assert len(proposal.a) == method.rank(NAME, rank) == rank + r + weak
    close(dense(module.with_factors(proposal.b, proposal.a)), exact, terms)
    # The rank of one of its parts cannot hold both; what is lost is what is reported.
    patched = repaired(method, module)
    assert patched.module.rank == rank
    lost = float((dense(patched.module) - exact).norm())
    assert lost == pytest.approx(patched.truncation_error * float(exact.norm()), abs=BF16 * float(terms))

    method, module = Gram(parameters, toy.reference, CONTINUED), toy.continued(scaling)
    delta_e = delta_a + beta * (delta_a - delta_0)
    exact = dense(module) @ (identity - through_k) + delta_e @ through_k
    proposal = method.propose(module)
    assert len(proposal.a) == method.rank(NAME, r) == 2 * r + weak
    close(dense(module.with_factors(proposal.b, proposal.a)), exact, terms + dense(module).norm())


@relaxed
@given(k=st.integers(4, 12), count=st.integers(1, 12), seed=st.integers(0, 2**16), weight=shapes["weight"])
def test_leading_pairs_are_those_with_the_largest_generalised_eigenvalues(
    tmp_path: Path, k: int, count: int, seed: int, weight: float
) -> None:
    toy = Toy(tmp_path / "ref", d=6, k=k, r=2, seed=seed, settings=everything())
    c_s, c_g = moments(toy)
    # C_g⁻¹C_s has the same eigenvectors; as columns of X they are orthogonal in C_g, and scaled to XᵀC_gX = I.
    values, vectors = (part.real for part in torch.linalg.eig(torch.linalg.solve(c_g, c_s)))
    order = values.argsort(descending=True)
    values, vectors = values[order], vectors[:, order]
    # Where two eigenvalues meet, which comes first is anybody's choice.
    assume(count >= k or float(values[count - 1] - values[count]) > 0.05 * float(values[count - 1]))
    vectors = vectors / ((vectors.T @ c_g) * vectors.T).sum(dim=1).sqrt()
    values, vectors = values[:count], vectors[:, :count]
    through_k = c_g @ vectors @ torch.diag(values / (values + weight)) @ vectors.T
    module = toy.fresh(2, 1.0)
    patched = repaired(
        Gram(
            GramParameters(general_weight=weight, steepness=1.0, amplification=0.0, pairs=count), toy.reference, FRESH
        ),
        module,
    )
    through = dense(module) @ through_k
    close(dense(patched.module), dense(module) - through, dense(module).norm() + through)
    assert toy.reference.manifest.gram is not None
    assert toy.reference.manifest.gram.pairs == {NAME: k}


def test_more_pairs_than_are_kept_are_all_pairs_and_fewer_repair_less(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "ref", d=8, k=8, r=2, seed=5, settings=everything())
    module = toy.fresh(2, 1.0)

    def patched(pairs: int | None) -> Tensor:
        return repaired(Gram(GramParameters(amplification=0.0, pairs=pairs), toy.reference, FRESH), module).module.a

    assert torch.equal(patched(8), patched(None))
    assert torch.equal(patched(2**20), patched(None))
    updates = [module.b.double() @ patched(pairs).double() for pairs in range(1, 9)]
    left = [float((toy.x_s.double() @ update.T).norm()) for update in updates]
    assert all(after <= before * (1 + BF16) for before, after in pairwise(left))
    assert left[-1] < 0.5 * left[0]


def test_a_model_that_is_aligned_by_itself_needs_no_aligned_update(tmp_path: Path) -> None:
    """`none`: the base is the aligned model. What is done to a fresh adapter is the same to the bit."""
    with_update, without = (
        Toy(tmp_path / source, d=8, k=10, r=3, seed=2, settings=everything(), source=source)
        for source in ("adapter", "none")
    )
    assert without.reference.manifest.aligned == {}
    assert without.reference.aligned(NAME) is None
    module = with_update.fresh(2, 0.5)
    for lineage in (FRESH, Kinship("foreign", 0.0, False)):
        method = Gram(GramParameters(), without.reference, lineage)
        other = Gram(GramParameters(), with_update.reference, lineage)
        assert torch.equal(method.propose(module).a, other.propose(module).a)
        assert torch.equal(method.propose(module).b, module.b)
        assert method.rank(NAME, 2) == 2
        assert method.similarity(module) == other.similarity(module)


def test_a_layer_that_the_aligned_update_does_not_reach_is_repaired_towards_no_update(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "ref", d=8, k=10, r=3, seed=2, settings=everything())
    toy.reference.manifest = toy.reference.manifest.model_copy(update={"aligned": {}})
    module = toy.fresh(2, 0.5)
    plain = Gram(GramParameters(), toy.reference, FRESH).propose(module)
    for kinship, beta in ((CONTINUED, 0.0), (CONTINUED, 0.9), (FRESH, 0.9)):
        method = Gram(GramParameters(amplification=beta), toy.reference, kinship)
        assert torch.equal(method.propose(module).a, plain.a)
        assert torch.equal(method.propose(module).b, module.b)
        assert method.rank(NAME, 2) == 2


@pytest.mark.parametrize("power", [-60, 60])
def test_how_the_factors_share_the_size_of_the_update_does_not_matter(tmp_path: Path, power: int) -> None:
    toy = Toy(tmp_path / "ref", d=8, k=10, r=3, seed=2, settings=everything())
    split = torch.tensor(power)
    for module, kinship in ((toy.fresh(2, 0.5), FRESH), (toy.continued(0.5), CONTINUED)):
        other = module.with_factors(torch.ldexp(module.b, -split), torch.ldexp(module.a, split))
        method = Gram(GramParameters(), toy.reference, kinship)
        assert method.similarity(other) == pytest.approx(method.similarity(module), abs=1e-6)
        wanted = dense(repaired(method, module).module)
        assert float((dense(repaired(method, other).module) - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_every_module_is_repaired_and_nothing_is_drawn(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "ref", d=6, k=6, r=2, seed=0, settings=everything())
    method = Gram(GramParameters(), toy.reference, FRESH)
    assert method.select({"a": 0.99, "b": 0.1}) == Selection(frozenset({"a", "b"}))
    assert method.takes_all
    assert [name for name, kind in METHODS.items() if kind.takes_all is not Method.takes_all] == list(jobs.TAKES_ALL)
    assert method.seed is None


@relaxed
@given(**shapes, beta=st.sampled_from([0.5, 1.0, 4.0]))
def test_the_similarity_after_leaves_out_what_the_repair_itself_put_there(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, weight: float, beta: float
) -> None:
    """It is that of A(I − K): what is left of the customer's own, however hard the repair pushes."""
    toy = Toy(tmp_path / "ref", d=d, k=k, r=r, seed=seed, settings=everything(1e-4))
    module = toy.fresh(2, scaling)
    plain = Gram(GramParameters(general_weight=weight, steepness=1.0, amplification=0.0), toy.reference, FRESH)
    wanted = plain.similarity(module.with_factors(*astuple(plain.propose(module))[:2]))
    method = Gram(GramParameters(general_weight=weight, steepness=1.0, amplification=beta), toy.reference, FRESH)
    proposal = method.propose(module)
    after = module.with_factors(proposal.b, proposal.a)
    assert method.similarity_after(module, after) == pytest.approx(wanted, abs=0.03)
