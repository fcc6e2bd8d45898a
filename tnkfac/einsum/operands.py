"""Factors of a tensor network: where a tensor comes from, and how it is seen as an operand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from tnkfac.einsum.geometry import Axis
from tnkfac.einsum.views import Split, Squeeze, View, viewed_shape


@dataclass(frozen=True, slots=True)
class Variable:
    """A tensor that the caller supplies under this name."""

    name: str


@dataclass(frozen=True, slots=True)
class Pattern:
    """Index pattern ``[k, o, i]`` of one spatial dimension, a constant."""

    axis: Axis


@dataclass(frozen=True, slots=True)
class Delta:
    """Kronecker delta ``[size, size]``, a constant."""

    size: int


@dataclass(frozen=True, slots=True)
class Ones:
    """Vector of ones ``[size]``, a constant."""

    size: int


Source = Variable | Pattern | Delta | Ones


@dataclass(frozen=True)
class Operand:
    """A source, the view that takes its tensor to one axis per leg, and the legs.

    For the output of a network the view is read backwards: it would take the result to its legs,
    so its adjoint takes the contracted legs to the result.

    Attributes:
        source: Where the tensor comes from.
        shape: Shape of the tensor before the view.
        legs: One name per axis after the view.
        view: Steps from the tensor to one axis per leg.
    """

    source: Source
    shape: tuple[int, ...]
    legs: tuple[str, ...]
    view: View = ()

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Size of every leg."""
        return viewed_shape(self.shape, self.view)

    def renamed(self, names: Mapping[str, str]) -> Operand:
        """The operand with some legs renamed."""
        return replace(self, legs=tuple(names.get(leg, leg) for leg in self.legs))

    def __str__(self) -> str:
        """The legs in einops style, grouped like the axes of the tensor if the view only splits.

        An axis of size one that was dropped is written as ``1``.
        """
        if not all(isinstance(step, Split | Squeeze) for step in self.view):
            return " ".join(self.legs)
        groups = list(self.legs)
        for step in reversed(self.view):
            if isinstance(step, Squeeze):
                groups.insert(step.axis, "1")
            elif isinstance(step, Split):
                end = step.axis + len(step.sizes)
                groups[step.axis : end] = [f"({' '.join(groups[step.axis : end])})"]
        return " ".join(groups)


def grouped(source: Source, groups: Iterable[Sequence[str]], sizes: Mapping[str, int]) -> Operand:
    """An operand whose tensor has one axis per group of legs, first leg slowest."""
    groups = list(groups)
    shape = tuple(prod(sizes[leg] for leg in group) for group in groups)
    view = tuple(
        Split(axis, tuple(sizes[leg] for leg in group))
        for axis, group in reversed(list(enumerate(groups)))
        if len(group) != 1
    )
    return Operand(source, shape, tuple(leg for group in groups for leg in group), view)
