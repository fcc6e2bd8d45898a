"""Triton's kernels are tried on a device before training relies on them.

They are compiled where they run, by tools that may be missing there or too old for the device.
Then torch's operations do the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from tnkfac.curvature.callers import warn
from tnkfac.curvature.precision import without_autocast


@lru_cache(maxsize=256)
def trusted(load: Callable[[], Any], device: torch.device) -> ModuleType | None:
    """A module of kernels, if they work; tried once for each device.

    Args:
        load: Imports the module, which has a function ``check`` that raises an error unless its
            kernels give what torch gives on a small problem.
        device: Where they are to run.

    Returns:
        The module; None without Triton, and, with a warning, where it does not work.
    """
    if find_spec("triton") is None:
        return None
    try:
        kernels: ModuleType = load()
        with torch.no_grad(), without_autocast(device.type):
            kernels.check(device)
    except Exception as error:  # whatever compilers and drivers raise
        warn(
            f"Triton's kernels do not work on {device}: {type(error).__name__}: {error}; "
            "torch's own operations take their place, with the same results in more time.",
            RuntimeWarning,
        )
        return None
    return kernels
