"""The low-rank algebra against dense float64 matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safegraft.engine import lowrank

sizes = st.integers(1, 12)
settings.register_profile("here", deadline=None)
settings.load_profile("here")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(d=sizes, k=sizes, r1=sizes, r2=sizes, seed=st.integers(0, 2**16))
def test_inner_products_and_cosines_equal_those_of_the_dense_updates(
    d: int, k: int, r1: int, r2: int, seed: int
) -> None:
    b1, a1, b2, a2 = random(seed, d, r1), random(seed + 1, r1, k), random(seed + 2, d, r2), random(seed + 3, r2, k)
    dense1, dense2 = b1 @ a1, b2 @ a2
    assert abs(lowrank.inner(b1, a1, b2, a2) - float((dense1 * dense2).sum())) < 1e-9 * (
        1 + dense1.norm() * dense2.norm()
    )
    wanted = torch.nn.functional.cosine_similarity(dense1.reshape(1, -1), dense2.reshape(1, -1), eps=1e-30)
    assert abs(lowrank.cosine(b1, a1, b2, a2) - float(wanted)) < 1e-9


@given(d=sizes, k=sizes, r=sizes, out=sizes, seed=st.integers(0, 2**16))
def test_recompression_is_the_truncated_svd_with_its_exact_error(d: int, k: int, r: int, out: int, seed: int) -> None:
    b, a = random(seed, d, r), random(seed + 1, r, k)
    new_b, new_a, error = lowrank.recompress(b, a, out)
    assert new_b.shape == (d, out)
    assert new_a.shape == (out, k)
    u, s, vt = torch.linalg.svd(b @ a, full_matrices=False)
    best = (u[:, :out] * s[:out]) @ vt[:out]
    assert torch.allclose(new_b @ new_a, best, atol=1e-8 * float(s[0]) + 1e-12)
    assert abs(error - float(s[out:].norm() / s.norm())) < 1e-7


@given(d=sizes, k=sizes, r=sizes, tokens=st.integers(1, 30), seed=st.integers(0, 2**16), data=st.data())
def test_low_rank_scores_equal_the_svd_of_the_activations(
    d: int, k: int, r: int, tokens: int, seed: int, data: st.DataObject
) -> None:
    """NLSR's own definition: project on the leading left singular vectors of the outputs; here only G is used."""
    b, a, x = random(seed, d, r), random(seed + 1, r, k), random(seed + 2, tokens, k)
    z = x @ a.T
    g = z.T @ z
    count = data.draw(st.integers(1, r))
    v = torch.linalg.svd(z.T, full_matrices=True).U[:, :count]
    singular = torch.linalg.svdvals(z.T)
    # Where the count cuts between equal singular values (or below the rank) the projection is not unique.
    if count < len(singular) and singular[count - 1] - singular[count] < 1e-6 * singular[0]:
        return
    if count > len(singular) or singular[count - 1] < 1e-6 * singular[0]:
        return
    assert torch.allclose(lowrank.low_rank_a(a, g, count), v @ v.T @ a, atol=1e-6 * float(a.norm()))
    outputs = b @ z.T
    u, s, _ = torch.linalg.svd(outputs, full_matrices=False)
    if count > len(s) or s[count - 1] < 1e-5 * s[0] or (count < len(s) and s[count - 1] - s[count] < 1e-5 * s[0]):
        return
    assert torch.allclose(
        lowrank.low_rank_b(b, g, count), u[:, :count] @ u[:, :count].T @ b, atol=1e-5 * float(b.norm())
    )


@given(d=sizes, r=sizes, tokens=st.integers(1, 20), seed=st.integers(0, 2**16))
def test_output_energy_counts_every_rows_squared_outputs(d: int, r: int, tokens: int, seed: int) -> None:
    b, z = random(seed, d, r), random(seed + 1, tokens, r)
    assert torch.allclose(lowrank.output_energy(b, z.T @ z), (b @ z.T).square().sum(dim=1))


@given(rows=sizes, columns=sizes, share=st.floats(0, 1), seed=st.integers(0, 2**16), per_row=st.booleans())
def test_masks_hold_the_largest_entries_and_survive_packing(
    rows: int, columns: int, share: float, seed: int, per_row: bool
) -> None:
    score = random(seed, rows, columns)
    mask = lowrank.top_mask(score, share, per_row=per_row)
    groups = zip(score, mask, strict=True) if per_row else [(score.reshape(-1), mask.reshape(-1))]
    for values, chosen in groups:
        assert int(chosen.sum()) == max(1, round(share * len(values)))
        if not bool(chosen.all()):
            assert values[chosen].min() >= values[~chosen].max()
    assert torch.equal(lowrank.unpack_mask(lowrank.pack_mask(mask), (rows, columns)), mask)


def test_products_with_one_gram_matrix_are_the_inner_products() -> None:
    b, a, c = torch.randn(40, 6), torch.randn(6, 30), torch.randn(6, 30)
    found = lowrank.with_gram(b.T @ b, c, c, a)
    assert found is not None
    assert found == pytest.approx((lowrank.inner(b, c, b, c), lowrank.inner(b, c, b, a)), rel=1e-5)
    # Zeros and what leaves float32's range are the caller's to compute otherwise.
    assert lowrank.with_gram(b.T @ b, torch.zeros(6, 30), a) is None
    assert lowrank.with_gram(b.T @ b, a * 2.0**110, a) is None


@pytest.mark.parametrize("value", [3.0, -3.0, 0.0, math.inf, -math.inf])
def test_the_largest_absolute_value_needs_no_copy(value: float) -> None:
    tensor = torch.linspace(-1.0, 1.0, 35).reshape(5, 7)
    tensor[3, 2] = value
    assert lowrank.largest(tensor) == float(tensor.abs().max())
    for dim in (0, 1):
        assert torch.equal(lowrank.largest_along(tensor, dim), tensor.abs().amax(dim=dim))


def test_nothing_hides_a_nan() -> None:
    tensor = torch.ones(5, 7)
    tensor[3, 2] = math.nan
    assert math.isnan(lowrank.largest(tensor))
    assert bool(lowrank.largest_along(tensor, 0).isnan()[2])
    assert bool(lowrank.largest_along(tensor, 1).isnan()[3])
