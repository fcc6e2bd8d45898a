"""Diagonal blocks of images whose channels are groups of their own, from products of their lines.

Neighbouring taps of a depthwise convolution differ by few lines of pixels. So the products of all
pixels of two such lines are formed, ``sum_n x[n, h, v] x[n, h + lag, w]``; which of them a pair of
taps meets is a binary matrix per axis. Padding and strides are in these.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from tnkfac.curvature.moments.tap_classes import TapClass, TapClasses

TOGETHER = 2**19
"""Numbers of products that are formed at one time."""


class Pairs(NamedTuple):
    """The pairs of lines of taps that blocks contain.

    Attributes:
        lines: First and second tap of the first axis, by their lag in pixels.
        met: For each lag, which first lines the pairs meet, ``[pairs, I1 - lag]``.
        across: Which pairs of pixels the pairs of taps of the second axis meet, ``[I2^2, K2^2]``.
        places: Where each entry of the blocks, and then of the last, stands in ``[pairs * K2^2]``.
    """

    lines: dict[int, list[tuple[int, int]]]
    met: dict[int, Tensor]
    across: Tensor
    places: Tensor


def applies(classes: TapClasses) -> bool:
    """Whether these are the taps of a convolution of images."""
    return len(classes) == 2 and all(len(axis) == 1 and axis[0].step > 0 for axis in classes)


def lines_of_blocks(taps: tuple[TapClass, ...], size: int) -> dict[int, list[tuple[int, int]]]:
    """Pairs of lines of taps that meet in blocks of so many rows, by their lag in pixels."""
    rows, columns = (axis.count for axis in taps)
    pairs = set()
    for start in range(0, rows * columns, size):
        met = range(start // columns, (min(start + size, rows * columns) - 1) // columns + 1)
        pairs |= {(j, k) for j, k in product(met, met) if j <= k}
    lines: dict[int, list[tuple[int, int]]] = {}
    for j, k in sorted(pairs):
        lines.setdefault((k - j) * taps[0].step, []).append((j, k))
    return {lag: found for lag, found in lines.items() if lag < taps[0].pixels}


def fill_from_lines(blocks: Tensor, last: Tensor, x: Tensor, classes: TapClasses) -> None:
    """Fill the diagonal blocks ``[C, B, k, k]`` and the last ``[C, r, r]``.

    Args:
        blocks: Overwritten.
        last: Overwritten, too.
        x: ``[N, C, I1, I2]``.
        classes: Classes of taps, which :func:`applies` to.
    """
    taps = tuple(axis[0] for axis in classes)
    pairs = _pairs(taps, blocks.shape[2], x.dtype, x.device)
    channels, height, width = x.shape[1:]
    step = max(1, TOGETHER // (height * width**2))
    whole = blocks.shape[1] * blocks.shape[2] ** 2
    for first in range(0, channels, step):
        found = _moments(x[:, first : first + step], pairs).index_select(1, pairs.places)
        some = slice(first, first + len(found))
        blocks[some] = found[:, :whole].view_as(blocks[some])
        last[some] = found[:, whole:].view_as(last[some])


def _moments(x: Tensor, pairs: Pairs) -> Tensor:
    """Moments of all pairs of lines of taps, and a zero: ``[C, pairs * K2^2 + 1]``."""
    channels, height, width = x.shape[1:]
    lines = x.permute(2, 1, 0, 3).contiguous()
    summed = []
    for lag, met in pairs.met.items():
        above, below = lines[: height - lag].flatten(0, 1), lines[lag:].flatten(0, 1)
        products = torch.bmm(above.mT, below).view(height - lag, -1)
        summed.append((met @ products).view(len(met) * channels, width**2))
    taps = torch.cat(summed) @ pairs.across
    taps = taps.view(-1, channels, taps.shape[1]).transpose(0, 1).flatten(1)
    return torch.nn.functional.pad(taps, (0, 1))


@lru_cache(maxsize=256)
def _pairs(
    taps: tuple[TapClass, ...], size: int, dtype: torch.dtype, device: torch.device
) -> Pairs:
    """Which products each entry of the blocks sums."""
    lines = lines_of_blocks(taps, size)
    met = {lag: _met_lines(taps[0], lag, found).to(device, dtype) for lag, found in lines.items()}
    order = {pair: at for at, pair in enumerate(p for found in lines.values() for p in found)}
    across = _met_across(taps[1]).to(device, dtype)
    rows, columns = (axis.count for axis in taps)
    index = []
    for start in range(0, rows * columns, size):
        block = range(start, min(start + size, rows * columns))
        for p, q in product(block, block):
            (j, a), (k, b) = sorted((divmod(p, columns), divmod(q, columns)))
            place = order.get((j, k))
            index.append(-1 if place is None else place * columns**2 + a * columns + b)
    at = torch.tensor(index, device="cpu")
    at[at < 0] = len(order) * columns**2
    return Pairs(lines, met, across, at.to(device))


def _met_lines(axis: TapClass, lag: int, pairs: list[tuple[int, int]]) -> Tensor:
    """Which first lines of pixels pairs of taps meet, where the second is a lag away."""
    met = torch.zeros(len(pairs), axis.pixels - lag, device="cpu")
    for row, (j, _) in enumerate(pairs):
        for o in range(axis.positions):
            pixel = axis.stride * o + axis.offsets[j]
            if 0 <= pixel < axis.pixels - lag:
                met[row, pixel] = 1
    return met


def _met_across(axis: TapClass) -> Tensor:
    """Which pairs of pixels each pair of taps meets."""
    met = torch.zeros(axis.pixels, axis.pixels, axis.count, axis.count, device="cpu")
    for o in range(axis.positions):
        seen = [(j, axis.stride * o + a) for j, a in enumerate(axis.offsets)]
        seen = [(j, pixel) for j, pixel in seen if 0 <= pixel < axis.pixels]
        for (j, p), (k, q) in product(seen, seen):
            met[p, q, j, k] = 1
    return met.view(axis.pixels**2, axis.count**2)
