"""Damping relative to the mean eigenvalue of the curvature, for SINGD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnkfac.curvature import Matrices, Parts
from tnkfac.optim.options import Group


@dataclass(frozen=True)
class Damped:
    """Factors as the update takes them, and what is added to the curvature.

    Attributes:
        A: Parts of the input factor.
        B: Parts of the output factor.
        on_K: Damping in the update of ``K``: a number, or one for each channel group, ``[G]``.
        on_C: The same for ``C``.
        level: Mean eigenvalue of the curvature in units of that of ``B (x) A``, ``[G]``, or None.
    """

    A: Parts
    B: Parts
    on_K: Tensor | float
    on_C: Tensor | float
    level: Tensor | None = None


def damped(k: Matrices, c: Matrices, A: Parts, B: Parts, group: Group) -> Damped:
    """Choose the damping of one layer for one batch.

    With ``damping=None`` it is ``relative_damping`` times the mean eigenvalue of ``B (x) A``, or
    of each factor with ``kfac_like``. Where grafting sets the size of an update anyway, factors
    of mean eigenvalue one serve for that: then the gradients may shrink by orders of magnitude in
    the course of training, and the preconditioner still follows the shape of the curvature.

    Args:
        k: Structure of ``A``.
        c: Structure of ``B``.
        A: Parts of the input factor of the batch.
        B: Parts of its output factor.
        group: Hyper-parameters of the layer.
    """
    if group["damping"] is not None:
        return Damped(A, B, group["damping"], group["damping"])
    share = group["relative_damping"]
    a, b = _usable(k.statistic_trace(A)), _usable(c.statistic_trace(B))
    if group["grafting"] is not None:
        return Damped(k.scaled(A, 1 / a), c.scaled(B, 1 / b), share, share)
    if group["kfac_like"]:
        return Damped(A, B, share * a, share * b, a * b)
    return Damped(A, B, share * a * b, share * a * b, a * b)


def _usable(trace: Tensor) -> Tensor:
    """One in the place of zero, so that a factor of zeros stays what it is."""
    return torch.where(trace > 0, trace, 1.0)
