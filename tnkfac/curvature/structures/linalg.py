"""Linear algebra on batches of small matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def eyes(groups: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Identity matrices ``[groups, .., d, d]`` of their own memory."""
    eye = torch.eye(shape[-1], dtype=dtype, device=device)
    return eye.expand(groups, *shape).contiguous()


def symmetric_norm(matrix: Tensor, iterations: int = 6) -> Tensor:
    """Spectral norm of symmetric ``[.., d, d]``, from below; zero for empty ones."""
    if not matrix.shape[-1]:
        return matrix.new_zeros(matrix.shape[:-2])
    vector = matrix.abs().sum(-1, keepdim=True)  # large where the leading eigenvector is
    tiny = torch.finfo(matrix.dtype).tiny
    for _ in range(iterations):
        length = torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
        vector = matrix @ (vector / length.clamp(min=tiny))
    norm: Tensor = torch.linalg.vector_norm(vector, dim=(-2, -1))
    return norm


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
