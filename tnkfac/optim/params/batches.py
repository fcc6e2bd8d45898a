"""Layers of equal shape, whose matrices are stacked: products and decompositions of all at once.

Every part of a structured matrix has the channel groups ``G`` in front; the groups of several
layers are as independent as those of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from tnkfac.curvature import Parts, fast
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer

SMALL = 1 << 15
"""Numbers of both factors up to which stacking pays on the CPU, where it only saves calls."""
SMALL_ON_DEVICE = 1 << 22
"""The same on a device, which is idle during a product of small matrices."""
TOGETHER = 1 << 24
"""Numbers of a stack; it is a copy."""


def stacked(
    layers: Sequence[CapturedLayer], kind: Callable[[CapturedLayer], Hashable]
) -> list[list[int]]:
    """Which layers go together, by their places; each is in one stack.

    Args:
        layers: Layers.
        kind: What layers of a stack have in common, next to device, dtype and structures.
    """
    open_stacks: dict[Hashable, list[int]] = {}
    found: list[list[int]] = []
    for place, layer in enumerate(layers):
        statistics, weight = layer.statistics, layer.weight
        k, c, groups = statistics.k, statistics.c, statistics.layer.groups
        numbers = groups * (_numbers(k.shapes) + _numbers(c.shapes))
        limit = SMALL if weight.device.type == "cpu" else SMALL_ON_DEVICE
        if not fast() or numbers > limit:
            found.append([place])
            continue
        key = k, c, groups, weight.device, weight.dtype, kind(layer)
        mates = open_stacks.get(key)
        if mates is None or (len(mates) + 1) * numbers > TOGETHER:
            mates = open_stacks[key] = []
            found.append(mates)
        mates.append(place)
    return found


class Stacking(ABC):
    """Adds to an optimizer that it works on stacks of layers."""

    @abstractmethod
    def _natural(self, layers: list[CapturedLayer], group: Group, gradients: Tensor) -> Tensor:
        """Precondition the gradient matrices ``[L G, C_out / G, D]`` of a stack of layers."""

    def _stack_kind(self, layer: CapturedLayer, group: Group) -> Hashable:
        """What of the state of a layer keeps it from a stack with others of its shape."""
        return None

    def _stacks(self, layers: list[CapturedLayer]) -> list[tuple[list[int], Group]]:
        """Which layers are taken together, by their places, and their group."""

        def kind(layer: CapturedLayer) -> Hashable:
            group = layer.group
            return id(group), self._stack_kind(layer, group)

        found = stacked(layers, kind)
        return [(places, layers[places[0]].group) for places in found]

    def _naturals(self, layers: list[CapturedLayer], matrices: list[Tensor]) -> list[Tensor]:
        """Precondition the gradient matrices of several layers."""
        found = list(matrices)
        for places, group in self._stacks(layers):
            (stack,) = joined([(matrices[i],) for i in places])
            together = self._natural([layers[i] for i in places], group, stack)
            for i, (one,) in zip(places, parted((together,), len(places)), strict=True):
                found[i] = one
        return found


def joined(several: Sequence[Parts]) -> Parts:
    """One matrix with the channel groups of several."""
    if len(several) == 1:
        return several[0]
    return tuple(torch.cat(parts) for parts in zip(*several, strict=True))


def parted(parts: Parts, count: int) -> list[Parts]:
    """The inverse of :func:`joined`."""
    pieces = [part.chunk(count) for part in parts]
    return [tuple(piece[i] for piece in pieces) for i in range(count)]


def _numbers(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)
