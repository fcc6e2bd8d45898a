"""Optimizers."""

from tnkfac.optim.report import Report, Row
from tnkfac.optim.singd import SINGD

__all__ = ["SINGD", "Report", "Row"]
