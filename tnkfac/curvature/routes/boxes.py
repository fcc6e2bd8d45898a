"""Sums over positions without unfolding: products with one binary matrix per axis."""

from __future__ import annotations

from functools import lru_cache, reduce
from math import prod

import torch
from torch import Tensor

from tnkfac.curvature.routes.taps import Classes, Taps

SMALL = 400
"""Up to so many pixels, one product with all axes at once is faster than one per axis."""


def box_sums(x: Tensor, classes: Classes) -> Tensor:
    """Sum what every tap meets over all positions.

    Tap ``k`` meets pixel ``i`` at most once, so this is a product with one binary matrix per axis:
    a single pass over ``x``.

    Args:
        x: ``[M, I1, .., Id]``.
        classes: Classes of taps per axis.

    Returns:
        ``[M, K1 * .. * Kd]``.
    """
    sizes = x.shape[1:]
    if all(len(axis) == 1 and axis[0].count == 1 for axis in classes):
        return _one_tap_sums(x, [taps for (taps,) in classes])
    if prod(sizes) <= SMALL:
        joint, taps = _joint(classes, x.dtype, x.device)
        return (x.reshape(x.shape[0], -1) @ joint)[:, :taps]
    boxes = [_box(axis, x.dtype, x.device) for axis in classes]
    if len(sizes) == 1:
        return x @ boxes[0].T
    for a, box in enumerate(boxes[:-1]):
        x = torch.matmul(box, x.reshape(-1, sizes[a], prod(sizes[a + 1 :])))
    x = x.reshape(-1, sizes[-1]) @ boxes[-1].T
    return x.reshape(-1, prod(box.shape[0] for box in boxes))


def position_sums(x: Tensor, classes: Classes) -> Tensor:
    """The same for every sample and channel, in the order in which ``x`` lies in memory.

    Args:
        x: ``[N, C, I1, .., Id]``.
        classes: Classes of taps per axis.

    Returns:
        ``[N, C, K1 * .. * Kd]``.
    """
    count, channels, *sizes = x.shape
    last = x.movedim(1, -1)
    if not last.is_contiguous() or x.is_contiguous():
        return box_sums(x.flatten(0, 1), classes).reshape(count, channels, -1)
    if prod(sizes) <= SMALL:
        joint, taps = _joint(classes, x.dtype, x.device)
        pixels = last.reshape(count, -1, channels)
        return torch.matmul(joint[:, :taps].T, pixels).transpose(1, 2)
    boxes = [_box(axis, x.dtype, x.device) for axis in classes]
    rows = count
    for a, box in enumerate(boxes):
        last = torch.matmul(box, last.reshape(rows, sizes[a], prod(sizes[a + 1 :]) * channels))
        rows *= len(box)
    return last.reshape(count, -1, channels).transpose(1, 2)


def _one_tap_sums(x: Tensor, taps: list[Taps]) -> Tensor:
    """The same where every axis has one tap: a sum over a slice."""
    for a, axis in enumerate(taps):
        met = [axis.stride * o + axis.low for o in range(axis.positions)]
        met = [pixel for pixel in met if 0 <= pixel < axis.pixels]
        if not met:
            return x.new_zeros(x.shape[0], 1)
        x = x[(slice(None),) * (1 + a) + (slice(met[0], met[-1] + 1, axis.stride),)]
    return x.sum(tuple(range(1, x.ndim))).unsqueeze(1)


def sum_of_squares(x: Tensor) -> Tensor:
    """``sum_n x[n]^2``, on the CPU without a square of the whole batch.

    Args:
        x: ``[N, ...]``.
    """
    if x.numel() <= _AT_ONCE:
        return x.square().sum(0)
    if x.device.type != "cpu":
        norms: Tensor = torch.linalg.vector_norm(x, dim=0)  # one kernel, which keeps no square
        return norms.square()
    total = torch.zeros_like(x[0])
    together = max(1, _AT_ONCE // max(1, total.numel()))
    for part in torch.split(x, together):
        if together == 1:
            total.addcmul_(part[0], part[0])
        else:
            total += part.square().sum(0)
    return total


_AT_ONCE = 2**16
"""Numbers whose squares stay in the cache."""


@lru_cache(maxsize=1024)
def _box(axis: tuple[Taps, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which pixels every tap meets, ``[K, I]``."""
    box = torch.zeros(sum(taps.count for taps in axis), axis[0].pixels, dtype=dtype)
    for taps in axis:
        for j, offset in enumerate(taps.offsets):
            for o in range(taps.positions):
                pixel = taps.stride * o + offset
                if 0 <= pixel < taps.pixels:
                    box[taps.first + j * taps.every, pixel] = 1
    return box.to(device)


@lru_cache(maxsize=1024)
def _joint(classes: Classes, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, int]:
    """The same for all axes at once, ``[I1 * .. * Id, K1 * .. * Kd]``, and its number of taps.

    Columns of zeros may follow: on a CPU a product with 16 columns takes two thirds of the time
    of one with 9.
    """
    boxes = [_box(axis, dtype, device) for axis in classes]
    joint = reduce(torch.kron, boxes)
    taps = len(joint)
    if device.type == "cpu" and dtype == torch.float32 and 8 < taps <= 2 * _COLUMNS:
        joint = torch.nn.functional.pad(joint, (0, 0, 0, -taps % _COLUMNS))
    return joint.T.contiguous(), taps


_COLUMNS = 16
"""Numbers that a CPU takes at a time."""
