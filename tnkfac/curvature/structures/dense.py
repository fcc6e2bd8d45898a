"""Dense matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnkfac.curvature.moments.second_moment import SecondMoment
from tnkfac.curvature.structures.linalg import cholesky_inverse, eigh, eyes, symmetric_norm
from tnkfac.curvature.structures.structure import Decomposable, Parts


@dataclass(frozen=True)
class Dense(Decomposable):
    """All matrices: one part ``[G, d, d]``."""

    name = "dense"

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """``d x d``."""
        return ((self.dim, self.dim),)

    def statistic(self, moment: SecondMoment, K: Parts | None = None) -> Parts:
        """The whole matrix."""
        return (moment.dense(),)

    def identity(self, groups: int, dtype: torch.dtype, device: torch.device) -> Parts:
        """Identity matrices."""
        return (eyes(groups, self.part_shapes[0], dtype, device),)

    def trace(self, m: Parts) -> Tensor:
        """Mean of the diagonal."""
        return m[0].diagonal(dim1=-2, dim2=-1).mean(-1)

    def norm(self, m: Parts) -> Tensor:
        """Norm by power iterations on ``m``, which is symmetric."""
        return symmetric_norm(m[0])

    def apply_kkt(self, K: Parts, X: Tensor) -> Tensor:
        """``K (K^T X)``."""
        return K[0] @ (K[0].mT @ X)

    def eigen(self, A: Parts) -> tuple[Tensor, Parts]:
        """Eigendecomposition of the symmetric part."""
        values, vectors = eigh(A[0])
        return values, (vectors,)

    def from_eigen(self, values: Tensor, vectors: Parts) -> Parts:
        """``V diag(values) V^T``."""
        return ((vectors[0] * values.unsqueeze(-2)) @ vectors[0].mT,)

    def inverse(self, A: Parts, shift: Tensor) -> Parts:
        """Inverse of the symmetric part."""
        return (cholesky_inverse(A[0], shift),)

    def product(self, Q: Parts, X: Tensor, transpose: bool = False) -> Tensor:
        """Matrix product."""
        return (Q[0].mT if transpose else Q[0]) @ X

    def to_dense(self, K: Parts) -> Tensor:
        """Already dense."""
        return K[0]
