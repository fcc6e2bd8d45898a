"""Optimizers."""

from tnkfac.optim.kfac import KFAC
from tnkfac.optim.preconditioner import KFACPreconditioner
from tnkfac.optim.report import Report, Row
from tnkfac.optim.singd import SINGD

__all__ = ["KFAC", "SINGD", "KFACPreconditioner", "Report", "Row"]
