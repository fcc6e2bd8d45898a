"""Sums over positions without unfolding: products with one binary matrix per axis."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from tnkfac.curvature.routes.taps import Classes, Taps

SMALL = 128
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
    boxes = [_box(axis, x.dtype, x.device) for axis in classes]
    if prod(sizes) <= SMALL:
        joint = boxes[0]
        for box in boxes[1:]:
            joint = torch.kron(joint, box)
        return x.reshape(x.shape[0], -1) @ joint.T
    if len(sizes) == 1:
        return x @ boxes[0].T
    for a, box in enumerate(boxes[:-1]):
        x = torch.matmul(box, x.reshape(-1, sizes[a], prod(sizes[a + 1 :])))
    x = x.reshape(-1, sizes[-1]) @ boxes[-1].T
    return x.reshape(-1, prod(box.shape[0] for box in boxes))


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
    """``sum_n x[n]^2`` in one pass, without a square of the whole batch.

    Args:
        x: ``[N, ...]``.
    """
    total = x.new_zeros(x.shape[1:])
    together = max(1, 2**16 // max(1, total.numel()))
    for part in torch.split(x, together):
        if together == 1:
            total.addcmul_(part[0], part[0])
        else:
            total += part.square().sum(0)
    return total


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
