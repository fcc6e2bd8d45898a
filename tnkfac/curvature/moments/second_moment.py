"""Gram matrices of a layer: ``sum u u^T`` over a batch, read without forming more than is asked.

A :class:`Gram` is not yet formed. Each way to read it (dense, diagonal, blocks) takes the cheapest
exact route, see :mod:`tnkfac.curvature.moments`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.curvature.layers import Layer
from tnkfac.curvature.moments import products, readings, unfold

Approx = Literal["expand", "reduce"]
APPROXIMATIONS: tuple[Approx, ...] = ("expand", "reduce")
Reading = Literal["dense", "diagonal", "rows", "sum"]


@dataclass(frozen=True)
class Gram:
    """The un-normalised Gram matrix ``[G, D, D]`` of one side of a layer, for one batch.

    With KFAC-expand every position of every sample is a row. With KFAC-reduce every sample is
    one: the mean over positions for inputs, the sum for output gradients (arXiv 2311.00636).

    Attributes:
        layer: Whose rows these are.
        tensor: Standard input or output gradient.
        approx: ``"expand"`` or ``"reduce"``.
        is_input: Whether the rows are those of the unfolded input.
        output_size: Spatial shape of the output, where the input alone does not tell it.
        scale: Number that multiplies what is read.
    """

    layer: Layer
    tensor: Tensor
    approx: Approx
    is_input: bool
    output_size: tuple[int, ...] | None = None
    scale: float = 1  # an integer, which torch.compile(dynamic=True) makes no input of

    @property
    def samples(self) -> int:
        """Batch size ``N``."""
        return self.tensor.shape[0]

    @property
    def positions(self) -> int:
        """Weight-sharing positions ``S`` of a sample."""
        if self.layer.kind == "linear":
            return self.tensor.shape[1]
        sizes = list(self.tensor.shape[2:])
        if self.is_input:
            sizes = unfold.output_size(self.layer, self.tensor.shape, self.output_size)
        positions = 1
        for size in sizes:
            positions *= size
        return positions

    @property
    def _ones(self) -> bool:
        return self.is_input and self.layer.bias

    @property
    def _empty(self) -> bool:
        return self.tensor.numel() == 0

    @property
    def dim(self) -> int:
        """Number of features ``D``, the bias included."""
        return self.layer.in_dim if self.is_input else self.layer.out_dim

    def dense(self) -> Tensor:
        """The whole matrix ``[G, D, D]``, bias last."""
        if torch.compiler.is_compiling():
            return self._with_bias(self._read_plainly("dense"))
        size = self.dim
        if self._empty:
            return self.tensor.new_zeros(self.layer.groups, size, size)
        full = self.tensor.new_empty(self.layer.groups, size, size)
        features = size - self._ones
        readings.fill_dense(self, full[:, :features, :features])
        if self._ones:
            column = readings.total(self)
            full[:, :-1, -1] = column
            full[:, -1, :-1] = column
            full[:, -1, -1] = self._corner
        return full

    def diagonal(self) -> Tensor:
        """The diagonal ``[G, D]``, bias last. No unfolded input is formed."""
        if torch.compiler.is_compiling():
            diagonal = self._read_plainly("diagonal")
        elif self._empty:
            return self.tensor.new_zeros(self.layer.groups, self.dim)
        else:
            diagonal = readings.diagonal(self)
        return F.pad(diagonal, (0, 1), value=float(self._corner)) if self._ones else diagonal

    def blocks(self, size: int) -> tuple[Tensor, Tensor]:
        """Diagonal blocks ``[G, D // size, size, size]`` and the last ``[G, r, r]``."""
        if torch.compiler.is_compiling():
            rows = self._plain_rows()
            count = rows.shape[2] // size
            whole = rows[:, :, : count * size].reshape(*rows.shape[:2], count, size)
            rest = rows[:, :, count * size :]
            blocks = torch.einsum("gmbi,gmbj->gbij", whole, whole)
            return blocks, torch.einsum("gmi,gmj->gij", rest, rest)
        groups, left = self.layer.groups, self.dim % size
        blocks = self.tensor.new_empty(groups, self.dim // size, size, size)
        last = self.tensor.new_empty(groups, left, left)
        features = self.dim - self._ones
        if self._empty:
            return blocks.zero_(), last.zero_()
        if not self._ones:
            readings.fill_blocks(self, blocks, last)
        elif left:
            readings.fill_blocks(self, blocks, last[:, :-1, :-1])
        else:
            readings.fill_blocks(self, blocks[:, :-1], blocks[:, -1, :-1, :-1])
        if self._ones:
            final = last if left else blocks[:, -1]
            column = readings.total(self)[:, features - final.shape[1] + 1 :]
            final[:, :-1, -1] = column
            final[:, -1, :-1] = column
            final[:, -1, -1] = self._corner
        return blocks, last

    def rows(self) -> Iterator[Tensor]:
        """The rows as columns ``[G, D, M]``, bias last, a bounded part of them at a time."""
        if torch.compiler.is_compiling():
            yield self._plain_rows().transpose(1, 2)
            return
        missing = 0 if self._empty else round(self._corner / self.scale)
        for rows in () if self._empty else readings.rows(self):
            missing -= rows.shape[2]
            yield F.pad(rows, (0, 0, 0, 1), value=self.scale**0.5) if self._ones else rows
        if missing and self._ones:  # positions of a transposed convolution that meet no tap
            zeros = self.tensor.new_zeros(self.layer.groups, self.dim - 1, 1)
            yield F.pad(zeros, (0, 0, 0, 1), value=(self.scale * missing) ** 0.5)

    def product(self, V: Tensor) -> Tensor:
        """The matrix times ``V [G, D, r]``, without forming it."""
        if torch.compiler.is_compiling():
            rows = self._plain_rows()
            return rows.transpose(1, 2) @ (rows @ V)
        if self._empty:
            return torch.zeros_like(V)
        if not self._ones:
            return products.times(self, V)
        column = readings.total(self).unsqueeze(2)
        above = products.times(self, V[:, :-1]) + column * V[:, -1:]
        return torch.cat([above, column.mT @ V[:, :-1] + self._corner * V[:, -1:]], 1)

    def columns(self, first: int, last: int) -> Tensor:
        """Some columns at the start and at the end, ``[G, D, first + last]``.

        Args:
            first: How many from the start.
            last: How many from the end; they do not overlap.
        """
        size = self.dim
        if torch.compiler.is_compiling():
            rows = self._plain_rows()
            chosen = torch.cat([rows[:, :, :first], rows[:, :, size - last :]], 2)
            return rows.transpose(1, 2) @ chosen
        if self._empty:
            return self.tensor.new_zeros(self.layer.groups, size, first + last)
        if not self._ones:
            return products.first_and_last(self, first, last)
        whole = first == size
        column = readings.total(self).unsqueeze(2)
        pixels = products.first_and_last(self, first - whole, max(0, last - 1))
        parts = [pixels, column] if last or whole else [pixels]
        above = torch.cat(parts, 2)
        chosen = torch.cat([column[:, : first - whole], column[:, size - max(last, 1) :]], 1)
        below = chosen.mT
        if last or whole:
            below = F.pad(below, (0, 1), value=self._corner)
        return torch.cat([above, below], 1)

    def _plain_rows(self) -> Tensor:
        """All rows ``[G, M, D]``, bias last."""
        rows = self._read_plainly("rows")
        return F.pad(rows, (0, 1), value=self.scale**0.5) if self._ones else rows

    def _with_bias(self, gram: Tensor) -> Tensor:
        if not self._ones:
            return gram
        column = self._read_plainly("sum").unsqueeze(2)
        corner = column.new_full((gram.shape[0], 1, 1), float(self._corner))
        below = torch.cat([column.transpose(1, 2), corner], 2)
        return torch.cat([torch.cat([gram, column], 2), below], 1)

    @property
    def _corner(self) -> float:
        return self.scale * self.samples * (self.positions if self.approx == "expand" else 1)

    def _read_plainly(self, reading: Reading) -> Tensor:
        """The features of a reading without routes or caches, for tracing and as their twin."""
        args = (self.is_input, self.output_size)
        if self.approx == "expand" and reading in ("diagonal", "sum"):
            x = self.tensor.square() if reading == "diagonal" else self.tensor
            return unfold.summed(self.layer, x, *args).sum(1).mul(self.scale)
        if self.approx == "expand":
            rows = unfold.unfolded(self.layer, self.tensor, *args).flatten(1, 2)
        else:
            rows = unfold.summed(self.layer, self.tensor, *args)
            rows = rows / self.positions if self.is_input else rows
        if reading == "sum":
            return rows.sum(1).mul(self.scale)
        rows = rows.mul(self.scale**0.5)
        if reading == "rows":
            return rows
        return rows.square().sum(1) if reading == "diagonal" else rows.transpose(1, 2) @ rows


def gram_pair(layer: Layer, x: Tensor, g: Tensor, approx: Approx) -> tuple[Gram, Gram]:
    """The input and the output Gram of one call of a layer.

    Args:
        layer: The layer.
        x: Input as the module received it.
        g: Gradient of the scalar that was back-propagated, shaped like the output.
        approx: ``"expand"`` or ``"reduce"``.
    """
    return input_gram(layer, x, g.shape, approx), output_gram(layer, g, approx)


def input_gram(layer: Layer, x: Tensor, output_shape: Sequence[int], approx: Approx) -> Gram:
    """The Gram of the unfolded input of one call that returned an output of some shape."""
    transposed = layer.kind == "conv_transpose"
    size = tuple(output_shape[-layer.dims :]) if transposed else None
    return Gram(layer, layer.standard_input(x), approx, True, size)


def output_gram(layer: Layer, g: Tensor, approx: Approx) -> Gram:
    """The Gram of the gradient with respect to the output of one call."""
    return Gram(layer, layer.standard_output(g), approx, False)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are summed in float32 at least."""
    return torch.promote_types(dtype, torch.float32)
