"""Triangular Toeplitz matrices, by fast Fourier transforms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from tnkfac.curvature.moments.second_moment import SecondMoment
from tnkfac.curvature.structures.structure import Parts, Structure


@lru_cache(maxsize=4096)
def fast_length(least: int) -> int:
    """The smallest product of twos, threes and fives that is not below ``least``."""
    sizes: Iterator[int] = (
        2**a * 3**b * 5**c for a in range(32) for b in range(8) for c in range(6)
    )
    return min((size for size in sizes if size >= least), default=least)


@dataclass(frozen=True)
class Toeplitz(Structure):
    """Triangular matrices with constant diagonals: one part ``[G, d]``, the diagonals in order.

    Products with them are convolutions and correlations. No ``d x d`` matrix is ever formed.

    Attributes:
        lower: Whether the first column is free, or the first row.
        length: Of transforms in which products do not wrap around.
    """

    lower: bool
    length: int = field(init=False, repr=False)
    reads_factor = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", fast_length(2 * self.dim - 1))

    @property
    def name(self) -> str:
        """``triltoeplitz`` or ``triutoeplitz``."""
        return "triltoeplitz" if self.lower else "triutoeplitz"

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """``d``."""
        return ((self.dim,),)

    @property
    def statistic_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Diagonals of ``Pi(K^T A K)``, and the mean of the diagonal of ``A``."""
        return (self.dim,), (1,)

    def statistic(self, moment: SecondMoment, K: Parts | None = None) -> Parts:
        """``Pi(K^T A K)`` itself, from the power spectrum of ``K^T X`` for the rows ``X``."""
        length = self.length
        total = moment.rows.zeros(moment.groups, length // 2 + 1)
        trace = moment.rows.zeros(moment.groups, 1)
        for rows in moment.vectors():
            trace = trace + rows.square().sum((1, 2)).unsqueeze(1)
            if K is not None:
                rows = self._multiply(K[0].to(rows.dtype), rows, correlate=self.lower)
            spectrum = torch.fft.rfft(rows, n=length, dim=1)
            total = total + (spectrum.real.square() + spectrum.imag.square()).sum(2)
        sums = torch.fft.irfft(total, n=length, dim=1)[:, : self.dim]
        return self._means(sums), trace / self.dim

    def identity(self, groups: int, dtype: torch.dtype, device: torch.device) -> Parts:
        """One on the main diagonal."""
        first = torch.zeros(groups, self.dim, dtype=dtype, device=device)
        first[:, 0] = 1
        return (first,)

    def matmul(self, K: Parts, m: Parts) -> Parts:
        """The first ``d`` coefficients of a convolution."""
        return (self._multiply(K[0], m[0].unsqueeze(2), correlate=False).squeeze(2),)

    def gram(self, K: Parts) -> Parts:
        """Diagonal ``j`` of ``K^T K`` sums ``(d - s) t_s t_(s - j)`` over ``s``."""
        t = K[0]
        weights = torch.arange(self.dim, 0, -1, dtype=t.dtype, device=t.device)
        sums = self._multiply(t, (weights * t).unsqueeze(2), correlate=True).squeeze(2)
        return (self._means(sums),)

    def congruence(self, K: Parts, A: Parts) -> Parts:
        """The statistic itself, which was measured with the same ``K``."""
        return A[:1]

    def trace(self, m: Parts) -> Tensor:
        """The main diagonal."""
        return m[0][:, 0]

    def statistic_trace(self, A: Parts) -> Tensor:
        """Mean of the diagonal of ``A``, which was measured with it."""
        return A[1].squeeze(1)

    def apply_kkt(self, K: Parts, X: Tensor) -> Tensor:
        """Correlate, then convolve; the other way round for upper ones."""
        pulled = self._multiply(K[0], X, correlate=self.lower)
        return self._multiply(K[0], pulled, correlate=not self.lower)

    def to_dense(self, K: Parts) -> Tensor:
        """Diagonals written out."""
        t = K[0]
        index = torch.arange(self.dim, device=t.device)
        distance = index[:, None] - index if self.lower else index - index[:, None]
        zero = torch.zeros((), dtype=t.dtype, device=t.device)
        return torch.where(distance >= 0, t[:, distance.clamp(min=0)], zero)

    def _means(self, sums: Tensor) -> Tensor:
        """Mean of each diagonal, those beside the main one doubled."""
        lengths = torch.arange(self.dim, 0, -1, dtype=sums.dtype, device=sums.device)
        means = 2 * sums / lengths
        return torch.cat([means[:, :1] / 2, means[:, 1:]], 1)

    def _multiply(self, t: Tensor, X: Tensor, correlate: bool) -> Tensor:
        """Lower Toeplitz matrix with first column ``t`` times ``X [G, d, M]``, or its transpose."""
        dtype = torch.promote_types(t.dtype, torch.float32)  # no transforms in half precision
        length = self.length
        spectrum = torch.fft.rfft(t.to(dtype), n=length, dim=1).unsqueeze(2)
        spectrum = spectrum.conj() if correlate else spectrum
        product = spectrum * torch.fft.rfft(X.to(dtype), n=length, dim=1)
        result: Tensor = torch.fft.irfft(product, n=length, dim=1)[:, : self.dim].to(X.dtype)
        return result
