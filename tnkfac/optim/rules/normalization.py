"""Scale of the factors, for hyper-parameters tuned with another package."""

from __future__ import annotations

from dataclasses import replace

from tnkfac.curvature.capture.statistics import Factors, Statistics

NORMALIZATIONS = ("fisher", "kfac-pytorch")


def normalized(factors: Factors, statistics: Statistics, normalization: str) -> Factors:
    """Factors in the scale of some package.

    kfac-pytorch takes means over the batch of output gradients, which carry the mean of the loss
    already, and divides both sides of convolutions by the number ``S`` of positions once more:
    ``A / S^2`` and ``sum g g^T / (N S^3)``, and ``sum g g^T / (N S)`` for linear layers.

    Args:
        factors: Those of the Fisher matrix.
        statistics: What they were measured by.
        normalization: ``"fisher"`` or ``"kfac-pytorch"``.
    """
    if normalization == "fisher":
        return factors
    samples, rows, terms = factors.counts.unbind()
    positions = rows / samples
    mean = 1 / (rows if statistics.loss_average is None else rows * terms)
    more = 1 / positions**2 if statistics.layer.dims else 1.0
    on_A, on_B = more, mean * more
    return replace(
        factors,
        A=tuple(part * on_A for part in factors.A),
        B=tuple(part * on_B for part in factors.B),
        squares=None if factors.squares is None else factors.squares * (on_A * on_B),
    )
