"""Communication of the processes that train one model."""

from tnkfac.optim.distributed.leaving import leave

__all__ = ["leave"]
