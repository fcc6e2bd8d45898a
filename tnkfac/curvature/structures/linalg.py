"""Linear algebra on batches of small matrices."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 160
"""Rows of all blocks together up to which all eigenvalues are computed."""
SAMPLED = 1024
"""Rows of the blocks that are looked at, of many, and at least sixteen blocks."""
PROBES = 2048
"""Numbers of all probe vectors, at least."""
STEPS = 16
"""Lanczos iterations."""
LEAF = 32
"""Rows up to which a triangular system is solved as a whole."""


def eyes(groups: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Identity matrices ``[groups, .., d, d]`` of their own memory."""
    eye = torch.eye(shape[-1], dtype=dtype, device=device)
    return eye.expand(groups, *shape).contiguous()


def symmetric_norm(matrix: Tensor, iterations: int = 6) -> Tensor:
    """Spectral norm of symmetric ``[.., d, d]``, from below; zero for empty ones."""
    if not matrix.shape[-1]:
        return matrix.new_zeros(matrix.shape[:-2])
    vector = _iterated(matrix, matrix.abs().sum(-1), iterations)  # starts near the leading one
    norm: Tensor = torch.linalg.vector_norm(vector, dim=-1)
    return norm


def largest_eigenvalue(matrix: Tensor, metric: Tensor, iterations: int = 6) -> Tensor:
    """Largest magnitude of the eigenvalues of ``[.., d, d]``, from below; zero for empty ones.

    Args:
        matrix: ``W``, whose eigenvalues are real since ``M W`` is symmetric.
        metric: Positive definite ``M``, in which lengths are measured.
        iterations: Products of ``W`` with a vector.
    """
    if not matrix.shape[-1]:
        return matrix.new_zeros(matrix.shape[:-2])
    vector = _iterated(matrix, metric.abs().sum(-1), iterations - 1)
    after = (matrix @ vector.unsqueeze(-1)).squeeze(-1)
    both = torch.stack([vector, after], -1)
    squares = (both * (metric @ both)).sum(-2).clamp(min=torch.finfo(matrix.dtype).tiny)
    ratio: Tensor = (squares[..., 1] / squares[..., 0]).sqrt()
    return ratio


def _iterated(matrix: Tensor, vector: Tensor, iterations: int) -> Tensor:
    """Power iterations from ``[.., d]``; each begins with a vector of length one."""
    tiny = torch.finfo(matrix.dtype).tiny
    for _ in range(iterations):
        length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
        vector = (matrix @ (vector / length.clamp(min=tiny)).unsqueeze(-1)).squeeze(-1)
    return vector


def eigenvalue_bound(matrix: Tensor) -> Tensor:
    """Bound on the magnitude of eigenvalues, if these are real: the root of the sum of squares."""
    squares: Tensor = (matrix.mT * matrix).sum((-1, -2))
    return squares.clamp(min=0).sqrt()


def spectral_nodes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights ``[G, n]`` of the spectral density of symmetric ``[G, count, d, d]``.

    Those of large matrices are estimated by Lanczos quadrature from vectors of signs (Ubaru, Chen
    and Saad 2017, algorithm 1), the same ones at every call. Of many blocks some are looked at, if
    these have the mean of all.
    """
    groups, count, dim, _ = blocks.shape
    if count * dim <= EXACT:
        values = torch.linalg.eigvalsh(blocks).flatten(1)
        return values, torch.full_like(values, 1 / values.shape[1])
    traces = blocks.diagonal(dim1=-2, dim2=-1).mean(-1)
    level = traces.mean(1)
    sampled = max(16, SAMPLED // dim)
    if count > sampled:
        places = torch.arange(sampled, device=blocks.device) * count // sampled
        error = (traces[:, places].mean(1) - level).abs()
        if bool((error <= 0.1 * level.abs()).all()):
            blocks, count = blocks[:, places], sampled
    level = torch.where(level > 0, level, 1.0)[:, None]  # squares of tiny numbers would vanish
    probes = max(1, min(16, -(-PROBES // (count * dim))))
    generator = torch.Generator().manual_seed(dim)
    signs = torch.randint(0, 2, (dim, probes), generator=generator, device="cpu") * 2.0 - 1
    start = (signs / dim**0.5).to(blocks.device, blocks.dtype).expand(groups, count, dim, probes)
    values, weights = _lanczos(blocks / level[:, :, None, None], start, min(STEPS, dim))
    return values.flatten(1) * level, weights.flatten(1) / (count * probes)


def _lanczos(matrix: Tensor, vector: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Gauss quadrature for unit vectors ``[.., d, p]``: nodes and weights ``[.., p, steps]``.

    Vectors are not made orthogonal again: what this loses are copies of outer eigenvalues, whose
    weights add up to the same.
    """
    tiny = torch.finfo(matrix.dtype).tiny
    before, beta = torch.zeros_like(vector), vector.new_zeros(())
    diagonal, side = [], []
    for _ in range(steps):
        following = matrix @ vector - beta * before
        alpha = (vector * following).sum(-2, keepdim=True)
        following = following - alpha * vector
        beta = following.square().sum(-2, keepdim=True).sqrt()
        diagonal.append(alpha.squeeze(-2))
        side.append(beta.squeeze(-2))
        before, vector = vector, following / beta.clamp(min=tiny)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, -1).double())
    if steps > 1:
        upper = torch.diag_embed(torch.stack(side[:-1], -1).double(), 1)
        tridiagonal = tridiagonal + upper + upper.mT
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values, vectors[..., 0, :].square()


def triangular_inverse(L: Tensor) -> Tensor:
    """Inverse of lower triangular ``[.., d, d]``, by halves: most of the work is in products."""
    dim = L.shape[-1]
    if dim <= LEAF:
        eye = torch.eye(dim, dtype=L.dtype, device=L.device).expand_as(L)
        whole: Tensor = torch.linalg.solve_triangular(L, eye, upper=False)
        return whole
    half = dim // 2
    first, last = slice(0, half), slice(half, None)
    inverse = torch.zeros_like(L)
    for part in (first, last):
        inverse[..., part, part] = triangular_inverse(L[..., part, part])
    between = inverse[..., last, last] @ (L[..., last, first] @ inverse[..., first, first])
    inverse[..., last, first] = -between
    return inverse


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigen-decomposition of symmetric matrices, in their own precision."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values, vectors


def cholesky_inverse(matrix: Tensor, shift: Tensor) -> Tensor:
    """Inverse of symmetric matrices ``[.., d, d]`` plus multiples ``[..]`` of the identity.

    Raises:
        torch.linalg.LinAlgError: If one is not positive definite.
    """
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    shifted = (matrix + matrix.mT) / 2 + shift[..., None, None] * eye
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))
