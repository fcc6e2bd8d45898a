"""Where SINGD starts: the factors that the statistics of one batch leave at rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tnkfac.curvature.callers import warn
from tnkfac.curvature.structures import Parts, Structure

_ITERATIONS = 80
_ACCURACY = 1e-13


def stationary_points(
    layers: Sequence[tuple[Structure, Structure, Parts, Parts]], damping: float
) -> list[tuple[Parts, Parts]]:
    """Symmetric ``K``, ``C`` at which one batch's factors leave SINGD's update at rest.

    Solves ``(K K^T)^-1 = tr(C^T B C)/d A + damping tr(C^T C)/d I`` and its mirror image for each
    channel group (the fixed point of arXiv 2312.05705, eq. 9). With the eigenvalues ``a`` of
    ``A`` and ``b`` of ``B`` both are ``1 / (a + r)`` and ``1 / (b + s)`` up to a scale, where
    ``r = damping f_b(s)``, ``s = damping f_a(r)`` and ``f(r) = mean(1/(a+r)) / mean(a/(a+r))``.
    Both maps decrease with a log-slope above -1, so there is one solution, found between bounds.
    The free scale between both is fixed by equal mean squares.

    Args:
        layers: Structures ``k`` and ``c`` and parts of the factors ``A`` and ``B`` of each; their
            equations are independent, and solved at once.
        damping: Non-negative.

    Returns:
        Parts of ``K`` and ``C`` of each. A group whose ``A`` or ``B`` is zero gets the limit,
        multiples of the identity.
    """
    inputs = [_decomposed(k, A) for k, _, A, _ in layers]
    outputs = [_decomposed(c, B) for _, c, _, B in layers]
    a, b = (_Rows([values for values, _ in side]) for side in (inputs, outputs))
    p, q = _spectra(a, b, damping)
    points = []
    for (_, _, A, B), (_, rebuild_K), (_, rebuild_C), x, y in zip(
        layers, inputs, outputs, a.cut(p.sqrt()), b.cut(q.sqrt()), strict=True
    ):
        points.append((rebuild_K(x.to(A[0].dtype)), rebuild_C(y.to(B[0].dtype))))
    return points


class _Rows:
    """Eigenvalues of every channel group of every layer, end to end.

    Attributes:
        values: All of them, in float64.
    """

    def __init__(self, several: Sequence[Tensor]) -> None:
        """Take ``[G, D]`` of every layer."""
        device = several[0].device
        self._shapes = [values.shape for values in several]
        lengths = torch.tensor(
            [dim for groups, dim in self._shapes for _ in range(groups)], device="cpu"
        )
        self._index = torch.repeat_interleave(lengths).to(device)
        self._lengths = lengths.to(device)
        self.values = torch.cat([values.double().reshape(-1) for values in several])

    def mean(self, values: Tensor) -> Tensor:
        """Mean of every group."""
        return torch.segment_reduce(values, "mean", lengths=self._lengths, unsafe=True)

    def spread(self, values: Tensor) -> Tensor:
        """One number for every group, to all its places."""
        return values.index_select(0, self._index)

    def cut(self, values: Tensor) -> list[Tensor]:
        """``[G, D]`` of every layer."""
        parts = torch.split(values, [shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


def _decomposed(structure: Structure, A: Parts) -> tuple[Tensor, Callable[[Tensor], Parts]]:
    """Eigenvalues ``[G, D]``, and what turns others with the same eigenvectors into parts.

    Where the decomposition fails, all eigenvalues are taken for their mean.
    """
    try:
        values, vectors = structure.eigen(tuple(part.double() for part in A))
        vectors = tuple(part.to(A[0].dtype) for part in vectors)
        return values, partial(structure.from_eigen, vectors=vectors)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        warn(f"A start is a multiple of the identity: {error}")
        values, _ = Structure.eigen(structure, A)
        return values, partial(Structure.from_eigen, structure, vectors=())


def _spectra(on_a: _Rows, on_b: _Rows, damping: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues of ``K K^T`` and ``C C^T`` from those of ``A`` and ``B``."""
    # Rounding leaves zeros of either sign.
    a, b = on_a.values.clamp(min=0), on_b.values.clamp(min=0)
    mean_a, mean_b = on_a.mean(a), on_b.mean(b)
    empty = (mean_a == 0) | (mean_b == 0)
    a, b = torch.where(on_a.spread(empty), 1.0, a), torch.where(on_b.spread(empty), 1.0, b)
    if damping == 0:  # the inverse of a singular factor has no other bound
        a, b = a + 1e-12 * on_a.spread(mean_a), b + 1e-12 * on_b.spread(mean_b)

    def residual(level: Tensor) -> tuple[Tensor, Tensor]:
        """How far ``log f_b(f_a(r))`` is above ``log r``, and the derivative of that."""
        s, slope_s = _damping_of(on_a, a, level.exp(), damping)
        r, slope_r = _damping_of(on_b, b, s, damping)
        return r.clamp(min=1e-250).log() - level, slope_r * slope_s - 1

    mean_b = on_b.mean(b)
    low = (damping / mean_b).clamp(min=1e-250).log()
    high = (damping * on_b.mean(1 / (b + 1e-30 * on_b.spread(mean_b)))).clamp(min=1e-250).log()
    r = _root(residual, low, high).exp() if damping > 0 else torch.zeros_like(low)
    s, _ = _damping_of(on_a, a, r, damping)
    p, q = 1 / (a + on_a.spread(r)), 1 / (b + on_b.spread(s))
    # The product of both scales: mean eigenvalue of P (B (x) A + damping I) is one.
    free_p, free_q = on_a.mean(p), on_b.mean(q)
    level = on_a.mean(a * p) * on_b.mean(b * q) + damping * free_p * free_q
    balance = (free_q / free_p / level).sqrt()
    limit = damping**-0.5 if damping > 0 else 1.0
    p = torch.where(on_a.spread(empty), limit, p * on_a.spread(balance))
    return p, torch.where(on_b.spread(empty), limit, q / on_b.spread(balance * level))


def _damping_of(rows: _Rows, e: Tensor, shift: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``damping mean(1 / (e + shift)) / mean(e / (e + shift))``, and its slope in logarithms."""
    inverse = 1 / (e + rows.spread(shift))
    share = e * inverse
    free, used = rows.mean(inverse), rows.mean(share)
    slope = rows.mean(share * inverse) / used - rows.mean(inverse * inverse) / free
    return damping * free / used, shift * slope


def _root(falling: Callable[[Tensor], tuple[Tensor, Tensor]], low: Tensor, high: Tensor) -> Tensor:
    """Root of a falling function, for each entry: Newton's method between bounds.

    Args:
        falling: Returns values and derivatives.
        low: Where it is not negative; the method starts here.
        high: Where it is not positive.
    """
    root = low
    for _ in range(_ITERATIONS):
        value, slope = falling(root)
        done = value.abs() < _ACCURACY
        if bool(done.all()):
            break
        low, high = torch.where(value > 0, root, low), torch.where(value > 0, high, root)
        newton = root - value / slope
        better = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        root = torch.where(done, root, better)
    return root
