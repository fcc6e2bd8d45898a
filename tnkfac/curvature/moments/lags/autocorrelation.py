"""Correlations of the channels of an input at all lags."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.curvature.moments.lags.borders import Lags

BLOCK = 16
"""Neighbouring pixels per row of the products that correlate single channels."""

LONGEST = 2**13
"""Pixels that are summed at one time: rounding errors of long sums in float32 add up."""

TOGETHER = 2**19
"""Numbers that are correlated at one time on the CPU, unless there are more lags."""

LAUNCHED = 2**21
"""The same on other devices."""


def correlate(x: Tensor, groups: int, lags: Sequence[Lags]) -> Tensor:
    """Correlate the channels of every group at all lags, over all pixels.

    Args:
        x: ``[N, C, I1, ..]``.
        groups: Channel groups ``G``.
        lags: Lags of every spatial axis.

    Returns:
        ``[C, C / G, M1, .., Md]`` with ``M`` lags per axis, ordered as :meth:`Lags.index` says.
    """
    if not lags:
        # Copied, as torch would go through views of groups one by one.
        rows = x.view(x.shape[0], groups, -1).transpose(0, 1).contiguous()
        products = torch.bmm(rows.mT, rows)  # of which libraries may round both halves differently
        return ((products + products.mT) / 2).flatten(0, 1)
    strides = [axis.stride for axis in lags]
    if max(strides) == 1:
        return symmetric_lags(x, groups, lags)
    phased = symmetric_lags(_phases(x, lags), groups, lags)
    dims, channels = len(lags), x.shape[1] // groups
    split = phased.reshape(-1, *strides, channels, *strides, *phased.shape[2:])
    axes = [(1 + a, 2 + dims + a, 2 + 2 * dims + a) for a in range(dims)]
    ordered = split.permute(0, 1 + dims, *(place for axis in axes for place in axis))
    return ordered.reshape(-1, channels, *(axis.count for axis in lags))


def _phases(x: Tensor, lags: Sequence[Lags]) -> Tensor:
    """Every ``stride``-th pixel as a channel of its own, ``[N, C * s1 * .., I1 / s1, ..]``."""
    pads: list[int] = []
    for a, axis in enumerate(lags):
        pads = [0, -x.shape[2 + a] % axis.stride, *pads]
    dims = len(lags)
    x = F.pad(x, pads)
    for a, axis in enumerate(lags):
        x = x.reshape(*x.shape[: 2 + 2 * a], -1, axis.stride, *x.shape[3 + 2 * a :])
    order = (0, 1, *(3 + 2 * a for a in range(dims)), *(2 + 2 * a for a in range(dims)))
    return x.permute(order).flatten(1, 1 + dims)


def symmetric_lags(x: Tensor, groups: int, lags: Sequence[Lags]) -> Tensor:
    """All lags within a phase, ``[C, C / G, 2 L1 + 1, ..]``, exactly symmetric.

    At ``L + lag`` stands ``sum_{n, i} x[n, c, i] x[n, d, i + step * lag]``. Lags below zero of the
    first axis come from the others, turned round.
    """
    most, steps = [axis.most for axis in lags], [axis.step for axis in lags]
    depthwise = x.shape[1] == groups
    half = _block_lags(x, most, steps) if depthwise else _convolved_lags(x, groups, most, steps)
    first = most[0]
    spread = half.new_empty(*half.shape[:2], 2 * first + 1, *half.shape[3:])
    spread[:, :, first:] = half
    del half
    per_group = spread.view(groups, -1, *spread.shape[1:])
    trailing = list(range(3, spread.ndim))
    for lag in range(first):  # R[c, d, -lag] is R[d, c, lag]
        ahead = per_group[:, :, :, 2 * first - lag].transpose(1, 2)
        per_group[:, :, :, lag] = ahead.flip(trailing) if trailing else ahead
    middle = per_group[:, :, :, first]
    per_group[:, :, :, first] = (middle + middle.transpose(1, 2).flip(trailing)) / 2
    return spread


def _convolved_lags(x: Tensor, groups: int, most: Sequence[int], steps: Sequence[int]) -> Tensor:
    """Lags from zero up of the first axis, ``[C, C / G, L1 + 1, 2 L2 + 1, ..]``.

    A few samples at a time: the copies that are made of them stay in the cache.
    """
    size = (x.shape[1], x.shape[1] // groups, most[0] + 1, *(2 * m + 1 for m in most[1:]))
    on_cpu = x.device.type == "cpu"
    numbers = max(TOGETHER if on_cpu else LAUNCHED, prod(size))
    longest = LONGEST if on_cpu else x.numel()
    together = min(numbers // max(1, x[0].numel()), longest // max(1, prod(x.shape[2:])))
    total = None
    for part in torch.tensor_split(x, -(-len(x) // max(1, together))):
        for products in _convolved(part, groups, size, most, steps, longest):
            total = products if total is None else total.add_(products)
    assert total is not None
    return total


def _convolved(
    x: Tensor,
    groups: int,
    size: Sequence[int],
    most: Sequence[int],
    steps: Sequence[int],
    longest: int,
) -> Iterator[Tensor]:
    """Weight gradients of a convolution of ``x`` with itself, of shape ``size``.

    They are of a few lines of pixels each, and sum to that of all.
    """
    dims = len(most)
    if dims == 2 and size[1] % 8 and x.device.type == "cpu":  # odd groups are slow otherwise
        x = x.contiguous(memory_format=torch.channels_last)
    ahead = F.pad(x, [0, 0] * (dims - 1) + [0, most[0] * steps[0]]) if most[0] else x
    weight = x.new_empty(1).expand(size)
    padding = [0, *(m * s for m, s in zip(most[1:], steps[1:], strict=True))]
    ones, zeros = [1] * dims, [0] * dims
    args = (None, ones, padding, list(steps), False, zeros, groups, (False, True, False))
    lines = max(1, longest * x.shape[2] // max(1, x[:, 0].numel()))
    for first in range(0, x.shape[2], lines):
        left = x[:, :, first : first + lines]
        right = ahead[:, :, first : first + left.shape[2] + most[0] * steps[0]]
        yield torch.ops.aten.convolution_backward(left, right, weight, *args)[1]


def _block_lags(x: Tensor, most: Sequence[int], steps: Sequence[int]) -> Tensor:
    """All lags of single channels, ``[C, 1, L1 + 1, 2 L2 + 1, ..]``.

    Libraries are slow where every channel is a group of its own. Here the pixels of a channel are
    laid out in one line, with zeros in between, so that a lag in space is one along the line. The
    products of blocks of neighbours with the blocks at an offset are ordinary matrix products of
    views; the lags are sums along their diagonals.
    """
    if len(most) == 1:
        return _block_lags(x.unsqueeze(2), [0, *most], [1, *steps])[:, :, 0, most[0] :]
    count, channels, *sizes = x.shape
    ends = [m * s for m, s in zip(most, steps, strict=True)]
    padded = [i + e for i, e in zip(sizes, ends, strict=True)]
    jumps = [prod(padded[a + 1 :]) for a in range(len(padded))]  # along the line, per pixel
    before = sum(e * j for e, j in zip(ends[1:], jumps[1:], strict=True))
    after = before + ends[0] * jumps[0]
    length = count * prod(padded)
    blocks = -(-length // BLOCK)
    offsets = [
        sum(lag * s * j for lag, s, j in zip(outer, steps, jumps, strict=False))
        for outer in product(range(most[0] + 1), *(range(-m, m + 1) for m in most[1:-1]))
    ]
    reach = range(-ends[-1], ends[-1] + 1, steps[-1])
    width = BLOCK + reach[-1] - reach[0]
    lags = x.new_empty(channels, len(offsets), len(reach))
    numbers = before + blocks * BLOCK + after + BLOCK
    chunk = min(channels, max(8, TOGETHER // 4 // numbers) // 8 * 8)
    line = x.new_zeros(chunk, numbers)
    for c in range(0, channels, chunk):
        part = x[:, c : c + chunk].transpose(0, 1)
        line = line[: part.shape[0]]
        filled = line[:, before : before + length].view(part.shape[0], count, *padded)
        for a, i in enumerate(sizes):
            filled = filled.narrow(2 + a, 0, i)
        filled.copy_(part)
        left = line[:, before : before + blocks * BLOCK].view(-1, blocks, BLOCK).mT
        products = x.new_empty(part.shape[0], BLOCK, width)
        along = (products.stride(0), products.stride(1) + 1, reach.step)
        for column, o in enumerate(offsets):
            start = line.storage_offset() + before + o + reach[0]
            for first in range(0, width, BLOCK):  # a view of neighbours that do not overlap
                columns = min(BLOCK, width - first)
                size = (part.shape[0], blocks, columns)
                right = line.as_strided(size, (line.stride(0), BLOCK, 1), start + first)
                products[:, :, first : first + columns] = torch.bmm(left, right)
            diagonals = products.as_strided((part.shape[0], BLOCK, len(reach)), along)
            lags[c : c + chunk, column] = diagonals.sum(1)
    return lags.view(channels, 1, most[0] + 1, *(2 * m + 1 for m in most[1:]))
