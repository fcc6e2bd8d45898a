"""The last part of a step: momentum, decay, and the step itself, for many parameters at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tnkfac.curvature import switch
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.sharding import local_shard, shard_like
from tnkfac.optim.params.state import State

CHUNK = 1 << 22
"""Bytes of gradients on the CPU that are taken to the end together: they stay in its cache."""
_FULL = (torch.float32, torch.float64)
_FUSED = ("cpu", "cuda")
_PLAIN = (Tensor, torch.nn.Parameter)


class Update(NamedTuple):
    """Preconditioned gradients of a layer.

    Attributes:
        layer: The layer.
        parts: Its parameters that have a gradient, each with its update in the shape of the
            parameter; these may be overwritten.
    """

    layer: CapturedLayer
    parts: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepOptions:
    """How a step of one parameter group is taken.

    Attributes:
        lr: Learning rate; a tensor where it lies on a device.
        momentum: Decay of the momentum buffer; zero without.
        weight_decay: Coefficient.
        decoupled: ``param *= 1 - lr * weight_decay`` instead of adding the decay to the update.
        averaged: The buffer is a moving average, so that updates keep their size.
        nesterov: Step along what the buffer will be if the update repeats itself.
    """

    lr: Tensor | float
    momentum: float
    weight_decay: float
    decoupled: bool
    averaged: bool
    nesterov: bool

    @staticmethod
    def of(group: Group, of_layer: Group) -> StepOptions:
        """Options of a parameter, whose group may differ from that of its layer's weight."""
        lr = group["lr"]
        return StepOptions(
            lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr),
            float(group["momentum"]),
            float(group["weight_decay"]),
            of_layer["decoupled_weight_decay"],
            of_layer["grafting"] is not None,
            group.get("nesterov", False),
        )


def chunks(layers: Sequence[CapturedLayer]) -> list[list[CapturedLayer]]:
    """Layers in order, of one device and dtype, cut where they would leave the cache of a CPU."""
    cut: list[list[CapturedLayer]] = []
    size, kind = 0, None
    for layer in layers:
        weight = layer.weight
        nbytes = weight.numel() * weight.element_size()
        full = weight.device.type == "cpu" and size + nbytes > CHUNK
        if full or kind != (weight.device, weight.dtype):
            cut.append([])
            size, kind = 0, (weight.device, weight.dtype)
        cut[-1].append(layer)
        size += nbytes
    return cut


def is_plain(param: Tensor) -> bool:
    """Whether kernels that walk through memory can take a parameter as it is."""
    if type(param) not in _PLAIN or param.dtype not in _FULL or param.device.type not in _FUSED:
        return False
    return param.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(param))


def apply_(updates: Sequence[Update], state: State, found_inf: Tensor | None) -> None:
    """Step all parameters of some layers.

    Args:
        updates: Layers with updates of the size that they should have.
        state: State of the optimizer.
        found_inf: Scalar that turns the step into none where it is one.
    """
    batches: dict[object, tuple[StepOptions, list[tuple[Tensor, Tensor]]]] = {}
    for layer, parts in updates:
        for param, update in parts:
            group = layer.group_of(param)
            key = id(group), id(layer.group), param.device, param.dtype
            if key not in batches:
                batches[key] = StepOptions.of(group, layer.group), []
            batches[key][1].append((param, update))
    for options, pairs in batches.values():
        params, moves = [param for param, _ in pairs], [update for _, update in pairs]
        buffers: list[Tensor] = []
        if options.momentum:
            buffers = [state[param]["momentum_buffer"] for param in params]
        if not all(type(param) in _PLAIN for param in params):
            moves = [shard_like(update, param) for param, update in pairs]
            params, buffers = [*map(local_shard, params)], [*map(local_shard, buffers)]
        if not switch.plain and params[0].device.type in _FUSED:
            _apply_listed(options, params, moves, buffers, found_inf)
        else:
            for i, (param, update) in enumerate(zip(params, moves, strict=True)):
                apply_reference_(options, param, update, buffers[i] if buffers else None, found_inf)


def _apply_listed(
    options: StepOptions,
    params: list[Tensor],
    updates: list[Tensor],
    buffers: list[Tensor],
    found_inf: Tensor | None,
) -> None:
    """Apply updates that may be of half precision, or lie in memory in different ways.

    These are stepped as copies in single precision that lie alike.
    """
    stepped = [param if is_plain(param) else _single(param) for param in params]
    moves = [
        update if _alike(update, param) else torch.empty_like(param).copy_(update)
        for param, update in zip(stepped, updates, strict=True)
    ]
    moved = [
        buffer if _alike(buffer, param) else torch.empty_like(param).copy_(buffer)
        for param, buffer in zip(stepped, buffers, strict=bool(buffers))
    ]
    fused_step_(options, stepped, moves, moved, found_inf)
    pairs = [*zip(params, stepped, strict=True), *zip(buffers, moved, strict=True)]
    copied = [(old, new) for old, new in pairs if old is not new]
    if copied:
        torch._foreach_copy_([old for old, _ in copied], [new for _, new in copied])


def _single(param: Tensor) -> Tensor:
    dtype = torch.promote_types(param.dtype, torch.float32)
    return param.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _alike(tensor: Tensor, param: Tensor) -> bool:
    return tensor.dtype == param.dtype and tensor.stride() == param.stride()


def fused_step_(
    options: StepOptions,
    params: list[Tensor],
    updates: list[Tensor],
    buffers: list[Tensor],
    found_inf: Tensor | None,
) -> None:
    """Momentum, decay and the step, as in :func:`apply_reference_`.

    torch's kernel for SGD does it all in one pass, and nothing at all where ``found_inf`` is one.
    """
    lr, momentum, decay = options.lr, options.momentum, options.weight_decay
    if found_inf is not None:
        found_inf = found_inf.to(params[0].device, torch.float32)
    if decay and options.decoupled:
        gate: Tensor | float = 1.0
        if found_inf is not None:
            gate = 1 - found_inf.to(params[0].dtype)
        torch._foreach_mul_(params, 1 - lr * decay * gate)
        decay = 0.0
    dampening = momentum if options.averaged else 0.0
    if options.nesterov and options.averaged:  # torch would dampen what the buffer takes alone
        torch._foreach_mul_(updates, 1 - momentum)
        decay, dampening = decay * (1 - momentum), 0.0
    torch._fused_sgd_(
        params,
        updates,
        buffers,
        weight_decay=decay,
        momentum=momentum,
        lr=lr,
        dampening=dampening,
        nesterov=options.nesterov and momentum > 0,
        maximize=False,
        is_first_step=False,
        found_inf=found_inf,
    )


def apply_reference_(
    options: StepOptions,
    param: Tensor,
    update: Tensor,
    buffer: Tensor | None,
    found_inf: Tensor | None = None,
) -> None:
    """Momentum, decay and the step itself of one parameter, in place.

    Args:
        options: How it is taken.
        param: The parameter.
        update: Its preconditioned gradient, same shape.
        buffer: Momentum buffer, or None without momentum.
        found_inf: Scalar that turns the step into none where it is one.
    """
    wide = torch.promote_types(param.dtype, torch.float32)
    lr, momentum = options.lr, options.momentum
    moved, update = param.to(wide), update.to(wide)
    if options.weight_decay:
        if options.decoupled:
            moved = moved * (1 - lr * options.weight_decay)
        else:
            update = update + options.weight_decay * moved
    written = [(param, moved)]
    if buffer is not None:
        fresh = 1 - momentum if options.averaged else 1.0
        average = momentum * buffer.to(wide) + fresh * update
        update = fresh * update + momentum * average if options.nesterov else average
        written.append((buffer, average))
    written[0] = param, moved - update * lr
    for old, new in written:
        old.copy_(
            new if found_inf is None else torch.where(found_inf.to(old.device) == 0, new, old)
        )
