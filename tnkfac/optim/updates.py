"""Steps of all parameters: preconditioned layers, and the rest by the fallback."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from tnkfac.optim import fallback
from tnkfac.optim.layers import CapturedLayer, Uncaptured
from tnkfac.optim.registry import Group
from tnkfac.optim.step import apply_update_, clipped, gradient_matrix, graft

State = Any
Natural = Callable[[CapturedLayer, Group, Tensor], Tensor]


def natural_gradients(
    layers: Iterable[CapturedLayer],
    natural: Natural,
    groups: dict[int, Group],
    keep: Tensor | None = None,
) -> tuple[list[tuple[CapturedLayer, Tensor, Tensor]], Tensor | None]:
    """Gradient matrices of all layers that have a gradient, preconditioned and clipped.

    Args:
        layers: Layers in module order.
        natural: Preconditions a gradient matrix ``[G, C_out / G, D]``, given layer and group.
        groups: Parameter groups by ``id`` of the parameter.
        keep: Scalar that is zero where the batch is to be skipped.

    Returns:
        Layer, gradient matrix and preconditioned gradient; and by what the trust region scaled
        them, or None without one.
    """
    chosen = [la for la in layers if any(p.grad is not None for p in la.params())]
    matrices = [gradient_matrix(layer, keep) for layer in chosen]
    own = [groups[id(layer.weight)] for layer in chosen]
    found = [natural(la, group, m) for la, group, m in zip(chosen, own, matrices, strict=True)]
    factor = clipped(found, matrices, own)
    return list(zip(chosen, matrices, found, strict=True)), factor


def step_layers(
    layers: Iterable[CapturedLayer],
    natural: Natural,
    state: State,
    groups: dict[int, Group],
    keep: Tensor | None,
) -> Tensor | None:
    """Step weights and biases of all layers; takes, and returns the factor, as above."""
    layers = [la for la in layers if any(p.grad is not None for p in la.params())]
    if any(groups[id(layer.weight)]["kl_clip"] is not None for layer in layers):
        updates, factor = natural_gradients(layers, natural, groups, keep)
        for layer, matrix, update in updates:
            _step_layer(layer, matrix, update, state, groups, keep)
        return factor
    for layer in layers:  # to the end, one after the other: its tensors are in the cache
        matrix = gradient_matrix(layer, keep)
        update = natural(layer, groups[id(layer.weight)], matrix)
        _step_layer(layer, matrix, update, state, groups, keep)
    return None


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
