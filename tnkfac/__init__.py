"""Second-order optimizers for PyTorch whose curvature comes from tensor networks."""

from tnkfac._version import __version__
from tnkfac.optim import KFAC, SINGD

__all__ = ["KFAC", "SINGD", "__version__"]
