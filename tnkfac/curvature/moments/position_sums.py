"""Sums over positions without unfolding: products with one binary matrix per axis."""

from __future__ import annotations

from functools import lru_cache, reduce
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from tnkfac.curvature.moments import onednn
from tnkfac.curvature.moments.strips import Strips, box, strips
from tnkfac.curvature.moments.tap_classes import TapClass, TapClasses

SMALL = 400
"""Up to so many pixels, one product with all axes at once is faster than one per axis."""
LARGE = 1 << 20
"""From so many numbers on, a CPU sums strips of pixels that the same taps meet before products."""


def box_sums(x: Tensor, classes: TapClasses) -> Tensor:
    """Sum what every tap meets over all positions.

    Tap ``k`` meets pixel ``i`` at most once, so this is a product with one binary matrix per axis:
    a single pass over ``x``.

    Args:
        x: ``[M, I1, .., Id]``.
        classes: Classes of taps per axis.

    Returns:
        ``[M, K1 * .. * Kd]``.
    """
    count, *sizes = x.shape
    if all(len(axis) == 1 and axis[0].count == 1 for axis in classes):
        return _one_tap_sums(x, [taps for (taps,) in classes])
    found = onednn.sums(x, classes)
    if found is not None:
        return found
    product = _product(classes, x.dtype, x.device, SMALL, x.numel() >= LARGE)
    x = _strip_sums(x, product, sizes, 1)
    if product.joint is not None:
        return (x.reshape(count, -1) @ product.joint)[:, : product.taps]
    if len(sizes) == 1:
        return x @ product.boxes[0].T
    for a, matrix in enumerate(product.boxes[:-1]):
        x = torch.matmul(matrix, x.reshape(-1, sizes[a], prod(sizes[a + 1 :])))
    x = x.reshape(-1, sizes[-1]) @ product.boxes[-1].T
    return x.reshape(count, product.taps)


def position_sums(x: Tensor, classes: TapClasses) -> Tensor:
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
    product = _product(classes, x.dtype, x.device, SMALL, x.numel() >= LARGE)
    last = _strip_sums(last, product, sizes, channels)
    if product.joint is not None:
        pixels = last.reshape(count, -1, channels)
        return torch.matmul(product.joint[:, : product.taps].T, pixels).transpose(1, 2)
    rows = count
    for a, matrix in enumerate(product.boxes):
        last = torch.matmul(matrix, last.reshape(rows, sizes[a], prod(sizes[a + 1 :]) * channels))
        rows *= len(matrix)
    return last.reshape(count, -1, channels).transpose(1, 2)


def _strip_sums(x: Tensor, product: Product, sizes: list[int], channels: int) -> Tensor:
    """Sum strips along the axes where that comes first; ``sizes`` change with them.

    Args:
        x: ``[M, I1, .., Id]``, or the same with channels last.
        product: How the axes are contracted.
        sizes: ``I1, .., Id``.
        channels: Numbers of a pixel.
    """
    for a, own in enumerate(product.strips):
        if own is not None:
            x = own.sums(x.reshape(-1, sizes[a], prod(sizes[a + 1 :]) * channels))
            sizes[a] = len(own.slices)
    return x


def _one_tap_sums(x: Tensor, taps: list[TapClass]) -> Tensor:
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


class Product(NamedTuple):
    """How the axes of an image are contracted with what tells which taps meet their pixels.

    Attributes:
        strips: Of every axis, where sums of its strips come first.
        boxes: Of every axis, ``[K, I]``, or ``[K, S]`` where the strips were summed.
        joint: Of all axes at once, ``[I1 * .. * Id, K1 * .. * Kd]``, if they are small; columns of
            zeros may follow.
        taps: ``K1 * .. * Kd``.
    """

    strips: list[Strips | None]
    boxes: list[Tensor]
    joint: Tensor | None
    taps: int


@lru_cache(maxsize=1024)
def _product(
    classes: TapClasses, dtype: torch.dtype, device: torch.device, small: int, large: bool
) -> Product:
    """How to contract images in which these taps lie.

    Args:
        classes: Classes of taps per axis.
        dtype: That of the images.
        device: Theirs.
        small: Pixels up to which all axes are contracted at once.
        large: Whether there is enough to sum that more operations pay.
    """
    cut: list[Strips | None] = [None] * len(classes)
    if large and device.type == "cpu" and prod(axis[0].pixels for axis in classes) > small:
        cut[:-1] = [strips(axis, dtype, device) for axis in classes[:-1]]
    boxes = [
        box(axis, dtype, device) if own is None else own.box
        for axis, own in zip(classes, cut, strict=True)
    ]
    taps, pixels = (prod(matrix.shape[side] for matrix in boxes) for side in (0, 1))
    if pixels > small:
        return Product(cut, boxes, None, taps)
    joint = reduce(torch.kron, boxes)
    if device.type == "cpu" and dtype == torch.float32 and 8 < taps <= 2 * onednn.COLUMNS:
        unused = -taps % onednn.COLUMNS  # 16 columns take 2/3 of the time of 9
        joint = torch.nn.functional.pad(joint, (0, 0, 0, unused))
    return Product(cut, boxes, joint.T.contiguous(), taps)
