"""Large layers on the CPU, some rows at a time: what is computed of them stays in the cache.

Gradients are scaled twice, once for their norm and once for the step, instead of being written to
memory in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from typing import Any

import torch
from torch import Tensor

from tnkfac.optim import multi
from tnkfac.optim.layers import CapturedLayer
from tnkfac.optim.scaling import Scaling

Group = dict[str, Any]
BLOCK = 1 << 18
"""Numbers that are taken at a time."""


def suits(layer: CapturedLayer, scaling: Scaling) -> bool:
    """Whether a layer is large enough, and its tensors can be cut along their first axis."""
    weight, gradient = layer.weight, layer.weight.grad
    if gradient is None or weight.device.type != "cpu" or scaling.groups > 1:
        return False
    return weight.numel() > BLOCK and gradient.stride() == weight.stride()


def step_large(
    layer: CapturedLayer, scaling: Scaling, state: Any, groups: dict[int, Group]
) -> bool:
    """Graft and step one layer; tell whether it was done: not where float32 loses its norm.

    Args:
        layer: The layer; its options suit :mod:`tnkfac.optim.multi`.
        scaling: Its preconditioner.
        state: State of the optimizer.
        groups: Parameter groups by ``id`` of the parameter.
    """
    own, weight, gradient = groups[id(layer.weight)], layer.weight, layer.weight.grad
    assert gradient is not None
    rows = max(1, BLOCK * len(weight) // weight.numel())
    gradients, params = torch.split(gradient, rows), torch.split(weight, rows)
    inputs = _cut(scaling.inputs, rows, len(weight), len(params))
    outputs = _cut(scaling.outputs, rows, len(weight), len(params))
    bias = None
    if layer.bias is not None and layer.bias.grad is not None:
        assert scaling.bias is not None
        bias = layer.bias.grad * scaling.bias
    if own["grafting"]:
        scale = _scale(gradients, inputs, outputs, bias, own)
        if scale is None:
            return False
        outputs = [part * scale for part in outputs]
        bias = None if bias is None else bias.mul_(scale)
    buffers: Sequence[Tensor | None] = [None] * len(params)
    if own["momentum"]:
        buffers = torch.split(state[weight]["momentum_buffer"], rows)
    averaged, decoupled = own["grafting"] is not None, own["decoupled_weight_decay"]
    for param, g, right, left, buffer in zip(
        params, gradients, inputs, outputs, buffers, strict=True
    ):
        kept = [] if buffer is None else [buffer]
        multi.apply(own, averaged, decoupled, [param], [(g * right).mul_(left)], kept, None)
    if bias is not None and layer.bias is not None:
        group = groups.get(id(layer.bias), own)
        kept = [state[layer.bias]["momentum_buffer"]] if group["momentum"] else []
        multi.apply(group, averaged, decoupled, [layer.bias], [bias], kept, None)
    return True


def _scale(
    gradients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    bias: Tensor | None,
    group: Group,
) -> float | None:
    """What brings an update to its size; None where float32 does not hold its squares."""
    norm, count = 0.0, 0
    for g, right, left in zip(gradients, inputs, outputs, strict=True):
        update = (g * right).mul_(left)
        norm, count = hypot(norm, torch.linalg.vector_norm(update).item()), count + g.numel()
    if bias is not None:
        norm = hypot(norm, torch.linalg.vector_norm(bias).item())
        count += bias.numel()
    return multi.size(group) * count**0.5 / norm if multi.in_range(norm) else None


def _cut(factor: Tensor, rows: int, length: int, pieces: int) -> list[Tensor]:
    """Cut a factor like the weight, unless it broadcasts along that axis."""
    if factor.shape[0] == length and length > 1:
        return list(torch.split(factor, rows))
    return [factor] * pieces
