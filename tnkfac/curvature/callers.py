"""Warnings that point at the line of the user, whatever lies between."""

from __future__ import annotations

import sys
import warnings

BETWEEN = ("tnkfac", "torch", "contextlib", "copy", "copyreg", "functools")
"""Packages and modules that nobody wants to be pointed at."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line outside of this package and of torch.

    How many frames that is away depends on torch, which wraps the steps of optimizers in profiling,
    and once more for schedulers and scalers of gradients.

    Args:
        message: What to say.
        category: Kind of warning.
    """
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and _lies_between(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _lies_between(module: str) -> bool:
    return module.partition(".")[0] in BETWEEN
