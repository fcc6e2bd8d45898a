"""One spelling for both optimizers, so that one table of tests is for both.

A module of tests with ``BOTH_OPTIMIZERS = True`` runs once with each; there ``Optimizer`` makes the
one whose turn it is, from options of SINGD.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from tnkfac import KFAC, SINGD

__all__ = [
    "EVERY_CURVATURE",
    "KINDS",
    "Optimizer",
    "factor_key",
    "is_kfac",
    "only_singd",
    "skip_unless_decomposable",
    "translated",
    "use",
]

KINDS = ("SINGD", "KFAC")
ONLY_SINGD = {
    "alpha1",
    "lr_cov",
    "init",
    "kfac_like",
    "normalize_lr_cov",
    "preconditioner_dtype",
}
_turn = ["SINGD"]


def use(kind: str) -> None:
    """Make optimizers of this kind from now on."""
    _turn[0] = kind


def is_kfac() -> bool:
    """Whether it is KFAC's turn."""
    return _turn[0] == "KFAC"


def skip_unless_decomposable(structure: str) -> None:
    """KFAC needs structures that hold an eigenbasis."""
    if is_kfac() and structure.startswith(("tri", "hierarchical")):
        pytest.skip("not a structure of KFAC")


def only_singd() -> None:
    """For options that KFAC does not have."""
    if is_kfac():
        pytest.skip("about an option of SINGD")


def factor_key() -> str:
    """State key of what an update of the factors changes in a dense layer."""
    return "A" if is_kfac() else "K"


def translated(options: dict[str, Any]) -> dict[str, Any]:
    """Options of SINGD as those of KFAC, for the same schedule and size of steps."""
    options = {key: value for key, value in options.items() if key not in ONLY_SINGD}
    if "T" in options:
        T = options.pop("T")
        options |= {"factor_update_steps": T, "inv_update_steps": T}
    return options


EVERY_CURVATURE: dict[str, Callable[..., Any]] = {
    "SINGD diagonal": partial(SINGD, structures="diagonal"),
    "SINGD dense": partial(SINGD, structures="dense"),
    "SINGD auto": partial(SINGD, structures="auto"),
    "KFAC eigen": partial(KFAC, compute_method="eigen"),
    "KFAC ekfac": partial(KFAC, compute_method="ekfac"),
    "KFAC cholesky": partial(KFAC, compute_method="cholesky"),
}
"""Both optimizers with each of their ways to keep and to invert factors."""


def Optimizer(params: Any, lr: float | Tensor = 1e-3, **options: Any) -> Any:
    """SINGD or KFAC, with SINGD's defaults for what both have."""
    if not is_kfac():
        return SINGD(params, lr, **options)
    defaults = {"T": 10, "grafting": "rms", "decoupled_weight_decay": True, "kl_clip": None}
    options = translated({**defaults, **options})
    if not isinstance(params, list | tuple) or not all(isinstance(p, dict) for p in params):
        return KFAC(params, lr, **options)
    return KFAC([translated(group) for group in params], lr, **options)
