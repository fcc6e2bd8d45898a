"""Which slots a call multiplies with, and in which order its rows are theirs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnkfac.curvature.capture.calls import Rows
from tnkfac.curvature.layers import Layer
from tnkfac.curvature.layers.linear import InputsFirstLinear, Linear
from tnkfac.curvature.uses.blocks import Block, block_of, strided
from tnkfac.curvature.uses.products import Product
from tnkfac.curvature.uses.slots import (
    ANOTHER_BIAS,
    BOTH_WAYS,
    COMPILED,
    COMPILED_GROUPS,
    NO_BLOCK,
    NOT_CONTIGUOUS,
    OTHER_SHAPES,
    OVERLAPPING,
    PART_OF_CONVOLUTION,
    BiasSlot,
    Slot,
    Weight,
)

Declare = Callable[[Weight, list[Slot]], bool]
"""Takes new slots up and gives them statistics; False if they cannot be trained."""
FindBias = Callable[[Any, int], BiasSlot | None]
"""Finds the trained bias that an argument is, given how many numbers it should have."""
Share = tuple[Slot, Layer, Rows | None]
"""A slot that a call multiplies with, the layer that it is there, and its rows."""


class Place(NamedTuple):
    """Which numbers of which weight an argument is.

    Attributes:
        weight: The weight.
        param: The parameter, as the module holds it now.
        shape: Shape of the argument.
        strides: Its strides in the memory of the parameter.
        offset: Its distance from the first number of the parameter.
        entries: Indices of the matrices that were copied, ``[T]``.
    """

    weight: Weight
    param: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    entries: Tensor | None = None


class Matching:
    """Finds slots of calls, and has new ones declared."""

    def __init__(self, declare: Declare, find_bias: FindBias) -> None:
        """Take up what is new by these.

        Args:
            declare: Takes up new slots.
            find_bias: Finds the bias that an argument is.
        """
        self._declare, self._find_bias = declare, find_bias

    def shares(self, product: Product, place: Place) -> list[Share] | str:
        """What a call multiplies with, or why nothing can be measured of it.

        Args:
            product: The call.
            place: Which numbers of which weight it takes.
        """
        if place.weight.refused:
            return place.weight.refused
        found = self._found(product, place)
        if not (isinstance(found, str) or torch.compiler.is_compiling()):
            for slot, _, _ in found:
                slot.used = True
        return found

    def _found(self, product: Product, place: Place) -> list[Share] | str:
        """The same, before slots know that they are used."""
        if product.convolution is not None:
            return self._convolved(product.convolution, product, place)
        shape, strides = place.shape, place.strides
        if product.matrix is not None and product.matrix != shape:
            shape, strides = product.matrix, (product.matrix[1], 1)
            if not _is_ordered(place):
                return NO_BLOCK
        elif len(shape) == 3:
            if shape[0] > 1 and strides[0] != 0:
                return self._stacked(product, place)
            shape, strides = shape[1:], strides[1:]  # the same matrix for all of a batch
        if len(shape) != 2 or place.entries is not None:
            return NO_BLOCK
        located = _whole_of(place) or block_of(shape, strides, place.offset)
        if located is None:
            return NO_BLOCK
        block, transposed = located
        found = self._slots_of(place, block, product.outputs_first != transposed, product.bias)
        if isinstance(found, str):
            return found
        if len(found) == 1 and found[0][0].layer.out_channels == _outputs(product, shape):
            return [(found[0][0], found[0][0].layer, product.rows)]
        return [
            (slot, slot.layer, _of_outputs(product.rows, first, first + slot.layer.out_channels))
            for slot, first in found
        ]

    def _slots_of(
        self, place: Place, block: Block, outputs_first: bool, bias: Any
    ) -> list[tuple[Slot, int]] | str:
        """Slots of a block, each with its first output in the call; or why there are none."""
        weight = place.weight
        whole = block.is_whole(place.param.shape)
        if not whole and not torch.compiler.is_compiling() and not strided(_local(place.param)):
            return weight.refuse(NOT_CONTIGUOUS)
        wanted = None if whole else block
        same = [slot for slot in weight.slots if slot.block == wanted]
        if same and same[0].outputs_first != outputs_first:
            return weight.refuse(BOTH_WAYS)
        slots = [(slot, 0) for slot in same] or _tiles(weight, wanted, outputs_first)
        if slots and all(self._has_bias(slot, bias, first) for slot, first in slots):
            return slots
        if slots and not weight.drop_expected():
            return weight.refuse(ANOTHER_BIAS)
        if torch.compiler.is_compiling():
            return COMPILED
        known = [_block_of_slot(slot, place.param) for slot in weight.slots]
        overlap = any(other is None or other.overlaps(block) for other in known)
        if overlap and not weight.drop_expected():
            return weight.refuse(OVERLAPPING)
        return self._declared(place, block, outputs_first, bias)

    def _declared(
        self, place: Place, block: Block, outputs_first: bool, bias: Any
    ) -> list[tuple[Slot, int]] | str:
        """New slots: the block, and with one matrix of a stack all the others."""
        weight, shape = place.weight, tuple(place.param.shape)
        inputs, outputs = block.rows, block.columns
        if outputs_first:
            inputs, outputs = outputs, inputs
        kind = Linear if outputs_first else InputsFirstLinear
        if block.is_entry(shape):
            layer = kind(inputs, outputs, False, 1)
            new = [Slot(each, outputs_first, layer, used=True) for each in block.entries(shape)]
        else:
            own = self._find_bias(bias, outputs)
            layer = kind(inputs, outputs, own is not None, 1)
            block_or_all = None if block.is_whole(shape) else block
            new = [Slot(block_or_all, outputs_first, layer, own, used=True)]
        if not self._take_up(weight, new):
            return weight.refused
        return [(next(slot for slot in new if slot.block in (None, block)), 0)]

    def _take_up(self, weight: Weight, new: list[Slot]) -> bool:
        """Give new slots statistics; tell whether they can be trained."""
        if not self._declare(weight, new):
            return False
        weight.add(new)
        return True

    def _has_bias(self, slot: Slot, argument: Any, first: int) -> bool:
        """Whether a call adds the bias that its slot has, from its first output on."""
        if slot.bias is None or torch.compiler.is_compiling():
            return True
        if not isinstance(argument, Tensor):
            return False
        told = self._find_bias(argument, argument.numel())
        if told is None or told[:2] != slot.bias[:2]:
            return False
        starts = [0 if each.span is None else each.span.offset for each in (told, slot.bias)]
        return starts[1] == starts[0] + first and first + slot.layer.out_channels <= len(argument)

    def _stacked(self, product: Product, place: Place) -> list[Share] | str:
        """All matrices of a stack."""
        weight, shape = place.weight, tuple(place.param.shape)
        if len(shape) == 2:
            return self._stacked_blocks(product, place)
        if len(shape) != 3 or place.offset or not _has_order_of(place):
            return NO_BLOCK
        outputs_first = product.outputs_first == (place.strides[2] == 1)
        if torch.compiler.is_compiling() and product.ends is not None:
            return COMPILED_GROUPS
        _, rows, columns = shape
        found = self._slots_of(place, Block(0, rows, columns, columns), outputs_first, None)
        if isinstance(found, str):
            return found
        if len(weight.slots) != shape[0]:
            return NO_BLOCK
        by_matrix = _ByMatrix(product, place.entries, shape[0])
        return [(slot, slot.layer, by_matrix.rows(e)) for e, slot in enumerate(weight.slots)]

    def _stacked_blocks(self, product: Product, place: Place) -> list[Share] | str:
        """Blocks of one matrix as a stack, each with a part of the inputs."""
        if place.entries is not None or product.ends is not None:
            return NO_BLOCK
        by_matrix = _ByMatrix(product, None, place.shape[0])
        shares: list[Share] = []
        for e in range(place.shape[0]):
            start = place.offset + e * place.strides[0]
            located = block_of(place.shape[1:], place.strides[1:], start)
            if located is None:
                return NO_BLOCK
            block, transposed = located
            found = self._slots_of(place, block, product.outputs_first != transposed, None)
            if isinstance(found, str):
                return found
            if len(found) != 1:
                return place.weight.refuse(OVERLAPPING)
            shares.append((found[0][0], found[0][0].layer, by_matrix.rows(e)))
        return shares

    def _convolved(
        self, describe: Callable[[bool], Layer], product: Product, place: Place
    ) -> list[Share] | str:
        """A convolution with a whole weight."""
        weight = place.weight
        same = place.shape == tuple(place.param.shape) and place.entries is None
        if not same or (not torch.compiler.is_compiling() and not _is_param(place)):
            return PART_OF_CONVOLUTION
        other = weight.slots and not self._has_bias(weight.slots[0], product.bias, 0)
        if other and not weight.drop_expected():
            return weight.refuse(ANOTHER_BIAS)
        if not weight.slots:
            if torch.compiler.is_compiling():
                return COMPILED
            bias = self._find_bias(product.bias, describe(False).out_channels)
            new = Slot(None, product.outputs_first, describe(bias is not None), bias)
            if not self._take_up(weight, [new]):
                return weight.refused
        slot, layer = weight.slots[0], describe(weight.slots[0].layer.bias)
        if type(slot.layer) is not type(layer) or slot.layer.weight_layout != layer.weight_layout:
            return weight.refuse(OTHER_SHAPES)
        return [(slot, layer, None)]


def _outputs(product: Product, shape: tuple[int, ...]) -> int:
    """How many outputs a call has whose weight argument has this shape."""
    return shape[0] if product.outputs_first else shape[1]


def _local(param: Tensor) -> Tensor:
    """The part of a parameter that is here, of a distributed one."""
    local: Tensor = getattr(param, "_local_tensor", param)
    return local


def _block_of_slot(slot: Slot, param: Tensor) -> Block | None:
    if slot.block is not None:
        return slot.block
    return _whole(tuple(param.shape)) if param.ndim == 2 else None


def _whole(shape: tuple[int, ...]) -> Block:
    """All of a matrix as a block."""
    rows, columns = shape
    return Block(0, rows, columns, columns)


def _whole_of(place: Place) -> tuple[Block, bool] | None:
    """A whole matrix or its transpose, however it lies in memory; None for anything else."""
    shape, strides = tuple(place.param.shape), tuple(place.param.stride())
    if len(shape) != 2 or place.offset or place.param.is_contiguous():
        return None
    if (place.shape, tuple(place.strides)) == (shape, strides):
        return _whole(shape), False
    if (place.shape, tuple(place.strides)) == (shape[::-1], strides[::-1]):
        return _whole(shape), True
    return None


def _tiles(weight: Weight, block: Block | None, outputs_first: bool) -> list[tuple[Slot, int]]:
    """Slots that together are a block, or all, by rows of outputs; none if they are not."""
    if not outputs_first or not weight.slots or weight.slots[0].block is None:
        return []
    if block is None:
        block = _whole(weight.shape)
    tiles, end = [], 0
    for slot in weight.slots:  # in the order of their offsets
        first = None if slot.block is None else slot.block.place_in(block)
        if first is None or not slot.outputs_first:
            continue
        if first != end:
            return []
        tiles.append((slot, first))
        end += slot.layer.out_channels
    return tiles if end == block.rows else []


def _is_param(place: Place) -> bool:
    """Whether an argument has the numbers of a whole parameter in their order."""
    return place.offset == 0 and place.strides == place.param.stride()


def _of_outputs(rows: Rows | None, first: int, last: int) -> Rows:
    """Rows with some of the outputs."""

    def some(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        if rows is not None:
            x, g = rows(x, g)
        return x, g[..., first:last]

    return some


def _is_ordered(place: Place) -> bool:
    """Whether an argument has its numbers in the order in which they lie in memory."""
    expected = 1
    for size, stride in zip(reversed(place.shape), reversed(place.strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _has_order_of(place: Place) -> bool:
    """Whether a stack of matrices is the parameter, or that with each matrix transposed."""
    (count, *sizes), (rows, columns) = tuple(place.param.shape), place.shape[1:]
    plain = [rows, columns] == sizes and place.strides[1:] == (columns, 1)
    turned = [columns, rows] == sizes and place.strides[1:] == (1, rows)
    whole = place.shape[0] == count or place.entries is not None
    return whole and place.strides[0] == rows * columns and (plain or turned)


class _ByMatrix:
    """Rows of all matrices of a stack, found once for each backward pass."""

    def __init__(self, product: Product, entries: Tensor | None, count: int) -> None:
        self._product, self._entries, self._count = product, entries, count
        self._found: tuple[Tensor, list[tuple[Tensor, Tensor]]] | None = None

    def rows(self, entry: int) -> Rows:
        """Those of one matrix."""

        def of_entry(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            if (
                torch.compiler.is_compiling()
            ):  # which remembers nothing, and finds it once by itself
                x, g = self._moved(x, g)
                return x[entry], g[entry]
            if self._found is None or self._found[0] is not g:
                self._found = g, list(zip(*map(self._parted, self._moved(x, g)), strict=True))
            found = self._found[1][entry]
            if entry == self._count - 1:
                self._found = None
            return found

        return of_entry

    def _moved(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return (x, g) if self._product.rows is None else self._product.rows(x, g)

    def _parted(self, rows: Tensor) -> list[Tensor]:
        """Rows ``[n, C]`` of each matrix."""
        ends, entries = self._product.ends, self._entries
        if ends is not None:
            bounds = [0, *ends.tolist()]
            sizes = [last - first for first, last in pairwise(bounds)]
            return list(torch.split(rows[: bounds[-1]], sizes))
        if entries is None:
            return list(rows.unbind())
        ordered = rows.index_select(0, entries.argsort(stable=True))
        sizes = torch.bincount(entries, minlength=self._count).tolist()
        return [some.flatten(0, 1) for some in torch.split(ordered, sizes)]
