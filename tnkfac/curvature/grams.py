"""Gram matrices of a layer: ``sum u u^T`` over a batch, read without forming more than is asked.

A :class:`Gram` is not yet formed. It knows its rows as a tensor network, and each way to read it
(dense, diagonal, blocks) is the contraction of two copies that share different legs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

from tnkfac.curvature import plain
from tnkfac.curvature.layers import Layer
from tnkfac.einsum import Network, Plan, plan

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
    """

    layer: Layer
    tensor: Tensor
    approx: Approx
    is_input: bool
    output_size: tuple[int, ...] | None = None

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
            sizes = plain.output_size(self.layer, self.tensor.shape, self.output_size)
        positions = 1
        for size in sizes:
            positions *= size
        return positions

    @property
    def _ones(self) -> bool:
        return self.is_input and self.layer.bias

    @property
    def dim(self) -> int:
        """Number of features ``D``, the bias included."""
        return self.layer.in_dim if self.is_input else self.layer.out_dim

    def dense(self) -> Tensor:
        """The whole matrix ``[G, D, D]``, bias last."""
        gram = self._read("dense")
        if not self._ones:
            return gram
        size = self.dim
        full = gram.new_empty(gram.shape[0], size, size)
        column = self._read("sum")
        full[:, :-1, :-1] = gram
        full[:, :-1, -1] = column
        full[:, -1, :-1] = column
        full[:, -1, -1] = self._corner
        return full

    def diagonal(self) -> Tensor:
        """The diagonal ``[G, D]``, bias last. No unfolded input is formed."""
        diagonal = self._read("diagonal")
        if not self._ones:
            return diagonal
        return torch.nn.functional.pad(diagonal, (0, 1), value=float(self._corner))

    def blocks(self, size: int) -> tuple[Tensor, Tensor]:
        """Diagonal blocks ``[G, D // size, size, size]`` and the last ``[G, r, r]``."""
        rows = self.rows()
        count = rows.shape[2] // size
        whole = rows[:, :, : count * size].reshape(*rows.shape[:2], count, size)
        rest = rows[:, :, count * size :]
        blocks = torch.einsum("gmbi,gmbj->gbij", whole, whole)
        return blocks, torch.einsum("gmi,gmj->gij", rest, rest)

    def rows(self) -> Tensor:
        """The rows themselves ``[G, M, D]``: unfolded, with a one at the bias."""
        rows = self._read("rows")
        return torch.nn.functional.pad(rows, (0, 1), value=1.0) if self._ones else rows

    @property
    def _corner(self) -> int:
        return self.samples * (self.positions if self.approx == "expand" else 1)

    def _read(self, reading: Reading) -> Tensor:
        if torch.compiler.is_compiling():
            return self._read_plainly(reading)
        key = (self.layer, tuple(self.tensor.shape), self.output_size, self.is_input)
        return _planned(*key, self.approx, reading)(x=self.tensor)

    def _read_plainly(self, reading: Reading) -> Tensor:
        """The same without plans, for tracing and as the twin in tests."""
        args = (self.is_input, self.output_size)
        if self.approx == "expand" and reading in ("diagonal", "sum"):
            x = self.tensor.square() if reading == "diagonal" else self.tensor
            return plain.summed(self.layer, x, *args).sum(1)
        if self.approx == "expand":
            rows = plain.unfolded(self.layer, self.tensor, *args).flatten(1, 2)
        else:
            rows = plain.summed(self.layer, self.tensor, *args)
            rows = rows / self.positions if self.is_input else rows
        if reading == "rows":
            return rows
        if reading == "sum":
            return rows.sum(1)
        return rows.square().sum(1) if reading == "diagonal" else rows.transpose(1, 2) @ rows


@lru_cache(maxsize=4096)
def _planned(
    layer: Layer,
    shape: tuple[int, ...],
    output_size: tuple[int, ...] | None,
    is_input: bool,
    approx: Approx,
    reading: Reading,
) -> Plan:
    rows = layer.input_rows(shape, output_size) if is_input else layer.output_rows(shape)
    return plan(_network(rows, is_input, approx, reading))


def _network(rows: Network, is_input: bool, approx: Approx, reading: Reading) -> Network:
    legs = rows.output.legs
    features = tuple(leg for leg in legs if leg[0] in "ck")
    positions = tuple(leg for leg in legs if leg not in (*features, "n", "g"))
    if approx == "reduce":
        rows = rows.arranged(("n",), ("g",), features)
        if is_input:
            count = prod(rows.sizes[leg] for leg in positions)
            rows = rows.scaled(1 / count)
        positions = ()
    if reading == "sum":
        return rows.arranged(("g",), features)
    if reading == "rows":
        return rows.arranged(("g",), ("n", *positions), features)
    if reading == "diagonal":
        return rows.gram({"n", "g", *positions, *features}, keep=[("g",), features])
    return rows.gram({"n", "g", *positions}, rows=[features], keep=[("g",)])


def gram_pair(layer: Layer, x: Tensor, g: Tensor, approx: Approx) -> tuple[Gram, Gram]:
    """The input and the output Gram of one call of a layer.

    Args:
        layer: The layer.
        x: Input as the module received it.
        g: Gradient of the scalar that was back-propagated, shaped like the output.
        approx: ``"expand"`` or ``"reduce"``.
    """
    outputs = layer.standard_output(g)
    size = tuple(outputs.shape[2:]) if layer.kind == "conv_transpose" else None
    inputs = layer.standard_input(x)
    return Gram(layer, inputs, approx, True, size), Gram(layer, outputs, approx, False)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are summed in float32 at least."""
    return torch.promote_types(dtype, torch.float32)
