"""Weight gradients of every sample, without a loop over samples.

The samples of a batch become channel groups of one large sample: the weight gradient of that
convolution holds those of all samples side by side. Small samples are unfolded instead, where that
is faster.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.curvature.moments.unfolding import Unfolding

UNFOLDED = 2**17
"""Up to so many numbers per sample, the CPU unfolds."""


def convolution_gradients(
    unfolding: Unfolding, x: Tensor, g: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """Gradients with respect to the weight of a convolution, ``[N, *shape]``.

    Args:
        unfolding: That of the convolution.
        x: Input ``[N, C_in, I1, ..]``.
        g: Gradient with respect to the output ``[N, C_out, O1, ..]``.
        shape: Shape of the weight.
    """
    if not unfolding.transposed:
        return _convolved(x, g, shape, unfolding, list(unfolding.padding))
    # A transposed convolution is a convolution of its output: inputs and outputs change places.
    pads = [
        (left, (i - 1) * s + d * (k - 1) + 1 - o - left)
        for i, o, k, s, d, (left, _) in zip(
            x.shape[2:],
            g.shape[2:],
            unfolding.kernel_size,
            unfolding.stride,
            unfolding.dilation,
            unfolding.padding,
            strict=True,
        )
    ]
    return _convolved(g, x, shape, unfolding, pads)


def _convolved(
    x: Tensor, g: Tensor, shape: tuple[int, ...], unfolding: Unfolding, pads: list[tuple[int, int]]
) -> Tensor:
    """Weight gradients of a convolution that takes ``x`` to the shape of ``g``, per sample."""
    unfolded = prod(shape[1:]) * unfolding.groups * prod(g.shape[2:])
    if x.device.type == "cpu" and unfolded <= UNFOLDED:
        return _unfolded(x, g, shape, unfolding, pads)
    return _folded(x, g, shape, unfolding, pads)


def _unfolded(
    x: Tensor, g: Tensor, shape: tuple[int, ...], unfolding: Unfolding, pads: list[tuple[int, int]]
) -> Tensor:
    """Gradients of samples, by a product of ``g`` with the unfolded ``x``."""
    count, dims = x.shape[0], unfolding.dims
    x = F.pad(x, [p for pair in reversed(pads) for p in pair])
    for a, (k, s, d) in enumerate(
        zip(unfolding.kernel_size, unfolding.stride, unfolding.dilation, strict=True)
    ):
        x = x.unfold(2 + a, d * (k - 1) + 1, s)[..., ::d]
    order = (0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    rows = x.permute(order).reshape(count, unfolding.groups, prod(shape[1:]), -1)
    grads = g.reshape(count, unfolding.groups, -1, rows.shape[3])
    return torch.matmul(grads, rows.mT).view(count, *shape)


def _folded(
    x: Tensor, g: Tensor, shape: tuple[int, ...], unfolding: Unfolding, pads: list[tuple[int, int]]
) -> Tensor:
    """Weight gradients of a convolution that takes ``x`` to the shape of ``g``, per sample."""
    count, dims = x.shape[0], unfolding.dims
    if any(left != right or left < 0 for left, right in pads):
        x = F.pad(x, [p for pair in reversed(pads) for p in pair])
        pads = [(0, 0)] * dims
    x, g = x.reshape(1, -1, *x.shape[2:]), g.reshape(1, -1, *g.shape[2:])
    weight = x.new_empty(1).expand(count * shape[0], *shape[1:])
    padding = [left for left, _ in pads]
    args = (None, list(unfolding.stride), padding, list(unfolding.dilation), False, [0] * dims)
    mask = (False, True, False)
    gradients: Tensor = torch.ops.aten.convolution_backward(
        g, x, weight, *args, count * unfolding.groups, mask
    )[1]
    return gradients.view(count, *shape)
