"""Curvature of layers: Kronecker factors, structures, and how statistics are captured."""

from tnkfac.curvature.accumulate import Factors, LossAverage, Statistics
from tnkfac.curvature.capture import FirstForward, Tap, attach
from tnkfac.curvature.discover import Owner, find_owners, root_of
from tnkfac.curvature.estimators import Kronecker, kfac
from tnkfac.curvature.explanation import explain
from tnkfac.curvature.factors import grad_factor, input_factor
from tnkfac.curvature.layers import Layer, describe
from tnkfac.curvature.preconditioner import Preconditioner, stationary_point
from tnkfac.curvature.structures import Parts, Structure, check_structure, resolve_structure

__all__ = [
    "Factors",
    "FirstForward",
    "Kronecker",
    "Layer",
    "LossAverage",
    "Owner",
    "Parts",
    "Preconditioner",
    "Statistics",
    "Structure",
    "Tap",
    "attach",
    "check_structure",
    "describe",
    "explain",
    "find_owners",
    "grad_factor",
    "input_factor",
    "kfac",
    "resolve_structure",
    "root_of",
    "stationary_point",
]
