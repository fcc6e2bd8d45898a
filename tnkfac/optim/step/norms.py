"""Norm of a gradient whose rows and columns are scaled, in one pass over it."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

SPREAD = 1e15
"""Between the largest factor and the smallest."""
LEAST, MOST = 1e-24, 1e24
"""Of a sum of squares that has lost no digits to those that vanish in float32, or overflow."""


def scaled_norm(gradient: Tensor, right: Tensor, left: Tensor) -> float | None:
    """Norm of ``gradient * right * left`` on the CPU; None where this cannot tell.

    Layer normalization has this sum: with output gradient ``g``, input ``x``, means of zero and
    reciprocal deviations ``r``, its weight's gradient is ``sum_o g[o, d] x[o, d] r[o]``. Here both
    ``g`` and ``x`` are the gradient, and ``r`` are squares of ``left``. Nothing of its size is
    written to memory: half of the time of scaling it and taking the norm.

    Args:
        gradient: ``[C_out, ...]``, in any order of its other axes.
        right: Positive factors of the columns, ``[1, ...]``.
        left: Positive factors of the rows, ``[C_out, 1, ...]``.
    """
    rows, kind = len(gradient), gradient.dtype
    if kind not in (torch.float32, torch.float64) or not left.dtype == right.dtype == kind:
        return None
    if len(left) != rows or left.numel() != rows:
        return None
    order = sorted(range(1, gradient.ndim), key=gradient.stride, reverse=True)
    matrix = gradient.permute(0, *order)
    if not matrix.is_contiguous():
        return None
    matrix, columns = matrix.flatten(1), right.permute(0, *order).reshape(-1)
    (low, top), (least, largest) = _range(left), _range(columns)
    if not (0 < top < SPREAD * low and 0 < largest < SPREAD * least):
        return None
    sums = torch.ops.aten.native_layer_norm_backward(
        matrix,
        matrix,
        [len(columns)],
        torch.zeros_like(left).view(rows, 1),
        (left / top).square().view(rows, 1),
        columns,  # the weight, which has no part in its gradient
        None,
        [False, True, False],
    )[1]
    total = torch.dot(sums, (columns / largest).square()).item()
    norm = sqrt(total) * top * largest if LEAST < total < MOST else 0.0
    return norm if 0 < norm < MOST else None


def _range(factors: Tensor) -> tuple[float, float]:
    low, top = torch.aminmax(factors)
    return low.item(), top.item()
