"""How a tensor is seen as an operand: splits, merges, slices, pads and windows of its axes.

Each step is a small value that knows the shape it leads to. It never overwrites its tensor, and
all but a :class:`Merge` of torn-apart axes and a padded :class:`Window` cost nothing. Every step
is linear and has an adjoint; the result of a network is shaped by those of its output's view.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tnkfac.einsum.geometry import Axis


@dataclass(frozen=True, slots=True)
class Split:
    """Split one axis into several, first slowest. Adjoint: merge them."""

    axis: int
    sizes: tuple[int, ...]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape after the step."""
        return (*shape[: self.axis], *self.sizes, *shape[self.axis + 1 :])


@dataclass(frozen=True, slots=True)
class Merge:
    """Merge ``count`` neighbouring axes into one. Adjoint: split it."""

    axis: int
    count: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape after the step."""
        end = self.axis + self.count
        return (*shape[: self.axis], prod(shape[self.axis : end]), *shape[end:])


@dataclass(frozen=True, slots=True)
class Squeeze:
    """Drop an axis of size one. Adjoint: insert it."""

    axis: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape after the step."""
        return (*shape[: self.axis], *shape[self.axis + 1 :])


@dataclass(frozen=True, slots=True)
class Slice:
    """Keep every ``step``-th entry of an axis from ``start``. Adjoint: zeros in between."""

    axis: int
    size: int
    start: int = 0
    step: int = 1

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape after the step."""
        return (*shape[: self.axis], self.size, *shape[self.axis + 1 :])


@dataclass(frozen=True, slots=True)
class Window:
    """Replace the axis of pixels by the axes ``o, k`` of a pattern, zeros where it is padded.

    A zero-copy view unless the pattern is padded. The adjoint adds every ``(o, k)`` to its pixel.
    """

    axis: int
    pattern: Axis

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape after the step."""
        sizes = (self.pattern.output_size, self.pattern.kernel_size)
        return (*shape[: self.axis], *sizes, *shape[self.axis + 1 :])


Step = Split | Merge | Squeeze | Slice | Window
View = tuple[Step, ...]


def viewed_shape(shape: tuple[int, ...], view: View) -> tuple[int, ...]:
    """Shape of a tensor after all steps of a view."""
    for step in view:
        shape = step.shape(shape)
    return shape
