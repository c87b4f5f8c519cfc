"""NLSR against a slow, dense, float64 twin that is written from the paper's formulas."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safegraft.contracts.methods import NlsrParameters
from safegraft.engine import lowrank
from safegraft.engine.bundle import BuildSettings
from safegraft.engine.methods.base import Kinship, Module
from safegraft.engine.methods.nlsr import Nlsr
from safegraft.engine.reference import LoadedReference, SafetyNeurons, magnitude_neurons, random_neurons
from safegraft.errors import Incompatible
from tests.engine.random_bundle import NAME, Toy, dense, repaired

CONTINUED = Kinship("continued", 0.9, True)
FRESH = Kinship("fresh", 0.0, False)
Form = Literal["factor", "paper", "neuron"]
FORMS: tuple[Form, ...] = ("factor", "paper", "neuron")
relaxed = settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = {
    "d": st.integers(3, 14),
    "k": st.integers(3, 14),
    "r": st.integers(1, 5),
    "seed": st.integers(0, 2**16),
    "scaling": st.floats(0.05, 8),
    "beta": st.sampled_from([0.0, 0.5, 0.9]),
    "sparsity": st.sampled_from([0.0, 0.3, 0.5, 0.8]),
    "weak": st.sampled_from([0, 0, 1, 3]),
}


class Twin:
    """The paper's definitions on dense float64 matrices, from raw activations at the answers' tokens.

    delta_a, delta_0: the updates of the aligned and of the weak adapter; b: B_e with B_e·A nearest to Δ_e.
    """

    def __init__(self, toy: Toy) -> None:
        s = toy.settings
        self.toy, self.share, self.per_row = toy, 1 - s.sparsity, s.mask_scope == "row"
        self.a, self.x = toy.a.double(), toy.x_r.double()
        self.delta_a = toy.b.double() @ self.a
        self.delta_0 = torch.zeros_like(self.delta_a)
        self.b = toy.b.double() * (1 + s.amplification)
        if toy.weak is not None:
            self.delta_0 = toy.weak[0].double() @ toy.weak[1].double()
            nearest = torch.linalg.lstsq(self.a.T, self.delta_0.T, driver="gelsd").solution.T
            self.b = self.b - s.amplification * nearest
        self.delta_e = self.delta_a + s.amplification * (self.delta_a - self.delta_0)

    def scores(self, scorer: str) -> tuple[Tensor, Tensor, Tensor]:
        """Of A (r, k), of B (d, r) and of the output rows (d,)."""
        z = self.x @ self.a.T
        if scorer == "low_rank":
            count = max(1, round(len(self.a) * self.share))
            v = torch.linalg.svd(z.T, full_matrices=True).U[:, :count]
            u = torch.linalg.svd(self.b @ z.T, full_matrices=True).U[:, :count]
            energy = (self.x @ self.delta_e.T).square().sum(dim=0)
            return (v @ v.T @ self.a).abs(), (u @ u.T @ self.b).abs(), energy
        if scorer == "magnitude":
            return self.a.abs(), self.b.abs(), self.delta_e.square().sum(dim=1)
        if scorer == "wanda":
            of_b = self.b.abs() * z.norm(dim=0)
            return self.a.abs() * self.x.norm(dim=0), of_b, of_b.square().sum(dim=1)
        of_a, of_b = (gradient.double() for gradient in self.toy.gradients[scorer])
        of_a, of_b = of_a * self.a.abs(), of_b * self.b.abs()
        return of_a, of_b, of_b.sum(dim=1)

    def cuts_clearly(self) -> bool:
        """Whether the last direction that the low-rank scores keep is a larger one than the first that they drop."""
        count = max(1, round(len(self.a) * self.share))
        z = self.x @ self.a.T
        energies = [torch.linalg.svdvals(part).square() for part in (z, z @ self.b.T)]
        return all(
            count >= len(found) or float(found[count - 1] - found[count]) > 1e-3 * float(found[0]) for found in energies
        )

    def same_but_for_ties(self, safe: SafetyNeurons, scorer: str) -> None:
        of_a, of_b, of_rows = self.scores(scorer)
        self._same(safe.mask_a, of_a, per_row=self.per_row)
        self._same(safe.mask_b, of_b, per_row=self.per_row)
        self._same(safe.rows, of_rows, per_row=False)

    def _same(self, mask: Tensor, score: Tensor, *, per_row: bool) -> None:
        """The share with the largest scores, but where float32 cannot tell a score from the last that was chosen."""
        rows = len(score) if per_row else 1
        for got, row in zip(mask.reshape(rows, -1), score.reshape(rows, -1), strict=True):
            count = max(1, round(self.share * len(row)))
            assert int(got.sum()) == count
            wanted = torch.zeros_like(got)
            wanted[sorted(range(len(row)), key=lambda j: -float(row[j]))[:count]] = True
            last = row[wanted].min()
            assert bool(((row - last).abs() <= 1e-4 * row.max())[got != wanted].all())


def cosine(x: Tensor, y: Tensor) -> float:
    scale = float(x.norm() * y.norm())
    return float((x * y).sum()) / scale if scale else 0.0


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    best: Tensor = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return best


def close(actual: Tensor, wanted: Tensor, terms: Tensor | None = None) -> None:
    """Up to float32's rounding of the largest of the terms that were added up."""
    scale = max(float(wanted.norm()), float(terms.norm()) if terms is not None else 0.0)
    assert float((actual - wanted).norm()) <= 2e-5 * (1e-6 + scale)


def toy_and_twin(
    folder: Path, d: int, k: int, r: int, seed: int, beta: float, sparsity: float, weak: int = 0
) -> tuple[Toy, Twin]:
    given = BuildSettings(amplification=beta, sparsity=sparsity)
    toy = Toy(folder, d=d, k=k, r=r, seed=seed, settings=given, weak_rank=weak)
    return toy, Twin(toy)


def well_conditioned(twin: Twin) -> bool:
    """With a weak adapter B_e comes from a pseudo-inverse of A, which loses as many digits as A's condition has."""
    r, k = twin.a.shape
    return twin.toy.weak is None or (r <= k and float(torch.linalg.cond(twin.a)) < 20)


def proposed(method: Nlsr, module: Module) -> Tensor:
    """The repaired update before any truncation, dense."""
    proposal = method.propose(module)
    return dense(module.with_factors(proposal.b, proposal.a))


@relaxed
@given(**shapes, scope=st.sampled_from(["row", "factor"]))
@pytest.mark.parametrize("scorer", ["low_rank", "wanda", "snip", "preference_snip", "magnitude"])
def test_masks_are_those_of_the_dense_definition(
    tmp_path: Path,
    scorer: str,
    d: int,
    k: int,
    r: int,
    seed: int,
    scaling: float,
    beta: float,
    sparsity: float,
    weak: int,
    scope: Literal["row", "factor"],
) -> None:
    # Beyond that, activations have a lower rank than the factors, and which directions come last is anybody's choice.
    assume(r <= min(d, k))
    given = BuildSettings(amplification=beta, sparsity=sparsity, mask_scope=scope)
    toy = Toy(tmp_path / "ref", d=d, k=k, r=r, seed=seed, settings=given, weak_rank=weak)
    twin = Twin(toy)
    assume(well_conditioned(twin) and (scorer != "low_rank" or twin.cuts_clearly()))
    twin.same_but_for_ties(neurons(toy, scorer), scorer)


def test_the_random_masks_repeat_with_their_seed_and_take_the_share_of_every_row(tmp_path: Path) -> None:
    toy, twin = toy_and_twin(tmp_path / "ref", 20, 30, 5, 0, 0.9, 0.8)

    def masks(seed: int, name: str = NAME) -> SafetyNeurons:
        return random_neurons(toy.reference, name, seed)

    for part in ("mask_a", "mask_b", "rows"):
        drawn = getattr(masks(1), part)
        assert torch.equal(drawn, getattr(masks(1), part))
        assert not torch.equal(drawn, getattr(masks(2), part))
        counts = drawn.reshape(1 if part == "rows" else len(drawn), -1).sum(dim=1)
        assert set(counts.tolist()) == {{"mask_a": 6, "mask_b": 1, "rows": 4}[part]}
    # Another module's draw is another one, whatever the other modules of an adapter are.
    manifest, other = toy.reference.manifest, "layers.1.self_attn.o_proj"
    toy.reference.manifest = manifest.model_copy(
        update={
            "aligned": manifest.aligned | {other: manifest.aligned[NAME]},
            "base_model": manifest.base_model.model_copy(
                update={"modules": manifest.base_model.modules | {other: manifest.base_model.modules[NAME]}}
            ),
        }
    )
    assert not torch.equal(masks(1, other).mask_a, masks(1).mask_a)
    assert twin.share == pytest.approx(0.2)


def test_random_masks_take_every_entry_equally_often(tmp_path: Path) -> None:
    toy, _ = toy_and_twin(tmp_path / "ref", 10, 10, 2, 0, 0.9, 0.8)
    draws = torch.stack([random_neurons(toy.reference, NAME, seed).mask_a for seed in range(400)]).double()
    # .2 with a standard error of .02: six of them for the largest of 20 entries.
    assert float((draws.mean(dim=0) - 0.2).abs().max()) < 0.12
    assert float(draws.mean()) == pytest.approx(0.2)


@pytest.mark.parametrize("scorer", ["low_rank", "wanda", "snip", "preference_snip", "magnitude", "random"])
@pytest.mark.parametrize("form", FORMS)
def test_every_scorer_decides_what_every_form_transplants(tmp_path: Path, form: Form, scorer: str) -> None:
    toy, twin = toy_and_twin(tmp_path / "ref", 12, 14, 4, 3, 0.9, 0.5)
    safe = neurons(toy, scorer)
    parameters = NlsrParameters.model_validate({"form": form, "scorer": scorer, "seed": 7})
    module = toy.continued(2.0)
    close(proposed(Nlsr(parameters, toy.reference, CONTINUED), module), expected(form, twin, safe, module))


def test_a_warm_reference_gives_every_job_what_a_new_one_gives(tmp_path: Path) -> None:
    """Numbers that a reference keeps are of one form, scorer, seed and amplification."""
    settings = BuildSettings(amplification=0.9, sparsity=0.5)
    toy = Toy(tmp_path / "ref", d=12, k=14, r=4, seed=3, settings=settings, weak_rank=2)
    module = toy.continued(2.0)
    seen = set()
    for form in FORMS:
        for scorer in ("low_rank", "wanda", "magnitude", "random"):
            for seed, beta in ((7, None), (8, None), (7, 0.0), (7, 2.0)):
                given = {"form": form, "scorer": scorer, "seed": seed, "amplification": beta}
                parameters = NlsrParameters.model_validate(given)
                warm, new = (
                    Nlsr(parameters, reference, CONTINUED).similarity(module)
                    for reference in (toy.reference, LoadedReference(tmp_path / "ref"))
                )
                assert warm == new, given
                assert Nlsr(parameters, toy.reference, CONTINUED).similarity(module) == warm
                seen.add(warm)
    assert len(seen) > 20


def neurons(toy: Toy, scorer: str) -> SafetyNeurons:
    if scorer == "random":
        return random_neurons(toy.reference, NAME, 7)
    if scorer == "magnitude":
        return magnitude_neurons(toy.reference, NAME)
    return toy.reference.neurons(NAME, scorer)  # type: ignore[arg-type]


def expected(form: Form, twin: Twin, safe: SafetyNeurons, module: Module) -> Tensor:
    """The repaired update of a continued module by the formulas of § 3.3."""
    b_t, a_t = module.scaling * module.b.double(), module.a.double()
    if form == "factor":
        return torch.where(safe.mask_b, twin.b, b_t) @ torch.where(safe.mask_a, twin.a, a_t)
    if form == "paper":
        theirs = (twin.b * safe.mask_b) @ (twin.a * safe.mask_a)
        return theirs + (b_t * ~safe.mask_b) @ (a_t * ~safe.mask_a)
    return torch.where(safe.rows[:, None], twin.delta_e, b_t @ a_t)


@relaxed
@given(**shapes)
def test_the_factor_form_swaps_masked_entries_and_nothing_else(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, beta: float, sparsity: float, weak: int
) -> None:
    toy, twin = toy_and_twin(tmp_path / "ref", d, k, r, seed, beta, sparsity, weak)
    assume(well_conditioned(twin))
    safe = toy.reference.neurons(NAME, "low_rank")
    method, module = Nlsr(NlsrParameters(form="factor"), toy.reference, CONTINUED), toy.continued(scaling)
    b_t, a_t = module.scaling * module.b.double(), module.a.double()
    patched = repaired(method, module)
    close(dense(patched.module), expected("factor", twin, safe, module))
    assert torch.equal(patched.module.a[~safe.mask_a], module.a[~safe.mask_a])
    assert torch.equal(patched.module.b[~safe.mask_b], module.b[~safe.mask_b])
    assert patched.truncation_error == 0.0
    assert patched.module.rank == method.rank(NAME, r) == r
    similarity = cosine((twin.b * safe.mask_b) @ (twin.a * safe.mask_a), (b_t * safe.mask_b) @ (a_t * safe.mask_a))
    assert method.similarity(module) == pytest.approx(similarity, abs=1e-4)
    assert method.similarity_after(module, patched.module) == pytest.approx(1.0, abs=1e-5)


@relaxed
@given(**shapes)
def test_the_paper_form_has_no_cross_terms(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, beta: float, sparsity: float, weak: int
) -> None:
    toy, twin = toy_and_twin(tmp_path / "ref", d, k, r, seed, beta, sparsity, weak)
    assume(well_conditioned(twin))
    safe = toy.reference.neurons(NAME, "low_rank")
    method, module = Nlsr(NlsrParameters(form="paper"), toy.reference, CONTINUED), toy.continued(scaling)
    exact = expected("paper", twin, safe, module)
    close(proposed(method, module), exact)
    assert len(method.propose(module).a) == method.rank(NAME, r) == 2 * r
    patched = repaired(method, module)
    # The best approximation itself jumps where two singular values meet; its error does not.
    error = float((exact - best_of_rank(exact, r)).norm() / exact.norm())
    assert patched.truncation_error == pytest.approx(error, abs=1e-4)
    assert float((dense(patched.module) - exact).norm() / exact.norm()) == pytest.approx(error, abs=1e-4)


@relaxed
@given(**shapes)
def test_the_paper_form_is_wholly_like_the_reference_where_nothing_was_truncated(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, beta: float, sparsity: float, weak: int
) -> None:
    toy, twin = toy_and_twin(tmp_path / "ref", d, k, r, seed, beta, sparsity, weak)
    assume(well_conditioned(twin))
    safe = toy.reference.neurons(NAME, "low_rank")
    method, module = Nlsr(NlsrParameters(form="paper"), toy.reference, CONTINUED), toy.continued(scaling)
    proposal = method.propose(module)
    whole = module.with_factors(proposal.b, proposal.a)
    assert method.similarity_after(module, whole) == pytest.approx(1.0, abs=1e-4)
    # And of what was truncated: what stands where the masked part should, against the masked part.
    patched = repaired(method, module).module
    b_t, a_t = module.scaling * module.b.double(), module.a.double()
    left = dense(patched) - (b_t * ~safe.mask_b) @ (a_t * ~safe.mask_a)
    theirs = (twin.b * safe.mask_b) @ (twin.a * safe.mask_a)
    assert method.similarity_after(module, patched) == pytest.approx(cosine(theirs, left), abs=1e-4)


@relaxed
@given(**shapes, rank=st.integers(1, 6))
def test_the_neuron_form_swaps_whole_rows_of_the_update_in_both_lineages(
    tmp_path: Path,
    d: int,
    k: int,
    r: int,
    seed: int,
    scaling: float,
    beta: float,
    sparsity: float,
    weak: int,
    rank: int,
) -> None:
    toy, twin = toy_and_twin(tmp_path / "ref", d, k, r, seed, beta, sparsity, weak)
    assume(well_conditioned(twin))
    rows = toy.reference.neurons(NAME, "low_rank").rows.double()[:, None]

    module = toy.continued(scaling)
    method = Nlsr(NlsrParameters(form="neuron"), toy.reference, CONTINUED)
    close(proposed(method, module), rows * twin.delta_e + (1 - rows) * dense(module), dense(module))
    assert len(method.propose(module).a) == method.rank(NAME, r)

    module = toy.fresh(rank, scaling)
    method = Nlsr(NlsrParameters(), toy.reference, FRESH)
    # The model that is served has the aligned update and the customer's; what is saved is relative to the former.
    exact = rows * twin.delta_e + (1 - rows) * (twin.delta_a + dense(module)) - twin.delta_a
    close(proposed(method, module), exact, twin.delta_a)
    assert len(method.propose(module).a) == method.rank(NAME, rank) == rank + (r + weak if beta else 0)
    patched = repaired(method, module)
    assert patched.module.rank == rank
    wanted = float((exact - best_of_rank(exact, rank)).norm())
    assert float((dense(patched.module) - exact).norm()) == pytest.approx(wanted, abs=1e-4 * (1 + float(exact.norm())))
    similarity = cosine(rows * twin.delta_e, rows * (twin.delta_a + dense(module)))
    assert method.similarity(module) == pytest.approx(similarity, abs=1e-4)
    proposal = method.propose(module)
    whole = module.with_factors(proposal.b, proposal.a)
    assert method.similarity_after(module, whole) == pytest.approx(1.0, abs=1e-4)


@relaxed
@given(**(shapes | {"weak": st.integers(1, 4)}))
def test_with_a_weak_adapter_the_extrapolation_is_exact_on_updates_and_a_projection_on_the_factors(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, beta: float, sparsity: float, weak: int
) -> None:
    toy, twin = toy_and_twin(tmp_path / "ref", d, k, r, seed, 0.9, sparsity, weak)
    assume(well_conditioned(twin))
    b, a = toy.reference.amplified(NAME, beta) or (None, None)
    assert a is not None
    assert b is not None
    close(b.double() @ a.double(), (1 + beta) * twin.delta_a - beta * twin.delta_0, twin.delta_0)
    # Without amplification the weak adapter has no part in it.
    assert len(a) == toy.reference.amplified_rank(NAME, beta) == r + (weak if beta > 0 else 0)
    beyond = toy.reference.surplus(NAME, beta)
    if beta == 0:
        assert beyond is None
    else:
        assert beyond is not None
        close(beyond[0].double() @ beyond[1].double(), beta * (twin.delta_a - twin.delta_0), twin.delta_0)
    # Least squares: what is left over is orthogonal to every row of A.
    left = (1 + beta) * twin.delta_a - beta * twin.delta_0 - toy.reference.amplified_on_a(NAME, beta).double() @ twin.a
    assert float((left @ twin.a.T).norm()) <= 1e-4 * float((twin.delta_a.norm() + twin.delta_0.norm()) * twin.a.norm())
    # The share is a root of a difference, so float32 tells no less than the root of its rounding.
    inside = torch.linalg.lstsq(twin.a.T, twin.delta_0.T, driver="gelsd").solution.T @ twin.a
    share = float((twin.delta_0 - inside).norm() / twin.delta_0.norm())
    assert toy.reference.manifest.aligned[NAME].off_basis == pytest.approx(share, abs=2e-3)


@pytest.mark.parametrize("weak", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_an_amplification_of_the_jobs_own_is_as_good_as_a_reference_that_was_built_with_it(
    tmp_path: Path, form: Form, weak: int
) -> None:
    built, other = (
        toy_and_twin(tmp_path / str(beta), 10, 12, 3, 5, beta, 0.5, weak)[0].reference for beta in (0.4, 0.9)
    )
    toy, twin = toy_and_twin(tmp_path / "ref", 10, 12, 3, 5, 0.4, 0.5, weak)
    module = toy.continued(2.0)
    given = Nlsr(NlsrParameters(form=form, amplification=0.4), other, CONTINUED)
    own = Nlsr(NlsrParameters(form=form), built, CONTINUED)
    assert given.resolved == own.resolved == {"form": form, "amplification": "0.4"}
    if weak:
        # The masks are those of the reference's own amplification; what they let through has the job's.
        close(proposed(given, module), expected(form, twin, other.neurons(NAME, "low_rank"), module))
    else:
        # One update times any factor has the same masks.
        close(proposed(given, module), proposed(own, module))
        assert given.similarity(module) == pytest.approx(own.similarity(module), abs=1e-6)
    plain = Nlsr(NlsrParameters(form=form, amplification=0.0), other, CONTINUED)
    assert float((proposed(plain, module) - proposed(own, module)).norm()) > 0.1 * float(twin.delta_a.norm())


@pytest.mark.parametrize("weak", [0, 2])
def test_without_amplification_a_fresh_adapter_only_loses_rows(tmp_path: Path, weak: int) -> None:
    toy, _ = toy_and_twin(tmp_path / "ref", 10, 12, 3, 5, 0.9, 0.5, weak)
    module = toy.fresh(2, 1.5)
    method = Nlsr(NlsrParameters(amplification=0.0), toy.reference, FRESH)
    rows = toy.reference.neurons(NAME, "low_rank").rows
    patched = repaired(method, module)
    assert torch.equal(patched.module.b, module.b * ~rows[:, None])
    assert torch.equal(patched.module.a, module.a)
    assert patched.truncation_error == 0.0
    assert method.rank(NAME, 2) == 2


SCORES = {"d": 0.9, "c": 0.1, "b": 0.5, "a": 0.5, "e": 0.95}


def selecting(toy: Toy, **parameters: object) -> Nlsr:
    return Nlsr(NlsrParameters.model_validate(parameters), toy.reference, CONTINUED)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return toy_and_twin(tmp_path / "ref", 6, 6, 2, 0, 0.9, 0.8)[0]


def test_the_least_similar_modules_are_repaired_and_ties_go_by_name(toy: Toy) -> None:
    order = ["c", "a", "b", "d", "e"]
    for count, share in enumerate([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]):
        selection = selecting(toy, skip_share=share).select(SCORES)
        assert selection.names == set(order[:count])
        assert selection.probability is None
    # Half of five is three: of a single module, half is that module.
    assert selecting(toy).select(SCORES).names == {"c", "a", "b"}
    assert selecting(toy).select({"a": 0.5}).names == {"a"}
    assert selecting(toy).select({}).names == set()


def test_the_most_similar_modules_are_a_control(toy: Toy) -> None:
    assert selecting(toy, selection="highest", skip_share=0.6).select(SCORES).names == {"d", "e"}
    assert selecting(toy, selection="highest", skip_share=0.4).select(SCORES).names == {"b", "d", "e"}
    assert selecting(toy, selection="highest", skip_share=1.0).select(SCORES).names == set()
    assert selecting(toy, selection="highest", skip_share=0.0).select(SCORES).names == set(SCORES)


def test_modules_drawn_by_chance_are_a_control_that_repeats_with_its_seed(toy: Toy) -> None:
    scores = {f"m{i:03d}": i / 100 for i in range(100)}

    def drawn(seed: int, of: dict[str, float] = scores) -> frozenset[str]:
        return selecting(toy, selection="random", skip_share=0.7, seed=seed).select(of).names

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1) == drawn(1, dict(reversed(scores.items())))
    assert {len(drawn(seed)) for seed in range(20)} == {30}
    # Blind to the scores: 15 of the 30 from either half, with a standard error of .2 over 200 draws.
    low = sum(len([name for name in drawn(seed) if scores[name] < 0.5]) for seed in range(200)) / 200
    assert low == pytest.approx(15, abs=1)
    selection = selecting(toy, selection="random", skip_share=0.7).select(scores)
    assert selection.probability == dict.fromkeys(scores, 0.3)


def test_the_draw_favours_damaged_modules_and_repeats_with_its_seed(toy: Toy) -> None:
    scores = {f"m{i:03d}": i / 200 for i in range(200)}

    def drawn(seed: int) -> frozenset[str]:
        return selecting(toy, selection="bernoulli", seed=seed).select(scores).names

    assert drawn(1) == drawn(1) != drawn(2)
    low = sum(len([name for name in drawn(seed) if scores[name] < 0.5]) for seed in range(50)) / 50
    high = sum(len([name for name in drawn(seed) if scores[name] >= 0.5]) for seed in range(50)) / 50
    # Expected: 100·(.5 + .1) and 100·(.5 − .1); the means of 50 draws have a standard error of .7.
    assert low == pytest.approx(60, abs=4)
    assert high == pytest.approx(40, abs=4)


def test_the_probability_of_being_skipped_rises_with_the_rank_by_similarity(toy: Toy) -> None:
    selection = selecting(toy, selection="bernoulli", skip_share=0.5, spread=0.4).select(SCORES)
    # P_j = .5 + .4·(r_j/5 − ½) is the probability of being skipped.
    wanted = {"c": 1 - 0.38, "a": 1 - 0.46, "b": 1 - 0.54, "d": 1 - 0.62, "e": 1 - 0.70}
    assert selection.probability == pytest.approx(wanted)
    # What leaves [0, 1] is cut off there.
    sure = selecting(toy, selection="bernoulli", skip_share=0.0, spread=1.0).select(SCORES)
    assert sure.probability == pytest.approx({"c": 1.0, "a": 1.0, "b": 0.9, "d": 0.7, "e": 0.5})
    assert {"a", "c"} <= sure.names


def test_a_seed_is_named_only_where_something_is_drawn(toy: Toy) -> None:
    for parameters in ({}, {"selection": "highest"}, {"scorer": "wanda"}):
        assert selecting(toy, seed=9, **parameters).seed is None
    for parameters in ({"selection": "bernoulli"}, {"selection": "random"}, {"scorer": "random"}):
        assert selecting(toy, seed=9, **parameters).seed == 9


@pytest.mark.parametrize("form", ["factor", "paper"])
def test_forms_on_factors_refuse_adapters_that_do_not_share_them(toy: Toy, form: str) -> None:
    for kinship in (FRESH, Kinship("foreign", 0.0, False), Kinship("continued", 0.9, False)):
        with pytest.raises(Incompatible) as caught:
            Nlsr(NlsrParameters.model_validate({"form": form}), toy.reference, kinship)
        assert caught.value.code == "lineage_mismatch"


def test_the_form_that_fits_is_chosen_and_named(toy: Toy) -> None:
    wanted = {FRESH: "neuron", Kinship("continued", 0.9, False): "neuron", CONTINUED: "factor"}
    for kinship, form in wanted.items():
        method = Nlsr(NlsrParameters(), toy.reference, kinship)
        assert method.resolved == {"form": form, "amplification": "0.9"}
    assert set(Nlsr.fidelity) == set(FORMS)


def test_low_rank_scores_from_g_alone_equal_those_from_the_singular_vectors_of_the_activations() -> None:
    """Wei et al.'s ActSVD, in float64: the projection onto the leading left singular vectors of the outputs."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for d, k, r, tokens, count in ((24, 32, 8, 200, 2), (16, 12, 6, 40, 3), (40, 20, 10, 500, 9)):
        a, b, x = random(r, k), random(d, r), random(tokens, k)
        z = x @ a.T
        g = z.T @ z
        v = torch.linalg.svd(z.T, full_matrices=False).U[:, :count]
        u = torch.linalg.svd(b @ z.T, full_matrices=False).U[:, :count]
        assert float((lowrank.low_rank_a(a, g, count) - v @ v.T @ a).norm() / a.norm()) < 1e-10
        assert float((lowrank.low_rank_b(b, g, count) - u @ u.T @ b).norm() / b.norm()) < 1e-10


@pytest.mark.parametrize(("sparsity", "share"), [(0.8, 0.35), (0.5, 0.5)])
def test_the_factor_form_leaves_cross_terms_of_a_third_to_a_half_of_the_energy(sparsity: float, share: float) -> None:
    """Why the form `paper` exists. Of Gaussian factors whose masks take the shares p and q of A and of B, they hold
    p(1 − q) + (1 − p)q in expectation: q is 2 of 8 at the sparsity .8."""
    shares = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        a_e, b_e, a_t, b_t, of_a, of_b = (torch.randn(*shape, generator=generator) for shape in [(8, 60), (48, 8)] * 3)
        mask_a = lowrank.top_mask(of_a, 1 - sparsity, per_row=True)
        mask_b = lowrank.top_mask(of_b, 1 - sparsity, per_row=True)
        factor = torch.where(mask_b, b_e, b_t) @ torch.where(mask_a, a_e, a_t)
        paper = (b_e * mask_b) @ (a_e * mask_a) + (b_t * ~mask_b) @ (a_t * ~mask_a)
        shares.append(float((factor - paper).square().sum() / factor.square().sum()))
    assert sum(shares) / len(shares) == pytest.approx(share, abs=0.01)
    assert 0.28 < min(shares) < max(shares) < 0.56


def test_bringing_a_repair_to_the_customers_rank_loses_exactly_what_is_reported() -> None:
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(20, 9, generator=generator, dtype=torch.float64)
    a = torch.randn(9, 30, generator=generator, dtype=torch.float64)
    singular = torch.linalg.svdvals(b @ a)
    for rank in range(1, 10):
        new_b, new_a, error = lowrank.recompress(b, a, rank)
        wanted = float(singular[rank:9].square().sum().sqrt() / singular.norm())
        assert error == pytest.approx(wanted, abs=1e-12)
        assert float((new_b @ new_a - b @ a).norm() / singular.norm()) == pytest.approx(wanted, abs=1e-12)
