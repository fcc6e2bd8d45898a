"""The vectors that a weight meets, without the one of a bias: rows of its inputs and outputs.

:class:`Rows` says what can be read of the second moment of some vectors. What is known of them
decides how: :class:`Vectors` lie in memory as they are, :class:`Pixels` are those of an image,
:class:`~tnkfac.curvature.moments.patches.Patches` those of an unfolded one, and
:class:`~tnkfac.curvature.moments.one_hot.OneHot` have a single one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from tnkfac.curvature.moments.algorithms import Algorithm
from tnkfac.curvature.moments.position_sums import fused_squared_sums, sum_of_squares
from tnkfac.curvature.moments.products import convolved
from tnkfac.curvature.moments.products.syrk import fill_product
from tnkfac.curvature.moments.windows import CHUNK, fill_from_pixels, pixel_rows


class Rows(ABC):
    """Vectors ``u`` of ``dim`` numbers in ``groups`` groups, one per sample and position.

    A subclass gives :meth:`parts` and :meth:`sample_sums`, and overrides what it can read without.

    Attributes:
        groups: Channel groups ``G``.
        dim: Numbers ``D`` of a vector.
        samples: Batch size ``N``.
        positions: Vectors ``S`` per sample.
        dtype: In which numbers are read.
        is_diagonal: Whether all of ``sum u u^T`` that is not zero is its diagonal.
    """

    is_diagonal: ClassVar[bool] = False

    def __init__(
        self, x: Tensor, dtype: torch.dtype, groups: int, dim: int, samples: int, positions: int
    ) -> None:
        """Rows of a tensor, which is converted when it is read."""
        self.raw, self.dtype, self.groups, self.dim = x, dtype, groups, dim
        self.samples, self.positions = samples, positions

    @property
    def x(self) -> Tensor:
        """The tensor that the rows are made of, to be read."""
        if self.raw.dtype != self.dtype:
            self.raw = self.raw.to(self.dtype)
        return self.raw

    @property
    def count(self) -> int:
        """Number of vectors."""
        return self.samples * self.positions

    @abstractmethod
    def parts(self) -> Iterator[Tensor]:
        """All vectors that are not zero as columns ``[G, D, M]``, a bounded number at a time."""

    @abstractmethod
    def sample_sums(self) -> Tensor:
        """Sum over the positions of every sample, ``[N, G, D]``, of its own memory."""

    def unfolded(self) -> Tensor:
        """All vectors at once, ``[G, N, S, D]``."""
        u = torch.cat(list(self.parts()), 2)
        shape = (self.groups, self.dim, self.samples, self.positions)
        return u.view(shape).permute(0, 2, 3, 1)

    def squared_sums(self) -> Tensor:
        """``sum_n (sum_s u_ns)^2``, ``[G, D]``."""
        return self.sample_sums().square().sum(0)

    def reduced(self, weight: float) -> Rows:
        """One vector per sample: the sum over its positions times a number."""
        return SampleSums(self, weight)

    def dense(self, out: Tensor) -> None:
        """Fill ``out [G, D, D]`` with ``sum u u^T``."""
        out.zero_()
        for u in self.parts():
            out += u @ u.mT

    def diagonal(self) -> Tensor:
        """The diagonal of ``sum u u^T``, ``[G, D]``."""
        total = self.zeros(self.groups, self.dim)
        for u in self.parts():
            total += u.square().sum(2)
        return total

    def total(self) -> Tensor:
        """``sum u``, ``[G, D]``."""
        total = self.zeros(self.groups, self.dim)
        for u in self.parts():
            total += u.sum(2)
        return total

    def blocks(self, blocks: Tensor, last: Tensor) -> None:
        """Fill the diagonal blocks ``[G, B, k, k]`` of ``sum u u^T`` and the last ``[G, r, r]``."""
        beta = 0.0
        for u in self.parts():
            _add_blocks(blocks, last, u, beta)
            beta = 1.0
        if beta == 0.0:
            blocks.zero_()
            last.zero_()

    def times(self, V: Tensor) -> Tensor:
        """``sum u u^T V`` for ``V [G, D, r]``."""
        product = torch.zeros_like(V)
        for u in self.parts():
            product += u @ (u.mT @ V)
        return product

    def columns(self, first: int, last: int) -> Tensor:
        """First and last columns of ``sum u u^T``, ``[G, D, first + last]``."""
        columns = self.zeros(self.groups, self.dim, first + last)
        for u in self.parts():
            columns[:, :, :first] += u @ u[:, :first].mT
            columns[:, :, first:] += u @ u[:, self.dim - last :].mT
        return columns

    def zeros(self, *shape: int) -> Tensor:
        """Zeros to add to."""
        return self.raw.new_zeros(shape, dtype=self.dtype)

    def algorithms(self, width: int) -> tuple[Algorithm, ...]:
        """Ways to form so many numbers in every row of the second moment, the cheapest first.

        Args:
            width: ``D`` for all, one for the diagonal, or the size of a block.
        """
        operations = self.count * self.groups * self.dim * width
        return (Algorithm("view", operations, 0, operations / 70),)


class Vectors(Rows):
    """Vectors that lie in memory: ``[N * S, G, D]``."""

    def __init__(self, x: Tensor, dtype: torch.dtype, positions: int = 1) -> None:
        """Take them as they are, the positions of a sample one after the other."""
        count, groups, dim = x.shape
        super().__init__(x, dtype, groups, dim, count // max(1, positions), positions)

    def parts(self) -> Iterator[Tensor]:
        """A view of all of them."""
        if self.raw.shape[0]:
            each = max(1, self.groups * self.dim)
            yield from torch.split(self._columns, max(1, CHUNK // each), 2)

    @property
    def _columns(self) -> Tensor:
        return self.x.permute(1, 2, 0)

    def sample_sums(self) -> Tensor:
        """Positions are next to each other."""
        return self._by_sample(self.x).sum(1)

    def _by_sample(self, x: Tensor) -> Tensor:
        return x.view(self.samples, self.positions, self.groups, self.dim)

    def unfolded(self) -> Tensor:
        """A view."""
        return self._by_sample(self.x).permute(2, 0, 1, 3)

    def squared_sums(self) -> Tensor:
        """One kernel of Triton's on CUDA."""
        fused = None
        if self.groups == 1 and self.raw.is_cuda:
            fused = fused_squared_sums(self._by_sample(self.raw).squeeze(2).mT)
        return super().squared_sums() if fused is None else fused.T

    def reduced(self, weight: float) -> Rows:
        """These rows themselves where every sample has one; else their sums."""
        return self if self.positions == 1 else super().reduced(weight)

    def dense(self, out: Tensor) -> None:
        """One product."""
        if convolved.pays(self.raw, self.dtype, self.count, out.numel()):
            convolved.fill_products(out, convolved.wide_images(self.x.flatten(1)))
        else:
            fill_product(out, (self._columns,), self.x.shape[0])

    def blocks(self, blocks: Tensor, last: Tensor) -> None:
        """As pixels of images, where that is faster."""
        whole = not last.numel()  # a part of the rows would be copied
        if whole and convolved.pays(self.raw, self.dtype, self.count, blocks.numel()):
            convolved.fill_blocks(blocks, last, convolved.images_of(self.x))
        else:
            super().blocks(blocks, last)

    def diagonal(self) -> Tensor:
        """Column by column."""
        return sum_of_squares(self.x)

    def total(self) -> Tensor:
        """Column by column."""
        return self.x.sum(0)


class SampleSums(Vectors):
    """One vector per sample, the weighted sum over its positions: the rows of KFAC-reduce."""

    def __init__(self, source: Rows, weight: float) -> None:
        """Take rows, which are summed when they are read."""
        Rows.__init__(self, source.raw, source.dtype, source.groups, source.dim, source.samples, 1)
        self._source, self._weight = source, weight
        self._sums: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """The sums, ``[N, G, D]``."""
        if self._sums is None:
            sums = self._source.sample_sums()
            self._sums = sums if self._weight == 1 else sums.mul_(self._weight)
        return self._sums

    def diagonal(self) -> Tensor:
        """Summed and squared at once."""
        squares = self._source.squared_sums()
        return squares if self._weight == 1 else squares * self._weight**2

    def algorithms(self, width: int) -> tuple[Algorithm, ...]:
        """Sums, and products of samples."""
        numbers, vectors = self.raw.numel(), self.samples * self.groups * self.dim
        held = vectors + numbers // max(1, self.samples)
        cost = 0.5 * numbers + vectors * width / 25
        return (Algorithm("average", numbers + vectors * width, held, cost),)


class Pixels(Rows):
    """All pixels of images ``[N, C, I1, ..]``: the outputs of a convolution."""

    def __init__(self, x: Tensor, dtype: torch.dtype, groups: int) -> None:
        """Take them in groups of channels."""
        count, channels = x.shape[:2]
        super().__init__(x, dtype, groups, channels // groups, count, prod(x.shape[2:]))

    def parts(self) -> Iterator[Tensor]:
        """A copy of a few samples."""
        return pixel_rows(self._pixels)

    @property
    def _pixels(self) -> Tensor:
        return self.x.reshape(self.samples, self.groups, self.dim, self.positions)

    def unfolded(self) -> Tensor:
        """A view."""
        return self._pixels.permute(1, 0, 3, 2)

    def sample_sums(self) -> Tensor:
        """Sums of whole channels."""
        return self.x.flatten(2).sum(2).view(-1, self.groups, self.dim)

    def squared_sums(self) -> Tensor:
        """One kernel of Triton's on CUDA."""
        fused = fused_squared_sums(self.raw)
        return super().squared_sums() if fused is None else fused.view(self.groups, self.dim)

    def dense(self, out: Tensor) -> None:
        """Sample by sample, or a few of them at once."""
        fill_from_pixels(out, self._pixels)

    def blocks(self, blocks: Tensor, last: Tensor) -> None:
        """Products of channels, where that is faster."""
        if convolved.pays(self.raw, self.dtype, self.count, blocks.numel()):
            convolved.fill_blocks(blocks, last, convolved.in_cache(self._pixels))
        else:
            super().blocks(blocks, last)

    def diagonal(self) -> Tensor:
        """Squares of norms, or of pixels, in the order in which they lie in memory."""
        x = self.x
        if x.is_contiguous():
            sums: Tensor = torch.linalg.vector_norm(x.flatten(2), dim=2).square().sum(0)
        else:
            sums = sum_of_squares(x).flatten(1).sum(1)
        return sums.reshape(self.groups, self.dim)

    def total(self) -> Tensor:
        """Batch first."""
        return self.x.sum(0).flatten(1).sum(1).reshape(self.groups, self.dim)


class TracedRows(Rows):
    """Rows for ``torch.compile``: all at once, by a few torch calls, without algorithms."""

    def __init__(self, u: Tensor) -> None:
        """Take ``[G, N, S, D]``."""
        groups, samples, positions, dim = u.shape
        super().__init__(u, u.dtype, groups, dim, samples, positions)

    def unfolded(self) -> Tensor:
        """The rows as they are given."""
        return self.raw

    def parts(self) -> Iterator[Tensor]:
        """All rows in one part."""
        yield self.unfolded().flatten(1, 2).mT

    def sample_sums(self) -> Tensor:
        """Sums over positions, also over one: how many there are is no part of what is traced."""
        return self.raw.sum(2).transpose(0, 1)

    def reduced(self, weight: float) -> Rows:
        """One vector per sample, which is traced as well."""
        return TracedRows((self.sample_sums() * weight).transpose(0, 1).unsqueeze(2))

    def blocks(self, blocks: Tensor, last: Tensor) -> None:
        """A product for every block."""
        u, end = self.unfolded().flatten(1, 2).mT, blocks.shape[1] * blocks.shape[2]
        whole, tail = u[:, :end], u[:, end : end + last.shape[1]]
        whole = whole.reshape(len(u), blocks.shape[1], blocks.shape[2], u.shape[2])
        blocks.copy_(whole @ whole.mT)
        last.copy_(tail @ tail.mT)


def _add_blocks(blocks: Tensor, last: Tensor, u: Tensor, beta: float) -> None:
    """Add the products of ``u [G, D, M]`` within every block."""
    size = blocks.shape[2]
    end = blocks.shape[1] * size
    for out, part in (
        (blocks, u[:, :end].reshape(len(u), blocks.shape[1], size, u.shape[2])),
        (last.unsqueeze(1), u[:, None, end : end + last.shape[1]]),
    ):
        if out.numel():
            square = out.flatten(0, 1)  # a copy where a slice of several groups is not one stack
            part = part.flatten(0, 1)
            torch.baddbmm(square, part, part.mT, beta=beta, out=square)
            if square.data_ptr() != out.data_ptr():
                out.copy_(square.view_as(out))
