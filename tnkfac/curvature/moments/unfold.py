"""The plain way to unfold: a few torch calls, without plans or caches.

It is what ``torch.compile`` traces, and the twin that the planned routes are tested against. All
sizes may be symbolic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.curvature.layers import Layer


def output_size(layer: Layer, shape: torch.Size, given: tuple[int, ...] | None) -> list[int]:
    """Spatial shape of the output of a convolution for a standard input of this shape.

    Args:
        layer: A convolution or transposed convolution.
        shape: Shape of its standard input.
        given: The answer, where it is known from an output.
    """
    if given is not None:
        return list(given)
    sizes = []
    for a in range(layer.dims):
        left, right = layer.padding[a]
        reach = layer.dilation[a] * (layer.kernel_size[a] - 1) + 1
        if layer.kind == "conv":
            sizes.append((shape[a + 2] + left + right - reach) // layer.stride[a] + 1)
        else:
            grown = (shape[a + 2] - 1) * layer.stride[a] - left - right + reach
            sizes.append(grown + layer.output_padding[a])
    return sizes


def unfolded(layer: Layer, x: Tensor, is_input: bool, given: tuple[int, ...] | None) -> Tensor:
    """Rows ``[G, N, S, D]`` of a standard input or output, without the ones of the bias.

    Args:
        layer: The layer.
        x: ``[N, C, I1, ..]``, or ``[N, S, C]`` for a linear layer.
        is_input: Whether to unfold; outputs are rows as they are.
        given: Spatial shape of the output, where it is known.
    """
    if layer.kind == "linear":
        return x.unsqueeze(0)
    groups = layer.groups
    if not is_input:
        return x.flatten(2).reshape(x.shape[0], groups, -1, x[0, 0].numel()).permute(1, 0, 3, 2)
    dims = layer.dims
    transposed = layer.kind == "conv_transpose"
    sizes = output_size(layer, x.shape, given)
    for a in range(dims):
        at = 2 + 2 * a  # behind it stand the taps of the axes before
        stride, dilation = layer.stride[a], layer.dilation[a]
        reach = dilation * (layer.kernel_size[a] - 1) + 1
        left, right = layer.padding[a]
        if transposed:  # a convolution with flipped taps over the input with zeros in between
            x = _spread(x, at, stride)
            left, stride = reach - 1 - left, 1
            right = sizes[a] + reach - 1 - left - x.shape[at]
        if left or right:
            x = F.pad(x, [0, 0] * (x.ndim - 1 - at) + [left, right])
        x = x.unfold(at, reach, stride)[..., ::dilation].narrow(at, 0, sizes[a])
        x = (x.flip(-1) if transposed else x).movedim(-1, 1)
    # [N, Kd, .., K1, C, O1, .., Od] -> [G, N, S, C / G, K1, .., Kd]
    taps = list(range(dims, 0, -1))
    x = x.permute(0, dims + 1, *taps, *range(dims + 2, 2 * dims + 2))
    x = x.flatten(dims + 2).flatten(2, dims + 1)
    x = x.reshape(x.shape[0], groups, x.shape[1] // groups, x.shape[2], x.shape[3])
    return x.permute(1, 0, 4, 2, 3).flatten(3)


def _spread(x: Tensor, axis: int, stride: int) -> Tensor:
    """Put ``stride - 1`` zeros between the entries of an axis."""
    if stride == 1:
        return x
    spread = F.pad(x.unsqueeze(axis + 1), [0, 0] * (x.ndim - 1 - axis) + [0, stride - 1])
    return spread.flatten(axis, axis + 1).narrow(axis, 0, (x.shape[axis] - 1) * stride + 1)


def summed(layer: Layer, x: Tensor, is_input: bool, given: tuple[int, ...] | None) -> Tensor:
    """Sum of :func:`unfolded` over positions, ``[G, N, D]``, without unfolding anything.

    Tap ``k`` sees pixel ``i`` in at most one position, so the sum is a product with one binary
    matrix per axis.
    """
    if layer.kind == "linear":
        return x.sum(1).unsqueeze(0)
    if not is_input:
        return x.flatten(2).sum(2).reshape(x.shape[0], layer.groups, -1).transpose(0, 1)
    sizes = output_size(layer, x.shape, given)
    for a in range(layer.dims):
        taps = layer.dilation[a] * torch.arange(layer.kernel_size[a], device=x.device)
        pixels = torch.arange(x.shape[2], device=x.device)  # the first axis not yet summed
        left, stride = layer.padding[a][0], layer.stride[a]
        if layer.kind == "conv":
            place = pixels + left - taps[:, None]
            seen = (place >= 0) & (place % stride == 0) & (place // stride < sizes[a])
        else:
            place = pixels * stride + taps[:, None] - left
            seen = (place >= 0) & (place < sizes[a])
        x = torch.tensordot(x, seen.to(x.dtype), dims=([2], [1]))
    return x.reshape(x.shape[0], layer.groups, -1).transpose(0, 1)
