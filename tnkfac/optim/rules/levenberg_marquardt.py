"""Levenberg-Marquardt adaptation of the damping (arXiv 1503.05671, section 6.5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tnkfac.curvature.structures import Decomposable, Parts
from tnkfac.optim.params.captured import CapturedLayer

EVERY = 5
"""Steps between adaptations."""
FACTOR = 0.9**EVERY
LEAST = 1e-8


def adapted(damping: float, change: float, predicted: float) -> float:
    """The damping after a step.

    Args:
        damping: The one before.
        change: By how much the loss changed.
        predicted: By how much the quadratic model said that it would.
    """
    ratio = change / predicted if predicted < 0 else math.nan
    if ratio > 0.75:
        damping *= FACTOR
    elif not ratio >= 0.25:  # also where a loss or the model is no number
        damping /= FACTOR
    return max(damping, LEAST)


class QuadraticModel:
    """The parameters before a step, and what the model makes of those after it."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        """Remember values and, once they are there, gradients."""
        self._before = [(param, param.detach().clone()) for param in params]
        self._moves: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}

    def moved(self) -> None:
        """The step is done; gradients are still those it was made with."""
        for param, before in self._before:
            self._moves[id(param)] = param.detach() - before
            if param.grad is not None:
                self._gradients[id(param)] = param.grad.detach().clone()

    def predicted(
        self, curvature: Iterable[tuple[CapturedLayer, Parts, Parts]], damping: float
    ) -> float:
        """``g^T d + d^T (F + damping I) d / 2`` with the layers' Kronecker-factored ``F``.

        Args:
            curvature: Layers that have factors, with their ``A`` and ``B``.
            damping: Added to the curvature of these layers.
        """
        total = sum(
            float((move * self._gradients[key]).sum(dtype=torch.float64))
            for key, move in self._moves.items()
            if key in self._gradients
        )
        for layer, A, B in curvature:
            k, c = layer.statistics.k, layer.statistics.c
            assert isinstance(k, Decomposable)
            assert isinstance(c, Decomposable)
            bias = None if layer.bias is None else self._moves[id(layer.bias)]
            move = layer.statistics.layer.to_matrix(self._moves[id(layer.weight)], bias)
            move = move.to(A[0].dtype)
            curved = c.product(B, k.product(A, move.mT).mT) + damping * move
            total += 0.5 * float((move * curved).sum(dtype=torch.float64))
        return total

    def evaluate(self, closure: Callable[[], Any]) -> float:
        """Loss after the step; gradients are left as they were."""
        saved = [(param, param.grad) for param, _ in self._before]
        for param, _ in saved:
            param.grad = None
        try:
            with torch.enable_grad():
                return float(closure().detach())
        finally:
            for param, grad in saved:
                param.grad = grad
