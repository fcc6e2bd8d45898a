"""Curvature of layers: Kronecker factors, structures, and how statistics are captured."""

from tnkfac.curvature.callers import warn
from tnkfac.curvature.capture.owners import Owner, find_owners, root_of
from tnkfac.curvature.capture.recording import output_shapes
from tnkfac.curvature.capture.statistics import Factors, LossAverage, Statistics
from tnkfac.curvature.capture.tap import FirstForward, Tap, attach
from tnkfac.curvature.estimators.diagonals import diagonal
from tnkfac.curvature.estimators.fisher import kfac
from tnkfac.curvature.estimators.kronecker import Kronecker
from tnkfac.curvature.estimators.ntk import gram, ntk
from tnkfac.curvature.estimators.sample_gradients import per_sample_gradients
from tnkfac.curvature.explanation import explain
from tnkfac.curvature.factors import grad_factor, input_factor
from tnkfac.curvature.layers import Layer, describe
from tnkfac.curvature.precision import FullPrecision
from tnkfac.curvature.structures import (
    Decomposable,
    Matrices,
    Parts,
    RaggedDiagonal,
    Structure,
    check_factor_structure,
    check_structure,
    resolve_structure,
)
from tnkfac.curvature.switch import plain_path
from tnkfac.curvature.triton_check import trusted

__all__ = [
    "Decomposable",
    "Factors",
    "FirstForward",
    "FullPrecision",
    "Kronecker",
    "Layer",
    "LossAverage",
    "Matrices",
    "Owner",
    "Parts",
    "RaggedDiagonal",
    "Statistics",
    "Structure",
    "Tap",
    "attach",
    "check_factor_structure",
    "check_structure",
    "describe",
    "diagonal",
    "explain",
    "find_owners",
    "grad_factor",
    "gram",
    "input_factor",
    "kfac",
    "ntk",
    "output_shapes",
    "per_sample_gradients",
    "plain_path",
    "resolve_structure",
    "root_of",
    "trusted",
    "warn",
]
