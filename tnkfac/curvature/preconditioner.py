"""The pair ``(K, C)`` of one layer, and where it starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tnkfac.curvature.structures import Parts, Structure

_ITERATIONS = 80
_ACCURACY = 1e-13


@dataclass(frozen=True)
class Preconditioner:
    """Structured ``K [G, D, D]`` and ``C [G, C_out / G, C_out / G]``.

    The inverse of the curvature ``B (x) A`` is kept as ``C C^T (x) K K^T``.

    Attributes:
        k: Structure of ``K``, the input side.
        c: Structure of ``C``, the output side.
        K: Parts of ``K``.
        C: Parts of ``C``.
    """

    k: Structure
    c: Structure
    K: Parts
    C: Parts

    def apply(self, gradient: Tensor) -> Tensor:
        """``C C^T G K K^T`` for a gradient matrix ``[G, C_out / G, D]``, in its dtype."""
        rows = gradient.transpose(1, 2).to(self.K[0].dtype)
        right = self.k.apply(self.K, rows).transpose(1, 2)
        return self.c.apply(self.C, right.to(self.C[0].dtype)).to(gradient.dtype)


def stationary_point(
    k: Structure, c: Structure, A: Parts, B: Parts, damping: float
) -> tuple[Parts, Parts]:
    """Symmetric ``K``, ``C`` at which one batch's factors leave SINGD's update at rest.

    Solves ``(K K^T)^-1 = tr(C^T B C)/d A + damping tr(C^T C)/d I`` and its mirror image for each
    channel group (the fixed point of arXiv 2312.05705, eq. 9). With the eigenvalues ``a`` of
    ``A`` and ``b`` of ``B`` both are ``1 / (a + r)`` and ``1 / (b + s)`` up to a scale, where
    ``r = damping f_b(s)``, ``s = damping f_a(r)`` and ``f(r) = mean(1/(a+r)) / mean(a/(a+r))``.
    Both maps decrease with a log-slope above -1, so there is one solution, found between bounds.
    The free scale between both is fixed by equal mean squares.

    Args:
        k: Structure of ``K``.
        c: Structure of ``C``.
        A: Parts of the input factor.
        B: Parts of the output factor.
        damping: Non-negative.

    Returns:
        Parts of ``K`` and ``C``. A group whose ``A`` or ``B`` is zero gets the limit, multiples
        of the identity.
    """
    a, rebuild_K = _decomposed(k, A)
    b, rebuild_C = _decomposed(c, B)
    p, q = _spectra(a.double(), b.double(), damping)
    return rebuild_K(p.sqrt().to(A[0].dtype)), rebuild_C(q.sqrt().to(B[0].dtype))


def _decomposed(structure: Structure, A: Parts) -> tuple[Tensor, Callable[[Tensor], Parts]]:
    """Eigenvalues ``[G, D]``, and what turns others with the same eigenvectors into parts.

    Where the decomposition fails, all eigenvalues are taken for their mean.
    """
    try:
        values, vectors = structure.eigen(tuple(part.double() for part in A))
        vectors = tuple(part.to(A[0].dtype) for part in vectors)
        return values, partial(structure.from_eigen, vectors=vectors)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        warnings.warn(f"A start is a multiple of the identity: {error}", stacklevel=2)
        values, _ = Structure.eigen(structure, A)
        return values, partial(Structure.from_eigen, structure, vectors=())


def _spectra(a: Tensor, b: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues of ``K K^T`` and ``C C^T`` from those of ``A [G, D]`` and ``B [G, Co]``."""
    a, b = a.clamp(min=0), b.clamp(min=0)  # rounding leaves eigenvalues of either sign at zero
    mean_a, mean_b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    empty = (mean_a == 0) | (mean_b == 0)
    a, b = torch.where(empty, 1.0, a), torch.where(empty, 1.0, b)
    if damping == 0:  # the inverse of a singular factor has no other bound
        a, b = a + 1e-12 * mean_a, b + 1e-12 * mean_b

    def residual(level: Tensor) -> tuple[Tensor, Tensor]:
        """How far ``log f_b(f_a(r))`` is above ``log r``, and the derivative of that."""
        s, slope_s = _damping_of(a, level.exp(), damping)
        found, slope_r = _damping_of(b, s, damping)
        return found.clamp(min=1e-250).log() - level, slope_r * slope_s - 1

    mean_b = b.mean(1, keepdim=True)
    low = (damping / mean_b).clamp(min=1e-250).log()
    high = (damping * (1 / (b + 1e-30 * mean_b)).mean(1, keepdim=True)).clamp(min=1e-250).log()
    r = _root(residual, low, high).exp() if damping > 0 else torch.zeros_like(low)
    s, _ = _damping_of(a, r, damping)
    p, q = 1 / (a + r), 1 / (b + s)
    # The product of both scales: mean eigenvalue of P (B (x) A + damping I) is one.
    level = (a * p).mean(1, keepdim=True) * (b * q).mean(1, keepdim=True)
    level = level + damping * p.mean(1, keepdim=True) * q.mean(1, keepdim=True)
    balance = (q.mean(1, keepdim=True) / p.mean(1, keepdim=True) / level).sqrt()
    p, q = p * balance, q / (balance * level)
    limit = damping**-0.5 if damping > 0 else 1.0
    return torch.where(empty, limit, p), torch.where(empty, limit, q)


def _damping_of(e: Tensor, shift: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``damping mean(1 / (e + shift)) / mean(e / (e + shift))``, and its slope in logarithms."""
    inverse = 1 / (e + shift)
    kept = e * inverse
    free, used = inverse.mean(1, keepdim=True), kept.mean(1, keepdim=True)
    slope = (kept * inverse).mean(1, keepdim=True) / used - inverse.square().mean(
        1, keepdim=True
    ) / free
    return damping * free / used, shift * slope


def _root(falling: Callable[[Tensor], tuple[Tensor, Tensor]], low: Tensor, high: Tensor) -> Tensor:
    """Where a falling function is zero, for each entry: Newton's method between bounds.

    Args:
        falling: Returns values and derivatives.
        low: Where it is not negative; the method starts here.
        high: Where it is not positive.
    """
    root = low
    for _ in range(_ITERATIONS):
        value, slope = falling(root)
        if bool((value.abs() < _ACCURACY).all()):
            break
        low, high = torch.where(value > 0, root, low), torch.where(value > 0, high, root)
        newton = root - value / slope
        root = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
    return root
