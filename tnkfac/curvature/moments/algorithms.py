"""Which way to form a Gram matrix: candidates, what they cost, and the choice.

Costs are estimates: multiply-adds, numbers that are written, and calls, weighted by what they take
on one core of a current CPU. Only their order matters, and it carries over to other devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod

from tnkfac.curvature.layers import Layer
from tnkfac.curvature.moments.contraction import groups_together, planned_gram
from tnkfac.curvature.moments.lags.autocorrelation import BLOCK
from tnkfac.curvature.moments.lags.borders import axis_lags, tap_pairs
from tnkfac.curvature.moments.syrk import triangle
from tnkfac.curvature.moments.tap_classes import TapClasses, tap_classes
from tnkfac.curvature.moments.windows import CHUNK

MOSTLY_PADDING = 0.75
"""Below this fraction of pixels among what is unfolded, a network is worth its plan."""

FEW_PIXELS = 100
"""Up to so many pixels of channels on their own, products of all pixels are cheap."""


MEMORY = 0.275
"""Share of what unfolding at once would hold that lags may take; estimates run a little high."""

LEAST_MEMORY = 2**18
"""Numbers that are always there."""


@dataclass(frozen=True)
class Route:
    """One way to read a Gram matrix.

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
def expand_routes(
    layer: Layer, shape: tuple[int, ...], output_size: tuple[int, ...]
) -> tuple[Route, ...]:
    """Routes to the dense input Gram of KFAC-expand, the cheapest first.

    Args:
        layer: A convolution or transposed convolution.
        shape: Shape of its standard input.
        output_size: Spatial shape of its output.
    """
    classes = tap_classes(layer, shape[2:], output_size)
    routes = [_windows_route(layer, shape, classes)]
    if routes[0].name != "view":
        routes.append(_lags_route(layer, shape, classes))
        alone = shape[1] == layer.groups and prod(shape[2:]) <= FEW_PIXELS
        if alone or _density(classes) < MOSTLY_PADDING:
            routes.append(_network_route(layer, shape, output_size))
    taps, positions = prod(layer.kernel_size), prod(output_size)
    features = shape[1] // layer.groups * taps
    unfolding = 2 * shape[0] * shape[1] * taps * positions + layer.groups * features**2
    most = max(LEAST_MEMORY, MEMORY * unfolding)

    def key(route: Route) -> tuple[bool, float]:
        hungry = route.numbers > most and ("lags" in route.name or "classes" in route.name)
        return hungry, route.cost

    return tuple(sorted(routes, key=key))


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


def _network_route(layer: Layer, shape: tuple[int, ...], output_size: tuple[int, ...]) -> Route:
    """A network never multiplies with padding."""
    plan = planned_gram(layer, shape, output_size)
    cost = plan.flops / 25 + 1.5 * plan.peak_memory + 5e4
    held = plan.peak_memory * groups_together(layer, shape, output_size) // layer.groups
    return Route("network", plan.flops, held, cost)


@lru_cache(maxsize=4096)
def block_routes(
    layer: Layer, shape: tuple[int, ...], output_size: tuple[int, ...], size: int
) -> tuple[Route, ...]:
    """Routes to the diagonal blocks of the input Gram of KFAC-expand, the cheapest first.

    Args:
        layer: A convolution or transposed convolution.
        shape: Shape of its standard input.
        output_size: Spatial shape of its output.
        size: Rows of a block.
    """
    classes = tap_classes(layer, shape[2:], output_size)
    taps, features = prod(layer.kernel_size), layer.in_dim - layer.bias
    unfolding = _windows_route(layer, shape, classes)
    operations = unfolding.operations * size // features
    numbers = operations // size
    cost = operations / (80 * min(1.0, size / 48)) + numbers + 3e4 * (1 + numbers / CHUNK)
    routes = [Route("im2col", operations, unfolding.numbers, cost)]
    channels = min(layer.in_channels // layer.groups, (size - 1) // taps + 2) * layer.groups
    part = (shape[0], channels, *shape[2:])
    slab = expand_routes(replace(layer, in_channels=channels), part, output_size)[0]
    count = -(-features // size)
    cost = (slab.cost + 3e5) * count
    routes.append(Route("slabs", slab.operations * count, slab.numbers, cost))
    return tuple(sorted(routes, key=lambda route: route.cost))


def _windows_route(layer: Layer, shape: tuple[int, ...], classes: TapClasses) -> Route:
    batch, channels = shape[:2]
    operations = numbers = held = most = 0
    for taps in product(*classes):
        features = channels // layer.groups * prod(t.count for t in taps)
        rows = batch * prod(t.positions for t in taps)
        operations += layer.groups * features**2 * rows
        numbers += layer.groups * features * rows
        most = max(most, rows)
        result = layer.groups * features**2
        part = max((layer.groups * features * rows + result) // 8, 2**16)
        held = max(held, min(max(CHUNK, result // 2), part))
    features = channels // layer.groups * prod(layer.kernel_size)
    once = layer.kind == "conv" and all(
        t.stride >= t.step * t.count or t.count == 1 for (t,) in classes
    )
    halves = triangle(features, layer.groups, most)
    cost = operations * halves / _rate(features, layer.groups)
    cost += numbers * 0.6 + 3e4 * (1 + numbers / CHUNK)
    cost += layer.groups * features**2 * (2.0 if len(classes[0]) == 1 else 5.0)
    return Route("view" if once else "im2col", operations, held, cost)


def _lags_route(layer: Layer, shape: tuple[int, ...], classes: TapClasses) -> Route:
    batch, channels = shape[:2]
    groups, each = layer.groups, channels // layer.groups
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
        cost = operations / (70 * min(1.0, each * phases / 24))
    numbers = batch * channels * phases * padded + 2 * channels * each * phases**2 * prod(counts)
    cost += (
        3 * channels * each * phases**2 * prod(counts) + 0.5 * batch * channels * phases * padded
    )
    width = 0
    for taps in product(*classes):
        pairs = [tap_pairs(t, n) for t, n in zip(taps, lags, strict=True)]
        width += prod(len(p.lags) for p in pairs)
        for inner in product((False, True), repeat=len(pairs)):
            if not any(inner):
                continue
            borders = [p.borders for p, at in zip(pairs, inner, strict=True) if at]
            outer = [n for n, at in zip(lags, inner, strict=True) if not at]
            sizes = [t.pixels for t, at in zip(taps, inner, strict=True) if not at]
            for sides in product(*borders):
                met = prod(border.pixels for border in sides)
                pieces = channels * each * met**2 * prod(n.count for n in outer)
                work = pieces * batch * prod(sizes) / prod(n.stride for n in outer) / 1.6
                operations += int(work)
                cost += work / (70 * min(1.0, each * met / 24)) + 10 * pieces + 3.5e5
                numbers += pieces
    cost += 3 * channels * each * width + 6e5
    cost *= 1.25 if phases == 1 else 2.0 if groups == 1 else 4.0
    many = prod(map(len, classes)) > 4  # most of what is looked up is zero then
    cost += (8 if many else 2) * channels * each * prod(layer.kernel_size) ** 2
    name = "lags" if layer.kind == "conv" and phases == 1 else "polyphase lags"
    return Route("tap classes" if layer.kind != "conv" else name, operations, numbers, cost)


def _rate(features: int, groups: int) -> float:
    """Multiply-adds per nanosecond of the product of unfolded rows with themselves."""
    if groups > 1:
        return max(20.0, 70.0 * min(1.0, features / 144))
    return 70.0 * min(1.0, features / 96)
