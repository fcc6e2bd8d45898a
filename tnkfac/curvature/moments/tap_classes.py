"""Which pixels the taps of a layer read: the geometry behind every way to sum over positions.

Along one axis, output position ``o`` and tap ``k`` of a convolution meet at pixel
``stride * o + dilation * k - left``. In a transposed convolution only every ``stride``-th output
position meets a tap at all. Its positions fall into residue classes, and within one class the taps
that are met read the input like an ordinary convolution of stride one. A :class:`TapClass` is
one of these; a convolution has a single one per axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd


@dataclass(frozen=True)
class TapClass:
    """Taps ``first, first + every, ...`` of one axis, which read pixel ``stride * o + offset``.

    Offsets are equally spaced: tap number ``j`` of the class has ``offset + j * step``.

    Attributes:
        first: First tap.
        every: Distance to the next tap.
        count: Number of taps.
        offset: Pixel of the first tap at ``o = 0``; negative in the padding.
        step: Pixels from one tap to the next; negative in transposed convolutions.
        stride: Pixels from one position to the next.
        positions: Number of positions ``o = 0, 1, ..``.
        pixels: Number of pixels of the axis.
    """

    first: int
    every: int
    count: int
    offset: int
    step: int
    stride: int
    positions: int
    pixels: int

    @property
    def offsets(self) -> range:
        """Offset of every tap."""
        return range(self.offset, self.offset + self.step * self.count, self.step)

    @property
    def low(self) -> int:
        """Smallest offset."""
        return min(self.offset, self.offset + self.step * (self.count - 1))

    @property
    def high(self) -> int:
        """Largest offset."""
        return max(self.offset, self.offset + self.step * (self.count - 1))

    @property
    def reach(self) -> range:
        """All positions, existing or not, at which some tap meets a pixel."""
        first = -(self.high // self.stride)
        return range(first, (self.pixels - 1 - self.low) // self.stride + 1)

    @property
    def outside(self) -> list[int]:
        """Positions that meet a pixel but do not exist."""
        return [o for o in self.reach if not 0 <= o < self.positions]

    @property
    def slots(self) -> slice:
        """The taps among all taps of the kernel."""
        return slice(self.first, self.first + self.every * (self.count - 1) + 1, self.every)


TapClasses = tuple[tuple[TapClass, ...], ...]
"""Classes of taps, per axis."""


def convolution_taps(
    k: int, stride: int, left: int, dilation: int, i: int, o: int
) -> tuple[TapClass, ...]:
    """The class of ``k`` taps along an axis of ``i`` pixels and ``o`` positions."""
    return (TapClass(0, 1, k, -left, dilation, stride, o, i),)


def transposed_taps(
    k: int, stride: int, left: int, dilation: int, i: int, o: int
) -> tuple[TapClass, ...]:
    """Classes of a transposed convolution: position ``stride * t + residue`` meets pixel ``t + a``.

    Args:
        k: Number of taps.
        stride: Stride.
        left: Padding before the first pixel.
        dilation: Dilation.
        i: Pixels of the input.
        o: Positions of the output.
    """
    every = stride // gcd(stride, dilation)
    step = -dilation * every // stride
    classes = []
    for first in range(min(every, k)):
        residue = (dilation * first - left) % stride
        offset = (residue + left - dilation * first) // stride
        positions = len(range(residue, o, stride))
        classes.append(
            TapClass(first, every, len(range(first, k, every)), offset, step, 1, positions, i)
        )
    return tuple(classes)
