"""The arithmetic of one parameter step: trust region, grafting, momentum, decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tnkfac.optim.distributed.reduction import whole
from tnkfac.optim.params.captured import CapturedLayer, update_dtype

RMS = 0.2
"""Root mean square of ``grafting="rms"``: that of a late AdamW update (arXiv 2502.16982)."""


def share_layout(tensors: Sequence[Tensor]) -> bool:
    """Whether numbers lie in memory in the same order and without gaps.

    Fused kernels walk through the memory of parameter, gradient and state in step; on the CPU they
    look neither at strides nor at a sign that is yet to be applied.
    """
    first = tensors[0]
    strides = first.stride()
    if any(tensor.stride() != strides or tensor.is_neg() for tensor in tensors):
        return False
    return first.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(first))


def gradient_matrix(layer: CapturedLayer, keep: Tensor | None = None) -> Tensor:
    """Joint gradient ``[G, C_out / G, D]`` of a layer, zero where a parameter has none.

    Args:
        layer: The layer.
        keep: Scalar that is zero where the batch is to be skipped.
    """
    weight, bias = _gradient(layer.weight), None
    if layer.bias is not None:
        bias = _gradient(layer.bias).to(weight.dtype)
    matrix = layer.statistics.layer.to_matrix(weight, bias)
    matrix = matrix.to(update_dtype(matrix.dtype))
    return matrix if keep is None else torch.where(keep.to(matrix.device) > 0, matrix, 0)


def _gradient(param: Tensor) -> Tensor:
    """The whole gradient of a parameter."""
    if param.grad is None:
        return torch.zeros(param.shape, dtype=param.dtype, device=param.device)
    return whole(param.grad)


def clipped(
    natural: list[Tensor], gradients: Sequence[Tensor], layers: Sequence[CapturedLayer]
) -> Tensor | None:
    """Shrink the updates of all layers by one factor where ``kl_clip`` asks for it.

    Args:
        natural: Preconditioned gradients ``[G, C_out / G, D]``, in module order; scaled in place.
        gradients: Gradients, of the same shapes.
        layers: The layers.

    Returns:
        The factor, at most one; None without ``kl_clip``.
    """
    own = [layer.group for layer in layers]
    chosen = [i for i, group in enumerate(own) if group["kl_clip"] is not None]
    if not chosen:
        return None
    terms = [
        term for i in chosen for term in _by_learning_rate(natural[i], gradients[i], layers[i])
    ]
    factor = trust_region(terms, min(own[i]["kl_clip"] for i in chosen))
    for i in chosen:
        natural[i].mul_(factor.to(natural[i].device, natural[i].dtype))
    return factor


def _by_learning_rate(
    natural: Tensor, gradient: Tensor, layer: CapturedLayer
) -> list[tuple[Tensor, Tensor, Any]]:
    """Columns of an update and of a gradient that have one learning rate, and that."""
    own = layer.group
    other = own if layer.bias is None else layer.group_of(layer.bias)
    if other is own:
        return [(natural, gradient, own["lr"])]
    return [
        (natural[:, :, :-1], gradient[:, :, :-1], own["lr"]),
        (natural[:, :, -1:], gradient[:, :, -1:], other["lr"]),
    ]


def graft(
    layer: CapturedLayer,
    gradient: Tensor,
    update: Tensor,
    state: Any,
    keep: Tensor | None = None,
) -> Tensor:
    """Give an update the size that the group asks for, over what is trained of the layer.

    Args:
        layer: The layer.
        gradient: Joint gradient matrix ``[G, C_out / G, D]``.
        update: Its preconditioned form.
        state: State of the optimizer, with the second moments of ``"adam"``.
        keep: Scalar that is zero where the batch is to be skipped.
    """
    group, kind = layer.group, layer.group["grafting"]
    if kind is None:
        return update
    trained, gradient = _trained(layer, update), _trained(layer, gradient)
    if not isinstance(kind, str) or kind == "rms":
        return update * grafting_scale(trained, RMS if kind == "rms" else kind)
    if kind == "sgd":
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        size = torch.linalg.vector_norm(gradient, dtype=dtype) / gradient.numel() ** 0.5
        return update * grafting_scale(trained, size)
    (_, beta), eps = group["fallback_betas"], group["fallback_eps"]
    squares = [
        adam_square(whole(param.grad), state[param], beta, eps, keep)
        for param in layer.params()
        if param.grad is not None
    ]
    size = (torch.stack(squares).sum() / trained.numel()).sqrt()
    return update * grafting_scale(trained, size)


def _trained(layer: CapturedLayer, matrix: Tensor) -> Tensor:
    """Columns of a joint matrix whose parameter has a gradient."""
    if layer.bias is None:
        return matrix
    if layer.bias.grad is None:
        return matrix[:, :, :-1]
    return matrix[:, :, -1:] if layer.weight.grad is None else matrix


def trust_region(terms: Sequence[tuple[Tensor, Tensor, Any]], bound: float) -> Tensor:
    """One factor for all layers that bounds the quadratic change of the loss.

    ``min(1, sqrt(bound / |sum lr^2 <natural, gradient>|))``, a scalar tensor.

    Args:
        terms: Preconditioned gradients, gradients of the same shapes, and learning rates.
        bound: ``kl_clip``.
    """
    total = torch.zeros((), device=terms[0][0].device)
    for update, gradient, lr in terms:
        dtype = torch.promote_types(update.dtype, torch.float32)
        product = torch.dot(update.to(dtype).flatten(), gradient.to(dtype).flatten())
        total = total + (product * lr * lr).to(total.device, non_blocking=True)
    return (bound / total.abs()).sqrt().clamp(max=1.0).nan_to_num(1.0)


def grafting_scale(update: Tensor, size: Tensor | float) -> Tensor:
    """Number that brings an update to a root mean square; zero for a zero update.

    Args:
        update: Any shape.
        size: Root mean square of the scaled update.
    """
    dtype = torch.promote_types(update.dtype, torch.float32)
    norm = torch.linalg.vector_norm(update, dtype=dtype)
    scale = size * update.numel() ** 0.5 / norm
    return torch.where(norm > 0, scale, 0.0).to(update.dtype)


def adam_state(param: Tensor) -> dict[str, Tensor]:
    """What ``grafting="adam"`` keeps of a parameter: its second moment, and its own updates."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    return {
        "exp_avg_sq": torch.zeros(param.shape, dtype=dtype, device=param.device),
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
    }


def adam_square(
    gradient: Tensor, state: dict[str, Tensor], beta: float, eps: float, keep: Tensor | None = None
) -> Tensor:
    """Squared norm of the AdamW update without momentum of one parameter.

    Args:
        gradient: Gradient of the parameter.
        state: Its state, see :func:`adam_state`; updated in place.
        beta: Decay of the second moment.
        eps: Added to its root.
        keep: Scalar that is zero where the batch is to be skipped, and then nothing changes.
    """
    second, step = state["exp_avg_sq"], state["step"]
    square = gradient.to(second.dtype).square()
    if keep is None:
        second.lerp_(square, 1 - beta)
        step += 1
    else:
        kept = keep.to(second.device)
        second.lerp_(torch.where(kept > 0, square, second), 1 - beta)
        step += kept.to(step.dtype)
    correction = (1 - torch.pow(beta, step.double())).to(second.dtype)
    update = gradient.to(second.dtype) / ((second / correction).sqrt() + eps)
    return update.square().sum()


def apply_update_(
    param: Tensor,
    update: Tensor,
    buffer: Tensor | None,
    *,
    lr: Any,
    momentum: Any,
    weight_decay: Any,
    decoupled: bool,
    averaged: bool,
    nesterov: bool = False,
    keep: Tensor | None = None,
) -> None:
    """Momentum, decay and the step itself, in place.

    Args:
        param: The parameter.
        update: Its preconditioned gradient, same shape.
        buffer: Momentum buffer, or None without momentum.
        lr: Learning rate.
        momentum: Decay of the buffer.
        weight_decay: Coefficient.
        decoupled: ``param *= 1 - lr * weight_decay`` instead of adding the decay to the update.
        averaged: The buffer is a moving average, so that updates keep their size.
        nesterov: Step along what the buffer will be if the update repeats itself.
        keep: Scalar that turns the step into none where it is zero; the update is zero then.
    """
    if keep is not None:
        keep = keep.to(param.device, param.dtype)
        lr, weight_decay = lr * keep, weight_decay * keep if weight_decay else 0.0
    if isinstance(weight_decay, Tensor) or weight_decay:
        if decoupled:
            param.mul_(1 - lr * weight_decay)
        else:
            update = update + weight_decay * param
    if buffer is not None:
        fresh = (1 - momentum) if keep is None else (1 - momentum) * keep
        if averaged:
            buffer.lerp_(update.to(buffer.dtype), fresh)
        elif keep is None and update.dtype == buffer.dtype and not isinstance(momentum, Tensor):
            torch.add(update, buffer, alpha=momentum, out=buffer)  # one pass instead of two
        else:
            buffer.mul_(momentum if keep is None else 1 - fresh).add_(update)
        if nesterov:
            update = (1 - momentum if averaged else 1) * update + momentum * buffer
        else:
            update = buffer
    if isinstance(lr, Tensor):
        param.sub_((update * lr.to(param.device)).to(param.dtype))
    else:
        param.add_(update, alpha=-lr)
