"""Algebra on ΔW = B·A that never forms ΔW. Pure functions; all factors are float32 or float64.

Shapes: A (r, k), B (d, r), G (r, r) with k inputs, d outputs, rank r. Scalings are folded into B by the caller.
Two updates may have different ranks wherever both appear.
"""

import math

import numpy as np
import torch
from torch import Tensor

from safegraft.errors import InvalidTensors

# Products whose largest entry lies between these were computed without leaving float32's range.
_SMALL, _LARGE = 2.0**-60, 2.0**100
# Powers of two by which a column of B and a row of A may differ from their mean.
_BALANCED = 8


def inner(
    b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor, *, of_b: Tensor | None = None, of_a: Tensor | None = None
) -> float:
    """⟨B₁A₁, B₂A₂⟩_F = Σ (B₁ᵀB₂) ⊙ (A₁A₂ᵀ), in r₁·r₂·(d+k) multiplications instead of r·d·k.

    of_b: B₁ᵀB₂ (r₁, r₂), of_a: A₁A₂ᵀ (r₁, r₂), where they are known. Raises InvalidTensors (`out_of_range`) where the
    result is not finite, so that no comparison ever meets a NaN.
    """
    of_b = b1.T @ b2 if of_b is None else of_b
    of_a = a1 @ a2.T if of_a is None else of_a
    if _usual(of_b) and _usual(of_a):
        return float((of_b.double() * of_a.double()).sum())
    # By powers of two, which are exact: the products of float32 factors leave float32's range long before ΔW does.
    factors, scale = [], 0
    for factor in (b1, b2, a1, a2):
        exponent = _exponent(factor)
        factors.append(torch.ldexp(factor, torch.tensor(-exponent)))
        scale += exponent
    small_b1, small_b2, small_a1, small_a2 = factors
    product = ((small_b1.T @ small_b2).double() * (small_a1 @ small_a2.T).double()).sum().item()
    try:
        result = math.ldexp(product, scale)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise out_of_range()
    return result


def _usual(product: Tensor) -> bool:
    """Whether a product of factors is so far from the ends of float32 that nothing in it was lost."""
    if not product.numel():
        return False
    return _SMALL < largest(product) < _LARGE


def largest(tensor: Tensor) -> float:
    """The largest absolute value; NaN where there is one. Without a copy of the tensor, as abs() makes."""
    low, high = torch.aminmax(tensor)
    return float(torch.maximum(-low, high))


def largest_along(tensor: Tensor, dim: int) -> Tensor:
    """`largest` of each row or column; dim: that which is left out."""
    return torch.maximum(-tensor.amin(dim=dim), tensor.amax(dim=dim))


def balanced(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same BA with column i of B and row i of A of about the same size; exact, by powers of two.

    A·2ᵏ and B·2⁻ᵏ are the same update. Without this, stacking one such pair beside an ordinary one would lose either.
    Factors that differ by less than 2¹⁶, as all that were trained do, are returned as they are.
    """
    if not b.numel() or not a.numel():
        return b, a
    of_b, of_a = largest_along(b, 0), largest_along(a, 1)
    used = (of_b > 0) & (of_a > 0)
    # Half of the difference of the logarithms; in two steps, because one alone may leave float32's range.
    shift = torch.where(used, ((of_a.log2() - of_b.log2()) / 2).round(), 0.0).nan_to_num(0.0).int()
    if int(shift.abs().max()) <= _BALANCED:
        return b, a
    half = torch.div(shift, 2, rounding_mode="trunc")
    rest = shift - half
    b = torch.ldexp(torch.ldexp(b, half), rest)
    a = torch.ldexp(torch.ldexp(a, -half[:, None]), -rest[:, None])
    return b, a


def out_of_range() -> InvalidTensors:
    return InvalidTensors(
        "The adapter's values leave the range in which they can be computed with.",
        code="out_of_range",
        hint="No training ends with such values; check how the adapter was saved.",
    )


def _exponent(factor: Tensor) -> int:
    """The power of two of the largest entry; 0 for zeros and for what is not finite (the result then tells)."""
    found = largest(factor) if factor.numel() else 0.0
    return math.frexp(found)[1] if 0.0 < found < math.inf else 0


def energies(b: Tensor, p: Tensor, weight: Tensor, *, of_b: Tensor | None = None) -> tuple[float, float]:
    """(‖B·P‖², ‖B·P·√w‖²) for P (r, m) and weights w (m,) ≥ 0, from BᵀB·P alone. Raises InvalidTensors.

    of_b: BᵀB (r, r), where it is known.
    """
    of_b = b.T @ b if of_b is None else of_b
    product = of_b @ p
    if _usual(of_b) and _usual(p) and _usual(product):
        # ‖B·pⱼ‖² = pⱼᵀ(BᵀB)pⱼ for each column.
        columns = (product * p).sum(dim=0, dtype=torch.float64)
        return float(columns.sum()), float(columns @ weight.double())
    return inner(b, p, b, p), inner(b, p * weight, b, p)


def with_gram(of_b: Tensor, a: Tensor, *others: Tensor) -> tuple[float, ...] | None:
    """⟨BA, BA'⟩ for every A' of others (r, k), from BᵀB (r, r) in one product. None where float32's range is left."""
    product = of_b @ a
    if not (_usual(product) and _usual(of_b) and all(_usual(other) for other in (a, *others))):
        return None
    # A row's sum in float32, which is added up pairwise and fast; the rows' in float64.
    found = tuple(float((product * other).sum(dim=1).sum(dtype=torch.float64)) for other in others)
    return found if all(map(math.isfinite, found)) else None


def norm(b: Tensor, a: Tensor) -> float:
    """‖BA‖_F."""
    return math.sqrt(max(inner(b, a, b, a), 0.0))


def cosine(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> float:
    """cos(vec B₁A₁, vec B₂A₂), clamped to [-1, 1]; 0 where one of them is zero."""
    return clamped(inner(b1, a1, b2, a2), norm(b1, a1) * norm(b2, a2))


def clamped(product: float, scale: float) -> float:
    """product/scale as a cosine in [-1, 1]; 0 where the scale is zero."""
    return max(-1.0, min(1.0, product / scale)) if scale > 0 else 0.0


def stack(*factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Σᵢ BᵢAᵢ as one pair ([B₁, B₂, …], [A₁; A₂; …]) of rank Σ rᵢ."""
    return torch.cat([b for b, _ in factors], dim=1), torch.cat([a for _, a in factors], dim=0)


def recompress(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of BA of at most `rank`, balanced, and its relative error.

    B = Q₁R₁, Aᵀ = Q₂R₂, SVD(R₁R₂ᵀ) = UΣWᵀ; returns Q₁U√Σ (d, rank), √ΣWᵀQ₂ᵀ (rank, k) and
    √(Σ_{i>rank} σᵢ²) / ‖BA‖_F (Eckart-Young). Zero rows and columns fill up where BA has a lower rank. Raises
    InvalidTensors (`out_of_range`).
    """
    b, a = balanced(b, a)
    if not bool(torch.isfinite(b).all() and torch.isfinite(a).all()):
        raise out_of_range()
    q1, r1 = torch.linalg.qr(b)
    q2, r2 = torch.linalg.qr(a.T)
    try:
        u, sigma, wt = torch.linalg.svd(r1.double() @ r2.T.double(), full_matrices=False)
    except RuntimeError as error:  # torch's LinAlgError
        raise out_of_range() from error
    kept = min(rank, len(sigma))
    root = sigma[:kept].sqrt()
    out_b = b.new_zeros(b.shape[0], rank)
    out_a = a.new_zeros(rank, a.shape[1])
    out_b[:, :kept] = q1 @ (u[:, :kept] * root).to(b.dtype)
    out_a[:kept] = (root[:, None] * wt[:kept]).to(a.dtype) @ q2.T
    total = float(sigma.square().sum())
    lost = float(sigma[kept:].square().sum())
    return out_b, out_a, (lost / total) ** 0.5 if total > 0 else 0.0


def top_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """The eigenvectors (n, count) of the `count` largest eigenvalues of a symmetric (n, n) matrix."""
    vectors: Tensor = torch.linalg.eigh(symmetric.double()).eigenvectors
    return vectors[:, -count:]


def low_rank_a(a: Tensor, g: Tensor, count: int) -> Tensor:
    """Â = VVᵀA, V the top `count` eigenvectors of G = ZᵀZ, Z = XAᵀ.

    This is the rank-`count` matrix nearest to A on the inputs X: min ‖XAᵀ − XÂᵀ‖_F (NLSR, eq. 4; ActSVD).
    """
    v = top_eigenvectors(g, count).to(a.dtype)
    projected: Tensor = v @ (v.T @ a)
    return projected


def low_rank_b(b: Tensor, g: Tensor, count: int) -> Tensor:
    """B̂ = UUᵀB, U the top `count` left directions of B·Zᵀ, through B = QR: U = Q·V, V from R·G·Rᵀ."""
    q, r = torch.linalg.qr(b.double())
    u = (q @ top_eigenvectors(r @ g.double() @ r.T, count)).to(b.dtype)
    projected: Tensor = u @ (u.T @ b)
    return projected


def output_energy(b: Tensor, g: Tensor) -> Tensor:
    """oᵢ² = bᵢ·G·bᵢᵀ (d,): the squared output of each row over all inputs that G counts."""
    return ((b @ g.to(b.dtype)) * b).sum(dim=1)


def top_mask(score: Tensor, share: float, *, per_row: bool) -> Tensor:
    """Boolean mask of the `share` of entries with the largest score, in each row or over the whole matrix.

    Exactly round(share·n) entries (at least one): ties go to the lower index, so that the mask is reproducible.
    """
    flat = score if per_row else score.reshape(1, -1)
    count = max(1, round(share * flat.shape[1]))
    order = torch.argsort(flat, dim=1, descending=True, stable=True)[:, :count]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask.scatter_(1, order, True)
    return mask.reshape(score.shape)


def pack_mask(mask: Tensor) -> Tensor:
    """Eight entries a byte (uint8, flat), the first in the highest bit."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_mask`: boolean, of `shape`."""
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=count).astype(bool)).reshape(shape)
