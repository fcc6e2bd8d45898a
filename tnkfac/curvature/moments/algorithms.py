"""Which way to form a second moment: candidates, what they cost, and the choice.

Costs are estimates: multiply-adds, numbers that are written, and calls, weighted by what they take
on one core of a current CPU. Only their order matters, and it carries over to other devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod

from tnkfac.curvature.moments.blocks.lines import TOGETHER as LINES
from tnkfac.curvature.moments.blocks.lines import applies, lines_of_blocks
from tnkfac.curvature.moments.contraction import groups_together, planned_moment
from tnkfac.curvature.moments.lags.autocorrelation import BLOCK
from tnkfac.curvature.moments.lags.borders import axis_lags, tap_pairs
from tnkfac.curvature.moments.products.convolved import FEW, LEAST
from tnkfac.curvature.moments.products.syrk import triangle
from tnkfac.curvature.moments.tap_classes import TapClasses
from tnkfac.curvature.moments.unfolding import Unfolding, tap_classes
from tnkfac.curvature.moments.windows import CHUNK

MOSTLY_PADDING = 0.75
"""Below this fraction of pixels among what is unfolded, a network is worth its plan."""

FEW_PIXELS = 100
"""Up to so many pixels of channels on their own, products of all pixels are cheap."""


SMALL = 16
"""Rows of one of many groups up to which convolutions multiply them at a fair rate."""

WHOLE = 256
"""Rows of matrices that may be formed as a whole where blocks on the diagonal are asked for."""

MEMORY = 0.275
"""Share of what unfolding at once would hold that lags may take; estimates run a little high."""

LEAST_MEMORY = 2**18
"""Numbers that are always there."""


@dataclass(frozen=True)
class Algorithm:
    """One way to form a second moment, or the blocks on its diagonal.

    Attributes:
        name: What it is called.
        operations: Multiply-adds.
        numbers: Numbers that it holds at one time, besides input and result.
        cost: Estimated nanoseconds on one core.
    """

    name: str
    operations: int
    numbers: int
    cost: float


@lru_cache(maxsize=4096)
def dense_algorithms(
    unfolding: Unfolding, shape: tuple[int, ...], output_size: tuple[int, ...]
) -> tuple[Algorithm, ...]:
    """Algorithms for the dense second moment of an unfolded input, the cheapest first.

    Args:
        unfolding: That of a convolution or transposed convolution.
        shape: Shape of its input.
        output_size: Spatial shape of its output.
    """
    classes = tap_classes(unfolding, shape[2:], output_size)
    algorithms = [_windows_algorithm(unfolding, shape, classes)]
    if algorithms[0].name != "view":
        algorithms.append(_lags_algorithm(unfolding, shape, classes))
        alone = shape[1] == unfolding.groups and prod(shape[2:]) <= FEW_PIXELS
        if alone or _density(classes) < MOSTLY_PADDING:
            algorithms.append(_network_algorithm(unfolding, shape, output_size))
    taps, positions = prod(unfolding.kernel_size), prod(output_size)
    features = shape[1] // unfolding.groups * taps
    unfolded = 2 * shape[0] * shape[1] * taps * positions + unfolding.groups * features**2
    most = max(LEAST_MEMORY, MEMORY * unfolded)

    def key(algorithm: Algorithm) -> tuple[bool, float]:
        hungry = algorithm.numbers > most and (
            "lags" in algorithm.name or "classes" in algorithm.name
        )
        return hungry, algorithm.cost

    return tuple(sorted(algorithms, key=key))


def _density(classes: TapClasses) -> float:
    """Fraction of the unfolded input that is no padding."""
    density = 1.0
    for axis in classes:
        places = sum(t.count * t.positions for t in axis)
        met = sum(
            0 <= t.stride * o + a < t.pixels
            for t in axis
            for a in t.offsets
            for o in range(t.positions)
        )
        density *= met / max(1, places)
    return density


def _network_algorithm(
    unfolding: Unfolding, shape: tuple[int, ...], output_size: tuple[int, ...]
) -> Algorithm:
    """A network never multiplies with padding."""
    plan = planned_moment(unfolding, shape, output_size)
    cost = plan.flops / 36 + plan.peak_memory + 5e4
    held = plan.peak_memory * groups_together(unfolding, shape, output_size) // unfolding.groups
    return Algorithm("network", plan.flops, held, cost)


@lru_cache(maxsize=4096)
def block_algorithms(
    unfolding: Unfolding, shape: tuple[int, ...], output_size: tuple[int, ...], size: int
) -> tuple[Algorithm, ...]:
    """Algorithms for diagonal blocks of that second moment, the cheapest first.

    Args:
        unfolding: That of a convolution or transposed convolution.
        shape: Shape of its input.
        output_size: Spatial shape of its output.
        size: Rows of a block.
    """
    classes = tap_classes(unfolding, shape[2:], output_size)
    taps, features = prod(unfolding.kernel_size), unfolding.features
    windows = _windows_algorithm(unfolding, shape, classes)
    operations = windows.operations * size // features
    numbers = operations // size
    rows = shape[0] * prod(output_size)
    fast = rows >= FEW and rows * features * size >= LEAST
    cost = operations / ((75 if fast else 45) * min(1.0, size / 48)) + _copied(numbers, output_size)
    algorithms = [Algorithm("im2col", operations, windows.numbers, cost)]
    step, count = slabs_together(unfolding, shape, size), unfolding.slabs(size).count
    groups = unfolding.groups * min(step, count)
    channels = groups * unfolding.slabs(size).width
    part = (shape[0], channels, *shape[2:])
    slab = dense_algorithms(
        replace(unfolding, channels=channels, groups=groups), part, output_size
    )[0]
    calls = count / min(step, count)
    moments = groups * (channels // groups * taps) ** 2
    cost = (slab.cost + moments + prod(part)) * calls + 5e4
    held = slab.numbers + moments + prod(part)
    algorithms.append(Algorithm("slabs", int(slab.operations * calls), held, cost))
    result = unfolding.groups * features**2
    if features <= WHOLE:
        dense = dense_algorithms(unfolding, shape, output_size)[0]
        cost = dense.cost + 2 * result
        algorithms.append(Algorithm("whole", dense.operations, dense.numbers + result, cost))
    if unfolding.groups == unfolding.channels and applies(classes):
        algorithms.append(_lines_algorithm(shape, classes, size))
    return tuple(sorted(algorithms, key=lambda algorithm: algorithm.cost))


def _lines_algorithm(shape: tuple[int, ...], classes: TapClasses, size: int) -> Algorithm:
    """Products of lines of single channels, and which of them are met."""
    batch, channels, height, width = shape
    taps = tuple(axis[0] for axis in classes)
    lines = lines_of_blocks(taps, size)
    pairs, across = sum(map(len, lines.values())), taps[1].count ** 2
    batches = channels * height * len(lines)
    products = batches * width**2
    met = channels * width**2 * pairs * (height + across)
    cost = 100 * batches + products * (batch / min(25.0, width) + 0.25) + met / 50
    cost += 4 * channels * pairs * across + 1e5
    held = min(channels * height * width**2, max(height * width**2, LINES)) * (1 + len(lines))
    return Algorithm("lines", products * batch + met, held, cost)


def slabs_together(unfolding: Unfolding, shape: tuple[int, ...], size: int) -> int:
    """How many slabs are formed at once: inputs and moments of so many stay bounded."""
    slabs = unfolding.slabs(size)
    pixels = shape[0] * slabs.width * prod(shape[2:])
    moments = (slabs.width * slabs.taps) ** 2
    return max(1, CHUNK // max(1, unfolding.groups * max(pixels, moments)))


def _windows_algorithm(
    unfolding: Unfolding, shape: tuple[int, ...], classes: TapClasses
) -> Algorithm:
    batch, channels = shape[:2]
    operations = numbers = held = most = 0
    for taps in product(*classes):
        features = channels // unfolding.groups * prod(t.count for t in taps)
        rows = batch * prod(t.positions for t in taps)
        operations += unfolding.groups * features**2 * rows
        numbers += unfolding.groups * features * rows
        most = max(most, rows)
        result = unfolding.groups * features**2
        part = max((unfolding.groups * features * rows + result) // 8, 2**16)
        held = max(held, min(max(CHUNK, result // 2), part))
    features = channels // unfolding.groups * prod(unfolding.kernel_size)
    once = all(
        len(axis) == 1 and (t.count == 1 or t.stride >= abs(t.step) * t.count)
        for axis in classes
        for t in axis
    )
    halves = triangle(features, unfolding.groups, most)
    cost = operations * halves / _rate(features, unfolding.groups, most)
    cost += _copied(numbers, tuple(axis[0].positions for axis in classes))
    cost += unfolding.groups * features**2 * (2.0 if len(classes[0]) == 1 else 5.0)
    return Algorithm("view" if once else "im2col", operations, held, cost)


def _lags_algorithm(unfolding: Unfolding, shape: tuple[int, ...], classes: TapClasses) -> Algorithm:
    batch, channels = shape[:2]
    groups, each = unfolding.groups, channels // unfolding.groups
    lags = [axis_lags(axis) for axis in classes]
    phases = prod(n.stride for n in lags)
    counts = [2 * n.most + 1 for n in lags]
    half = (counts[0] + 1) // 2 * prod(counts[1:])
    padded = prod(
        -(-axis[0].pixels // n.stride) + n.most for axis, n in zip(classes, lags, strict=True)
    )
    if each * phases == 1:
        wide = half // counts[-1] * (BLOCK + counts[-1] * lags[-1].step) / BLOCK
        operations = int(batch * channels * padded * wide * BLOCK / 4)
        cost = batch * channels * padded * (1 + 0.3 * wide)
    else:
        pixels = batch * prod(axis[0].pixels for axis in classes)
        operations = channels * each * phases * half * pixels
        cost = operations / (150 * min(1.0, each * phases / 24))
    numbers = batch * channels * phases * padded + 2 * channels * each * phases**2 * prod(counts)
    cost += (
        2 * channels * each * phases**2 * prod(counts) + 0.5 * batch * channels * phases * padded
    )
    width = 0
    for taps in product(*classes):
        pairs = [tap_pairs(t, n) for t, n in zip(taps, lags, strict=True)]
        width += prod(len(p.lags) for p in pairs)
        for inner in product((False, True), repeat=len(pairs)):
            if not any(inner):
                continue
            borders = [p.borders for p, is_inner in zip(pairs, inner, strict=True) if is_inner]
            outer = [n for n, is_inner in zip(lags, inner, strict=True) if not is_inner]
            sizes = [t.pixels for t, is_inner in zip(taps, inner, strict=True) if not is_inner]
            for sides in product(*borders):
                met = prod(border.pixels for border in sides)
                pieces = channels * each * met**2 * prod(n.count for n in outer)
                work = pieces * batch * prod(sizes) / prod(n.stride for n in outer) / 1.6
                operations += int(work)
                rate = 70 if each * phases == 1 else 150
                cost += work / (rate * min(1.0, each * met / 24)) + 4 * pieces + 1e5
                numbers += pieces
    cost += 1.5 * channels * each * width + 3e5
    cost *= 1.25 if phases == 1 else 1.7 if groups == 1 else 4.0
    many = prod(map(len, classes)) > 4  # most of what is looked up is zero then
    cost += (8 if many else 1) * channels * each * prod(unfolding.kernel_size) ** 2
    name = "lags" if phases == 1 else "polyphase lags"
    name = name if all(len(axis) == 1 for axis in classes) else "tap classes"
    return Algorithm(name, operations, numbers, cost)


def _copied(numbers: int, output_size: tuple[int, ...]) -> float:
    """Nanoseconds that unfolding takes: short lines of an image take longer."""
    return numbers * (0.35 + 4 / max(1, output_size[-1])) + 3e4 * (1 + numbers / CHUNK)


def _rate(features: int, groups: int, rows: int) -> float:
    """Multiply-adds per nanosecond of the product of unfolded rows with themselves."""
    if rows >= FEW and rows * groups * features**2 >= LEAST:  # by convolutions
        if groups == 1:
            return 120.0 * min(1.0, features / 144)
        return 100.0 if features <= SMALL else max(20.0, 60.0 * min(1.0, features / 144))
    if groups > 1:
        return max(20.0, 55.0 * min(1.0, features / 144))
    return 57.0 * min(1.0, features / 96)
