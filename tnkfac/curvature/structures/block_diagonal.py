"""Block-diagonal matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnkfac.curvature.moments.second_moment import SecondMoment
from tnkfac.curvature.structures.linalg import cholesky_inverse, eigh, eyes, symmetric_norm
from tnkfac.curvature.structures.structure import Decomposable, Parts, Structure


@dataclass(frozen=True)
class BlockDiagonal(Decomposable):
    """Blocks of ``size`` rows along the diagonal, the last one smaller.

    Two parts: ``[G, d // size, size, size]`` and ``[G, r, r]`` with ``r = d mod size``.

    Attributes:
        size: Rows of a block.
    """

    size: int

    @property
    def name(self) -> str:
        """E.g. ``block30diagonal``."""
        return f"block{self.size}diagonal"

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The whole blocks and the rest."""
        last = self.dim % self.size
        return (self.dim // self.size, self.size, self.size), (last, last)

    def statistic(self, moment: SecondMoment, K: Parts | None = None) -> Parts:
        """The diagonal blocks only."""
        return moment.blocks(self.size)

    def identity(self, groups: int, dtype: torch.dtype, device: torch.device) -> Parts:
        """Identity blocks."""
        return tuple(eyes(groups, shape, dtype, device) for shape in self.part_shapes)

    def trace(self, m: Parts) -> Tensor:
        """Mean of the diagonal of all blocks."""
        whole, last = (part.diagonal(dim1=-2, dim2=-1) for part in m)
        return (whole.sum((-1, -2)) + last.sum(-1)) / self.dim

    def norm(self, m: Parts) -> Tensor:
        """Norm of the largest block; blocks are symmetric."""
        whole, last = (symmetric_norm(part) for part in m)
        return torch.cat([whole, last.unsqueeze(1)], dim=1).amax(1)

    def apply_kkt(self, K: Parts, X: Tensor) -> Tensor:
        """``K_i K_i^T`` on the rows of block ``i``."""
        return self.product(K, self.product(K, X, transpose=True))

    def product(self, Q: Parts, X: Tensor, transpose: bool = False) -> Tensor:
        """``Q_i`` times the rows of block ``i``."""
        done = [(q.mT if transpose else q) @ x for q, x in zip(Q, self._rows(X), strict=True)]
        whole = done[0].flatten(1, 2)
        return torch.cat([whole, done[1]], dim=1) if done[1].numel() else whole

    def product_into(self, out: Tensor, Q: Parts, X: Tensor) -> None:
        """``Q_i`` times the rows of block ``i``, written where the result lies."""
        for q, x, y in zip(Q, self._rows(X), self._rows(out), strict=True):
            for group in range(len(X)):
                if q.ndim == 4:
                    torch.bmm(q[group], x[group], out=y[group])
                elif q.numel():
                    torch.mm(q[group], x[group], out=y[group])

    def _rows(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the rows of whole blocks ``[G, d // size, size, ..]`` and of the rest."""
        count, size, _ = self.part_shapes[0]
        whole = X[:, : count * size]
        return whole.reshape(len(X), count, size, X.shape[2]), X[:, count * size :]

    def pieces(self, K: Parts, rows: int) -> list[tuple[slice, Structure, Parts]]:
        """Some whole blocks each, and the last one by itself."""
        count, size, _ = self.part_shapes[0]
        each = max(1, rows // size)
        empty = K[1][:, :0, :0]
        found: list[tuple[slice, Structure, Parts]] = []
        for start in range(0, count, each):
            blocks = K[0][:, start : start + each]
            dim = blocks.shape[1] * size
            at = slice(start * size, start * size + dim)
            found.append((at, BlockDiagonal(dim, size), (blocks, empty)))
        if K[1].numel():
            last = BlockDiagonal(K[1].shape[1], size)
            found.append((slice(count * size, self.dim), last, (K[0][:, :0], K[1])))
        return found

    def inverse(self, A: Parts, shift: Tensor) -> Parts:
        """Inverse of every block."""
        whole, last = A
        return cholesky_inverse(whole, shift.unsqueeze(1)), cholesky_inverse(last, shift)

    def eigen(self, A: Parts) -> tuple[Tensor, Parts]:
        """Eigendecomposition of every block, in their order."""
        (values, vectors), (last, last_vectors) = (eigh(part) for part in A)
        return torch.cat([values.flatten(1), last], dim=1), (vectors, last_vectors)

    def from_eigen(self, values: Tensor, vectors: Parts) -> Parts:
        """``V_i diag(values_i) V_i^T``."""
        count, size, _ = self.part_shapes[0]
        whole = values[:, : count * size].reshape(values.shape[0], count, size)
        split = whole, values[:, count * size :]
        return tuple((v * e.unsqueeze(-2)) @ v.mT for v, e in zip(vectors, split, strict=True))

    def to_dense(self, K: Parts) -> Tensor:
        """Blocks written out."""
        dense = K[0].new_zeros(K[0].shape[0], self.dim, self.dim)
        start = 0
        for block in (*K[0].unbind(1), K[1]):
            end = start + block.shape[-1]
            dense[:, start:end, start:end] = block
            start = end
        return dense
