"""Optimizers, and what one's own rule is made of."""

from tnkfac.optim.base import CurvatureOptimizer
from tnkfac.optim.kfac import KFAC
from tnkfac.optim.kfac_pytorch import KFACPreconditioner
from tnkfac.optim.options import Option
from tnkfac.optim.params.captured import Needs
from tnkfac.optim.report.summary import Report, Row
from tnkfac.optim.rules.rule import Rule
from tnkfac.optim.singd import SINGD
from tnkfac.optim.timm_names import register_timm

__all__ = [
    "KFAC",
    "SINGD",
    "CurvatureOptimizer",
    "KFACPreconditioner",
    "Needs",
    "Option",
    "Report",
    "Row",
    "Rule",
    "register_timm",
]
