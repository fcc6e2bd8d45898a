"""Rows with a single one: what an embedding multiplies with its weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from tnkfac.curvature.moments.algorithms import Algorithm
from tnkfac.curvature.moments.rows import Rows
from tnkfac.curvature.moments.windows import CHUNK


class OneHot(Rows):
    """One-hot vectors of indices ``[N, S]``, which are counted and never written out.

    An index that is left out is a vector of zeros.
    """

    is_diagonal: ClassVar[bool] = True

    def __init__(
        self, index: Tensor, dtype: torch.dtype, dim: int, left_out: int | None = None
    ) -> None:
        """Take indices below ``dim``."""
        super().__init__(index, dtype, 1, dim, *index.shape)
        self._left_out = left_out

    def _weights(self) -> Tensor:
        """One for every index, zero for those that are left out, ``[N, S]``."""
        if self._left_out is None:
            return torch.ones_like(self.raw, dtype=self.dtype)
        return (self.raw != self._left_out).to(self.dtype)

    def parts(self) -> Iterator[Tensor]:
        """Written out after all, a few at a time."""
        step = max(1, CHUNK // self.dim)
        every = torch.arange(self.dim, device=self.raw.device).unsqueeze(1)
        pairs = zip(
            torch.split(self.raw.flatten(), step),
            torch.split(self._weights().flatten(), step),
            strict=True,
        )
        for index, weights in pairs:
            yield ((index == every) * weights).unsqueeze(0)

    def total(self) -> Tensor:
        """Counts."""
        return self._added(self._weights())

    diagonal = total

    def dense(self, out: Tensor) -> None:
        """Counts on the diagonal."""
        out.zero_()
        out.diagonal(dim1=1, dim2=2).copy_(self.total())

    def reduced(self, weight: float) -> Rows:
        """These rows themselves where every sample has one; else their sums."""
        return self if self.positions == 1 else super().reduced(weight)

    def sample_sums(self) -> Tensor:
        """Histogram of every sample."""
        sums = self.zeros(self.samples, self.dim)
        return sums.scatter_add_(1, self.raw, self._weights()).unsqueeze(1)

    def squared_sums(self) -> Tensor:
        """An index counts as often as its sample has it, without a histogram."""
        return self._added(self._weights() * equal_positions(self.raw, self.dtype))

    def times(self, V: Tensor) -> Tensor:
        """Counts times rows."""
        return self.total().unsqueeze(2) * V

    def columns(self, first: int, last: int) -> Tensor:
        """Two parts of the diagonal."""
        counts, dim = self.total(), self.dim
        eye = torch.eye(dim, dtype=self.dtype, device=self.raw.device) if dim else counts.mT
        return counts.unsqueeze(2) * torch.cat([eye[:, :first], eye[:, dim - last :]], 1)

    def blocks(self, blocks: Tensor, last: Tensor) -> None:
        """Parts of the diagonal."""
        counts, end = self.total(), blocks.shape[1] * blocks.shape[2]
        for out in (blocks, last):
            out.zero_()
        blocks.diagonal(dim1=2, dim2=3).copy_(counts[:, :end].view(blocks.shape[:3]))
        last.diagonal(dim1=1, dim2=2).copy_(counts[:, end:])

    def _added(self, weights: Tensor) -> Tensor:
        """Sum of weights by index, ``[1, D]``; it waits for nothing."""
        return self.zeros(1, self.dim).index_add_(1, self.raw.flatten(), weights.view(1, -1))

    def algorithms(self, width: int) -> tuple[Algorithm, ...]:
        """Counts."""
        return (Algorithm("counts", self.count, 0, 2.0 * self.count),)


def equal_positions(index: Tensor, dtype: torch.dtype) -> Tensor:
    """How many positions of the same sample have the same index, ``[N, S]``.

    Args:
        index: ``[N, S]``.
        dtype: That of the result.
    """
    step = max(1, CHUNK // max(1, index.shape[1] ** 2))
    counts = [(part.unsqueeze(1) == part.unsqueeze(2)).sum(2) for part in torch.split(index, step)]
    return torch.cat(counts).to(dtype)
