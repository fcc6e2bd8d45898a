"""Hierarchical matrices: dense in their first and last few rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnkfac.curvature.moments.second_moment import SecondMoment
from tnkfac.curvature.structures.linalg import eyes
from tnkfac.curvature.structures.structure import Parts, Structure


@dataclass(frozen=True)
class Hierarchical(Structure):
    """``[[T, B, F], [0, diag C, 0], [0, D, E]]`` (arXiv 2312.05705, figure 3).

    With ``t`` top rows, ``e`` end rows and ``c = d - t - e`` in between, the five parts are ``T``
    ``[G, t, t]``, ``B`` and ``F`` side by side ``[G, t, c + e]``, ``C`` ``[G, c]``, ``D``
    ``[G, e, c]`` and ``E`` ``[G, e, e]``. The top comes first where ``d`` is too small for all.

    Of a symmetric ``A`` it needs the top rows ``[G, t, d]``, the end rows ``[G, e, d]`` and the
    diagonal in between ``[G, c]``.

    Attributes:
        top: Rows of ``T``, at most.
        end: Rows of ``E``, at most.
    """

    top: int
    end: int

    @property
    def name(self) -> str:
        """E.g. ``hierarchical15_15``."""
        return f"hierarchical{self.top}_{self.end}"

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """``t``, ``c`` and ``e``."""
        top = min(self.top, self.dim)
        end = min(self.end, self.dim - top)
        return top, self.dim - top - end, end

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """``T``, ``[B | F]``, ``C``, ``D``, ``E``."""
        t, c, e = self._sizes
        return (t, t), (t, c + e), (c,), (e, c), (e, e)

    @property
    def statistic_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Top rows, end rows, diagonal in between."""
        t, c, e = self._sizes
        return (t, self.dim), (e, self.dim), (c,)

    def statistic(self, moment: SecondMoment, K: Parts | None = None) -> Parts:
        """A few columns and the diagonal."""
        t, c, e = self._sizes
        columns = moment.columns(t, e).mT
        return columns[:, :t], columns[:, t:], moment.diagonal()[:, t : t + c]

    def identity(self, groups: int, dtype: torch.dtype, device: torch.device) -> Parts:
        """Identity blocks and ones, zeros beside them."""
        top, right, middle, left, end = self.part_shapes

        def zeros(shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(groups, *shape, dtype=dtype, device=device)

        return (
            eyes(groups, top, dtype, device),
            zeros(right),
            zeros(middle) + 1,
            zeros(left),
            eyes(groups, end, dtype, device),
        )

    def matmul(self, K: Parts, m: Parts) -> Parts:
        """Block by block."""
        (T, BF, C, D, E), (t, bf, c, d, e) = K, m
        B, F = self._split(BF)
        right = torch.cat([B * c.unsqueeze(1) + F @ d, F @ e], 2)
        return T @ t, T @ bf + right, C * c, D * c.unsqueeze(1) + E @ d, E @ e

    def gram(self, K: Parts) -> Parts:
        """``K^T K``, what is above and left of the diagonal doubled."""
        T, BF, C, D, E = K
        B, F = self._split(BF)
        middle = C.square() + B.square().sum(1) + D.square().sum(1)
        left = 2 * (F.mT @ B + E.mT @ D)
        return T.mT @ T, 2 * T.mT @ BF, middle, left, E.mT @ E + F.mT @ F

    def congruence(self, K: Parts, A: Parts) -> Parts:
        """``K^T A K`` from the top rows, the end rows and the diagonal of ``A``."""
        T, BF, C, D, E = K
        B, F = self._split(BF)
        rows, ends, q = A
        t, c, _ = self._sizes
        A_tt, A_tc, A_te = rows[..., :t], rows[..., t : t + c], rows[..., t + c :]
        A_et, A_ec, A_ee = ends[..., :t], ends[..., t : t + c], ends[..., t + c :]
        scale = C.unsqueeze(1)
        P = A_tt @ B + A_tc * scale + A_te @ D  # top rows of A times the middle columns of K
        Q = A_et @ B + A_ec * scale + A_ee @ D
        R, S = A_tt @ F + A_te @ E, A_et @ F + A_ee @ E  # the same with its last columns
        middle = (A_tc * B).sum(1) + q * C + (A_ec * D).sum(1)
        return (
            T.mT @ A_tt @ T,
            2 * T.mT @ torch.cat([P, R], 2),
            (B * P).sum(1) + C * middle + (D * Q).sum(1),
            2 * (F.mT @ P + E.mT @ Q),
            F.mT @ R + E.mT @ S,
        )

    def trace(self, m: Parts) -> Tensor:
        """Mean of the three diagonals."""
        T, _, C, _, E = m
        first, last = (block.diagonal(dim1=-2, dim2=-1).sum(-1) for block in (T, E))
        return (first + C.sum(-1) + last) / self.dim

    def statistic_trace(self, A: Parts) -> Tensor:
        """Mean of the three diagonals."""
        t, c, _ = self._sizes
        rows, ends, q = A
        first = rows[..., :t].diagonal(dim1=-2, dim2=-1).sum(-1)
        last = ends[..., t + c :].diagonal(dim1=-2, dim2=-1).sum(-1)
        return (first + q.sum(-1) + last) / self.dim

    def apply_kkt(self, K: Parts, X: Tensor) -> Tensor:
        """``K^T X``, then ``K`` times it, row block by row block."""
        T, BF, C, D, E = K
        B, F = self._split(BF)
        x, y, z = torch.split(X, list(self._sizes), 1)
        scale = C.unsqueeze(2)
        x, y, z = T.mT @ x, B.mT @ x + scale * y + D.mT @ z, F.mT @ x + E.mT @ z
        return torch.cat([T @ x + B @ y + F @ z, scale * y, D @ y + E @ z], 1)

    def to_dense(self, K: Parts) -> Tensor:
        """Blocks written out."""
        T, BF, C, D, E = K
        t, c, _ = self._sizes
        dense = T.new_zeros(T.shape[0], self.dim, self.dim)
        dense[:, :t, :t], dense[:, :t, t:] = T, BF
        dense[:, t : t + c, t : t + c] = torch.diag_embed(C)
        dense[:, t + c :, t : t + c], dense[:, t + c :, t + c :] = D, E
        return dense

    def _split(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """``B`` and ``F``."""
        c = self._sizes[1]
        return right[..., :c], right[..., c:]
