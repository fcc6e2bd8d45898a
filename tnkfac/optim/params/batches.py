"""Batches of layers: products, updates and decompositions of many matrices at once.

Every part of a structured matrix has the channel groups ``G`` in front; the groups of several
layers are as independent as those of one. So layers of equal shape are stacked, and diagonals of
whatever sizes lie end to end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from tnkfac.curvature import Matrices, Parts, RaggedDiagonal, fast
from tnkfac.optim.finite import finite_on_host
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.parts import overwrite, read

States = Sequence[dict[str, Any]]

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


class Batch(ABC):
    """Layers whose matrices are taken together.

    Attributes:
        layers: The layers; they share hyper-parameters, device and dtype.
        k: Their input-side matrices.
        c: Their output-side matrices.
    """

    layers: Sequence[CapturedLayer]
    k: Matrices
    c: Matrices

    @abstractmethod
    def factors(self, loss_scale: Tensor | float) -> tuple[Parts, Parts]:
        """Normalised ``A`` and ``B`` of what was measured since the last update."""

    @abstractmethod
    def read(self, states: States, name: str, dtype: torch.dtype) -> Parts:
        """Matrices from the states of the layers; names end in ``K`` or ``C``."""

    @abstractmethod
    def write(self, states: States, new: dict[str, Parts], keep: Tensor | None) -> None:
        """Write matrices into the states, but of no layer where a number is not finite.

        Args:
            states: States of the layers.
            new: New matrices by name.
            keep: Scalar that is zero where the batch is to be skipped.
        """


class Stack(Batch):
    """Layers of equal structures: channel groups of all of them in one matrix."""

    def __init__(self, layers: Sequence[CapturedLayer]) -> None:
        """These layers."""
        self.layers = layers
        self._structures = {"K": layers[0].statistics.k, "C": layers[0].statistics.c}
        self.k, self.c = self._structures.values()

    def factors(self, loss_scale: Tensor | float) -> tuple[Parts, Parts]:
        """One layer after the other."""
        found = [layer.statistics.factors(loss_scale) for layer in self.layers]
        return joined([each.A for each in found]), joined([each.B for each in found])

    def read(self, states: States, name: str, dtype: torch.dtype) -> Parts:
        """Joined."""
        count = len(self._structures[name[-1]].shapes)
        return joined([read(state, name, count, dtype) for state in states])

    def write(self, states: States, new: dict[str, Parts], keep: Tensor | None) -> None:
        """Parted."""
        pieces = [parted(parts, len(self.layers)) for parts in new.values()]
        for state, own in zip(states, zip(*pieces, strict=True), strict=True):
            overwrite(state, dict(zip(new, own, strict=True)), keep)


class EndToEnd(Batch):
    """Layers with diagonal factors of whatever sizes, in one vector."""

    k: RaggedDiagonal
    c: RaggedDiagonal

    def __init__(self, layers: Sequence[CapturedLayer]) -> None:
        """These layers."""
        self.layers = layers
        statistics = [layer.statistics for layer in layers]
        device = layers[0].weight.device
        groups = [each.layer.groups for each in statistics]
        sides = ([each.k.dim for each in statistics], [each.c.dim for each in statistics])
        repeated = (
            tuple(dim for dim, count in zip(side, groups, strict=True) for _ in range(count))
            for side in sides
        )
        self.k, self.c = (RaggedDiagonal.of(lengths, device) for lengths in repeated)
        self._layer = RaggedDiagonal.of(tuple(groups), device).segment  # of every segment

    def factors(self, loss_scale: Tensor | float) -> tuple[Parts, Parts]:
        """All layers at once."""
        A, B, counts = zip(*(layer.statistics.sums() for layer in self.layers), strict=True)
        statistics = self.layers[0].statistics
        on_A, on_B = statistics.normalizers(torch.stack(counts), loss_scale)
        sides = ((self.k, A, on_A), (self.c, B, on_B))
        a, b = (s.scaled((_flat(parts),), by[self._layer]) for s, parts, by in sides)
        return a, b

    def read(self, states: States, name: str, dtype: torch.dtype) -> Parts:
        """End to end."""
        return (_flat([state[name] for state in states]).to(dtype),)

    def write(self, states: States, new: dict[str, Parts], keep: Tensor | None) -> None:
        """Cut, and copied all at once."""
        values = {name: vector for name, (vector,) in new.items()}
        if keep is not None or self._layer.is_cuda or not finite_on_host([*values.values()]):
            good = self._finite(values)
            if keep is not None:
                good &= keep.to(good.device, non_blocking=True) > 0
            for side, names in self._sides(values):
                kept = good[self._layer][side.segment]
                for name in names:
                    (old,) = self.read(states, name, values[name].dtype)
                    values[name] = torch.where(kept, values[name], old)
        for name, vector in values.items():
            parts = [state[name].view(-1) for state in states]
            torch._foreach_copy_(parts, list(torch.split(vector, [len(part) for part in parts])))

    def _finite(self, values: dict[str, Tensor]) -> Tensor:
        """Whether all numbers of each layer are finite."""
        bad = torch.zeros(len(self.layers), device=self._layer.device)
        for side, names in self._sides(values):
            mean = side.trace((torch.stack([values[name] for name in names]).sum(0),))
            bad.index_add_(0, self._layer, (mean - mean != 0).float())  # not a number, or infinite
        return bad == 0

    def _sides(self, values: dict[str, Tensor]) -> list[tuple[RaggedDiagonal, list[str]]]:
        """The names of input-side and of output-side matrices."""
        sides = (self.k, "K"), (self.c, "C")
        return [(side, [name for name in values if name[-1] == end]) for side, end in sides]


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _numbers(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)
