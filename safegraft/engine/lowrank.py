"""Algebra on ΔW = B·A that never forms ΔW. Pure functions; all factors are float32 or float64.

Shapes: A (r, k), B (d, r), G (r, r) with k inputs, d outputs, rank r. Scalings are folded into B by the caller.
Two updates may have different ranks wherever both appear.
"""

import math

import numpy as np
import torch
from torch import Tensor


def inner(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> float:
    """⟨B₁A₁, B₂A₂⟩_F = Σ (B₁ᵀB₂) ⊙ (A₁A₂ᵀ), in r₁·r₂·(d+k) multiplications instead of r·d·k."""
    return ((b1.T @ b2).double() * (a1 @ a2.T).double()).sum().item()


def norm(b: Tensor, a: Tensor) -> float:
    """‖BA‖_F."""
    return math.sqrt(max(inner(b, a, b, a), 0.0))


def cosine(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> float:
    """cos(vec B₁A₁, vec B₂A₂), clamped to [-1, 1]; 0 where one of them is zero."""
    scale = norm(b1, a1) * norm(b2, a2)
    return max(-1.0, min(1.0, inner(b1, a1, b2, a2) / scale)) if scale > 0 else 0.0


def stack(*factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Σᵢ BᵢAᵢ as one pair ([B₁, B₂, …], [A₁; A₂; …]) of rank Σ rᵢ."""
    return torch.cat([b for b, _ in factors], dim=1), torch.cat([a for _, a in factors], dim=0)


def recompress(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of BA of at most `rank`, balanced, and its relative error.

    B = Q₁R₁, Aᵀ = Q₂R₂, SVD(R₁R₂ᵀ) = UΣWᵀ; returns Q₁U√Σ (d, rank), √ΣWᵀQ₂ᵀ (rank, k) and
    √(Σ_{i>rank} σᵢ²) / ‖BA‖_F (Eckart-Young). Zero rows and columns fill up where BA has a lower rank.
    """
    q1, r1 = torch.linalg.qr(b)
    q2, r2 = torch.linalg.qr(a.T)
    u, sigma, wt = torch.linalg.svd((r1 @ r2.T).double(), full_matrices=False)
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
