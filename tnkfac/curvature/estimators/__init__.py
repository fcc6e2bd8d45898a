"""Estimates of the curvature of a whole model over data."""

from tnkfac.curvature.estimators.diagonals import diagonal
from tnkfac.curvature.estimators.fisher import kfac
from tnkfac.curvature.estimators.kernels import gram, ntk
from tnkfac.curvature.estimators.kronecker import Kronecker
from tnkfac.curvature.estimators.samples import per_sample_gradients

__all__ = ["Kronecker", "diagonal", "gram", "kfac", "ntk", "per_sample_gradients"]
