"""The size of updates: one bound over all layers, and one size for each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import hypot, inf, isfinite

import torch
from torch import Tensor

from tnkfac.optim.distributed.reduction import full_tensor
from tnkfac.optim.finite import SkippedSteps
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
    updates: list[Tensor],
    gradients: Sequence[Tensor],
    layers: Sequence[CapturedLayer],
    found_inf: Tensor | None,
) -> Tensor | None:
    """Shrink the updates of all layers by one factor where ``kl_clip`` asks for it.

    Args:
        updates: Preconditioned gradients ``[G, C_out / G, D]``, in module order.
        gradients: Gradients, of the same shapes.
        layers: The layers.
        found_inf: Scalar that is one where the batch is to be skipped.

    Returns:
        The factor, at most one; None without ``kl_clip``.
    """
    clipped = [i for i, layer in enumerate(layers) if layer.group["kl_clip"] is not None]
    if not clipped:
        return None
    terms = [
        term for i in clipped for term in _by_learning_rate(updates[i], gradients[i], layers[i])
    ]
    on_host = found_inf is None and updates[0].device.type == "cpu"
    factor = trust_region(terms, min(layers[i].group["kl_clip"] for i in clipped), on_host)
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


def trust_region(
    terms: Sequence[tuple[Tensor, Tensor, Tensor | float]], bound: float, on_host: bool = False
) -> Tensor:
    """One factor for all layers that bounds the quadratic change of the loss.

    ``min(1, sqrt(bound / |sum lr^2 <natural, gradient>|))``, a scalar tensor.

    Args:
        terms: Preconditioned gradients, gradients of the same shapes, and learning rates.
        bound: ``kl_clip``.
        on_host: Whether numbers may be looked at.
    """
    total = torch.zeros((), dtype=torch.float64, device=terms[0][0].device)
    for update, gradient, lr in terms:
        product = _dot(update, gradient, on_host) * lr * lr
        total = total + product.to(total.device, torch.float64, non_blocking=True)
    return (bound / total.abs()).sqrt().clamp(max=1.0).nan_to_num(0.0)


def _dot(update: Tensor, gradient: Tensor, on_host: bool) -> Tensor:
    """Scalar product; zero where it is not finite, since such an update makes no step."""
    dtype = torch.promote_types(update.dtype, torch.float32)
    product = torch.dot(update.to(dtype).flatten(), gradient.to(dtype).flatten())
    if on_host and not isfinite(product.item()):  # perhaps only too large
        product = torch.dot(update.double().flatten(), gradient.double().flatten())
    return torch.where(product.isfinite(), product, 0.0)


# -------------------------------------------------------------------------------- grafting


def graft_(
    updates: Sequence[Update], state: State, found_inf: Tensor | None, skipped: SkippedSteps
) -> tuple[list[Update], Tensor | None]:
    """Give every update the size that its group asks for, over what is trained of the layer.

    A zero update stays zero. A layer whose update is not finite makes no step; on a device, where
    nobody waits to learn which one that is, none of these layers does.

    Args:
        updates: Layers of one device and dtype with their updates, which are overwritten.
        state: State of the optimizer, with the second moments of ``"adam"``.
        found_inf: Scalar that is one where the batch is to be skipped.
        skipped: Counts layers that make no step.

    Returns:
        The updates to apply, and the scalar that says whether they are.
    """
    if not updates:
        return [], found_inf
    first = updates[0].parts[0][1]
    if found_inf is None and first.device.type == "cpu":
        norms = _norms_on_host(updates)
        good = [isfinite(norm) for norm in norms]
        if not all(good):
            skipped.add([u.layer.name for u, g in zip(updates, good, strict=True) if not g])
        pairs = [(u, n) for u, n, g in zip(updates, norms, good, strict=True) if g]
        return _graft_on_host(pairs, state), None
    lengths = _norms(updates)
    names = [update.layer.name for update in updates]
    found_inf = _flagged(names, lengths, found_inf, skipped)
    return _graft(updates, lengths, state, found_inf), found_inf


def flagged(updates: Sequence[Update], found_inf: Tensor | None, skipped: SkippedSteps) -> Tensor:
    """The scalar that says whether updates on a device are skipped: also if one is not finite.

    Args:
        updates: Layers of one device and dtype with their updates.
        found_inf: Scalar that is one where the batch is to be skipped.
        skipped: Counts layers whose update is not finite.
    """
    values = [value for update in updates for _, value in update.parts]
    names = [update.layer.name for update in updates for _ in update.parts]
    return _flagged(names, torch.stack(torch._foreach_norm(values)), found_inf, skipped)


def _flagged(
    names: Sequence[str], norms: Tensor, found_inf: Tensor | None, skipped: SkippedSteps
) -> Tensor:
    bad = norms - norms != 0  # of what is not finite the difference is not a number
    if found_inf is not None:  # of a batch that is skipped nothing is counted
        skip = found_inf.to(norms.device, non_blocking=True) > 0
        bad = bad > skip
    skipped.add_flags(names, bad)
    flag = bad.any()
    return (flag if found_inf is None else flag | skip).float()


def _graft_on_host(pairs: Sequence[tuple[Update, float]], state: State) -> list[Update]:
    """Bring updates to their sizes, given their norms."""
    values, scales = [], []
    for update, norm in pairs:
        if update.layer.group["grafting"] is not None and norm > 0:
            target = _target(update, state, None)
            largest = torch.finfo(update.parts[0][1].dtype).max
            values += [value for _, value in update.parts]
            scales += [min(float(target) / norm, largest)] * len(update.parts)
    if values:
        torch._foreach_mul_(values, scales)
    return [update for update, _ in pairs]


def _graft(
    updates: Sequence[Update], norms: Tensor, state: State, found_inf: Tensor | None
) -> list[Update]:
    """Bring updates to their sizes without waiting for a device, and with few launches."""
    grafted = [i for i, update in enumerate(updates) if update.layer.group["grafting"] is not None]
    if not grafted:
        return list(updates)
    values = [value for i in grafted for _, value in updates[i].parts]
    owners = [i for i, place in enumerate(grafted) for _ in updates[place].parts]
    dtype, device = values[0].dtype, values[0].device
    targets = _targets([_target(updates[i], state, found_inf) for i in grafted], norms)
    if len(grafted) < len(updates):
        norms = norms.index_select(0, _kept(tuple(grafted), torch.int64, device))
    scales = torch.where(norms > 0, targets / norms, 0.0).clamp(max=torch.finfo(dtype).max)
    scales = scales.to(dtype)
    if len(owners) > len(grafted):
        scales = scales.index_select(0, _kept(tuple(owners), torch.int64, device))
    if not all(value.is_contiguous() for value in values):
        torch._foreach_mul_(values, scales.unbind())
        return list(updates)
    counts = [value.numel() for value in values]  # end to end: numbers times tensors go one by one
    lengths = _kept(tuple(counts), torch.int64, device)
    flat = torch.cat([value.view(-1) for value in values])
    flat *= torch.repeat_interleave(scales, lengths, output_size=len(flat))
    sized = iter(torch.split(flat, counts))
    done = {
        i: [(param, next(sized).view(value.shape)) for param, value in updates[i].parts]
        for i in grafted
    }
    return [Update(u.layer, done.get(i, u.parts)) for i, u in enumerate(updates)]


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


def _norms_on_host(updates: Sequence[Update]) -> list[float]:
    """Norm of each update, over all its parameters; not finite where a number is not."""
    norms = iter(_host_norms([value for update in updates for _, value in update.parts]))
    return [hypot(*(next(norms) for _ in update.parts)) for update in updates]


def _norms(updates: Sequence[Update]) -> Tensor:
    """Norms of updates as a tensor, without waiting for a device."""
    values = [value for update in updates for _, value in update.parts]
    norms = torch.stack(torch._foreach_norm(values, dtype=torch.float64))
    if len(values) == len(updates):
        return norms
    owners = tuple(i for i, update in enumerate(updates) for _ in update.parts)
    joint = torch.zeros(len(updates), dtype=norms.dtype, device=norms.device)
    return joint.index_add_(0, _kept(owners, torch.int64, norms.device), norms.square()).sqrt()


def _targets(targets: Sequence[Tensor | float], like: Tensor) -> Tensor:
    """Numbers and scalars as one tensor."""
    dtype, device = like.dtype, like.device
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
