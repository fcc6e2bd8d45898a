"""Second-order optimizers for PyTorch whose curvature comes from tensor networks."""

from tnkfac._version import __version__
from tnkfac.optim import KFAC, SINGD, KFACPreconditioner, register_timm

__all__ = ["KFAC", "SINGD", "KFACPreconditioner", "__version__", "register_timm"]
