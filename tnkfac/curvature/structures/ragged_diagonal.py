"""Diagonal matrices of many sizes, end to end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tnkfac.curvature.structures.structure import Matrices, Parts


@dataclass(frozen=True, eq=False)
class RaggedDiagonal(Matrices):
    """Diagonals one after the other: one part ``[sum of lengths]``, a *segment* for each matrix.

    Attributes:
        lengths: Dimension of each matrix, ``[G]``.
        segment: The matrix of every number.
    """

    lengths: Tensor
    segment: Tensor

    @staticmethod
    @lru_cache(maxsize=64)
    def of(lengths: tuple[int, ...], device: torch.device) -> RaggedDiagonal:
        """Matrices of these dimensions; kept, since copies to a device wait for it.

        Args:
            lengths: Dimensions.
            device: Where their numbers are.
        """
        counts = torch.tensor(lengths, device="cpu")
        segment = torch.repeat_interleave(counts, output_size=sum(lengths))
        return RaggedDiagonal(counts.to(device), segment.to(device))

    def identity(self, groups: int, dtype: torch.dtype, device: torch.device) -> Parts:
        """Vector of ones."""
        return (torch.ones(len(self.segment), dtype=dtype, device=device),)

    def matmul(self, K: Parts, m: Parts) -> Parts:
        """Elementwise product."""
        return (K[0] * m[0],)

    def gram(self, K: Parts) -> Parts:
        """Squares of the diagonals."""
        return (K[0].square(),)

    def congruence(self, K: Parts, A: Parts) -> Parts:
        """``K^2 A``."""
        return (K[0].square() * A[0],)

    def trace(self, m: Parts) -> Tensor:
        """Mean of each segment."""
        return torch.segment_reduce(m[0], "mean", lengths=self.lengths, unsafe=True)

    def statistic_trace(self, A: Parts) -> Tensor:
        """Mean of each segment."""
        return self.trace(A)

    def norm(self, m: Parts) -> Tensor:
        """Largest magnitude of each segment."""
        return torch.segment_reduce(m[0].abs(), "max", lengths=self.lengths, unsafe=True)

    def largest(self, m: Parts) -> Tensor:
        """Largest magnitude of each segment."""
        return self.norm(m)

    def scaled(self, m: Parts, by: Tensor | float) -> Parts:
        """Each segment times its number."""
        return (m[0] * (by.index_select(0, self.segment) if isinstance(by, Tensor) else by),)
