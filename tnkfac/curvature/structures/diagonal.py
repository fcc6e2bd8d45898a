"""Diagonal matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnkfac.curvature.moments.second_moment import SecondMoment
from tnkfac.curvature.structures.structure import Decomposable, Parts


@dataclass(frozen=True)
class Diagonal(Decomposable):
    """Diagonal matrices: one part ``[G, d]``."""

    name = "diagonal"

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """``d``."""
        return ((self.dim,),)

    @property
    def basis_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The unit vectors are not kept."""
        return ()

    def statistic(self, moment: SecondMoment, K: Parts | None = None) -> Parts:
        """The diagonal only; nothing is unfolded."""
        return (moment.diagonal(),)

    def identity(self, groups: int, dtype: torch.dtype, device: torch.device) -> Parts:
        """Vectors of ones."""
        return (torch.ones(groups, self.dim, dtype=dtype, device=device),)

    def matmul(self, K: Parts, m: Parts) -> Parts:
        """Elementwise product."""
        return (K[0] * m[0],)

    def gram(self, K: Parts) -> Parts:
        """Squares of the diagonal."""
        return (K[0].square(),)

    def square(self, K: Parts) -> Parts:
        """Squares of the diagonal."""
        return (K[0].square(),)

    def congruence(self, K: Parts, A: Parts) -> Parts:
        """``K^2 A``."""
        return (K[0].square() * A[0],)

    def add_identity_(self, m: Parts, by: Tensor | float) -> Parts:
        """Added to every number."""
        m[0].add_(by.unsqueeze(1) if isinstance(by, Tensor) else by)
        return m

    def trace(self, m: Parts) -> Tensor:
        """Mean."""
        return m[0].mean(-1)

    def norm(self, m: Parts) -> Tensor:
        """Largest magnitude."""
        return m[0].abs().amax(-1)

    def apply_kkt(self, K: Parts, X: Tensor) -> Tensor:
        """Rows of ``X`` scaled by ``K^2``."""
        return K[0].square().unsqueeze(-1) * X

    def similar_norm(self, W: Parts, metric: Parts, enough: float) -> Tensor:
        """Largest magnitude."""
        return self.norm(W)

    def spectrum(self, A: Parts) -> tuple[Tensor, Tensor]:
        """The numbers, with equal weights."""
        return A[0], torch.full_like(A[0], 1 / self.dim)

    def eigen(self, A: Parts) -> tuple[Tensor, Parts]:
        """The diagonal; its eigenvectors are the unit vectors."""
        return A[0], ()

    def from_eigen(self, values: Tensor, vectors: Parts) -> Parts:
        """The values."""
        return (values,)

    def inverse(self, A: Parts, shift: Tensor) -> Parts:
        """Reciprocals; infinite where a sum is zero."""
        return (1 / (A[0] + shift.unsqueeze(1)),)

    def inverse_root(self, A: Parts) -> Parts:
        """Roots of the reciprocals."""
        return (A[0].rsqrt(),)

    def product(self, Q: Parts, X: Tensor, transpose: bool = False) -> Tensor:
        """Rows scaled; the eigenvectors, which have no parts, change nothing."""
        return Q[0].unsqueeze(-1) * X if Q else X

    def to_dense(self, K: Parts) -> Tensor:
        """Diagonal matrices."""
        return torch.diag_embed(K[0])
