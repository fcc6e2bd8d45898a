"""Both diagonals of one call of a layer, with few operations, each of which reads its tensor once.

What :meth:`.Gram.diagonal` gives for the two sides, in the order of memory in which the tensors
lie.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from tnkfac.curvature.layers import Layer
from tnkfac.curvature.moments import unfold
from tnkfac.curvature.moments.position_sums import sample_sums, sum_of_squares, sum_over_positions
from tnkfac.curvature.moments.tap_classes import tap_classes
from tnkfac.curvature.triton_check import trusted


def input_squares(
    layer: Layer,
    x: Tensor,
    size: tuple[int, ...],
    approx: Literal["expand", "reduce"],
    dtype: torch.dtype,
) -> Tensor:
    """Diagonal of the input Gram, ``[G, D]``, bias last.

    Args:
        layer: The layer.
        x: Standard input.
        size: Spatial shape of the output; of a linear layer, its number of positions.
        approx: ``"expand"`` or ``"reduce"``.
        dtype: That of the result.
    """
    count = prod(size)
    kernels = _kernels(x) if approx == "reduce" else None
    fused: Tensor | None = None if kernels is None else kernels.input_sums(layer, x, size)
    if fused is not None:
        squares = fused.mul_(1 / count**2)
    elif layer.kind == "linear":
        squares = _linear(x.to(dtype), approx, True)
    else:
        x, classes = x.to(dtype), tap_classes(layer, tuple(x.shape[2:]), size)
        if approx == "expand":
            squares = sum_over_positions(sum_of_squares(x), classes)
        else:
            squares = sample_sums(x, classes).square().sum(0).mul_(1 / count**2)
    squares = squares.reshape(layer.groups, -1)
    if not layer.bias:
        return squares
    ones = x.shape[0] * (count if approx == "expand" else 1)
    return torch.cat([squares, _column(layer.groups, ones, dtype, x.device)], 1)


def output_squares(
    layer: Layer, g: Tensor, approx: Literal["expand", "reduce"], dtype: torch.dtype
) -> Tensor:
    """Diagonal of the output Gram, ``[G, C_out / G]``.

    Args:
        layer: The layer.
        g: Standard output gradient.
        approx: ``"expand"`` or ``"reduce"``.
        dtype: That of the result.
    """
    kernels = _kernels(g) if approx == "reduce" else None
    if kernels is not None:
        sums: Tensor = kernels.output_sums(layer, g)
        return sums.reshape(layer.groups, -1)
    g = g.to(dtype)
    if layer.kind == "linear":
        return _linear(g, approx, False).reshape(layer.groups, -1)
    axes = tuple(range(2, g.ndim))
    if approx == "reduce":
        rows = g.sum(axes)
    elif g.is_contiguous():  # rows of memory, which norms are fast for
        rows = torch.linalg.vector_norm(g.flatten(2), dim=2)
    else:
        return sum_of_squares(g).sum([axis - 1 for axis in axes]).reshape(layer.groups, -1)
    return rows.square().sum(0).reshape(layer.groups, -1)


def output_size(layer: Layer, x: Tensor, g: Tensor) -> tuple[int, ...]:
    """Spatial shape of the output of a standard input, or number of its positions.

    Args:
        layer: The layer.
        x: Standard input.
        g: Standard output gradient.
    """
    if layer.kind == "linear":
        return (x.shape[1],)
    given = tuple(g.shape[2:]) if layer.kind == "conv_transpose" else None
    return tuple(unfold.output_size(layer, x.shape, given))


def _kernels(tensor: Tensor) -> ModuleType | None:
    """Triton's kernels, if there are any for this tensor."""
    kernels = trusted(_load, tensor.device) if tensor.is_cuda else None
    return kernels if kernels is not None and kernels.usable(tensor) else None


def _load() -> ModuleType:
    from tnkfac.curvature.moments import triton_sums

    return triton_sums


def _linear(x: Tensor, approx: str, mean: bool) -> Tensor:
    """Of ``x [N, S, D]``."""
    positions = x.shape[1]
    if positions == 1:
        return sum_of_squares(x[:, 0])
    if approx == "expand":
        return sum_of_squares(x.flatten(0, 1))
    return (x.mean(1) if mean else x.sum(1)).square().sum(0)


@lru_cache(maxsize=1024)
def _column(groups: int, value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((groups, 1), value, dtype=dtype, device=device)
