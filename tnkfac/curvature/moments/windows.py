"""Unfolding with bounded memory: windows of a few samples at a time, and products of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.curvature.moments.products import convolved
from tnkfac.curvature.moments.products.syrk import HALVED, fill_product, fill_sample_products
from tnkfac.curvature.moments.tap_classes import TapClass, TapClasses

CHUNK = 2**21
"""Most numbers that are unfolded at one time: they stay in the cache, and memory is bounded."""


LEAST = 2**18
"""Numbers that may always be unfolded."""

NARROW = 128
"""Up to so many channels, one product per sample beats a copy of them all."""


def windows(x: Tensor, taps: Sequence[TapClass], ranges: Sequence[range]) -> Tensor:
    """View all windows at some positions, zeros where they leave the input.

    Args:
        x: ``[N, C, I1, ..]``; a view of it if no window leaves it, else of a padded copy.
        taps: One class per axis.
        ranges: Positions per axis, consecutive ones.

    Returns:
        View ``[N, C, K1, .., Kd, O1, .., Od]``.
    """
    pads: list[int] = []
    starts = []
    for axis, o in zip(taps, ranges, strict=True):
        first = axis.stride * o[0] + axis.low
        last = axis.stride * o[-1] + axis.high
        left, right = max(0, -first), max(0, last - axis.pixels + 1)
        pads = [left, right, *pads]
        starts.append(axis.stride * o[0] + axis.offset + left)
    if any(pads):
        x = F.pad(x, pads)
    strides = x.stride()[2:]
    offset = x.storage_offset() + sum(s * a for s, a in zip(strides, starts, strict=True))
    steps = [s * axis.step for s, axis in zip(strides, taps, strict=True)]
    flipped = [a for a, step in enumerate(steps) if step < 0]
    for a in flipped:  # a view cannot run backwards: begin at the last tap, and turn round later
        offset += steps[a] * (taps[a].count - 1)
    size = (*x.shape[:2], *(axis.count for axis in taps), *map(len, ranges))
    moves = (s * axis.stride for s, axis in zip(strides, taps, strict=True))
    seen = x.as_strided(size, (*x.stride()[:2], *map(abs, steps), *moves), offset)
    return seen.flip([2 + a for a in flipped]) if flipped else seen


def rows(x: Tensor, groups: int, taps: Sequence[TapClass], ranges: Sequence[range]) -> Tensor:
    """Unfold: ``[G, C / G * K, N * O]``, a copy.

    Args:
        x: ``[N, C, I1, ..]``.
        groups: Channel groups ``G``.
        taps: One class per axis.
        ranges: Positions per axis.
    """
    dims = len(taps)
    seen = windows(x, taps, ranges)
    order = (*range(1, 2 + dims), 0, *range(2 + dims, 2 + 2 * dims))
    count = x.shape[0] * prod(map(len, ranges))
    return seen.permute(order).reshape(groups, -1, count)


def chunks(x: Tensor, classes: TapClasses, result: int = 0) -> list[Tensor]:
    """Split the batch so that no part unfolds to more than :data:`CHUNK` numbers, or an eighth.

    A single sample is never split. Every part passes over the whole result, so that large results
    want large parts.

    Args:
        x: ``[N, C, I1, ..]``.
        classes: Classes of taps per axis.
        result: Numbers of what every part is added to: an eighth of them may be unfolded, too.
    """
    if not x.shape[0]:
        return []
    each = max(_unfolded(taps, x.shape[1]) for taps in product(*classes))
    most = min(max(CHUNK, result // 2), max((each * x.shape[0] + result) // 8, LEAST))
    return list(torch.split(x, max(1, most // max(each, 1))))


def _unfolded(taps: Sequence[TapClass], channels: int) -> int:
    return channels * prod(axis.count * axis.positions for axis in taps)


def window_rows(x: Tensor, groups: int, classes: TapClasses) -> Iterator[Tensor]:
    """Unfold class by class, zeros where a class has no tap: ``[G, D, M]`` each.

    Args:
        x: ``[N, C, I1, ..]``.
        groups: Channel groups ``G``.
        classes: Classes of taps per axis.
    """
    kernel = [sum(taps.count for taps in axis) for axis in classes]
    for taps in product(*classes):
        ranges = [range(axis.positions) for axis in taps]
        if not all(ranges):
            continue
        unfolded = rows(x, groups, taps, ranges)
        if all(len(axis) == 1 for axis in classes):
            yield unfolded
            continue
        spread = x.new_zeros(groups, x.shape[1] // groups, *kernel, unfolded.shape[2])
        counts = [axis.count for axis in taps]
        slots = (slice(None), slice(None), *(axis.slots for axis in taps))
        spread[slots] = unfolded.view(groups, -1, *counts, unfolded.shape[2])
        yield spread.flatten(1, -2)


def fill_from_windows(out: Tensor, x: Tensor, classes: TapClasses) -> None:
    """Fill ``out`` with the second moment of all windows, a few samples at a time.

    Args:
        out: ``[G, D, D]``, overwritten.
        x: ``[N, C, I1, ..]``.
        classes: Classes of taps per axis; taps of different classes never meet.
    """
    groups, channels = out.shape[0], x.shape[1] // out.shape[0]
    if all(len(axis) == 1 for axis in classes):
        _fill_class(out, x, [axis[0] for axis in classes])
        return
    kernel = [sum(taps.count for taps in axis) for axis in classes]
    out.zero_()
    target = out.view(groups, channels, *kernel, channels, *kernel)
    for taps in product(*classes):
        counts = [axis.count for axis in taps]
        size = channels * prod(counts)
        block = out.new_empty(groups, size, size)
        _fill_class(block, x, taps)
        slots = [slice(None), *(axis.slots for axis in taps)]
        place = (slice(None), *slots, *slots)
        target[place] = block.view(groups, channels, *counts, channels, *counts)


def _fill_class(out: Tensor, x: Tensor, taps: Sequence[TapClass]) -> None:
    """Fill ``out`` with the second moment of one class."""
    ranges = [range(axis.positions) for axis in taps]
    parts = chunks(x, tuple((axis,) for axis in taps), out.numel()) if all(ranges) else []
    positions = prod(map(len, ranges))
    groups, size = out.shape[:2]
    narrow = groups > 1 or size < HALVED
    columns = len(parts[0]) * positions if parts else 0
    if narrow and convolved.pays(x, x.dtype, columns, out.numel()):
        seen = (windows(part, taps, ranges) for part in parts)
        convolved.fill_products(out, (u.reshape(len(u), -1, positions) for u in seen))
    elif groups == 1 and size <= min(NARROW, positions):
        fill_sample_products(out, (_aligned(windows(part, taps, ranges), size) for part in parts))
    else:
        columns = x.shape[0] * positions
        fill_product(out, (rows(part, groups, taps, ranges) for part in parts), columns)


def fill_blocks_from_windows(blocks: Tensor, last: Tensor, x: Tensor, classes: TapClasses) -> bool:
    """Fill blocks on the diagonal, where convolutions are fast at that.

    Args:
        blocks: ``[G, B, k, k]``, overwritten.
        last: The last one ``[G, r, r]``, overwritten, too.
        x: ``[N, C, I1, ..]``.
        classes: Classes of taps per axis.

    Returns:
        Whether that is so.
    """
    if any(len(axis) > 1 for axis in classes):
        return False
    taps = [axis[0] for axis in classes]
    ranges = [range(axis.positions) for axis in taps]
    positions, parts = prod(map(len, ranges)), chunks(x, classes)
    columns = len(parts[0]) * positions if parts else 0
    if not convolved.pays(x, x.dtype, columns, blocks.numel()):
        return False
    seen = (windows(part, taps, ranges) for part in parts)
    groups = len(blocks)
    unfolded = (u.reshape(len(u), groups, -1, positions) for u in seen)
    convolved.fill_blocks(blocks, last, unfolded)
    return True


def _aligned(seen: Tensor, size: int) -> Tensor:
    """Copy windows to ``[N, 1, D, S]``; rows a power of two apart would fall on one cache line."""
    positions = seen[0].numel() // size
    each = seen.new_empty(len(seen), 1, size, positions + 16)[..., :positions]
    each.view(seen.shape).copy_(seen)
    return each


def fill_from_pixels(out: Tensor, pixels: Tensor) -> None:
    """Fill ``out`` with the second moment of all pixels.

    Args:
        out: ``[G, D, D]``, overwritten.
        pixels: ``[N, G, D, P]``.
    """
    groups, size = out.shape[:2]
    narrow = groups > 1 or size < HALVED
    if narrow and convolved.pays(pixels, pixels.dtype, pixels[:, 0, 0].numel(), out.numel()):
        convolved.fill_products(out, convolved.in_cache(pixels.flatten(1, 2)))
        return
    if size <= min(NARROW, pixels.shape[3]):
        together = max(1, CHUNK // (groups * size**2))
        fill_sample_products(out, torch.split(pixels, together))
        return
    columns = pixels.shape[0] * pixels.shape[3]
    fill_product(out, pixel_rows(pixels), columns)


def pixel_rows(pixels: Tensor) -> Iterator[Tensor]:
    """Pixels ``[N, G, D, P]`` as columns ``[G, D, M]``, a few samples at a time."""
    each = pixels[:1].numel()
    for part in torch.split(pixels, max(1, CHUNK // each)) if each else ():
        yield part.permute(1, 2, 0, 3).flatten(2)
