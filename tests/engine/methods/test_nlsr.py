"""NLSR against a slow, dense, float64 twin that is written from the paper's formulas."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safegraft.contracts.methods import NlsrParameters
from safegraft.engine.methods.base import Kinship
from safegraft.engine.methods.nlsr import Nlsr
from safegraft.engine.reference import BuildSettings
from safegraft.errors import Incompatible
from tests.engine.random_bundle import NAME, Toy, dense

CONTINUED = Kinship("continued", 0.9, True)
FRESH = Kinship("fresh", 0.0, False)
relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = {
    "d": st.integers(3, 14),
    "k": st.integers(3, 14),
    "r": st.integers(1, 5),
    "seed": st.integers(0, 2**16),
    "scaling": st.floats(0.05, 8),
    "beta": st.sampled_from([0.0, 0.5, 0.9]),
    "sparsity": st.sampled_from([0.0, 0.3, 0.5, 0.8]),
}


class Twin:
    """The paper's definitions on dense float64 matrices, from raw activations."""

    def __init__(self, toy: Toy) -> None:
        s = toy.settings
        self.a = toy.a.double()
        self.b = toy.b.double() * (1 + s.amplification)
        share, r = 1 - s.sparsity, toy.a.shape[0]
        count = max(1, round(r * share))
        z = toy.x_s.double() @ self.a.T
        v = torch.linalg.svd(z.T, full_matrices=True).U[:, :count]
        u = torch.linalg.svd(self.b @ z.T, full_matrices=True).U[:, :count]
        self.score_a, self.score_b = (v @ v.T @ self.a).abs(), (u @ u.T @ self.b).abs()
        self.energy = (self.b @ z.T).square().sum(dim=1)[None]
        self.mask_a, self.mask_b = self.largest(self.score_a, share), self.largest(self.score_b, share)
        self.rows = self.largest(self.energy, share)[0]

    @staticmethod
    def largest(score: Tensor, share: float) -> Tensor:
        mask = torch.zeros(score.shape, dtype=torch.bool)
        for row in range(score.shape[0]):
            for column in sorted(range(score.shape[1]), key=lambda j: -float(score[row, j]))[
                : max(1, round(share * score.shape[1]))
            ]:
                mask[row, column] = True
        return mask


def cosine(x: Tensor, y: Tensor) -> float:
    scale = float(x.norm() * y.norm())
    return float((x * y).sum()) / scale if scale else 0.0


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    best: Tensor = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return best


def close(actual: Tensor, wanted: Tensor) -> None:
    assert float((actual - wanted).norm()) <= 2e-5 * (1e-6 + float(wanted.norm()))


def toy_and_twin(folder: Path, d: int, k: int, r: int, seed: int, beta: float, sparsity: float) -> tuple[Toy, Twin]:
    toy = Toy(folder, d=d, k=k, r=r, seed=seed, settings=BuildSettings(amplification=beta, sparsity=sparsity))
    return toy, Twin(toy)


@relaxed
@given(**shapes)
def test_masks_are_those_of_the_dense_definition(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, beta: float, sparsity: float
) -> None:
    # Beyond that, activations have a lower rank than the factors, and which directions come last is anybody's choice.
    assume(r <= min(d, k))
    toy, twin = toy_and_twin(tmp_path / "ref", d, k, r, seed, beta, sparsity)
    safe = toy.reference.neurons(NAME)
    close(safe.b.double() @ safe.a.double(), twin.b @ twin.a)
    same_but_for_ties(safe.mask_a, twin.mask_a, twin.score_a)
    same_but_for_ties(safe.mask_b, twin.mask_b, twin.score_b)
    same_but_for_ties(safe.rows[None], twin.rows[None], twin.energy)


def same_but_for_ties(mask: Tensor, wanted: Tensor, score: Tensor) -> None:
    """Entries may only differ where float32 cannot tell their score from the last one that was chosen."""
    for row in range(len(mask)):
        assert int(mask[row].sum()) == int(wanted[row].sum())
        last = score[row][wanted[row]].min()
        assert bool(((score[row] - last).abs() <= 1e-4 * score[row].max())[mask[row] != wanted[row]].all())


@relaxed
@given(**shapes)
def test_the_factor_form_swaps_masked_entries_and_nothing_else(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, beta: float, sparsity: float
) -> None:
    toy, twin = toy_and_twin(tmp_path / "ref", d, k, r, seed, beta, sparsity)
    twin.mask_a, twin.mask_b = toy.reference.neurons(NAME).mask_a, toy.reference.neurons(NAME).mask_b
    method, module = Nlsr(NlsrParameters(form="factor"), toy.reference, CONTINUED), toy.continued(scaling)
    b_t, a_t = module.scaling * module.b.double(), module.a.double()
    wanted_b = torch.where(twin.mask_b, twin.b, b_t)
    wanted_a = torch.where(twin.mask_a, twin.a, a_t)
    patched = method.patch(module)
    close(dense(patched.module), wanted_b @ wanted_a)
    assert torch.equal(patched.module.a[~twin.mask_a], module.a[~twin.mask_a])
    assert torch.equal(patched.module.b[~twin.mask_b], module.b[~twin.mask_b])
    assert patched.truncation_error == 0.0
    similarity = cosine((twin.b * twin.mask_b) @ (twin.a * twin.mask_a), (b_t * twin.mask_b) @ (a_t * twin.mask_a))
    assert method.similarity(module) == pytest.approx(similarity, abs=1e-5)
    assert method.similarity(patched.module) == pytest.approx(1.0, abs=1e-5)


@relaxed
@given(**shapes)
def test_the_paper_form_has_no_cross_terms(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, beta: float, sparsity: float
) -> None:
    toy, twin = toy_and_twin(tmp_path / "ref", d, k, r, seed, beta, sparsity)
    twin.mask_a, twin.mask_b = toy.reference.neurons(NAME).mask_a, toy.reference.neurons(NAME).mask_b
    module = toy.continued(scaling)
    b_t, a_t = module.scaling * module.b.double(), module.a.double()
    exact = (twin.b * twin.mask_b) @ (twin.a * twin.mask_a) + (b_t * ~twin.mask_b) @ (a_t * ~twin.mask_a)
    patched = Nlsr(NlsrParameters(form="paper"), toy.reference, CONTINUED).patch(module)
    best = best_of_rank(exact, r)
    close(dense(patched.module), best)
    error = float((exact - best).norm() / exact.norm())
    assert patched.truncation_error == pytest.approx(error, abs=1e-4)


@relaxed
@given(**shapes, rank=st.integers(1, 6))
def test_the_neuron_form_swaps_whole_rows_of_the_update_in_both_lineages(
    tmp_path: Path, d: int, k: int, r: int, seed: int, scaling: float, beta: float, sparsity: float, rank: int
) -> None:
    toy, twin = toy_and_twin(tmp_path / "ref", d, k, r, seed, beta, sparsity)
    rows = twin.rows.double()[:, None]
    delta_e, delta_a = twin.b @ twin.a, twin.b @ twin.a / (1 + beta)

    module = toy.continued(scaling)
    exact = rows * delta_e + (1 - rows) * dense(module)
    patched = Nlsr(NlsrParameters(form="neuron"), toy.reference, CONTINUED).patch(module)
    close(dense(patched.module), best_of_rank(exact, r))

    module = toy.fresh(rank, scaling)
    method = Nlsr(NlsrParameters(), toy.reference, FRESH)
    # The model that is served has the aligned update and the customer's; what is saved is relative to the former.
    exact = rows * delta_e + (1 - rows) * (delta_a + dense(module)) - delta_a
    patched = method.patch(module)
    assert patched.module.rank == rank
    close(dense(patched.module), best_of_rank(exact, rank))
    similarity = cosine(rows * delta_e, rows * (delta_a + dense(module)))
    assert method.similarity(module) == pytest.approx(similarity, abs=1e-5)


def test_the_least_similar_modules_are_repaired_and_ties_go_by_name(tmp_path: Path) -> None:
    toy, _ = toy_and_twin(tmp_path / "ref", 6, 6, 2, 0, 0.9, 0.8)
    scores = {"d": 0.9, "c": 0.1, "b": 0.5, "a": 0.5}
    method = Nlsr(NlsrParameters(skip_share=0.5), toy.reference, CONTINUED)
    assert method.select(scores).names == {"c", "a"}
    assert method.select(scores).probability is None
    assert Nlsr(NlsrParameters(skip_share=1.0), toy.reference, CONTINUED).select(scores).names == set()
    assert Nlsr(NlsrParameters(skip_share=0.0), toy.reference, CONTINUED).select(scores).names == set(scores)


def test_the_draw_favours_damaged_modules_and_repeats_with_its_seed(tmp_path: Path) -> None:
    toy, _ = toy_and_twin(tmp_path / "ref", 6, 6, 2, 0, 0.9, 0.8)
    scores = {f"m{i:03d}": i / 200 for i in range(200)}

    def drawn(seed: int) -> frozenset[str]:
        parameters = NlsrParameters(selection="bernoulli", seed=seed)
        return Nlsr(parameters, toy.reference, CONTINUED).select(scores).names

    assert drawn(1) == drawn(1) != drawn(2)
    low = sum(len([name for name in drawn(seed) if scores[name] < 0.5]) for seed in range(50)) / 50
    high = sum(len([name for name in drawn(seed) if scores[name] >= 0.5]) for seed in range(50)) / 50
    # Expected: 100·(.5 + .1) and 100·(.5 − .1); the means of 50 draws have a standard error of .7.
    assert low == pytest.approx(60, abs=4)
    assert high == pytest.approx(40, abs=4)
    selection = Nlsr(NlsrParameters(selection="bernoulli"), toy.reference, CONTINUED).select(scores)
    assert selection.probability is not None
    assert selection.probability["m000"] > selection.probability["m199"]


@pytest.mark.parametrize("form", ["factor", "paper"])
def test_forms_on_factors_refuse_adapters_that_do_not_share_them(tmp_path: Path, form: str) -> None:
    toy, _ = toy_and_twin(tmp_path / "ref", 6, 6, 2, 0, 0.9, 0.8)
    for kinship in (FRESH, Kinship("continued", 0.9, False)):
        with pytest.raises(Incompatible) as caught:
            Nlsr(NlsrParameters.model_validate({"form": form}), toy.reference, kinship)
        assert caught.value.code == "lineage_mismatch"
    assert Nlsr(NlsrParameters(), toy.reference, FRESH).resolved == {"form": "neuron"}
    assert Nlsr(NlsrParameters(), toy.reference, CONTINUED).resolved == {"form": "factor"}
