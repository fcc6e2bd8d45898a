"""Steps of all parameters: preconditioned layers, and the rest by the fallback."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from tnkfac.optim import fallback, multi
from tnkfac.optim.layers import CapturedLayer, Uncaptured
from tnkfac.optim.paths import fast
from tnkfac.optim.registry import Group
from tnkfac.optim.step import apply_update_, clipped, gradient_matrix, graft

State = Any
Naturals = Callable[[list[CapturedLayer], dict[int, Group], list[Tensor]], list[Tensor]]


def natural_gradients(
    layers: Iterable[CapturedLayer],
    naturals: Naturals,
    groups: dict[int, Group],
    keep: Tensor | None = None,
) -> tuple[list[tuple[CapturedLayer, Tensor, Tensor]], Tensor | None]:
    """Gradient matrices of all layers that have a gradient, preconditioned and clipped.

    Args:
        layers: Layers in module order.
        naturals: Preconditions gradient matrices ``[G, C_out / G, D]``, given layers and groups.
        groups: Parameter groups by ``id`` of the parameter.
        keep: Scalar that is zero where the batch is to be skipped.

    Returns:
        Layer, gradient matrix and preconditioned gradient; and by what the trust region scaled
        them, or None without one.
    """
    chosen = [la for la in layers if any(p.grad is not None for p in la.params())]
    matrices = [gradient_matrix(layer, keep) for layer in chosen]
    own = [groups[id(layer.weight)] for layer in chosen]
    found = naturals(chosen, groups, matrices)
    factor = clipped(found, matrices, own)
    return list(zip(chosen, matrices, found, strict=True)), factor


def step_layers(
    layers: Iterable[CapturedLayer],
    naturals: Naturals,
    state: State,
    groups: dict[int, Group],
    keep: Tensor | None,
) -> Tensor | None:
    """Step weights and biases of all layers; takes, and returns the factor, as above."""
    layers = [la for la in layers if any(p.grad is not None for p in la.params())]
    if any(groups[id(layer.weight)]["kl_clip"] is not None for layer in layers):
        updates, factor = natural_gradients(layers, naturals, groups, keep)
        chosen = {id(layer): (matrix, update) for layer, matrix, update in updates}
        for chunk in multi.chunks(layers):
            _finish(chunk, [chosen[id(layer)] for layer in chunk], state, groups, keep)
        return factor
    for chunk in multi.chunks(layers):  # to the end, one after the other
        matrices = [gradient_matrix(layer, keep) for layer in chunk]
        found = naturals(chunk, groups, matrices)
        _finish(chunk, list(zip(matrices, found, strict=True)), state, groups, keep)
    return None


def _finish(
    layers: list[CapturedLayer],
    pairs: list[tuple[Tensor, Tensor]],
    state: State,
    groups: dict[int, Group],
    keep: Tensor | None,
) -> None:
    """Graft and step, given gradient matrices and what they were preconditioned to."""
    many = []
    for layer, (matrix, update) in zip(layers, pairs, strict=True):
        if fast() and multi.suits(layer, update, state, groups):
            many.append((layer, update))
        else:
            _step_layer(layer, matrix, update, state, groups, keep)
    if many:
        multi.step_many(many, state, groups, keep)


def _step_layer(
    layer: CapturedLayer,
    matrix: Tensor,
    update: Tensor,
    state: State,
    groups: dict[int, Group],
    keep: Tensor | None,
) -> None:
    """Graft, and step weight and bias."""
    group = groups[id(layer.weight)]
    update = graft(layer, group, matrix, update, state.get(layer.weight, {}))
    weight, bias = layer.statistics.layer.from_matrix(update, layer.weight.shape)
    _step_param(layer.weight, weight, state, groups, group, keep)
    if layer.bias is not None and bias is not None:
        _step_param(layer.bias, bias, state, groups, group, keep)


def _step_param(
    param: Tensor,
    update: Tensor,
    state: State,
    groups: dict[int, Group],
    layer_group: Group,
    keep: Tensor | None,
) -> None:
    if param.grad is None:
        return
    group = groups.get(id(param), layer_group)
    apply_update_(
        param,
        update,
        state[param]["momentum_buffer"] if group["momentum"] else None,
        lr=group["lr"],
        momentum=group["momentum"],
        weight_decay=group["weight_decay"],
        decoupled=layer_group["decoupled_weight_decay"],
        averaged=layer_group["grafting"] is not None,
        nesterov=group.get("nesterov", False),
        keep=keep,
    )


def step_others(
    others: Iterable[Uncaptured],
    state: State,
    param_groups: list[Group],
    groups: dict[int, Group],
    skip: Tensor | None,
) -> None:
    """Step all other parameters; ``skip`` turns the step into none where it is one."""
    by_group: dict[int, list[Tensor]] = {}
    for other in others:
        if other.param.grad is not None:
            by_group.setdefault(id(groups[id(other.param)]), []).append(other.param)
    for group in param_groups:
        params = by_group.get(id(group), [])
        if params:
            fallback.update(params, [state.get(param, {}) for param in params], group, skip)
