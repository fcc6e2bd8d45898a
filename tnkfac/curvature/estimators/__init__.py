"""Estimates of the curvature of a whole model over data."""

from tnkfac.curvature.estimators.fisher import kfac
from tnkfac.curvature.estimators.kronecker import Kronecker

__all__ = ["Kronecker", "kfac"]
