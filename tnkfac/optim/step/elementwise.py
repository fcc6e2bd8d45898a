"""Layers whose preconditioner scales each number of a gradient: those with diagonal factors.

Gradients keep the shape and the layout of their parameter; no joint matrix is formed. Large layers
on the CPU are taken some rows at a time, so that what is computed of them stays in the cache: their
gradients are read twice, once for their norm and once for the step, instead of being written to
memory scaled. The norm also tells whether a gradient is finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import hypot, isfinite

import torch
from torch import Tensor

from tnkfac.optim.finite import finite_on_host
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.scaling import Diagonals, ElementwisePreconditioner, Squares
from tnkfac.optim.params.state import State
from tnkfac.optim.step import grafting
from tnkfac.optim.step.apply import StepOptions, Update, fused_step_, is_plain

Scaled = tuple[CapturedLayer, ElementwisePreconditioner]
BLOCK = 1 << 18
"""Numbers of a large layer that are taken at a time."""


def scaled_layers(
    layers: Sequence[CapturedLayer], diagonals: Diagonals
) -> tuple[list[Scaled], list[CapturedLayer]]:
    """Layers whose gradients are scaled, with their factors; and all others.

    Args:
        layers: Layers that have a gradient.
        diagonals: Factors of those that have diagonal ones.
    """
    scaled: list[Scaled] = []
    others: list[CapturedLayer] = []
    for layer in layers:
        pair = diagonals.get(id(layer)) if _fits(layer) else None
        if pair is None:
            others.append(layer)
        else:
            scaled.append((layer, _scaling(layer, *pair)))
    return scaled, others


def _fits(layer: CapturedLayer) -> bool:
    """Whether gradients of a layer can be scaled where they lie."""
    weight = layer.weight
    if weight.grad is None or weight.grad.dtype != weight.dtype:
        return False
    return all(is_plain(param) and param.dtype == weight.dtype for param in layer.params())


def _scaling(layer: CapturedLayer, K: Tensor, C: Tensor) -> ElementwisePreconditioner:
    """The elementwise preconditioner of a layer, made anew where its factors have changed."""
    scaling = layer.scaling
    if scaling is None or not scaling.holds(K, C):
        scaling = layer.scaling = ElementwisePreconditioner(K, C, (K._version, C._version))
    return scaling


def square(scaled: Sequence[Scaled]) -> list[Squares]:
    """Squares of the factors of some layers, kept with what was read."""
    stale = [(layer, scaling) for layer, scaling in scaled if scaling.squares is None]
    if stale:
        factors = [factor for _, scaling in stale for factor in (scaling.K, scaling.C)]
        products = torch._foreach_mul(factors, factors)
        for (layer, scaling), KK, CC in zip(stale, products[::2], products[1::2], strict=True):
            scaling.squares = _broadcasting(layer, KK, CC)
    return [scaling.squares for _, scaling in scaled if scaling.squares is not None]


def _broadcasting(layer: CapturedLayer, right: Tensor, left: Tensor) -> Squares:
    """Squares of ``K`` and ``C`` in the shape of the weight, and their products for the bias."""
    bias = None
    if layer.bias is not None:
        bias = (left * right[:, -1:]).view(-1)
        right = right[:, :-1]
    return Squares(*layer.statistics.layer.broadcast(right, left), bias)


def scaled_gradients(scaled: Sequence[Scaled]) -> list[Update]:
    """Preconditioned gradients of weights, and of biases that have a gradient.

    Args:
        scaled: Layers whose weights have gradients, with their factors.
    """
    squares = square(scaled)
    gradients, indices, biases, factors = [], [], [], []
    for index, (layer, scaling) in enumerate(scaled):
        gradient = layer.weight.grad
        assert gradient is not None
        if scaling.groups > 1:
            gradient = gradient.reshape(scaling.groups, -1, *gradient.shape[1:])
        gradients.append(gradient)
        if layer.bias is not None and layer.bias.grad is not None:
            bias = squares[index].bias
            assert bias is not None
            indices.append(index)
            biases.append(layer.bias.grad)
            factors.append(bias)
    inputs = [each.inputs for each in squares]
    outputs = [each.outputs for each in squares]
    if gradients[0].device.type == "cpu":
        weights = torch._foreach_mul(gradients, inputs)
        torch._foreach_mul_(weights, outputs)
    else:  # what is broadcast takes a launch for each tensor, the product with gradients one
        weights = torch._foreach_mul(inputs, outputs)
        torch._foreach_mul_(weights, gradients)
    products = torch._foreach_mul(biases, factors) if biases else ()
    scaled_biases = dict(zip(indices, products, strict=True))
    updates = []
    for index, (weight, (layer, scaling)) in enumerate(zip(weights, scaled, strict=True)):
        parts = [(layer.weight, weight.flatten(0, 1) if scaling.groups > 1 else weight)]
        if layer.bias is not None and index in scaled_biases:
            parts.append((layer.bias, scaled_biases[index]))
        updates.append(Update(layer, parts))
    return updates


# -------------------------------------------------------------------------------- by rows


class DeferredCheck:
    """Large gradients whose norms tell whether they are finite.

    The norm of a preconditioned gradient is needed for grafting anyway; to look at the gradient
    before would read it once more.
    """

    def __init__(self, layers: Sequence[CapturedLayer], diagonals: Diagonals, state: State) -> None:
        """Choose those of some layers that can be left.

        Args:
            layers: All layers.
            diagonals: Factors of those that have diagonal ones.
            state: State of the optimizer.
        """
        self._scaled: list[Scaled] = []
        large = [layer for layer in layers if is_large(layer) and layer.group["grafting"]]
        if any(layer.group["kl_clip"] is not None for layer in layers):
            return  # that asks for all products with gradients before any step
        if any(p.device.type != "cpu" for layer in layers for p in layer.params()):
            return
        scaled, _ = scaled_layers(large, diagonals)
        self._scaled = [pair for pair in scaled if is_cut(pair[0], state)]

    def others(self, gradients: Iterable[Tensor]) -> list[Tensor]:
        """All other gradients."""
        deferred = {id(layer.weight.grad) for layer, _ in self._scaled}
        return [gradient for gradient in gradients if id(gradient) not in deferred]

    def norms(self) -> dict[int, float] | None:
        """Norms of the preconditioned gradients, by ``id`` of the layer.

        None if a gradient is not finite; an update of the factors, whose statistics are all
        finite, stands.
        """
        norms: dict[int, float] = {}
        for layer, scaling in self._scaled:
            assert layer.weight.grad is not None
            current = _scaling(layer, scaling.K, scaling.C)  # an update has changed them
            norms[id(layer)] = norm((layer, current))
            if not grafting.in_range(norms[id(layer)]) and not finite_on_host([layer.weight.grad]):
                return None
        return norms


def is_cut(layer: CapturedLayer, state: State) -> bool:
    """Whether a layer with diagonal factors is taken by rows."""
    kind = layer.group["grafting"]
    if not is_large(layer) or (isinstance(kind, str) and kind != "rms"):
        return False
    for param in layer.params():
        group = layer.group_of(param)
        if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
            return False
        buffer = state.get(param, {}).get("momentum_buffer")  # that of a checkpoint may differ
        alike = buffer is None or buffer.dtype == param.dtype
        if not alike or (buffer is not None and buffer.stride() != param.stride()):
            return False
    return True


def is_large(layer: CapturedLayer) -> bool:
    """Whether a layer is large, and its tensors can be cut along their first axis."""
    weight, gradient = layer.weight, layer.weight.grad
    if gradient is None or weight.numel() <= BLOCK or weight.device.type != "cpu":
        return False
    if layer.statistics.layer.groups > 1 or gradient.dtype != weight.dtype:
        return False
    rows_lie_together = weight.stride(0) * len(weight) == weight.numel()
    return rows_lie_together and gradient.stride() == weight.stride()


def norm(scaled: Scaled) -> float:
    """Norm of the preconditioned gradients of a layer; not finite where one of them is not."""
    layer, _ = scaled
    (squares,) = square([scaled])
    length = 0.0
    for g, right, left in zip(*_pieces(layer, squares), strict=True):
        length = hypot(length, torch.linalg.vector_norm((g * right).mul_(left)).item())
    bias = _bias(layer, squares)
    return length if bias is None else hypot(length, torch.linalg.vector_norm(bias).item())


def step_large(scaled: Scaled, state: State, known: float | None = None) -> bool:
    """Graft and step one layer; tell whether it was done: not where its norm is out of range.

    Args:
        scaled: The layer, with its factors.
        state: State of the optimizer.
        known: What :func:`norm` has found, if it was asked before.
    """
    layer, _ = scaled
    weight, group = layer.weight, layer.group
    (squares,) = square([scaled])
    pieces, inputs, outputs = _pieces(layer, squares)
    params = torch.split(weight, len(pieces[0]))
    bias = _bias(layer, squares)
    length = norm(scaled) if known is None else known
    if not isfinite(length):
        return False
    if group["grafting"]:
        size = grafting.number(group)
        if size is None or not grafting.in_range(length):
            return False
        count = weight.numel() + (0 if bias is None else bias.numel())
        scale = size * count**0.5 / length
        outputs = [part * scale for part in outputs]
        bias = None if bias is None else bias.mul_(scale)
    options = StepOptions.of(group, group)
    buffers: Sequence[list[Tensor]] = [[] for _ in params]
    if options.momentum:
        buffer = state[weight]["momentum_buffer"]
        buffers = [[part] for part in torch.split(buffer, len(pieces[0]))]
    for param, g, right, left, moved in zip(params, pieces, inputs, outputs, buffers, strict=True):
        fused_step_(options, [param], [(g * right).mul_(left)], moved, None)
    if bias is not None and layer.bias is not None:
        options = StepOptions.of(layer.bias_group, group)
        moved = [state[layer.bias]["momentum_buffer"]] if options.momentum else []
        fused_step_(options, [layer.bias], [bias], moved, None)
    return True


def _pieces(
    layer: CapturedLayer, squares: Squares
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Rows of a gradient, some at a time, and their factors."""
    gradient = layer.weight.grad
    assert gradient is not None
    rows = max(1, BLOCK * len(gradient) // gradient.numel())
    pieces = torch.split(gradient, rows)
    inputs = _cut(squares.inputs, rows, len(gradient), len(pieces))
    return pieces, inputs, _cut(squares.outputs, rows, len(gradient), len(pieces))


def _bias(layer: CapturedLayer, squares: Squares) -> Tensor | None:
    """The preconditioned gradient of the bias."""
    if layer.bias is None or layer.bias.grad is None:
        return None
    assert squares.bias is not None
    return layer.bias.grad * squares.bias


def _cut(factor: Tensor, rows: int, length: int, pieces: int) -> list[Tensor]:
    """Cut a factor like the weight, unless it broadcasts along that axis."""
    if factor.shape[0] == length and length > 1:
        return list(torch.split(factor, rows))
    return [factor] * pieces
