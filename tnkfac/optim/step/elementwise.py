"""Layers whose preconditioner scales each number of a gradient: those with diagonal factors.

Gradients keep the shape and the layout of their parameter; no joint matrix is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tnkfac.curvature.structures.diagonal import Diagonal
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.scaling import Scaling, Squares

_KINDS = (torch.float32, torch.float64)


def is_diagonal(layer: CapturedLayer, state: dict[str, Any]) -> bool:
    """Whether both factors of a layer are diagonal, in the precision of its weight."""
    kind, statistics = layer.weight.dtype, layer.statistics
    if "K" not in state or layer.weight.device.type not in ("cpu", "cuda") or kind not in _KINDS:
        return False
    if not (isinstance(statistics.k, Diagonal) and isinstance(statistics.c, Diagonal)):
        return False
    return all(state[name].dtype == kind for name in ("K", "C"))


def read(
    layers: Sequence[CapturedLayer], pairs: Sequence[tuple[Tensor, Tensor] | None]
) -> list[Scaling | None]:
    """The scalings of some layers, read anew where factors have changed.

    Args:
        layers: Layers, which keep what was read.
        pairs: ``K [G, D]`` and ``C [G, C_out / G]`` of each; None for a layer without a scaling.
    """
    found: list[Scaling | None] = []
    for layer, pair in zip(layers, pairs, strict=True):
        if pair is not None and (layer.scaling is None or not layer.scaling.holds(*pair)):
            K, C = pair
            layer.scaling = Scaling(K, C, (K._version, C._version))
        found.append(None if pair is None else layer.scaling)
    return found


def square(chosen: Sequence[tuple[CapturedLayer, Scaling]]) -> list[Squares]:
    """Squares of the factors of some layers, kept with what was read."""
    stale = [(layer, scaling) for layer, scaling in chosen if scaling.squares is None]
    if stale:
        factors = [factor for _, scaling in stale for factor in (scaling.K, scaling.C)]
        products = torch._foreach_mul(factors, factors)
        for (layer, scaling), KK, CC in zip(stale, products[::2], products[1::2], strict=True):
            scaling.squares = _broadcasting(layer, KK, CC)
    return [scaling.squares for _, scaling in chosen if scaling.squares is not None]


def _broadcasting(layer: CapturedLayer, right: Tensor, left: Tensor) -> Squares:
    """Squares of ``K`` and ``C`` in the shape of the weight, and their products for the bias."""
    bias = None
    if layer.bias is not None:
        bias = (left * right[:, -1:]).view(-1)
        right = right[:, :-1]
    return Squares(*layer.statistics.layer.broadcast(right, left), bias)


def scaled_gradients(
    chosen: Sequence[tuple[CapturedLayer, Scaling]],
) -> list[tuple[Tensor, Tensor | None]]:
    """Preconditioned gradients of weights, and of biases that have a gradient.

    Args:
        chosen: Layers whose weights have gradients, and their scalings.
    """
    squares = square(chosen)
    gradients, at, biases, factors = [], [], [], []
    for index, (layer, scaling) in enumerate(chosen):
        gradient = layer.weight.grad
        assert gradient is not None
        if scaling.groups > 1:
            gradient = gradient.reshape(scaling.groups, -1, *gradient.shape[1:])
        gradients.append(gradient)
        if layer.bias is not None and layer.bias.grad is not None:
            bias = squares[index].bias
            assert bias is not None
            at.append(index)
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
    found = dict(zip(at, torch._foreach_mul(biases, factors), strict=True)) if biases else {}
    return [
        (weight.flatten(0, 1) if scaling.groups > 1 else weight, found.get(index))
        for index, (weight, (_, scaling)) in enumerate(zip(weights, chosen, strict=True))
    ]
