"""The last part of a step for many layers at once: grafting, momentum, decay, and the step itself.

The same arithmetic as in :mod:`tnkfac.optim.step.grafting`, with a few calls for lists of tensors
in the place of several for each. It takes what can be put that way; all else goes the plain way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import hypot, inf
from typing import Any

import torch
from torch import Tensor

from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.step.grafting import RMS

CHUNK = 1 << 22
"""Bytes of gradients on the CPU that are taken to the end together: they stay in its cache."""
Update = tuple[CapturedLayer, Tensor, Tensor | None]
_SAFE = 1e-10


def suits(layer: CapturedLayer, state: Any) -> bool:
    """Whether all options of a layer can be had for lists of tensors, and its tensors be used."""
    own = layer.group
    if own["grafting"] in ("adam", "sgd") or own.get("nesterov", False):
        return False
    kind = layer.weight.dtype
    if kind not in (torch.float32, torch.float64):
        return False
    for param in layer.params():
        group = layer.group_of(param)
        if isinstance(group["lr"], Tensor) or isinstance(group["weight_decay"], Tensor):
            return False
        if isinstance(group["momentum"], Tensor) or param.dtype != kind:
            return False
        if param.device.type not in ("cpu", "cuda") or type(param) not in _PLAIN:
            return False
        if not (param.is_contiguous() or _is_dense(param)):
            return False
        buffer = state.get(param, {}).get("momentum_buffer")  # that of a checkpoint may differ
        if buffer is not None and (buffer.dtype != kind or buffer.stride() != param.stride()):
            return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_dense(param: Tensor) -> bool:
    """Whether a tensor fills its memory, in whatever order of axes."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(param))


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


def step_many(updates: Sequence[Update], state: Any, keep: Tensor | None) -> None:
    """Graft and step all weights and biases.

    Args:
        updates: Layers of one device and dtype, each with the preconditioned gradients of its
            weight and, where that has one, of its bias; they may be overwritten.
        state: State of the optimizer.
        keep: Scalar that is zero where the batch is to be skipped.
    """
    step_sized(_grafted(updates, keep is None), state, keep)


def step_sized(updates: Sequence[Update], state: Any, keep: Tensor | None) -> None:
    """Step all weights and biases by updates that have their size."""
    batches: dict[Any, tuple[Group, bool, bool, list[Tensor], list[Tensor], list[Tensor]]] = {}
    for layer, *both in updates:
        own = layer.group
        averaged, decoupled = own["grafting"] is not None, own["decoupled_weight_decay"]
        for param, update in zip((layer.weight, layer.bias), both, strict=True):
            if param is None or update is None or param.grad is None:
                continue
            group = layer.group_of(param)
            key = id(group), averaged, decoupled
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = (group, averaged, decoupled, [], [], [])
            if update.stride() != param.stride():
                update = torch.empty_like(param).copy_(update)
            batch[3].append(param)
            batch[4].append(update)
            if group["momentum"]:
                batch[5].append(state[param]["momentum_buffer"])
    for batch in batches.values():
        apply(*batch, keep)


def apply(
    group: Group,
    averaged: bool,
    decoupled: bool,
    params: list[Tensor],
    updates: list[Tensor],
    buffers: list[Tensor],
    keep: Tensor | None,
) -> None:
    """Momentum, decay and the step, as in :func:`tnkfac.optim.step.grafting.apply_update_`.

    torch's kernel for SGD does it all in one pass, and nothing at all where ``found_inf`` is one.
    """
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    skip = None
    if keep is not None:
        skip = 1 - keep.to(params[0].device, torch.float32)
        keep = 1 - skip.to(params[0].dtype)
    if decay and decoupled:
        torch._foreach_mul_(params, 1 - lr * decay if keep is None else 1 - lr * decay * keep)
    torch._fused_sgd_(
        params,
        updates,
        buffers,
        weight_decay=0.0 if decoupled else float(decay),
        momentum=float(momentum),
        lr=float(lr),
        dampening=float(momentum) if averaged else 0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=skip,
    )


def _grafted(
    updates: Sequence[Update], on_host: bool
) -> list[tuple[CapturedLayer, Tensor, Tensor | None]]:
    """Give every update the size that its group asks for; they may be overwritten.

    Args:
        updates: As for :func:`step_many`.
        on_host: Whether numbers may be looked at.
    """
    grafted = [entry for entry in updates if entry[0].group["grafting"]]
    if not grafted:
        return list(updates)
    weights = [weight for _, weight, _ in grafted]
    at = tuple(i for i, (_, _, bias) in enumerate(grafted) if bias is not None)
    biases = [bias for _, _, bias in grafted if bias is not None]
    numbers = [weight.numel() for weight in weights]
    for i, bias in zip(at, biases, strict=True):
        numbers[i] += bias.numel()
    sizes = tuple(
        size(layer.group) * count**0.5 for (layer, *_), count in zip(grafted, numbers, strict=True)
    )
    scale = _scaled_on_host if on_host and weights[0].device.type == "cpu" else _scaled
    done = scale(weights, biases, at, sizes)
    own = dict(zip(at, done[len(weights) :], strict=True))
    found = {id(layer): (layer, done[i], own.get(i)) for i, (layer, *_) in enumerate(grafted)}
    return [found.get(id(entry[0]), entry) for entry in updates]


def _scaled_on_host(
    weights: list[Tensor], biases: list[Tensor], at: tuple[int, ...], sizes: tuple[float, ...]
) -> list[Tensor]:
    """Bring weights and biases, which go with the weights at some places, to their joint norms."""
    values = [*weights, *biases]
    norms = _host_norms(values)
    for i, norm in zip(at, norms[len(weights) :], strict=True):
        norms[i] = hypot(norms[i], norm)
    found = [size / norm if norm > 0 else 0.0 for size, norm in zip(sizes, norms, strict=False)]
    torch._foreach_mul_(values, [*found, *(found[i] for i in at)])
    return values


def _scaled(
    weights: list[Tensor], biases: list[Tensor], at: tuple[int, ...], sizes: tuple[float, ...]
) -> list[Tensor]:
    """The same without waiting for a device, and there with few launches."""
    values = [*weights, *biases]
    total = torch.stack(torch._foreach_norm(values, dtype=torch.float64))
    device = total.device
    if biases:
        squares = total.square()
        places = _kept(at, torch.int64, device)
        total = squares[: len(weights)].index_add(0, places, squares[len(weights) :]).sqrt()
    scales = torch.where(total > 0, _kept(sizes, total.dtype, device) / total, 0.0)
    scales = scales.to(weights[0].dtype)
    if biases:
        scales = scales.index_select(0, _kept((*range(len(weights)), *at), torch.int64, device))
    if not all(value.is_contiguous() for value in values):
        torch._foreach_mul_(values, scales.unbind())
        return values
    counts = [value.numel() for value in values]  # end to end: numbers times tensors go one by one
    lengths = _kept(tuple(counts), torch.int64, device)
    flat = torch.cat([value.view(-1) for value in values])
    flat *= torch.repeat_interleave(scales, lengths, output_size=len(flat))
    parts = torch.split(flat, counts)
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


def in_range(norm: float) -> bool:
    """Whether a norm has lost nothing to squares that vanish in float32, or are infinite."""
    return _SAFE < norm < inf


def _host_norms(updates: list[Tensor]) -> list[float]:
    """Norm of each.

    Squares are summed in float64 where they would not fit into float32: where a normalisation
    follows a layer, its output factor is all rounding, and its natural gradient may be of size
    1e19. That takes several times as long, so it is done only if there is need.
    """
    norms: list[float] = [norm.item() for norm in torch._foreach_norm(updates)]
    if not all(map(in_range, norms)):
        norms = [norm.item() for norm in torch._foreach_norm(updates, dtype=torch.float64)]
    return norms


def size(group: Group) -> float:
    """Root mean square that grafting gives an update."""
    kind = group["grafting"]
    return RMS if kind == "rms" else float(kind)


@lru_cache(maxsize=256)
def _kept(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers already on the device: copying them there would wait for it."""
    return torch.tensor(numbers, dtype=dtype, device=device)
