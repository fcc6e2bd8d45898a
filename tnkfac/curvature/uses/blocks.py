"""Blocks: the matrices that views of a parameter are, as places in its memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """A matrix in the memory of a contiguous parameter.

    Attributes:
        offset: Place of its first number.
        rows: Number of rows, as they lie in memory.
        columns: Number of columns.
        stride: Distance of rows.
    """

    offset: int
    rows: int
    columns: int
    stride: int

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return self.rows * self.columns

    def of(self, tensor: Tensor) -> Tensor:
        """The block of a tensor with the shape of the parameter.

        Args:
            tensor: The parameter, its gradient, or what else is shaped like it.
        """
        flat = tensor.detach().contiguous()
        shape, strides = (self.rows, self.columns), (self.stride, 1)
        return flat.as_strided(shape, strides, flat.storage_offset() + self.offset)

    def label(self, shape: Sequence[int]) -> str:
        """How it is written as an index of the parameter.

        Args:
            shape: Of the parameter.
        """
        if len(shape) == 2 and self.stride == shape[1]:
            first, left = divmod(self.offset, self.stride)
            columns = f", {left}:{left + self.columns}" if self.columns != shape[1] else ""
            return f"[{first}:{first + self.rows}{columns}]"
        if len(shape) == 3 and self.is_entry(shape):
            return f"[{self.offset // self.numel}]"
        end = self.offset + (self.rows - 1) * self.stride + self.columns
        return f"[{self.offset}:{end}:{self.stride}]"

    def is_whole(self, shape: Sequence[int]) -> bool:
        """Whether it is all of a matrix of this shape."""
        return tuple(shape) == (self.rows, self.columns) and self.offset == 0

    def is_entry(self, shape: Sequence[int]) -> bool:
        """Whether it is one matrix of a stack ``[E, rows, columns]``, as those of experts are."""
        return (
            len(shape) == 3
            and tuple(shape[1:]) == (self.rows, self.columns)
            and self.stride == self.columns
            and self.offset % self.numel == 0
        )

    def entries(self, shape: Sequence[int]) -> list[Block]:
        """All matrices of the stack of which it is one."""
        size = self.numel
        return [Block(e * size, self.rows, self.columns, self.stride) for e in range(shape[0])]

    def overlaps(self, other: Block) -> bool:
        """Whether two blocks have a number in common, as far as that is told without counting."""
        if self.stride == other.stride:
            (row, column), (row_b, column_b) = (divmod(b.offset, b.stride) for b in (self, other))
            return (
                row < row_b + other.rows
                and row_b < row + self.rows
                and column < column_b + other.columns
                and column_b < column + self.columns
            )
        ends = [b.offset + (b.rows - 1) * b.stride + b.columns for b in (self, other)]
        return self.offset < ends[1] and other.offset < ends[0]

    def place_in(self, outer: Block) -> int | None:
        """The row of another block at which this one begins, if it is some of its rows."""
        if self.stride != outer.stride or self.columns != outer.columns:
            return None
        place, rest = divmod(self.offset - outer.offset, outer.stride)
        fits = rest == 0 and place >= 0 and place + self.rows <= outer.rows
        return place if fits else None


@dataclass(frozen=True)
class Span:
    """Some numbers of a vector, such as those of a bias that belong to one matrix.

    Attributes:
        offset: Place of the first one.
        numel: How many they are.
    """

    offset: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """These numbers of a tensor."""
        return tensor.detach().narrow(0, self.offset, self.numel)

    def label(self, shape: Sequence[int]) -> str:
        """How they are written as an index of the parameter."""
        return f"[{self.offset}:{self.offset + self.numel}]"


def block_of(
    shape: Sequence[int], strides: Sequence[int], offset: int
) -> tuple[Block, bool] | None:
    """The block that a view with two axes is, and whether it is the transpose of that.

    Args:
        shape: Of the view.
        strides: Of the view.
        offset: Its distance from the first number of the parameter.

    Returns:
        None for a view that skips numbers within its rows.
    """
    (rows, columns), (down, right) = shape, strides
    if right == 1 and down >= columns:
        return Block(offset, rows, columns, down), False
    if down == 1 and right >= rows:
        return Block(offset, columns, rows, right), True
    return None


def covers(blocks: Iterable[Block | Span], numel: int) -> bool:
    """Whether disjoint blocks are all of a parameter with so many numbers."""
    return sum(block.numel for block in blocks) == numel


def strided(tensor: Tensor) -> bool:
    """Whether a parameter is a plain tensor of whose memory blocks can be taken."""
    return tensor.layout is torch.strided and tensor.is_contiguous()
