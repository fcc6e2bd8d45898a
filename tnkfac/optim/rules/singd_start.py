"""Where SINGD starts: the factors that the statistics of one batch leave at rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tnkfac.curvature.callers import warn
from tnkfac.curvature.structures import Parts, Structure
from tnkfac.curvature.structures.structure import Decomposable

_ITERATIONS = 80
_ACCURACY = 1e-13


def stationary_points(
    layers: Sequence[tuple[Structure, Structure, Parts, Parts]], damping: float
) -> list[tuple[Parts, Parts]]:
    """``K`` and ``C`` at which one batch's factors leave SINGD's update at rest.

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
    solve = _by_cholesky if _can_be_estimated(layers, damping) else _by_eigenvectors
    return solve(layers, damping)


Problem = tuple[Structure, Structure, Parts, Parts]
Spectrum = tuple[Tensor, Tensor]


def _by_eigenvectors(layers: Sequence[Problem], damping: float) -> list[tuple[Parts, Parts]]:
    """Symmetric ``K`` and ``C`` from eigendecompositions in double precision."""
    inputs = [_decomposed(k, A) for k, _, A, _ in layers]
    outputs = [_decomposed(c, B) for _, c, _, B in layers]
    a, b = (_Rows([values for values, _ in side]) for side in (inputs, outputs))
    on_a, on_b = _shifts(a, b, damping)
    points = []
    for (_, _, A, B), (_, rebuild_K), (_, rebuild_C), x, y in zip(
        layers,
        inputs,
        outputs,
        a.cut(on_a.inverse(a).sqrt()),
        b.cut(on_b.inverse(b).sqrt()),
        strict=True,
    ):
        points.append((rebuild_K(x.to(A[0].dtype)), rebuild_C(y.to(B[0].dtype))))
    return points


def _can_be_estimated(layers: Sequence[Problem], damping: float) -> bool:
    """Whether estimates of the spectra will do: they err by a hundredth."""
    return (
        damping > 0
        and all(isinstance(s, Decomposable) for k, c, _, _ in layers for s in (k, c))
        and all(part.dtype == torch.float32 for *_, A, B in layers for part in (*A, *B))
    )


def _by_cholesky(layers: Sequence[Problem], damping: float) -> list[tuple[Parts, Parts]]:
    """Triangular ``K`` and ``C``: preconditioner and updates depend on ``K K^T`` alone.

    ``r`` and ``s`` need only means over the spectra, which quadrature estimates. Where that or a
    factor of Cholesky fails, all is done by eigenvectors.
    """
    spectra: dict[int, tuple[Spectrum, Spectrum]] = {}
    for place, (k, c, A, B) in enumerate(layers):
        if isinstance(k, Decomposable) and isinstance(c, Decomposable):
            with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                both = k.spectrum(A), c.spectrum(B)
                if all(bool(nodes.isfinite().all()) for nodes, _ in both):
                    spectra[place] = both
    points: dict[int, tuple[Parts, Parts]] = {}
    if spectra:
        a, b = (_Rows(*zip(*(both[i] for both in spectra.values()), strict=True)) for i in (0, 1))
        on_a, on_b = _shifts(a, b, damping)
        start = 0
        for place in spectra:
            k, c, A, B = layers[place]
            assert isinstance(k, Decomposable)
            assert isinstance(c, Decomposable)
            part = slice(start, start + len(A[0]))
            with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                points[place] = on_a.root(k, A, part), on_b.root(c, B, part)
            start = part.stop
    for place, problem in enumerate(layers):
        if place not in points:
            (points[place],) = _by_eigenvectors([problem], damping)
    return [points[place] for place in range(len(layers))]


class _Rows:
    """Eigenvalues of every channel group of every layer, end to end.

    Attributes:
        values: All of them, in float64.
    """

    def __init__(self, several: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> None:
        """Take ``[G, D]`` of every layer, perhaps with weights in a mean."""
        device = several[0].device
        self._shapes = [values.shape for values in several]
        lengths = torch.tensor(
            [dim for groups, dim in self._shapes for _ in range(groups)], device="cpu"
        )
        self._index = torch.repeat_interleave(lengths).to(device)
        self._lengths = lengths.to(device)
        self.values = torch.cat([values.double().reshape(-1) for values in several])
        self._weights = [weight.double().reshape(-1) for weight in weights]
        if weights:
            self._weights = [torch.cat(self._weights)]

    def mean(self, values: Tensor) -> Tensor:
        """Mean of every group."""
        if self._weights:
            values = values * self._weights[0]
            return torch.segment_reduce(values, "sum", lengths=self._lengths, unsafe=True)
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


@dataclass(frozen=True)
class _Shifted:
    """``K K^T = scale (A + shift I)^-1`` of every channel group, or a multiple of the identity.

    Attributes:
        shift: In float64.
        scale: In float64.
        limit: The multiple, where a factor is zero.
        empty: Where that is so.
    """

    shift: Tensor
    scale: Tensor
    limit: float
    empty: Tensor

    def inverse(self, rows: _Rows) -> Tensor:
        """Eigenvalues of ``K K^T``."""
        inverse = rows.spread(self.scale) / (rows.values.clamp(min=0) + rows.spread(self.shift))
        return torch.where(rows.spread(self.empty), self.limit, inverse)

    def root(self, structure: Decomposable, A: Parts, groups: slice) -> Parts:
        """``K`` of some channel groups, triangular."""
        of_A, shift, scale = (
            values[groups].to(A[0].dtype)
            for values in (
                ~self.empty,
                torch.where(self.empty, 1.0, self.shift),
                torch.where(self.empty, self.limit, self.scale),
            )
        )
        shifted = structure.add_identity_(structure.scaled(A, of_A), shift)
        return structure.scaled(structure.inverse_root(shifted), scale.sqrt())


def _shifts(on_a: _Rows, on_b: _Rows, damping: float) -> tuple[_Shifted, _Shifted]:
    """``K K^T`` and ``C C^T`` by the eigenvalues of ``A`` and ``B``."""
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
    if damping == 0:
        r, s = 1e-12 * mean_a, 1e-12 * mean_b
    return _Shifted(r, balance, limit, empty), _Shifted(s, 1 / (balance * level), limit, empty)


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
