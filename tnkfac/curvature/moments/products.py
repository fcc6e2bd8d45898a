"""Products of a Gram matrix with a few vectors, without forming it."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.curvature.moments import readings, unfold
from tnkfac.curvature.moments.windows import CHUNK

if TYPE_CHECKING:
    from tnkfac.curvature.moments.second_moment import Gram


def times(gram: Gram, V: Tensor) -> Tensor:
    """``A V [G, D, r]`` for all features but the bias.

    The rows of an unfolded input are what a convolution multiplies its weight with, so that a
    convolution with ``r`` output channels per group and its weight gradient replace unfolding.

    Args:
        gram: The Gram matrix ``A``.
        V: ``[G, D, r]``.
    """
    if gram.approx == "expand" and gram.is_input and gram.layer.kind != "linear":
        return _convolved(gram, V)
    product = torch.zeros_like(V)
    for rows in readings.rows(gram):
        product += rows @ (rows.mT @ V)
    return product


def first_and_last(gram: Gram, first: int, last: int) -> Tensor:
    """First and last columns of ``A``, all features but the bias: ``[G, D, first + last]``.

    Args:
        gram: The Gram matrix ``A``.
        first: How many from the start.
        last: How many from the end.
    """
    layer = gram.layer
    features = gram.dim - (gram.is_input and layer.bias)
    if gram.approx == "expand" and gram.is_input and layer.kind != "linear":
        eye = torch.eye(features, dtype=gram.tensor.dtype, device=gram.tensor.device)
        chosen = torch.cat([eye[:, :first], eye[:, features - last :]], 1)
        return _convolved(gram, chosen.expand(layer.groups, -1, -1))
    columns = gram.tensor.new_zeros(layer.groups, features, first + last)
    for rows in readings.rows(gram):
        columns[:, :, :first] += rows @ rows[:, :first].mT
        columns[:, :, first:] += rows @ rows[:, features - last :].mT
    return columns


def _convolved(gram: Gram, V: Tensor) -> Tensor:
    """Convolve with ``V`` as weight, then take the weight gradient, a few samples at a time."""
    layer, x = gram.layer, gram.tensor
    count = V.shape[2]
    if not count:
        return V.contiguous()
    weight, _ = layer.from_matrix(V.mT, _weight_shape(gram, count))
    sizes = unfold.output_size(layer, x.shape, gram.output_size)
    transposed = layer.kind == "conv_transpose"
    pads = list(layer.padding)
    if any(left != right for left, right in pads):
        x = F.pad(x, [p for pair in reversed(pads) for p in pair])
        pads = [(0, 0)] * layer.dims
    padding = [left for left, _ in pads]
    ahead = [0] * layer.dims
    if transposed:
        default = unfold.output_size(layer, x.shape, None)
        ahead = [
            size - normal + extra
            for size, normal, extra in zip(sizes, default, layer.output_padding, strict=True)
        ]
    hyper = (layer.stride, padding, layer.dilation, transposed, ahead, layer.groups)
    product = torch.zeros_like(weight)
    each = max(1, count * layer.groups * prod(sizes), x[:1].numel())
    mask = (False, True, False)
    for part in torch.split(x, max(1, CHUNK // each)):
        y = torch.ops.aten.convolution(part, weight, None, *hyper)
        grads = torch.ops.aten.convolution_backward(y, part, weight, None, *hyper, mask)
        product += grads[1]
    return layer.to_matrix(product, None).mT * gram.scale


def _weight_shape(gram: Gram, count: int) -> tuple[int, ...]:
    layer = gram.layer
    inside = layer.in_channels // layer.groups
    if layer.kind == "conv_transpose":
        return (layer.in_channels, count, *layer.kernel_size)
    return (count * layer.groups, inside, *layer.kernel_size)
