"""Faults of ``tnkfac/optim``."""

from fault import Fault

FAULTS: tuple[Fault, ...] = ()
