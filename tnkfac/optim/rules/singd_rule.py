"""The update of SINGD's factors (arXiv 2312.05705)."""

from __future__ import annotations

import torch
from torch import Tensor

from tnkfac.curvature import Matrices, Parts

LARGEST_CHANGE = 0.5
"""Largest relative change of the preconditioner in one update, unless it starts at the identity.

``K <- K (I - rate m)`` is an exponential cut off after its first order, and diverges when one
batch has far more curvature than those before, as happens near the end of training.
"""


def singd_update(
    k: Matrices,
    c: Matrices,
    K: Parts,
    C: Parts,
    m_K: Parts | None,
    m_C: Parts | None,
    A: Parts,
    B: Parts,
    *,
    damping: tuple[Tensor | float, Tensor | float],
    alpha1: float,
    lr_cov: float,
    kfac_like: bool,
    normalize: bool,
    bounded: bool = False,
) -> tuple[Parts, Parts, Parts, Parts]:
    """One update of ``K`` and ``C`` (arXiv 2312.05705, figure 4, right).

    Args:
        k: Structure of ``K`` and ``A``.
        c: Structure of ``C`` and ``B``.
        K: Input-side factor of the preconditioner.
        C: Output-side factor.
        m_K: Momentum of ``K``, or None for zero.
        m_C: Momentum of ``C``, or None for zero.
        A: Input factor of the curvature.
        B: Output-gradient factor.
        damping: Added to the curvature in the update of ``K`` and of ``C``.
        alpha1: Decay of the momenta.
        lr_cov: Step size.
        kfac_like: Replace the four traces by one (IKFAC).
        normalize: Scale the step by the largest entry of the momentum if it exceeds one.
        bounded: Shorten a step that would change ``K`` or ``C`` by more than half.

    Returns:
        New ``K``, ``C``, ``m_K``, ``m_C``.
    """
    H_K, H_C = k.pull(K, A), c.pull(C, B)
    KK, CC = k.gram(K), c.gram(C)
    for_K, for_C = damping
    on_K = (1.0, for_K) if kfac_like else (c.trace(H_C), for_K * c.trace(CC))
    on_C = (1.0, for_C) if kfac_like else (k.trace(H_K), for_C * k.trace(KK))
    half = 0.5 * (1 - alpha1 if normalize else 1.0)
    new: list[Parts] = []
    moved: list[Parts] = []
    for structure, X, m, H, gram, coefficients in (
        (k, K, m_K, H_K, KK, on_K),
        (c, C, m_C, H_C, CC, on_C),
    ):
        eye = structure.identity(X[0].shape[0], X[0].dtype, X[0].device)
        terms = zip(eye, *map(structure.scaled, (H, gram), coefficients), strict=True)
        step = tuple(half * (-one + pulled + damped) for one, pulled, damped in terms)
        if m is not None:
            step = tuple(alpha1 * old + part for old, part in zip(m, step, strict=True))
        rate: Tensor | float = lr_cov
        if normalize:
            rate = lr_cov / structure.largest(step).clamp(min=1.0)
        if bounded:
            rate = torch.clamp(LARGEST_CHANGE / structure.norm(step), max=rate)
        move = structure.scaled(structure.matmul(X, step), rate)
        moved.append(tuple(x - part for x, part in zip(X, move, strict=True)))
        new.append(step)
    return moved[0], moved[1], new[0], new[1]
