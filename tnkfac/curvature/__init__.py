"""Curvature of layers: Kronecker factors, structures, and how statistics are captured."""

from tnkfac.curvature.factors import grad_factor, input_factor

__all__ = ["grad_factor", "input_factor"]
