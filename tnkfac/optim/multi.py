"""The last part of a step for many layers at once: grafting, momentum, decay, and the step itself.

The same arithmetic as in :mod:`tnkfac.optim.step`, with a few calls for lists of tensors in the
place of several for each. It takes what can be put that way; all else goes the plain way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tnkfac.optim.layers import CapturedLayer
from tnkfac.optim.step import RMS

Group = dict[str, Any]
CHUNK = 1 << 22
"""Bytes of gradients on the CPU that are taken to the end together: they stay in its cache."""
Update = tuple[CapturedLayer, Tensor]


def suits(layer: CapturedLayer, update: Tensor, state: Any, groups: dict[int, Group]) -> bool:
    """Whether all options of a layer can be had for lists of tensors, and its tensors viewed."""
    own = groups[id(layer.weight)]
    if own["grafting"] in ("adam", "sgd") or own.get("nesterov", False):
        return False
    kind = update.dtype
    if kind not in (torch.float32, torch.float64):
        return False
    for param in layer.params():
        group = groups.get(id(param), own)
        if isinstance(group["lr"], Tensor) or isinstance(group["weight_decay"], Tensor):
            return False
        if isinstance(group["momentum"], Tensor) or param.dtype != kind:
            return False
        if not param.is_contiguous() or type(param) not in (Tensor, torch.nn.Parameter):
            return False
        buffer = state.get(param, {}).get("momentum_buffer")  # that of a checkpoint may differ
        if buffer is not None and (buffer.dtype != kind or not buffer.is_contiguous()):
            return False
    return True


def chunks(layers: Sequence[CapturedLayer]) -> list[list[CapturedLayer]]:
    """Layers in order, of one device and dtype, cut where they would leave the cache of a CPU."""
    found: list[list[CapturedLayer]] = []
    size, kind = 0, None
    for layer in layers:
        weight = layer.weight
        own = weight.numel() * weight.element_size()
        full = weight.device.type == "cpu" and size + own > CHUNK
        if full or kind != (weight.device, weight.dtype):
            found.append([])
            size, kind = 0, (weight.device, weight.dtype)
        found[-1].append(layer)
        size += own
    return found


def step_many(
    updates: Sequence[Update], state: Any, groups: dict[int, Group], keep: Tensor | None
) -> None:
    """Graft and step all weights and biases.

    Args:
        updates: Layers, each with its preconditioned gradient matrix ``[G, C_out / G, D]``.
        state: State of the optimizer.
        groups: Parameter groups by ``id`` of the parameter.
        keep: Scalar that is zero where the batch is to be skipped; the updates are zero then.
    """
    grafted = [i for i, (la, _) in enumerate(updates) if groups[id(la.weight)]["grafting"]]
    values = [update for _, update in updates]
    if grafted:
        trained = [_trained(*updates[i]) for i in grafted]
        sizes = tuple(
            _size(groups[id(updates[i][0].weight)]) * part.numel() ** 0.5
            for i, part in zip(grafted, trained, strict=True)
        )
        scales = _scales(trained, sizes)
        scaled = torch._foreach_mul([values[i] for i in grafted], scales)
        for i, value in zip(grafted, scaled, strict=True):
            values[i] = value
    batches: dict[Any, tuple[Group, bool, bool, list[Tensor], list[Tensor], list[Tensor]]] = {}
    for (layer, _), value in zip(updates, values, strict=True):
        own = groups[id(layer.weight)]
        for param, part in zip(layer.params(), _parts(layer, value), strict=True):
            if param.grad is None:
                continue
            group = groups.get(id(param), own)
            averaged, decoupled = own["grafting"] is not None, own["decoupled_weight_decay"]
            key = id(group), averaged, decoupled
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = (group, averaged, decoupled, [], [], [])
            batch[3].append(param.view_as(part))
            batch[4].append(part)
            if group["momentum"]:
                batch[5].append(state[param]["momentum_buffer"].view_as(part))
    for group, averaged, decoupled, params, parts, buffers in batches.values():
        _apply(group, averaged, decoupled, params, parts, buffers, keep)


def _apply(
    group: Group,
    averaged: bool,
    decoupled: bool,
    params: list[Tensor],
    parts: list[Tensor],
    buffers: list[Tensor],
    keep: Tensor | None,
) -> None:
    """Momentum, decay and the step, in place, as in :func:`tnkfac.optim.step.apply_update_`."""
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    if keep is not None:
        keep = keep.to(params[0].device, params[0].dtype)
    if decay and decoupled:
        shrink: Any = 1 - lr * decay if keep is None else 1 - lr * decay * keep
        torch._foreach_mul_(params, shrink)
    elif decay:
        part = params if keep is None else torch._foreach_mul(params, keep)
        parts = list(torch._foreach_add(parts, part, alpha=decay))
    if buffers:
        if averaged and keep is None:
            torch._foreach_lerp_(buffers, parts, 1 - momentum)
        elif averaged:
            torch._foreach_lerp_(buffers, parts, [(1 - momentum) * keep] * len(parts))
        else:
            torch._foreach_mul_(buffers, momentum if keep is None else 1 - (1 - momentum) * keep)
            torch._foreach_add_(buffers, parts)
        parts = buffers
    if keep is None:
        torch._foreach_add_(params, parts, alpha=-lr)
    else:
        torch._foreach_sub_(params, torch._foreach_mul(parts, lr * keep))


def _trained(layer: CapturedLayer, update: Tensor) -> Tensor:
    """What of an update is not frozen."""
    if layer.bias is not None and layer.bias.grad is None:
        return update[:, :, :-1]
    return update


def _parts(layer: CapturedLayer, update: Tensor) -> list[Tensor]:
    """An update for weight and bias, in shapes that these can be viewed as."""
    if layer.statistics.layer.kind == "conv_transpose":  # its matrix is no view of the weight
        weight, bias = layer.statistics.layer.from_matrix(update, layer.weight.shape)
        return [weight] if bias is None else [weight, bias]
    if layer.bias is None:
        return [update]
    return [update[:, :, :-1], update[:, :, -1:]]


def _size(group: Group) -> float:
    kind = group["grafting"]
    return RMS if kind == "rms" else float(kind)


def _scales(updates: list[Tensor], sizes: tuple[float, ...]) -> list[Tensor]:
    """What brings each update to its norm, zero for one of zeros.

    Squares are summed in float64: where a normalisation follows a layer, its output factor is all
    rounding, and its natural gradient may be of size 1e19.
    """
    norms = torch.stack(torch._foreach_norm(updates, dtype=torch.float64))
    wanted = _sizes(sizes, norms.dtype, norms.device)
    found = torch.where(norms > 0, wanted / norms, 0.0)
    return list(found.to(updates[0].dtype).unbind())


@lru_cache(maxsize=256)
def _sizes(sizes: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers already on the device: copying them there would wait for it."""
    return torch.tensor(sizes, dtype=dtype, device=device)
