"""The convolution whose backward pass works with a sample of its input."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tnkfac.einsum.crs.gradients import Layer, estimate, mesh
from tnkfac.einsum.crs.samples import (
    Sample,
    check_generator,
    fractions_below_one,
    sampled_legs,
    select,
    uniform,
)
from tnkfac.einsum.geometry import Padding, conv_axes

Ints = int | Sequence[int]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    keep: Mapping[str, float],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Convolution of any dimension whose weight gradient is an unbiased estimate.

    The result and the gradients of input and bias are exact. Stored for the backward pass are the
    kept slices of ``x``, their indices, and ``weight``. It can be differentiated once.

    Args:
        x: Input ``[N, C_in, I1, ...]``, or ``[C_in, I1, ...]``.
        weight: Kernel ``[C_out, C_in / groups, K1, ...]``.
        bias: ``[C_out]`` or None.
        stride: Pixels between output positions, one or one per dimension.
        padding: Zeros on each side: int, ``'same'``, ``'valid'``, or an int or a pair per
            dimension.
        dilation: Pixels between taps, one or one per dimension.
        groups: Channel groups.
        keep: Expected kept fraction, in ``(0, 1]``, by what is sampled: ``"channels"`` of the
            input, ``"space"`` (input pixels), ``"batch"``, ``"output"`` (output positions; stored
            are the pixels that any kept one meets). For the spatial ones it is the joint fraction
            ``p``, that is ``p ** (1 / d)`` along each of ``d`` dimensions. What is left out is 1;
            if all are 1, the backward pass is the ordinary one.
        generator: Where masks are drawn from; by default the global generator of the device.
            With one of the CPU, the host need not wait for an accelerator. Recomputation by
            ``torch.utils.checkpoint`` (with ``preserve_rng_state``) repeats the masks either way.

    Returns:
        ``[N, C_out, O1, ...]``, or without ``N``.

    Raises:
        TypeError: If ``keep`` or ``generator`` is of the wrong type, or ``x`` is complex.
        ValueError: For an unknown key or a fraction outside ``(0, 1]``, or if nothing fits.

    Example:
        >>> x = torch.rand(2, 8, 9, 9)
        >>> weight = torch.rand(4, 8, 3, 3, requires_grad=True)
        >>> y = conv(x, weight, stride=2, keep={"channels": 0.5, "space": 0.25})
        >>> bool(torch.equal(y, torch.conv2d(x, weight, stride=2)))
        True
        >>> y.sum().backward()
        >>> weight.grad.shape
        torch.Size([4, 8, 3, 3])
    """
    fractions = fractions_below_one(keep)
    check_generator(generator)
    if x.is_complex():
        raise TypeError(f"x: got {x.dtype}. Supported: real floating-point dtypes.")
    if x.ndim == weight.ndim - 1:
        return conv(
            x.unsqueeze(0),
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            keep=keep,
            generator=generator,
        ).squeeze(0)
    if x.ndim != weight.ndim or x.ndim < 3:
        raise ValueError(
            f"x: got shape {tuple(x.shape)} with a weight of shape {tuple(weight.shape)}. "
            "Supported: [N, C_in, I1, ...] with [C_out, C_in / groups, K1, ...]."
        )
    axes = conv_axes(tuple(x.shape[2:]), tuple(weight.shape[2:]), stride, padding, dilation)
    layer = Layer(axes, groups)
    if not fractions:
        return layer(layer.pad(x), weight, bias)
    # No graph can hold this call: how much is kept is known only when the masks are drawn.
    disable: Any = torch.compiler.disable
    run = disable(_sampled) if torch.compiler.is_compiling() else _sampled
    y: Tensor = run(x, weight, bias, layer, fractions, generator)
    return y


_pending: weakref.WeakValueDictionary[tuple[int, int], Sample] = weakref.WeakValueDictionary()
"""Samples from generators of users, for as long as a graph holds them."""


def _sampled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer: Layer,
    fractions: Mapping[str, float],
    generator: torch.Generator | None,
) -> Tensor:
    legs = sampled_legs(layer.axes, x.shape, fractions)
    count = sum(size for _, size, _ in legs)
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    )
    sample: Sample | None = None
    if generator is None:
        # Drawn even if it is not used: checkpointing runs without gradients first, and what draws
        # random numbers behind this layer has to find the generator in the same state again.
        numbers = uniform(count, x.device, None)
        if differentiable:
            sample = select(layer.axes, legs, numbers.cpu(), None)
    else:
        # Checkpointing restores global generators only. A number of theirs tells which call it
        # is that a backward pass recomputes, and the graph of that call still holds the sample.
        call = id(generator), int(torch.randint(2**62, (), device="cpu"))
        if differentiable:
            if torch._C._current_graph_task_id() != -1:
                sample = _pending.get(call)
            if sample is None:
                numbers = uniform(count, generator.device, generator)
                sample = select(layer.axes, legs, numbers.cpu(), generator)
                _pending[call] = sample
    if sample is None:
        return layer(layer.pad(x), weight, bias)
    x, weight, bias = _as_autocast(x), _as_autocast(weight), _as_autocast(bias)
    y: Tensor = _Conv.apply(layer.pad(x), weight, bias, layer, sample)
    return y


def _as_autocast(tensor: Any) -> Any:
    """Cast as autocast does before a convolution."""
    if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


class _Conv(torch.autograd.Function):
    """Convolution that keeps a sample of its padded input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer, sample: Sample
    ) -> Tensor:
        slices = x[mesh(x, sample.x)] if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(weight, slices, *sample.x, *sample.g)
        ctx.layer, ctx.sample, ctx.shape, ctx.has_bias = layer, sample, x.shape, bias is not None
        return layer(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        weight, slices, *lists = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        with torch.autocast(g.device.type, enabled=False):
            if needs_x or needs_bias:
                dx, db = ctx.layer.input_gradient(
                    ctx.shape, weight, ctx.has_bias, g, (needs_x, needs_bias)
                )
            if needs_weight:
                x_index, g_index = tuple(lists[: g.ndim]), tuple(lists[g.ndim :])
                dw = estimate(ctx.layer, ctx.shape, weight.shape, slices, g, x_index, g_index)
                dw = dw.mul_(ctx.sample.scale)
        return dx, dw, db, None, None
