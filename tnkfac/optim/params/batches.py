"""Batches of layers: products, updates and decompositions of many matrices at once.

Every part of a structured matrix has the channel groups ``G`` in front; the groups of several
layers are as independent as those of one. So layers of equal shape are stacked, and diagonals of
whatever sizes lie end to end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from tnkfac.curvature import switch
from tnkfac.curvature.capture.statistics import Factors
from tnkfac.curvature.structures import Matrices, Parts, RaggedDiagonal, Structure
from tnkfac.optim.finite import finite_on_host
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.state import ParamState, State, unpack, write_where

SMALL = 1 << 15
"""Numbers of both factors up to which stacking pays on the CPU, where it only saves calls."""
SMALL_ON_DEVICE = 1 << 22
"""Numbers up to which it pays on a device, which idles during products of small matrices."""
TOGETHER = 1 << 24
"""Numbers of a stack; it is a copy."""


def stacks(layers: Sequence[CapturedLayer], state: State) -> list[list[int]]:
    """Which layers go together, by their places; each is in one stack.

    Those of a stack have device, dtypes, structures and hyper-parameters in common.

    Args:
        layers: Layers.
        state: State of the optimizer.
    """
    open_stacks: dict[Hashable, list[int]] = {}
    stacked: list[list[int]] = []
    for place, layer in enumerate(layers):
        statistics, weight = layer.statistics, layer.weight
        k, c, groups = statistics.k, statistics.c, statistics.layer.groups
        numel = groups * (k.numel + c.numel)
        limit = SMALL if weight.device.type == "cpu" else SMALL_ON_DEVICE
        if switch.plain or numel > limit:
            stacked.append([place])
            continue
        dtypes = tuple(part.dtype for part in state.get(weight, {}).values())
        key = k, c, groups, weight.device, weight.dtype, id(layer.group), dtypes
        mates = open_stacks.get(key)
        if mates is None or (len(mates) + 1) * numel > TOGETHER:
            mates = open_stacks[key] = []
            stacked.append(mates)
        mates.append(place)
    return stacked


def joined(several: Sequence[Parts]) -> Parts:
    """One matrix with the channel groups of several."""
    if len(several) == 1:
        return several[0]
    return tuple(torch.cat(parts) for parts in zip(*several, strict=True))


def parted(parts: Parts, count: int) -> list[Parts]:
    """Cut what :func:`joined` has joined."""
    if count == 1:
        return [parts]
    pieces = [part.chunk(count) for part in parts]
    return [tuple(piece[i] for piece in pieces) for i in range(count)]


class Batch(ABC):
    """Layers whose matrices are taken together.

    Attributes:
        layers: The layers; they share hyper-parameters, device and dtype.
        group: Their hyper-parameters.
        k: Their input-side matrices.
        c: Their output-side matrices.
    """

    k: Matrices
    c: Matrices

    def __init__(
        self,
        layers: Sequence[CapturedLayer],
        state: State,
        loss_scale: Tensor | float = 1.0,
        found_inf: Tensor | None = None,
    ) -> None:
        """Take these layers.

        Args:
            layers: Layers that have a state.
            state: State of the optimizer.
            loss_scale: By how much the loss of the passes was multiplied.
            found_inf: Scalar that is one where nothing is to be written.
        """
        self.layers = layers
        self._states: list[ParamState] = [state[layer.weight] for layer in layers]
        self._loss_scale, self._found_inf = loss_scale, found_inf
        self._join()

    @abstractmethod
    def _join(self) -> None:
        """Set the matrices of both sides."""

    @property
    def group(self) -> Group:
        """Hyper-parameters of all layers."""
        return self.layers[0].group

    @property
    def on_host(self) -> bool:
        """Whether numbers can be read without waiting."""
        return self._found_inf is None and self.layers[0].weight.device.type == "cpu"

    def each(self) -> list[tuple[CapturedLayer, ParamState]]:
        """Every layer with the state of its weight."""
        return list(zip(self.layers, self._states, strict=True))

    @abstractmethod
    def factors(self) -> tuple[Parts, Parts]:
        """Normalised ``A`` and ``B`` of what was measured since the last update."""

    @abstractmethod
    def read(self, name: str, dtype: torch.dtype | None = None) -> Parts:
        """A matrix from the states of the layers, cast if a dtype is given."""

    @abstractmethod
    def write(self, new: Mapping[str, Parts]) -> None:
        """Write matrices into the states, but of no layer where a number is not finite."""


class Stack(Batch):
    """Layers of equal structures: channel groups of all of them in one matrix."""

    k: Structure
    c: Structure

    def _join(self) -> None:
        """Structures of all layers."""
        statistics = self.layers[0].statistics
        self.k, self.c = statistics.k, statistics.c

    def measured(self) -> list[Factors]:
        """Factors measured since the last update, of one layer after the other."""
        return [layer.statistics.factors(self._loss_scale) for layer in self.layers]

    def factors(self) -> tuple[Parts, Parts]:
        """Factors of all layers, joined."""
        measured = self.measured()
        return joined([each.A for each in measured]), joined([each.B for each in measured])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Parts:
        """A matrix of all layers, joined."""
        return joined([unpack(state, name, dtype) for state in self._states])

    def made_of(self, name: str, make: Callable[[Parts], Parts]) -> Parts:
        """Something that is made of a matrix, and kept until that changes.

        It lies in no checkpoint: a resumed run makes the same of the same matrix.

        Args:
            name: Of the matrix.
            make: The same function at all calls for this name.
        """
        sources = [part for state in self._states for part in unpack(state, name)]
        if any(source.is_inference() for source in sources):  # these do not tell of changes
            return make(self.read(name))
        versions = [source._version for source in sources]
        cache = self.layers[0].cached_products
        seen, made = cache.get(name, ([], ()))
        fresh = len(seen) == len(sources) and all(
            old is source and version == now
            for (old, version), source, now in zip(seen, sources, versions, strict=True)
        )
        if not fresh:
            made = make(self.read(name))
            cache[name] = [*zip(sources, versions, strict=True)], made
        return made

    def write(self, new: Mapping[str, Parts]) -> None:
        """Write the parts of each layer into its state."""
        pieces = [parted(parts, len(self.layers)) for parts in new.values()]
        for state, layer_parts in zip(self._states, zip(*pieces, strict=True), strict=True):
            write_where(state, dict(zip(new, layer_parts, strict=True)), self._found_inf)


class EndToEnd(Batch):
    """Layers with diagonal matrices of whatever sizes, in one vector."""

    k: RaggedDiagonal
    c: RaggedDiagonal

    def _join(self) -> None:
        """Structures of all layers."""
        statistics = [layer.statistics for layer in self.layers]
        device = self.layers[0].weight.device
        groups = [each.layer.groups for each in statistics]
        sides = ([each.k.dim for each in statistics], [each.c.dim for each in statistics])
        repeated = (
            tuple(dim for dim, count in zip(side, groups, strict=True) for _ in range(count))
            for side in sides
        )
        self.k, self.c = (RaggedDiagonal.of(lengths, device) for lengths in repeated)
        self._layer = RaggedDiagonal.of(tuple(groups), device).segment  # of every channel group

    def factors(self) -> tuple[Parts, Parts]:
        """Factors of all layers, normalised at once."""
        A, B, counts = zip(*(layer.statistics.sums() for layer in self.layers), strict=True)
        statistics = self.layers[0].statistics
        on_A, on_B = statistics.normalizers(torch.stack(counts), self._loss_scale)
        sides = ((self.k, A, on_A), (self.c, B, on_B))
        a, b = (s.scaled((_flat(parts),), by[self._layer]) for s, parts, by in sides)
        return a, b

    def read(self, name: str, dtype: torch.dtype | None = None) -> Parts:
        """A matrix of all layers, end to end."""
        vector = _flat([state[name] for state in self._states])
        return (vector if dtype is None else vector.to(dtype),)

    def write(self, new: Mapping[str, Parts]) -> None:
        """Cut new matrices, and copy all at once."""
        values = {name: vector for name, (vector,) in new.items()}
        if not self.on_host or not finite_on_host([*values.values()]):
            values = self._guarded(values)
        for name, vector in values.items():
            parts = [state[name].view(-1) for state in self._states]
            torch._foreach_copy_(parts, list(torch.split(vector, [len(part) for part in parts])))

    def _guarded(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Old numbers in the place of new ones for layers of which one is not finite."""
        alike: dict[tuple[int, ...], list[str]] = {}  # names by the sizes of all layers
        for name in values:
            alike.setdefault(tuple(state[name].numel() for state in self._states), []).append(name)
        layers = {sizes: RaggedDiagonal.of(sizes, self._layer.device) for sizes in alike}
        means = [
            layers[sizes].trace((torch.stack([values[name] for name in names]).sum(0),))
            for sizes, names in alike.items()
        ]
        total = torch.stack(means).sum(0)
        good = total - total == 0  # of what is not finite the difference is not a number
        if self._found_inf is not None:
            good &= self._found_inf.to(good.device, non_blocking=True) == 0
        guarded: dict[str, Tensor] = {}
        for sizes, names in alike.items():
            mask = good[layers[sizes].segment]
            for name in names:
                (old,) = self.read(name, values[name].dtype)
                guarded[name] = torch.where(mask, values[name], old)
        return guarded


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
