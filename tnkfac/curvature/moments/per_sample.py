"""Gradients of every sample for the weights of supported layers, without a loop over samples.

The samples of a batch become channel groups of one large sample: the weight gradient of that
convolution holds those of all samples side by side. Small samples are unfolded instead, where that
is faster.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.curvature.layers import Layer

UNFOLDED = 2**17
"""Up to so many numbers per sample, the CPU unfolds."""


def sample_weight_gradients(layer: Layer, x: Tensor, g: Tensor) -> Tensor:
    """Gradients with respect to the weight, one per sample.

    Args:
        layer: The layer.
        x: Standard input ``[N, C_in, I1, ..]`` or ``[N, S, C_in]``.
        g: Standard gradient with respect to the output ``[N, C_out, O1, ..]`` or ``[N, S, C_out]``.

    Returns:
        ``[N, *weight.shape]``.
    """
    if layer.kind == "linear":
        return torch.bmm(g.mT, x)
    if layer.kind == "conv":
        pads = list(layer.padding)
        return _convolved(x, g, layer.weight_shape, layer, pads)
    # A transposed convolution is a convolution of its output: inputs and outputs change places.
    pads = [
        (left, (i - 1) * s + d * (k - 1) + 1 - o - left)
        for i, o, k, s, d, (left, _) in zip(
            x.shape[2:],
            g.shape[2:],
            layer.kernel_size,
            layer.stride,
            layer.dilation,
            layer.padding,
            strict=True,
        )
    ]
    return _convolved(g, x, layer.weight_shape, layer, pads)


def sample_weight_squares(layer: Layer, x: Tensor, g: Tensor) -> Tensor | None:
    """Sum over samples of the squared gradients, where it needs none of them; else None.

    Args:
        layer: The layer.
        x: Standard input.
        g: Standard gradient with respect to the output.
    """
    if layer.kind == "linear" and x.shape[1] == 1:
        return g[:, 0].square().T @ x[:, 0].square()
    return None


def sample_bias_gradients(layer: Layer, g: Tensor) -> Tensor:
    """Gradients with respect to the bias, ``[N, C_out]``; ``g`` as above."""
    return g.sum(1) if layer.kind == "linear" else g.flatten(2).sum(2)


def output_slice(layer: Layer, g: Tensor, first: int, last: int) -> tuple[Layer, Tensor]:
    """A layer without groups that only has the output channels ``first`` to ``last``."""
    small = replace(layer, out_channels=last - first)
    return small, g[..., first:last] if layer.kind == "linear" else g[:, first:last]


def _convolved(
    x: Tensor, g: Tensor, shape: tuple[int, ...], layer: Layer, pads: list[tuple[int, int]]
) -> Tensor:
    """Weight gradients of a convolution that takes ``x`` to the shape of ``g``, per sample."""
    unfolded = prod(shape[1:]) * layer.groups * prod(g.shape[2:])
    if x.device.type == "cpu" and unfolded <= UNFOLDED:
        return _unfolded(x, g, shape, layer, pads)
    return _folded(x, g, shape, layer, pads)


def _unfolded(
    x: Tensor, g: Tensor, shape: tuple[int, ...], layer: Layer, pads: list[tuple[int, int]]
) -> Tensor:
    """By a product of ``g`` with the unfolded ``x``."""
    count, dims = x.shape[0], layer.dims
    x = F.pad(x, [p for pair in reversed(pads) for p in pair])
    for a, (k, s, d) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        x = x.unfold(2 + a, d * (k - 1) + 1, s)[..., ::d]
    order = (0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    rows = x.permute(order).reshape(count, layer.groups, prod(shape[1:]), -1)
    grads = g.reshape(count, layer.groups, -1, rows.shape[3])
    return torch.matmul(grads, rows.mT).view(count, *shape)


def _folded(
    x: Tensor, g: Tensor, shape: tuple[int, ...], layer: Layer, pads: list[tuple[int, int]]
) -> Tensor:
    """Weight gradients of a convolution that takes ``x`` to the shape of ``g``, per sample."""
    count, dims = x.shape[0], layer.dims
    if any(left != right or left < 0 for left, right in pads):
        x = F.pad(x, [p for pair in reversed(pads) for p in pair])
        pads = [(0, 0)] * dims
    x, g = x.reshape(1, -1, *x.shape[2:]), g.reshape(1, -1, *g.shape[2:])
    weight = x.new_empty(1).expand(count * shape[0], *shape[1:])
    padding = [left for left, _ in pads]
    args = (None, list(layer.stride), padding, list(layer.dilation), False, [0] * dims)
    mask = (False, True, False)
    found: Tensor = torch.ops.aten.convolution_backward(
        g, x, weight, *args, count * layer.groups, mask
    )[1]
    return found.view(count, *shape)
