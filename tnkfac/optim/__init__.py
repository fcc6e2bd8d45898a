"""Optimizers."""

from tnkfac.optim.kfac import KFAC
from tnkfac.optim.kfac_pytorch import KFACPreconditioner
from tnkfac.optim.report.summary import Report, Row
from tnkfac.optim.singd import SINGD
from tnkfac.optim.timm_names import register_timm

__all__ = ["KFAC", "SINGD", "KFACPreconditioner", "Report", "Row", "register_timm"]
