"""Curvature of layers: Kronecker factors, diagonals and kernels of a model's loss."""

from tnkfac.curvature import backpack
from tnkfac.curvature.estimators.diagonals import diagonal
from tnkfac.curvature.estimators.fisher import kfac
from tnkfac.curvature.estimators.kronecker import Kronecker
from tnkfac.curvature.estimators.ntk import gram, ntk
from tnkfac.curvature.estimators.sample_gradients import per_sample_gradients
from tnkfac.curvature.explanation import explain
from tnkfac.curvature.factors import grad_factor, input_factor
from tnkfac.curvature.switch import plain_path

__all__ = [
    "Kronecker",
    "backpack",
    "diagonal",
    "explain",
    "grad_factor",
    "gram",
    "input_factor",
    "kfac",
    "ntk",
    "per_sample_gradients",
    "plain_path",
]
