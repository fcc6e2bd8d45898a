"""Large layers on the CPU, some rows at a time: what is computed of them stays in the cache.

Gradients are read twice, once for their norm and once for the step, instead of being written to
memory scaled. The norm also tells whether a gradient is finite, so that it need not be read a
third time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from typing import Any

import torch
from torch import Tensor

from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.scaling import Scaling, Squares
from tnkfac.optim.step import apply
from tnkfac.optim.step.elementwise import square

BLOCK = 1 << 18
"""Numbers that are taken at a time."""


def suits(layer: CapturedLayer) -> bool:
    """Whether a layer is large enough, and its tensors can be cut along their first axis."""
    weight, gradient = layer.weight, layer.weight.grad
    if gradient is None or weight.numel() <= BLOCK or weight.device.type != "cpu":
        return False
    if layer.statistics.layer.groups > 1 or gradient.dtype != weight.dtype:
        return False
    rows_lie_together = weight.stride(0) * len(weight) == weight.numel()
    return rows_lie_together and gradient.stride() == weight.stride()


def norm(layer: CapturedLayer, scaling: Scaling) -> float:
    """Norm of the preconditioned gradients of a layer; not finite where one of them is not."""
    (squares,) = square([(layer, scaling)])
    gradient: Any = layer.weight.grad
    found = 0.0
    for g, right, left in zip(*_pieces(gradient, squares), strict=True):
        found = hypot(found, torch.linalg.vector_norm((g * right).mul_(left)).item())
    bias = _bias(layer, squares)
    return found if bias is None else hypot(found, torch.linalg.vector_norm(bias).item())


def step_large(
    layer: CapturedLayer,
    scaling: Scaling,
    state: Any,
    known: float | None = None,
) -> bool:
    """Graft and step one layer; tell whether it was done: not where float32 loses its norm.

    Args:
        layer: The layer; its options suit :mod:`tnkfac.optim.step.apply`.
        scaling: Its preconditioner.
        state: State of the optimizer.
        known: What :func:`norm` has found, if it was asked before.
    """
    own, weight = layer.group, layer.weight
    (squares,) = square([(layer, scaling)])
    pieces, inputs, outputs = _pieces(weight.grad, squares)
    params = torch.split(weight, len(pieces[0]))
    bias = _bias(layer, squares)
    if own["grafting"]:
        length = norm(layer, scaling) if known is None else known
        if not apply.in_range(length):
            return False
        count = weight.numel() + (0 if bias is None else bias.numel())
        scale = apply.size(own) * count**0.5 / length
        outputs = [part * scale for part in outputs]
        bias = None if bias is None else bias.mul_(scale)
    buffers: Sequence[Tensor | None] = [None] * len(params)
    if own["momentum"]:
        buffers = torch.split(state[weight]["momentum_buffer"], len(pieces[0]))
    averaged, decoupled = own["grafting"] is not None, own["decoupled_weight_decay"]
    for param, g, right, left, buffer in zip(params, pieces, inputs, outputs, buffers, strict=True):
        kept = [] if buffer is None else [buffer]
        apply.apply(own, averaged, decoupled, [param], [(g * right).mul_(left)], kept, None)
    if bias is not None and layer.bias is not None:
        group = layer.group_of(layer.bias)
        kept = [state[layer.bias]["momentum_buffer"]] if group["momentum"] else []
        apply.apply(group, averaged, decoupled, [layer.bias], [bias], kept, None)
    return True


def _pieces(
    gradient: Any, squares: Squares
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Some rows of a gradient at a time, and what scales them."""
    rows = max(1, BLOCK * len(gradient) // gradient.numel())
    pieces = torch.split(gradient, rows)
    inputs = _cut(squares.inputs, rows, len(gradient), len(pieces))
    return pieces, inputs, _cut(squares.outputs, rows, len(gradient), len(pieces))


def _bias(layer: CapturedLayer, squares: Squares) -> Tensor | None:
    """The preconditioned gradient of the bias."""
    if layer.bias is None or layer.bias.grad is None:
        return None
    assert squares.bias is not None
    return layer.bias.grad * squares.bias


def _cut(factor: Tensor, rows: int, length: int, pieces: int) -> list[Tensor]:
    """Cut a factor like the weight, unless it broadcasts along that axis."""
    if factor.shape[0] == length and length > 1:
        return list(torch.split(factor, rows))
    return [factor] * pieces
