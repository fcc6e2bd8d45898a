"""Pairs of taps along one axis: which lag they have, and what the borders take away from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tnkfac.curvature.moments.tap_classes import TapClass


@dataclass(frozen=True)
class Lags:
    """All lags of one axis; every ``stride``-th pixel is a phase of its own.

    Attributes:
        stride: Number of phases.
        step: Pixels of a phase per lag.
        most: Largest lag, in steps.
    """

    stride: int
    step: int
    most: int

    @property
    def count(self) -> int:
        """Number of pairs of phases times lags."""
        return self.stride**2 * (2 * self.most + 1)

    def index(self, first: int, second: int) -> int:
        """Index of the correlation of pixels at these offsets from each other."""
        left, right = first % self.stride, second % self.stride
        lag = (second // self.stride - first // self.stride) // self.step
        return (left * self.stride + right) * (2 * self.most + 1) + self.most + lag


@dataclass(frozen=True)
class Border:
    """Positions on one side of an axis that do not exist.

    Attributes:
        first: First pixel that they meet.
        pixels: Number of pixels that they meet.
        parts: ``(entry, p, q)``: of the active entry, the product of these pixels, from ``first``.
    """

    first: int
    pixels: int
    parts: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class TapPairs:
    """The pairs of taps of one class; those that differ in nothing share an entry.

    Attributes:
        entries: Entry of every pair, by first and second tap number.
        lags: Index of the lag of every entry.
        active: First entry that some border takes away from; all later ones are active, too.
        borders: The non-empty sides.
    """

    entries: tuple[tuple[int, ...], ...]
    lags: tuple[int, ...]
    active: int
    borders: tuple[Border, ...]


def axis_lags(classes: tuple[TapClass, ...]) -> Lags:
    """The lags that all classes of an axis need."""
    stride = classes[0].stride
    if stride == 1:
        step = abs(classes[0].step)
        return Lags(1, step, max(taps.count for taps in classes) - 1)
    (taps,) = classes
    return Lags(stride, 1, taps.high // stride - taps.low // stride)


@lru_cache(maxsize=4096)
def tap_pairs(taps: TapClass, lags: Lags) -> TapPairs:
    """Sort the pairs of taps of a class into entries."""
    numbers = range(taps.count)
    offsets = taps.offsets
    met: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    sides = [[], []]  # type: list[list[int]]
    for o in taps.outside:
        side = 0 if o < 0 else 1
        hits = [(j, taps.stride * o + a) for j, a in enumerate(offsets)]
        hits = [(j, pixel) for j, pixel in hits if 0 <= pixel < taps.pixels]
        sides[side] += [pixel for _, pixel in hits]
        for j, p in hits:
            for k, q in hits:
                met.setdefault((j, k), []).append((side, p, q))
    lag_of = {(j, k): lags.index(offsets[j], offsets[k]) for j in numbers for k in numbers}
    plain = sorted({lag for pair, lag in lag_of.items() if pair not in met})
    place = {pair: len(plain) + index for index, pair in enumerate(met)}
    place |= {pair: plain.index(lag) for pair, lag in lag_of.items() if pair not in met}
    borders = []
    for side, pixels in enumerate(sides):
        if pixels:
            first = min(pixels)
            parts = [
                (place[pair] - len(plain), p - first, q - first)
                for pair, places in met.items()
                for edge, p, q in places
                if edge == side
            ]
            borders.append(Border(first, max(pixels) - first + 1, tuple(parts)))
    return TapPairs(
        tuple(tuple(place[j, k] for k in numbers) for j in numbers),
        (*plain, *(lag_of[pair] for pair in met)),
        len(plain),
        tuple(borders),
    )
