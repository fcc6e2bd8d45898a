"""Sums over positions without unfolding: products with one binary matrix per axis."""

from __future__ import annotations

from functools import lru_cache, reduce
from math import prod
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from tnkfac.curvature.moments.tap_classes import TapClass, TapClasses
from tnkfac.curvature.moments.unfolding import Unfolding
from tnkfac.curvature.triton_check import trusted

SMALL = 400
"""Up to so many pixels, one product with all axes at once is faster than one per axis."""
COLUMNS = 16
"""Columns that a CPU multiplies at a time: 16 take 2/3 of the time of 9."""
CACHED = 2**16
"""Numbers whose squares stay in the cache."""


def sum_over_positions(x: Tensor, classes: TapClasses) -> Tensor:
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
        return _sum_of_one_tap(x, [taps for (taps,) in classes])
    met = _met_pixels(classes, x.dtype, x.device, SMALL)
    if met.joint is not None:
        return (x.reshape(count, -1) @ met.joint)[:, : met.taps]
    if len(sizes) == 1:
        return x @ met.axes[0].T
    for a, matrix in enumerate(met.axes[:-1]):
        x = torch.matmul(matrix, x.reshape(-1, sizes[a], prod(sizes[a + 1 :])))
    return (x.reshape(-1, sizes[-1]) @ met.axes[-1].T).reshape(count, met.taps)


def sample_sums(x: Tensor, classes: TapClasses) -> Tensor:
    """Sum what every tap meets of every sample, in the order in which ``x`` lies in memory.

    Args:
        x: ``[N, C, I1, .., Id]``.
        classes: Classes of taps per axis.

    Returns:
        ``[N, C, K1 * .. * Kd]``.
    """
    count, channels, *sizes = x.shape
    last = x.movedim(1, -1)
    if not last.is_contiguous() or x.is_contiguous():
        return sum_over_positions(x.flatten(0, 1), classes).reshape(count, channels, -1)
    met = _met_pixels(classes, x.dtype, x.device, SMALL)
    if met.joint is not None:
        pixels = last.reshape(count, -1, channels)
        return torch.matmul(met.joint[:, : met.taps].T, pixels).transpose(1, 2)
    rows = count
    for a, matrix in enumerate(met.axes):
        last = torch.matmul(matrix, last.reshape(rows, sizes[a], prod(sizes[a + 1 :]) * channels))
        rows *= len(matrix)
    return last.reshape(count, -1, channels).transpose(1, 2)


def fused_squared_sums(
    x: Tensor, unfolding: Unfolding | None = None, sizes: tuple[int, ...] = ()
) -> Tensor | None:
    """``sum_n (sum_p u_np)^2`` over what every tap meets, in one pass, where Triton's kernel works.

    Args:
        x: ``[N, C, I1, .., Id]``.
        unfolding: Which pixels are met; None for every pixel once.
        sizes: Spatial shape of the output.

    Returns:
        ``[C, K]``, in float32 at least.
    """
    kernels = triton_kernels(x)
    return None if kernels is None else kernels.squared_sums(x, unfolding, sizes)


def triton_kernels(tensor: Tensor) -> ModuleType | None:
    """Triton's kernels, if there are any for this tensor."""
    kernels = trusted(_load, tensor.device) if tensor.is_cuda else None
    return kernels if kernels is not None and kernels.usable(tensor) else None


def _load() -> ModuleType:
    from tnkfac.curvature.moments import triton_sums

    return triton_sums


def sum_of_squares(x: Tensor) -> Tensor:
    """``sum_n x[n]^2``, on the CPU without a square of the whole batch.

    Args:
        x: ``[N, ...]``.
    """
    if x.numel() <= CACHED:
        return x.square().sum(0)
    if x.device.type != "cpu":
        norms: Tensor = torch.linalg.vector_norm(x, dim=0)  # one kernel, which keeps no square
        return norms.square()
    total = torch.zeros_like(x[0])
    together = max(1, CACHED // max(1, total.numel()))
    for part in torch.split(x, together):
        if together == 1:
            total.addcmul_(part[0], part[0])
        else:
            total += part.square().sum(0)
    return total


def _sum_of_one_tap(x: Tensor, taps: list[TapClass]) -> Tensor:
    """Sum over a slice, where every axis has one tap."""
    for a, axis in enumerate(taps):
        met = [axis.stride * o + axis.low for o in range(axis.positions)]
        met = [pixel for pixel in met if 0 <= pixel < axis.pixels]
        if not met:
            return x.new_zeros(x.shape[0], 1)
        x = x[(slice(None),) * (1 + a) + (slice(met[0], met[-1] + 1, axis.stride),)]
    return x.sum(tuple(range(1, x.ndim))).unsqueeze(1)


class _MetPixels(NamedTuple):
    """Which taps meet which pixels.

    Attributes:
        axes: Of every axis, ``[K, I]``.
        joint: Of all axes at once, ``[I1 * .. * Id, K1 * .. * Kd]``, if they are small; columns of
            zeros may follow.
        taps: ``K1 * .. * Kd``.
    """

    axes: list[Tensor]
    joint: Tensor | None
    taps: int


@lru_cache(maxsize=1024)
def _met_pixels(
    classes: TapClasses, dtype: torch.dtype, device: torch.device, small: int
) -> _MetPixels:
    """Ones where taps meet pixels; all axes at once up to ``small`` pixels."""
    axes = [_met_along(axis, dtype, device) for axis in classes]
    taps, pixels = (prod(matrix.shape[side] for matrix in axes) for side in (0, 1))
    if pixels > small:
        return _MetPixels(axes, None, taps)
    joint = reduce(torch.kron, axes)
    if device.type == "cpu" and dtype == torch.float32 and 8 < taps <= 2 * COLUMNS:
        joint = torch.nn.functional.pad(joint, (0, 0, 0, -taps % COLUMNS))
    return _MetPixels(axes, joint.T.contiguous(), taps)


@lru_cache(maxsize=1024)
def _met_along(axis: tuple[TapClass, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which pixels every tap of an axis meets, ``[K, I]``."""
    met = torch.zeros(sum(taps.count for taps in axis), axis[0].pixels, dtype=dtype, device="cpu")
    for taps in axis:
        for j, offset in enumerate(taps.offsets):
            for o in range(taps.positions):
                pixel = taps.stride * o + offset
                if 0 <= pixel < taps.pixels:
                    met[taps.first + j * taps.every, pixel] = 1
    return met.to(device)
