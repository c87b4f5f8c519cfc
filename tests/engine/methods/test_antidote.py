"""Antidote against Wanda's scores on raw inputs, dense and in float64."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safegraft.contracts.methods import AntidoteParameters, GramParameters
from safegraft.engine.bundle import BuildSettings
from safegraft.engine.methods.antidote import Antidote
from safegraft.engine.methods.base import Kinship, Module
from safegraft.engine.methods.gram import Gram
from tests.engine.random_bundle import NAME, Toy, dense, repaired

FRESH = Kinship("fresh", 0.0, False)
Basis = Literal["canonical", "stored", "rows"]
BASES: tuple[Basis, ...] = ("canonical", "stored", "rows")
relaxed = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes: Mapping[str, Any] = {
    "d": st.integers(3, 14),
    "k": st.integers(3, 14),
    "rank": st.integers(1, 5),
    "seed": st.integers(0, 2**16),
    "scaling": st.floats(0.05, 8),
    "density": st.sampled_from([0.1, 0.2, 0.5, 0.9]),
}
# Scores come from eigenpairs in bfloat16: which of two entries is the larger is only known where they differ by more.
BF16 = 0.03
NOT_TRUNCATED = BuildSettings(ridge=1e-2, smallest_pair=0.0)


class Twin:
    """The scores of one module's entries in the basis in which (b, a) are given, from raw inputs."""

    def __init__(self, toy: Toy, b: Tensor, a: Tensor) -> None:
        self.b, self.a = b.double(), a.double()
        x_s, x_g = toy.x_s.double(), toy.x_g.double()
        # The reference adds a little to every direction of the general inputs.
        epsilon = toy.settings.ridge * x_g.square().sum(dim=1).mean() / x_g.shape[1]
        root = (epsilon * len(x_g)) ** 0.5 * torch.eye(x_g.shape[1], dtype=torch.float64)
        self.inputs = {"harmful": (x_s, len(x_s)), "general": (torch.cat([x_g, root]), len(x_g))}

    def entries(self, of: str) -> tuple[Tensor, Tensor]:
        """|A|·‖X‖ (r, k) and |B|·‖Z‖ (d, r)."""
        x, count = self.inputs[of]
        norms = x.norm(dim=0) / count**0.5, (x @ self.a.T).norm(dim=0) / count**0.5
        return self.a.abs() * norms[0], self.b.abs() * norms[1]

    def rows(self, of: str) -> Tensor:
        """The mean square of every output (1, d)."""
        x, count = self.inputs[of]
        return (x @ self.a.T @ self.b.T).square().sum(dim=0)[None] / count


def must_and_may(score: Tensor, density: float, tolerance: float = BF16) -> tuple[Tensor, Tensor]:
    """Entries that are among the largest of their row for sure, and those that may be."""
    count = round(density * score.shape[1])
    if count == 0:
        nothing = torch.zeros(score.shape, dtype=torch.bool)
        return nothing, nothing
    order = score.sort(dim=1, descending=True).values
    last = order[:, count - 1 : count]
    first_out = order[:, count : count + 1] if count < score.shape[1] else torch.zeros_like(last)
    slack = tolerance * order[:, :1]
    return score > first_out + slack, score >= last - slack


def made(toy: Toy, **parameters: object) -> Antidote:
    return Antidote(AntidoteParameters.model_validate(parameters), toy.reference, FRESH)


def canonical(module: Module) -> tuple[Tensor, Tensor]:
    """(B, A) = (U√Σ, √ΣWᵀ) of the update without its scaling, from a dense SVD."""
    u, sigma, wt = torch.linalg.svd(module.b.double() @ module.a.double(), full_matrices=False)
    root = sigma[: module.rank].sqrt()
    return u[:, : module.rank] * root, root[:, None] * wt[: module.rank]


@relaxed
@given(**shapes)
def test_in_the_stored_basis_the_largest_entries_of_every_row_become_zero(
    tmp_path: Path, d: int, k: int, rank: int, seed: int, scaling: float, density: float
) -> None:
    toy = Toy(tmp_path / "ref", d=d, k=k, r=2, seed=seed, settings=NOT_TRUNCATED)
    module = toy.fresh(rank, scaling)
    patched = repaired(made(toy, basis="stored", density=density), module)
    scores = Twin(toy, module.b, module.a).entries("harmful")
    for score, before, after in zip(scores, (module.a, module.b), (patched.module.a, patched.module.b), strict=True):
        pruned = after == 0
        must, may = must_and_may(score, density)
        assert bool((pruned | ~must).all())
        assert bool((may | ~pruned).all())
        assert set(pruned.sum(dim=1).tolist()) == {round(density * score.shape[1])}
        assert torch.equal(after[~pruned], before[~pruned])
    assert patched.module.rank == rank
    assert patched.truncation_error == 0.0


@relaxed
@given(**shapes)
def test_in_the_canonical_basis_it_is_done_to_the_factors_of_the_singular_value_decomposition(
    tmp_path: Path, d: int, k: int, rank: int, seed: int, scaling: float, density: float
) -> None:
    assume(rank <= min(d, k))
    toy = Toy(tmp_path / "ref", d=d, k=k, r=2, seed=seed, settings=NOT_TRUNCATED)
    module = toy.fresh(rank, scaling)
    sigma = torch.linalg.svdvals(module.b.double() @ module.a.double())[:rank]
    # Two equal singular values have no basis of their own.
    assume(bool((sigma[:-1] > 1.02 * sigma[1:]).all()) and float(sigma[-1]) > 1e-3 * float(sigma[0]))
    b, a = canonical(module)
    proposal = made(toy, basis="canonical", density=density).propose(module)
    if round(density * k) == round(density * rank) == 0:
        # Too few entries for a single one to go: the customer's own factors, not the same update in another basis.
        assert torch.equal(proposal.a, module.a)
        assert torch.equal(proposal.b, module.b)
        return
    # A singular vector and its partner may both have the other sign.
    signs = torch.sign((proposal.a.double() * a).sum(dim=1) + 1e-30)
    b, a = b * signs, a * signs[:, None]
    for score, whole, after in zip(Twin(toy, b, a).entries("harmful"), (a, b), (proposal.a, proposal.b), strict=True):
        pruned = after == 0
        must, may = must_and_may(score, density)
        assert bool((pruned | ~must).all())
        assert bool((may | ~pruned).all())
        assert set(pruned.sum(dim=1).tolist()) == {round(density * score.shape[1])}
        apart = torch.where(pruned, 0.0, after.double() - whole)
        assert float(apart.abs().max()) < 2e-3 * float(whole.abs().max())


@relaxed
@given(**shapes)
def test_whole_rows_are_pruned_by_their_mean_squared_output_on_harmful_prompts(
    tmp_path: Path, d: int, k: int, rank: int, seed: int, scaling: float, density: float
) -> None:
    toy = Toy(tmp_path / "ref", d=d, k=k, r=2, seed=seed, settings=NOT_TRUNCATED)
    module = toy.fresh(rank, scaling)
    patched = repaired(made(toy, basis="rows", density=density), module)
    pruned = (patched.module.b == 0).all(dim=1)
    must, may = must_and_may(Twin(toy, module.b, module.a).rows("harmful"), density)
    assert bool((pruned | ~must[0]).all())
    assert bool((may[0] | ~pruned).all())
    assert int(pruned.sum()) == round(density * d)
    wanted = dense(module) * ~pruned[:, None]
    assert torch.equal(dense(patched.module), wanted)
    assert torch.equal(patched.module.a, module.a)


@pytest.fixture
def by_hand(tmp_path: Path) -> tuple[Toy, Module]:
    """Harmful inputs are largest in the second column, general ones much more so; both small or even elsewhere."""
    inputs = torch.diag(torch.tensor([1.0, 2.0, 0.1])), torch.diag(torch.tensor([1.0, 10.0, 1.0]))
    toy = Toy(tmp_path / "ref", d=3, k=3, r=1, seed=0, settings=BuildSettings(smallest_pair=0.0), inputs=inputs)
    a = torch.tensor([[3.0, 2.0, 9.0], [3.0, 1.0, 9.0]])
    b = torch.tensor([[1.0, 1.2], [1.0, 1.5], [9.0, 1.0]])
    return toy, Module(NAME, a, b, 1.0)


def test_an_example_by_hand(by_hand: tuple[Toy, Module]) -> None:
    toy, module = by_hand
    proposal = made(toy, basis="stored", density=0.34).propose(module)
    # |A|·‖X‖ ~ (3, 4, .9) and (3, 2, .9): a third of each row is the second and the first.
    assert proposal.a.tolist() == [[3.0, 0.0, 9.0], [0.0, 1.0, 9.0]]
    # ‖Z‖ ~ √(3² + 4² + .9²) and √(3² + 2² + .9²), 1.37 apart, which lies between 1.2 and 1.5.
    assert torch.equal(proposal.b, module.b * torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    # The third row's output is the largest by far.
    rows = made(toy, basis="rows", density=0.34).propose(module)
    assert torch.equal(rows.b, module.b * torch.tensor([[1.0], [1.0], [0.0]]))


def test_an_example_by_hand_that_spares_what_general_prompts_need_as_much(by_hand: tuple[Toy, Module]) -> None:
    toy, module = by_hand
    proposal = made(toy, basis="stored", density=0.34, spare="general").propose(module)
    # On general inputs |A|·‖X‖ ~ (3, 20, 9) and (3, 10, 9): the first row's candidate is spared, the second's is not.
    assert proposal.a.tolist() == [[3.0, 2.0, 9.0], [0.0, 1.0, 9.0]]
    # ‖Z‖ ~ √490 and √190, 1.6 apart: there the second row needs its first entry most, so its second goes.
    assert torch.equal(proposal.b, module.b * torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    rows = made(toy, basis="rows", density=0.34, spare="general").propose(module)
    assert torch.equal(rows.b, module.b)


@relaxed
@given(**shapes)
def test_what_general_prompts_need_as_much_is_spared(
    tmp_path: Path, d: int, k: int, rank: int, seed: int, scaling: float, density: float
) -> None:
    toy = Toy(tmp_path / "ref", d=d, k=k, r=2, seed=seed, settings=NOT_TRUNCATED)
    module = toy.fresh(rank, scaling)
    twin = Twin(toy, module.b, module.a)
    stored = made(toy, basis="stored", density=density, spare="general").propose(module)
    rows = made(toy, basis="rows", density=density, spare="general").propose(module)
    for pruned, harmful, general in (
        (stored.a == 0, twin.entries("harmful")[0], twin.entries("general")[0]),
        (stored.b == 0, twin.entries("harmful")[1], twin.entries("general")[1]),
        ((rows.b == 0).all(dim=1)[None], twin.rows("harmful"), twin.rows("general")),
    ):
        must, may = must_and_may(harmful, density)
        spared, perhaps = must_and_may(general, density)
        assert bool((pruned | ~must | perhaps).all())
        assert bool((~pruned | (may & ~spared)).all())


@pytest.mark.parametrize("density", [0.3, 0.6, 1.0])
def test_safety_critical_rows_are_spared_and_no_others(tmp_path: Path, density: float) -> None:
    toy = Toy(tmp_path / "ref", d=20, k=12, r=3, seed=2, settings=BuildSettings(smallest_pair=0.0))
    module = toy.fresh(3, 1.0)
    critical = toy.reference.neurons(NAME, "low_rank").rows
    assert int(critical.sum()) == 4
    spared = made(toy, basis="rows", density=density, spare="safety").propose(module)
    plain = made(toy, basis="rows", density=density).propose(module)
    assert torch.equal((spared.b == 0).all(dim=1), (plain.b == 0).all(dim=1) & ~critical)
    # Where the alignment changes nothing there is nothing to spare.
    toy.reference.manifest = toy.reference.manifest.model_copy(update={"aligned": {}})
    assert torch.equal(made(toy, basis="rows", density=density, spare="safety").propose(module).b, plain.b)


@pytest.mark.parametrize("seed", range(6))
def test_another_basis_of_the_same_update_changes_nothing_but_for_the_stored_one(tmp_path: Path, seed: int) -> None:
    """(B·M⁻¹, M·A) is the same update. What published code prunes depends on M, which is an accident of training."""
    toy = Toy(tmp_path / "ref", d=24, k=30, r=2, seed=seed, settings=NOT_TRUNCATED)
    module = toy.fresh(4, 0.5)
    m = toy.random(4, 4) + 2.0 * torch.eye(4)
    other = module.with_factors((module.b.double() @ torch.linalg.inv(m.double())).float(), m @ module.a)
    assert float((dense(other) - dense(module)).norm()) < 1e-5 * float(dense(module).norm())
    apart = {}
    for basis in BASES:
        results = [dense(repaired(made(toy, basis=basis, density=0.2), item).module) for item in (module, other)]
        apart[basis] = float((results[0] - results[1]).norm() / results[0].norm())
        assert float((results[0] - dense(module)).norm() / dense(module).norm()) > 0.1
    assert apart["canonical"] < 1e-4
    assert apart["rows"] < 1e-4
    assert apart["stored"] > 0.1


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("power", [-60, 60])
def test_how_the_factors_share_the_size_of_the_update_does_not_matter(tmp_path: Path, basis: Basis, power: int) -> None:
    toy = Toy(tmp_path / "ref", d=10, k=12, r=2, seed=1, settings=NOT_TRUNCATED)
    module, split = toy.fresh(4, 0.5), torch.tensor(power)
    other = module.with_factors(torch.ldexp(module.b, -split), torch.ldexp(module.a, split))
    method = made(toy, basis=basis, density=0.3)
    wanted = dense(repaired(method, module).module)
    assert float((dense(repaired(method, other).module) - wanted).norm()) <= 1e-5 * float(wanted.norm())
    assert method.similarity(other) == pytest.approx(method.similarity(module), abs=1e-6)


def test_a_share_of_less_than_half_an_entry_prunes_none(tmp_path: Path) -> None:
    """A tenth of a single entry is none: an adapter of rank 1 keeps its B, and loses a tenth of A."""
    toy = Toy(tmp_path / "ref", d=20, k=30, r=2, seed=0, settings=NOT_TRUNCATED)
    for basis in ("stored", "canonical"):
        for rank, of_b in ((1, 0), (4, 0), (6, 1), (16, 2)):
            proposal = made(toy, basis=basis, density=0.1).propose(toy.fresh(rank, 1.0))
            assert set((proposal.b == 0).sum(dim=1).tolist()) == {of_b}
            assert set((proposal.a == 0).sum(dim=1).tolist()) == {3}


@pytest.mark.parametrize("basis", BASES)
def test_a_density_of_one_removes_the_update_and_one_of_zero_selects_nothing(tmp_path: Path, basis: Basis) -> None:
    toy = Toy(tmp_path / "ref", d=10, k=12, r=2, seed=1, settings=NOT_TRUNCATED)
    scores = {"a": 0.1, "b": 0.9}
    everything, nothing = made(toy, basis=basis, density=1.0), made(toy, basis=basis, density=0.0)
    assert float(dense(repaired(everything, toy.fresh(3, 1.0)).module).norm()) == 0.0
    assert everything.select(scores).names == set(scores)
    assert everything.select(scores).probability is None
    assert nothing.select(scores).names == set()
    module = toy.fresh(3, 1.0)
    error = (dense(repaired(nothing, module).module) - dense(module)).norm()
    assert float(error) <= 1e-6 * float(dense(module).norm())


@pytest.mark.parametrize("kinship", [FRESH, Kinship("continued", 0.9, True)])
def test_its_similarity_is_that_of_gram(tmp_path: Path, kinship: Kinship) -> None:
    toy = Toy(tmp_path / "ref", d=10, k=12, r=2, seed=1, settings=NOT_TRUNCATED)
    method = Antidote(AntidoteParameters(), toy.reference, kinship)
    module = toy.continued(0.5)
    assert method.similarity(module) == Gram(GramParameters(), toy.reference, kinship).similarity(module)
    assert set(Antidote.fidelity) == set(BASES)
    assert method.seed is None
