"""Gradients of a convolution, and the estimate of its weight gradient from kept slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.einsum import functional
from tnkfac.einsum.crs.samples import Index
from tnkfac.einsum.geometry import Axis

_NATIVE: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Layer:
    """Geometry of a call.

    Attributes:
        axes: One axis per spatial dimension.
        groups: Channel groups.
    """

    axes: tuple[Axis, ...]
    groups: int

    @property
    def hyper(self) -> dict[str, Any]:
        """Keyword arguments of a convolution over the padded input."""
        return {
            "stride": [axis.stride for axis in self.axes],
            "padding": [min(axis.left, axis.right) for axis in self.axes],
            "dilation": [axis.dilation for axis in self.axes],
            "groups": self.groups,
        }

    def pad(self, x: Tensor) -> Tensor:
        """Pad by what the two sides differ in, as torch does for ``'same'``."""
        excess = []
        for axis in reversed(self.axes):
            both = min(axis.left, axis.right)
            excess += [axis.left - both, axis.right - both]
        return F.pad(x, excess) if any(excess) else x

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve the padded input."""
        hyper, dims = self.hyper, len(self.axes)
        y: Tensor
        if dims > len(_NATIVE):
            y = functional.conv(x, weight, bias, **hyper)
        else:
            y = _NATIVE[dims - 1](x, weight, bias, **hyper)
        return y

    def input_gradient(
        self, shape: torch.Size, weight: Tensor, bias: bool, g: Tensor, needed: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the padded input of this shape, and of the bias."""
        hyper = self.hyper
        if len(self.axes) > len(_NATIVE):
            dx = functional.input_vjp(weight, g, shape[2:], **hyper) if needed[0] else None
            return dx, g.sum([0, *range(2, g.ndim)]) if needed[1] else None
        x = g.new_empty(1).expand(shape)
        sizes = [len(weight)] if bias else None
        dx, _, db = _backward(g, x, weight, sizes, hyper, (needed[0], False, needed[1]))
        return dx, db

    def weight_gradient(self, x: Tensor, g: Tensor, shape: Sequence[int]) -> Tensor:
        """Gradient of a weight of this shape."""
        if len(self.axes) > len(_NATIVE):
            return functional.weight_vjp(x, g, tuple(shape[2:]), **self.hyper)
        weight = g.new_empty(1).expand(*shape)
        gradient = _backward(g, x, weight, None, self.hyper, (False, True, False))[1]
        assert gradient is not None
        return gradient


def _backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    hyper: Mapping[str, Any],
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Torch's own gradients of input, weight and bias, those of them that ``mask`` asks for."""
    stride, padding, dilation = hyper["stride"], hyper["padding"], hyper["dilation"]
    none = [0] * len(stride)
    result: tuple[Tensor | None, Tensor | None, Tensor | None]
    result = torch.ops.aten.convolution_backward(
        g, x, weight, bias_sizes, stride, padding, dilation, False, none, hyper["groups"], mask
    )
    return result


def estimate(
    layer: Layer,
    shape: torch.Size,
    weight_shape: torch.Size,
    slices: Tensor,
    g: Tensor,
    x_index: Index,
    g_index: Index,
) -> Tensor:
    """Weight gradient from the kept slices of the padded input of this shape, not scaled."""
    c_out, channels, *taps = weight_shape
    per_group = c_out // layer.groups
    gradient = g.new_zeros(weight_shape)
    if slices.numel() == 0 or any(index is not None and len(index) == 0 for index in g_index):
        return gradient

    # Channels: drop groups without a kept one, and give the others the same number of slots.
    groups, width, slots = layer.groups, channels, None
    sample = x_index[1]
    if sample is not None:
        live, owner, counts = torch.unique_consecutive(
            sample // channels, return_inverse=True, return_counts=True
        )
        groups, width = len(live), int(counts.max())
        rank = torch.arange(len(sample), device="cpu") - (counts.cumsum(0) - counts)[owner]
        if groups * width > len(sample):
            slots = owner * width + rank
        if groups < layer.groups:
            rows = (live[:, None] * per_group + torch.arange(per_group, device="cpu")).flatten()
            g_index = (g_index[0], rows, *g_index[2:])

    # Space: slice axes of one tap on both sides, put zeros between the pixels of the others.
    axes: list[Axis] = []
    x_place: list[Tensor | None] = [None, slots]
    g_place: list[Tensor | None] = [None, None]
    for axis, pixels, outputs in zip(layer.axes, x_index[2:], g_index[2:], strict=True):
        sliced = axis.kernel_size == 1 and pixels is not None
        axes.append(Axis(len(pixels), 1) if sliced and pixels is not None else axis)
        x_place.append(None if sliced else pixels)
        g_place.append(None if sliced else outputs)
    x = _spread(slices, x_place, [0, groups * width, *shape[2:]])
    g = _spread(g[mesh(g, g_index)], g_place, g.shape)
    small = replace(layer, axes=tuple(axes), groups=groups)
    part = small.weight_gradient(x, g, (groups * per_group, width, *taps))
    if sample is None:
        return part
    target = gradient.view(layer.groups, per_group, channels, *taps)
    source = part.reshape(groups, per_group, width, *taps)
    device = g.device
    target[(sample // channels).to(device), :, (sample % channels).to(device)] = source[
        owner.to(device), :, rank.to(device)
    ]
    return gradient


def mesh(tensor: Tensor, index: Sequence[Tensor | None]) -> tuple[Tensor | slice, ...]:
    """An index of ``tensor`` that keeps these entries of every axis, in one gather or scatter.

    Whole axes between two lists are spelt out: torch would move the axes to the front otherwise.
    """
    sampled = [dim for dim, entries in enumerate(index) if entries is not None]
    mesh: list[Tensor | slice] = [slice(None)] * len(index)
    for dim in range(sampled[0], sampled[-1] + 1) if sampled else ():
        entries = index[dim]
        if entries is None:
            entries = torch.arange(tensor.shape[dim], device=tensor.device)
        device = tensor.device
        mesh[dim] = entries.to(device, non_blocking=True).view(-1, *[1] * (sampled[-1] - dim))
    return tuple(mesh)


def _spread(tensor: Tensor, index: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """Put the entries of axes that have indices there, in an axis of zeros of the given size."""
    if all(entries is None for entries in index):
        return tensor
    shape = [
        old if entries is None else new
        for entries, old, new in zip(index, tensor.shape, sizes, strict=True)
    ]
    spread = tensor.new_zeros(shape)
    spread[mesh(spread, index)] = tensor
    return spread
