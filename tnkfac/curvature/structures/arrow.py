"""Arrow matrices: a diagonal and one more row or column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnkfac.curvature.moments.second_moment import SecondMoment
from tnkfac.curvature.structures.structure import Parts, Structure


@dataclass(frozen=True)
class Arrow(Structure):
    """A diagonal and the rest of one row or column, that of the *pivot*.

    Two parts: the diagonal ``[G, d]``, the pivot's entry included, and the arm ``[G, d - 1]``.

    =========================  ===========  ============  ======================
    name                       pivot        its dense     non-zeros
    =========================  ===========  ============  ======================
    ``triltopleftdiag``        last         row           ``[[a, 0], [b^T, c]]``
    ``trilbottomrightdiag``    first        column        ``[[c, 0], [b, a]]``
    ``triutopleftdiag``        last         column        ``[[a, b], [0, c]]``
    ``triubottomrightdiag``    first        row           ``[[c, b^T], [0, a]]``
    =========================  ===========  ============  ======================

    With a dense row, ``K^T A K`` needs the diagonal of ``A`` and its pivot row; with a dense
    column ``v`` the diagonal and ``A v``, two passes over the data with one output channel.

    Attributes:
        last: Whether the pivot is the last index, or the first.
        row: Whether its row is dense, or its column.
    """

    last: bool
    row: bool

    @property
    def name(self) -> str:
        """Name that a user writes."""
        lower = self.last == self.row
        return f"tri{'l' if lower else 'u'}{'topleft' if self.last else 'bottomright'}diag"

    @property
    def reads_factor(self) -> bool:  # type: ignore[override]
        """A dense column is multiplied with the data."""
        return not self.row

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Diagonal and arm."""
        return (self.dim,), (self.dim - 1,)

    @property
    def statistic_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The diagonal of ``A``, and its pivot row or ``A v``."""
        return (self.dim,), (self.dim,)

    def statistic(self, moment: SecondMoment, K: Parts | None = None) -> Parts:
        """The diagonal, and one matrix-vector product."""
        if self.row or K is None:
            column = moment.columns(0, 1) if self.last else moment.columns(1, 0)
        else:
            column = moment.product(self._column(K).to(moment.dtype).unsqueeze(2))
        return moment.diagonal(), column.squeeze(2)

    def identity(self, groups: int, dtype: torch.dtype, device: torch.device) -> Parts:
        """Identity matrices: ones, and no arm."""
        ones = torch.ones(groups, self.dim, dtype=dtype, device=device)
        return ones, torch.zeros_like(ones[:, 1:])

    def matmul(self, K: Parts, m: Parts) -> Parts:
        """Elementwise."""
        (a, c), (x, z) = self._split(K[0]), self._split(m[0])
        arm = K[1] * x + c * m[1] if self.row else a * m[1] + K[1] * z
        return K[0] * m[0], arm

    def gram(self, K: Parts) -> Parts:
        """``K^T K``, the arm doubled."""
        (a, c), b = self._split(K[0]), K[1]
        if self.row:
            return self._join(a.square() + b.square(), c.square()), 2 * c * b
        corner = c.square() + b.square().sum(1, keepdim=True)
        return self._join(a.square(), corner), 2 * a * b

    def congruence(self, K: Parts, A: Parts) -> Parts:
        """``K^T A K``, the arm doubled."""
        (a, c), b = self._split(K[0]), K[1]
        (q, corner), (r, _) = self._split(A[0]), self._split(A[1])
        if self.row:
            diagonal = a.square() * q + 2 * a * b * r + b.square() * corner
            return self._join(diagonal, c.square() * corner), 2 * c * (a * r + b * corner)
        corner = (self._column(K) * A[1]).sum(1, keepdim=True)
        return self._join(a.square() * q, corner), 2 * a * r

    def trace(self, m: Parts) -> Tensor:
        """Mean of the diagonal."""
        return m[0].mean(1)

    def statistic_trace(self, A: Parts) -> Tensor:
        """Mean of the diagonal."""
        return A[0].mean(1)

    def apply_kkt(self, K: Parts, X: Tensor) -> Tensor:
        """``K^T X``, then ``K`` times it."""
        (a, c), b = self._split(K[0].unsqueeze(2)), K[1].unsqueeze(2)
        v, s = self._split(X)
        if self.row:
            v, s = a * v + b * s, c * s
            return self._join(a * v, (b * v).sum(1, keepdim=True) + c * s)
        v, s = a * v, (b * v).sum(1, keepdim=True) + c * s
        return self._join(a * v + b * s, c * s)

    def to_dense(self, K: Parts) -> Tensor:
        """Diagonal and arm written out."""
        dense = torch.diag_embed(K[0])
        pivot = self.dim - 1 if self.last else 0
        others = slice(0, -1) if self.last else slice(1, None)
        (dense[:, pivot] if self.row else dense[:, :, pivot])[:, others] = K[1]
        return dense

    def _column(self, K: Parts) -> Tensor:
        """The dense column, its diagonal entry included."""
        return self._join(K[1], self._split(K[0])[1])

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Entries of all other indices along axis 1, and that of the pivot."""
        return (x[:, :-1], x[:, -1:]) if self.last else (x[:, 1:], x[:, :1])

    def _join(self, others: Tensor, pivot: Tensor) -> Tensor:
        """Inverse of :meth:`_split`."""
        return torch.cat([others, pivot] if self.last else [pivot, others], 1)
