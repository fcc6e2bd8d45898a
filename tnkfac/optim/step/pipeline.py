"""From gradients to parameters: precondition, resize, apply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tnkfac.optim.finite import SkippedSteps
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer, Uncaptured
from tnkfac.optim.params.scaling import Diagonals
from tnkfac.optim.params.state import State
from tnkfac.optim.step import elementwise, fallback, triton_step
from tnkfac.optim.step.apply import Update, apply_, chunks
from tnkfac.optim.step.elementwise import scaled_gradients, scaled_layers
from tnkfac.optim.step.grafting import clip_, flagged, gradient_matrix, graft_

Precondition = Callable[[list[CapturedLayer], list[Tensor]], list[Tensor]]
"""Preconditions gradient matrices ``[G, C_out / G, D]``, given their layers."""


def preconditioned(
    layers: Sequence[CapturedLayer], precondition: Precondition, found_inf: Tensor | None
) -> tuple[list[Update], Tensor | None]:
    """Gradients of some layers, preconditioned as joint matrices and clipped together.

    Args:
        layers: Layers that have a gradient, in module order.
        precondition: As above.
        found_inf: Scalar that is one where the batch is to be skipped.

    Returns:
        The updates; and by what the trust region scaled them, or None without one.
    """
    if not layers:
        return [], None
    gradients = [gradient_matrix(layer, found_inf) for layer in layers]
    matrices = precondition(list(layers), gradients)
    factor = clip_(matrices, gradients, layers, found_inf)
    return [
        _parted(layer, matrix, gradient)
        for layer, matrix, gradient in zip(layers, matrices, gradients, strict=True)
    ], factor


def _parted(layer: CapturedLayer, matrix: Tensor, gradient: Tensor) -> Update:
    """The update of a layer's parameters from that of the joint matrix."""
    if matrix.data_ptr() == gradient.data_ptr():  # a gradient, which stays as it is
        matrix = matrix.clone()
    values = layer.statistics.layer.from_matrix(matrix, layer.weight.shape)
    pairs = zip(layer.params(), values, strict=False)
    return Update(
        layer,
        [(param, new) for param, new in pairs if param.grad is not None and new is not None],
    )


@dataclass(frozen=True)
class StepContext:
    """What the stages of one step share.

    Attributes:
        state: State of the optimizer.
        found_inf: Scalar that turns the step into none where it is one.
        skipped: Counts layers whose update is not finite.
        diagonals: Factors of layers whose gradients are only scaled.
        norms: What is known of the norms of scaled gradients, by ``id`` of the layer.
    """

    state: State
    found_inf: Tensor | None
    skipped: SkippedSteps
    diagonals: Diagonals
    norms: Mapping[int, float]


def step_layers(
    layers: Iterable[CapturedLayer], precondition: Precondition, context: StepContext
) -> Tensor | None:
    """Step weights and biases of all layers.

    Args:
        layers: Layers in module order.
        precondition: Preconditions gradient matrices.
        context: State and flags.

    Returns:
        By what the trust region scaled all updates, or None without one.
    """
    trained = [la for la in layers if any(p.grad is not None for p in la.params())]
    if any(layer.group["kl_clip"] is not None for layer in trained):
        updates, factor = preconditioned(trained, precondition, context.found_inf)
        by_layer = {id(update.layer): update for update in updates}
        for chunk in chunks(trained):
            _resize_and_apply([by_layer[id(layer)] for layer in chunk], context)
        return factor
    for chunk in chunks(trained):  # to the end, one after the other
        others = _step_scaled(chunk, context) if context.diagonals else chunk
        updates, _ = preconditioned(others, precondition, context.found_inf)
        _resize_and_apply(updates, context)
    return None


def _resize_and_apply(updates: Sequence[Update], context: StepContext) -> None:
    sized, found_inf = graft_(updates, context.state, context.found_inf, context.skipped)
    apply_(sized, context.state, found_inf)


def _step_scaled(layers: Sequence[CapturedLayer], context: StepContext) -> list[CapturedLayer]:
    """Step the layers whose gradients are only scaled; return all others."""
    state, norms = context.state, context.norms
    scaled, others = scaled_layers(layers, context.diagonals)
    if context.found_inf is None:
        scaled = [
            (layer, scaling)
            for layer, scaling in scaled
            if not elementwise.is_cut(layer, state)
            or not elementwise.step_large((layer, scaling), state, norms.get(id(layer)))
        ]
    if not scaled:
        return others
    if triton_step.suits(scaled):
        sized = triton_step.sized_gradients(scaled)
        apply_(sized, state, flagged(sized, context.found_inf, context.skipped))
    else:
        _resize_and_apply(scaled_gradients(scaled), context)
    return others


def step_others(
    others: Iterable[Uncaptured],
    state: State,
    param_groups: list[Group],
    found_inf: Tensor | None,
) -> None:
    """Step all other parameters; ``found_inf`` turns the step into none where it is one."""
    by_group: dict[int, list[Tensor]] = {}
    for uncaptured in others:
        if uncaptured.param.grad is not None:
            by_group.setdefault(id(uncaptured.group), []).append(uncaptured.param)
    for group in param_groups:
        params = by_group.get(id(group), [])
        if params:
            fallback.update(params, [state.get(param, {}) for param in params], group, found_inf)
