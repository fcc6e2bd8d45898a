"""Steps of all parameters: preconditioned layers, and the rest by the fallback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from tnkfac.curvature import fast
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer, Uncaptured
from tnkfac.optim.params.scaling import Scaling
from tnkfac.optim.params.sharding import local, part_of
from tnkfac.optim.step import apply, fallback, row_chunks, triton_step
from tnkfac.optim.step.elementwise import scaled_gradients
from tnkfac.optim.step.grafting import apply_update_, clipped, gradient_matrix, graft

State = Any
Naturals = Callable[[list[CapturedLayer], list[Tensor]], list[Tensor]]
Scalings = Callable[[list[CapturedLayer]], list[Scaling | None]]


def natural_gradients(
    layers: Iterable[CapturedLayer],
    naturals: Naturals,
    keep: Tensor | None = None,
) -> tuple[list[tuple[CapturedLayer, Tensor, Tensor]], Tensor | None]:
    """Gradient matrices of all layers that have a gradient, preconditioned and clipped.

    Args:
        layers: Layers in module order.
        naturals: Preconditions gradient matrices ``[G, C_out / G, D]``, given their layers.
        keep: Scalar that is zero where the batch is to be skipped.

    Returns:
        Layer, gradient matrix and preconditioned gradient; and by what the trust region scaled
        them, or None without one.
    """
    chosen = [la for la in layers if any(p.grad is not None for p in la.params())]
    matrices = [gradient_matrix(layer, keep) for layer in chosen]
    found = naturals(chosen, matrices)
    factor = clipped(found, matrices, chosen)
    return list(zip(chosen, matrices, found, strict=True)), factor


def step_layers(
    layers: Iterable[CapturedLayer],
    naturals: Naturals,
    scalings: Scalings,
    state: State,
    keep: Tensor | None,
    norms: Mapping[int, float],
) -> Tensor | None:
    """Step weights and biases of all layers.

    Args:
        layers: Layers in module order.
        naturals: As above.
        scalings: The :class:`Scaling` of every layer that has one.
        state: State of the optimizer.
        keep: Scalar that is zero where the batch is to be skipped.
        norms: What is known of the norms of scaled gradients, by ``id`` of the layer.

    Returns:
        By what the trust region scaled all updates, or None without one.
    """
    layers = [la for la in layers if any(p.grad is not None for p in la.params())]
    if any(layer.group["kl_clip"] is not None for layer in layers):
        updates, factor = natural_gradients(layers, naturals, keep)
        chosen = {id(layer): (matrix, update) for layer, matrix, update in updates}
        for chunk in apply.chunks(layers):
            _finish(chunk, [chosen[id(layer)] for layer in chunk], [], state, keep)
        return factor
    for chunk in apply.chunks(layers):  # to the end, one after the other
        scaled, rest = _scaled(chunk, scalings, state, keep, norms)
        matrices = [gradient_matrix(layer, keep) for layer in rest]
        found = naturals(rest, matrices) if rest else []
        _finish(rest, list(zip(matrices, found, strict=True)), scaled, state, keep)
    return None


def _scaled(
    layers: list[CapturedLayer],
    scalings: Scalings,
    state: State,
    keep: Tensor | None,
    norms: Mapping[int, float],
) -> tuple[list[apply.Update], list[CapturedLayer]]:
    """Layers whose gradients are but scaled, with the results; and all others.

    Large ones, and those that a kernel brings to size, are stepped at once, and are in neither.
    """
    if not fast():
        return [], layers
    rest: list[CapturedLayer] = []
    fitting: list[CapturedLayer] = []
    for layer in layers:
        whole = layer.weight.grad is not None and layer.weight.grad.dtype == layer.weight.dtype
        (fitting if whole and apply.suits(layer, state) else rest).append(layer)
    chosen: list[tuple[CapturedLayer, Scaling]] = []
    for layer, found in zip(fitting, scalings(fitting), strict=True):
        if found is None:
            rest.append(layer)
        elif not (
            keep is None
            and row_chunks.suits(layer)
            and row_chunks.step_large(layer, found, state, norms.get(id(layer)))
        ):
            chosen.append((layer, found))
    if triton_step.suits(chosen):
        apply.step_sized(triton_step.sized_gradients(chosen), state, keep)
        return [], rest
    pairs = scaled_gradients(chosen) if chosen else []
    return [(la, *pair) for (la, _), pair in zip(chosen, pairs, strict=True)], rest


def _finish(
    layers: list[CapturedLayer],
    pairs: list[tuple[Tensor, Tensor]],
    scaled: list[apply.Update],
    state: State,
    keep: Tensor | None,
) -> None:
    """Graft and step.

    Args:
        layers: Layers.
        pairs: Their gradient matrices, and what these were preconditioned to.
        scaled: More layers, with the preconditioned gradients of their parameters.
        state: State of the optimizer.
        keep: Scalar that is zero where the batch is to be skipped.
    """
    many = scaled
    for layer, (matrix, update) in zip(layers, pairs, strict=True):
        fits = layer.weight.grad is not None and update.dtype == layer.weight.dtype
        fits = fits and apply.suits(layer, state)
        if fast() and fits:
            if update.data_ptr() == matrix.data_ptr():  # a gradient, which stays as it is
                update = update.clone()
            weight, bias = layer.statistics.layer.from_matrix(update, layer.weight.shape)
            frozen = layer.bias is None or layer.bias.grad is None
            many.append((layer, weight, None if frozen else bias))
        else:
            _step_layer(layer, matrix, update, state, keep)
    if many:
        apply.step_many(many, state, keep)


def _step_layer(
    layer: CapturedLayer,
    matrix: Tensor,
    update: Tensor,
    state: State,
    keep: Tensor | None,
) -> None:
    """Graft, and step weight and bias."""
    update = graft(layer, matrix, update, state, keep)
    weight, bias = layer.statistics.layer.from_matrix(update, layer.weight.shape)
    _step_param(layer, layer.weight, weight, state, keep)
    if layer.bias is not None and bias is not None:
        _step_param(layer, layer.bias, bias, state, keep)


def _step_param(
    layer: CapturedLayer, param: Tensor, update: Tensor, state: State, keep: Tensor | None
) -> None:
    if param.grad is None:
        return
    group = layer.group_of(param)
    apply_update_(
        local(param),
        part_of(update, param),
        local(state[param]["momentum_buffer"]) if group["momentum"] else None,
        lr=group["lr"],
        momentum=group["momentum"],
        weight_decay=group["weight_decay"],
        decoupled=layer.group["decoupled_weight_decay"],
        averaged=layer.group["grafting"] is not None,
        nesterov=group.get("nesterov", False),
        keep=keep,
    )


def step_others(
    others: Iterable[Uncaptured],
    state: State,
    param_groups: list[Group],
    skip: Tensor | None,
) -> None:
    """Step all other parameters; ``skip`` turns the step into none where it is one."""
    by_group: dict[int, list[Tensor]] = {}
    for other in others:
        if other.param.grad is not None:
            by_group.setdefault(id(other.group), []).append(other.param)
    for group in param_groups:
        params = by_group.get(id(group), [])
        if params:
            fallback.update(params, [state.get(param, {}) for param in params], group, skip)
