"""The size of updates: one bound over all layers, and one size for each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import hypot, inf

import torch
from torch import Tensor

from tnkfac.curvature import switch
from tnkfac.optim.distributed.reduction import full_tensor
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer, update_dtype
from tnkfac.optim.params.state import ParamState, State
from tnkfac.optim.step.apply import Update

RMS = 0.2
"""Root mean square of ``grafting="rms"``: that of a late AdamW update (arXiv 2502.16982)."""
_SAFE = 1e-10


def gradient_matrix(layer: CapturedLayer, found_inf: Tensor | None = None) -> Tensor:
    """Joint gradient ``[G, C_out / G, D]`` of a layer, zero where a parameter has none.

    Args:
        layer: The layer.
        found_inf: Scalar that is one where the batch is to be skipped; then it is zero.
    """
    weight, bias = _gradient(layer.weight), None
    if layer.bias is not None:
        bias = _gradient(layer.bias).to(weight.dtype)
    matrix = layer.statistics.layer.to_matrix(weight, bias)
    matrix = matrix.to(update_dtype(matrix.dtype))
    if found_inf is None:
        return matrix
    return torch.where(found_inf.to(matrix.device) == 0, matrix, 0)


def _gradient(param: Tensor) -> Tensor:
    """The whole gradient of a parameter."""
    if param.grad is None:
        return torch.zeros(param.shape, dtype=param.dtype, device=param.device)
    return param.grad if type(param.grad) is Tensor else full_tensor(param.grad)


# -------------------------------------------------------------------------------- trust region


def clip_(
    updates: list[Tensor], gradients: Sequence[Tensor], layers: Sequence[CapturedLayer]
) -> Tensor | None:
    """Shrink the updates of all layers by one factor where ``kl_clip`` asks for it.

    Args:
        updates: Preconditioned gradients ``[G, C_out / G, D]``, in module order.
        gradients: Gradients, of the same shapes.
        layers: The layers.

    Returns:
        The factor, at most one; None without ``kl_clip``.
    """
    clipped = [i for i, layer in enumerate(layers) if layer.group["kl_clip"] is not None]
    if not clipped:
        return None
    terms = [
        term for i in clipped for term in _by_learning_rate(updates[i], gradients[i], layers[i])
    ]
    factor = trust_region(terms, min(layers[i].group["kl_clip"] for i in clipped))
    for i in clipped:
        updates[i].mul_(factor.to(updates[i].device, updates[i].dtype))
    return factor


def _by_learning_rate(
    update: Tensor, gradient: Tensor, layer: CapturedLayer
) -> list[tuple[Tensor, Tensor, Tensor | float]]:
    """Columns of an update and of a gradient that have one learning rate, and that."""
    lr = layer.group["lr"]
    if layer.bias_group is layer.group:
        return [(update, gradient, lr)]
    return [
        (update[:, :, :-1], gradient[:, :, :-1], lr),
        (update[:, :, -1:], gradient[:, :, -1:], layer.bias_group["lr"]),
    ]


def trust_region(terms: Sequence[tuple[Tensor, Tensor, Tensor | float]], bound: float) -> Tensor:
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


# -------------------------------------------------------------------------------- grafting


def graft_(updates: Sequence[Update], state: State, found_inf: Tensor | None) -> list[Update]:
    """Give every update the size that its group asks for, over what is trained of the layer.

    A zero update stays zero.

    Args:
        updates: Layers of one device and dtype with their updates, which are overwritten.
        state: State of the optimizer, with the second moments of ``"adam"``.
        found_inf: Scalar that is one where the batch is to be skipped.

    Returns:
        The updates.
    """
    grafted = [update for update in updates if update.layer.group["grafting"] is not None]
    if not grafted:
        return list(updates)
    values = [value for update in grafted for _, value in update.parts]
    owners = tuple(i for i, update in enumerate(grafted) for _ in update.parts)
    norms = [_target(update, state, found_inf) for update in grafted]
    numbers = [norm for norm in norms if not isinstance(norm, Tensor)]
    on_host = not switch.plain and found_inf is None and values[0].device.type == "cpu"
    if on_host and len(numbers) == len(norms):
        done = _resized_on_host(values, owners, numbers)
    else:
        done = _resized(values, owners, norms)
    sized = iter(done)
    resized = {
        id(update.layer): Update(update.layer, [(param, next(sized)) for param, _ in update.parts])
        for update in grafted
    }
    return [resized.get(id(update.layer), update) for update in updates]


def number(group: Group) -> float | None:
    """Root mean square that grafting gives an update; None if it depends on gradients."""
    kind = group["grafting"]
    if kind == "rms":
        return RMS
    return None if isinstance(kind, str) else float(kind)


def _target(update: Update, state: State, found_inf: Tensor | None) -> Tensor | float:
    """The norm that grafting gives an update."""
    layer, parts = update
    root_mean_square = number(layer.group)
    if root_mean_square is not None:
        return float(root_mean_square * sum(value.numel() for _, value in parts) ** 0.5)
    gradients = [(param, full_tensor(param.grad)) for param, _ in parts if param.grad is not None]
    if layer.group["grafting"] == "sgd":
        dtype = torch.promote_types(gradients[0][1].dtype, torch.float32)
        norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for _, gradient in gradients]
        joint: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return joint
    (_, beta), eps = layer.group["fallback_betas"], layer.group["fallback_eps"]
    squares = [adam_square(g, state[param], beta, eps, found_inf) for param, g in gradients]
    return torch.stack(squares).sum().sqrt()


def adam_square(
    gradient: Tensor,
    state: ParamState,
    beta: float,
    eps: float,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Squared norm of the AdamW update without momentum of one parameter.

    Args:
        gradient: Gradient of the parameter.
        state: Its state, with second moment and count of steps; updated in place.
        beta: Decay of the second moment.
        eps: Added to its root.
        found_inf: Scalar that is one where the batch is to be skipped; then nothing changes.
    """
    second, step = state["exp_avg_sq"], state["step"]
    square = gradient.to(second.dtype).square()
    if found_inf is None:
        second.lerp_(square, 1 - beta)
        step += 1
    else:
        skip = found_inf.to(second.device)
        second.lerp_(torch.where(skip == 0, square, second), 1 - beta)
        step += 1 - skip.to(step.dtype)
    correction = (1 - torch.pow(beta, step.double())).to(second.dtype)
    update = gradient.to(second.dtype) / ((second / correction).sqrt() + eps)
    return update.square().sum()


def _resized_on_host(
    values: list[Tensor], owners: tuple[int, ...], targets: list[float]
) -> list[Tensor]:
    """Bring tensors to norms of their owners, joint over all that an owner has."""
    joint = [0.0] * len(targets)
    for owner, norm in zip(owners, _host_norms(values), strict=True):
        joint[owner] = hypot(joint[owner], norm)
    scales = [
        target / norm if norm > 0 else 0.0 for target, norm in zip(targets, joint, strict=True)
    ]
    torch._foreach_mul_(values, [scales[owner] for owner in owners])
    return values


def _resized(
    values: list[Tensor], owners: tuple[int, ...], targets: Sequence[Tensor | float]
) -> list[Tensor]:
    """Bring tensors to norms without waiting for a device, and there with few launches."""
    dtype, device = torch.float64, values[0].device
    total = torch.stack(torch._foreach_norm(values, dtype=dtype))
    places = _kept(owners, torch.int64, device)
    if len(owners) > len(targets):
        joint = torch.zeros(len(targets), dtype=dtype, device=device)
        total = joint.index_add_(0, places, total.square()).sqrt()
    scales = torch.where(total > 0, _targets(targets, dtype, device) / total, 0.0)
    scales = scales.to(values[0].dtype)
    if len(owners) > len(targets):
        scales = scales.index_select(0, places)
    if not all(value.is_contiguous() for value in values):
        torch._foreach_mul_(values, scales.unbind())
        return values
    counts = [value.numel() for value in values]  # end to end: numbers times tensors go one by one
    lengths = _kept(tuple(counts), torch.int64, device)
    flat = torch.cat([value.view(-1) for value in values])
    flat *= torch.repeat_interleave(scales, lengths, output_size=len(flat))
    parts = torch.split(flat, counts)
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


def _targets(targets: Sequence[Tensor | float], dtype: torch.dtype, device: torch.device) -> Tensor:
    numbers = [target for target in targets if not isinstance(target, Tensor)]
    if len(numbers) == len(targets):
        return _kept(tuple(numbers), dtype, device)
    each = (
        target.to(device, dtype) if isinstance(target, Tensor) else _kept((target,), dtype, device)
        for target in targets
    )
    return torch.cat([target.view(1) for target in each])


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


@lru_cache(maxsize=256)
def _kept(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers already on the device: copying them there would wait for it."""
    return torch.tensor(numbers, dtype=dtype, device=device)
