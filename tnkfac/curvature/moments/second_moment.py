"""Second moments of one side of a layer over a batch, read without forming more than is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.curvature.moments.rows import Rows

Approx = Literal["expand", "reduce"]
APPROXIMATIONS: tuple[Approx, ...] = ("expand", "reduce")


@dataclass(frozen=True)
class SecondMoment:
    """``sum u u^T`` of some rows, ``[G, D, D]``, with a one appended to them for a bias.

    With KFAC-expand every position of every sample is a row. With KFAC-reduce every sample is
    one: the mean over positions for inputs, the sum for output gradients (arXiv 2311.00636).

    Attributes:
        rows: The vectors without the one.
        has_one: Whether it is appended, also to vectors that are zero.
        positions: Positions ``S`` per sample that share the weight.
    """

    rows: Rows
    has_one: bool
    positions: int

    @classmethod
    def of(cls, rows: Rows, approx: Approx, is_input: bool, bias: bool) -> SecondMoment:
        """Second moment of the rows of all positions.

        Args:
            rows: One for every position of every sample.
            approx: ``"expand"`` or ``"reduce"``.
            is_input: Whether to reduce to means, and not to sums.
            bias: Whether the layer has one.
        """
        positions = rows.positions
        if approx == "reduce":
            rows = rows.reduced(1 / positions if is_input and positions else 1)
        return cls(rows, is_input and bias, positions)

    @property
    def samples(self) -> int:
        """Batch size ``N``."""
        return self.rows.samples

    @property
    def groups(self) -> int:
        """Channel groups ``G``."""
        return self.rows.groups

    @property
    def dim(self) -> int:
        """Number of features ``D``, the one included."""
        return self.rows.dim + self.has_one

    @property
    def dtype(self) -> torch.dtype:
        """Number type in which the second moment is read."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Device on which the second moment is read."""
        return self.rows.raw.device

    def dense(self) -> Tensor:
        """The whole matrix ``[G, D, D]``, the one last."""
        full, features = self.empty(self.dim, self.dim), self.rows.dim
        self.rows.dense(full[:, :features, :features])
        if self.has_one:
            self._fill_border(full)
        return full

    def _fill_border(self, matrix: Tensor) -> None:
        """Fill last row and column of a matrix of the last features."""
        column = self.rows.total()[:, self.rows.dim - matrix.shape[1] + 1 :]
        matrix[:, :-1, -1] = column
        matrix[:, -1, :-1] = column
        matrix[:, -1, -1] = self.rows.count

    def diagonal(self) -> Tensor:
        """The diagonal ``[G, D]``, the one last. No unfolded input is formed."""
        diagonal = self.rows.diagonal()
        if not self.has_one:
            return diagonal
        if torch.compiler.is_compiling():
            return F.pad(diagonal, (0, 1), value=float(self.rows.count))
        ones = _column(self.groups, self.rows.count, self.dtype, self.device)
        return torch.cat([diagonal, ones], 1)

    def blocks(self, size: int) -> tuple[Tensor, Tensor]:
        """Diagonal blocks ``[G, D // size, size, size]`` and the last ``[G, r, r]``."""
        left = self.dim % size
        blocks, last = self.empty(self.dim // size, size, size), self.empty(left, left)
        if not self.has_one:
            self.rows.blocks(blocks, last)
        elif left:
            self.rows.blocks(blocks, last[:, :-1, :-1])
            self._fill_border(last)
        else:
            self.rows.blocks(blocks[:, :-1], blocks[:, -1, :-1, :-1])
            self._fill_border(blocks[:, -1])
        return blocks, last

    def vectors(self) -> Iterator[Tensor]:
        """The rows as columns ``[G, D, M]``, the one last, a bounded part of them at a time."""
        missing = self.rows.count
        for u in self.rows.parts():
            missing -= u.shape[2]
            yield F.pad(u, (0, 0, 0, 1), value=1.0) if self.has_one else u
        if self.has_one and not torch.compiler.is_compiling() and missing:
            # Positions of a transposed convolution that meet no tap.
            zeros = self.rows.zeros(self.groups, self.rows.dim, 1)
            yield F.pad(zeros, (0, 0, 0, 1), value=missing**0.5)

    def product(self, V: Tensor) -> Tensor:
        """The matrix times ``V [G, D, r]``, without forming it."""
        if not self.has_one:
            return self.rows.times(V)
        column = self.rows.total().unsqueeze(2)
        above = self.rows.times(V[:, :-1]) + column * V[:, -1:]
        return torch.cat([above, column.mT @ V[:, :-1] + self.rows.count * V[:, -1:]], 1)

    def columns(self, first: int, last: int) -> Tensor:
        """Some columns at the start and at the end, ``[G, D, first + last]``.

        Args:
            first: How many from the start.
            last: How many from the end; they do not overlap.
        """
        if not self.has_one:
            return self.rows.columns(first, last)
        size = self.dim
        whole = first == size
        column = self.rows.total().unsqueeze(2)
        pixels = self.rows.columns(first - whole, max(0, last - 1))
        above = torch.cat([pixels, column] if last or whole else [pixels], 2)
        below = torch.cat([column[:, : first - whole], column[:, size - max(last, 1) :]], 1).mT
        if last or whole:
            below = F.pad(below, (0, 1), value=float(self.rows.count))
        return torch.cat([above, below], 1)

    def empty(self, *shape: int) -> Tensor:
        """Memory for one tensor of this shape per group."""
        return self.rows.raw.new_empty((self.groups, *shape), dtype=self.dtype)


@lru_cache(maxsize=1024)
def _column(groups: int, value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((groups, 1), value, dtype=dtype, device=device)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are summed in float32 at least."""
    return torch.promote_types(dtype, torch.float32)
