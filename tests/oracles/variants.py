"""Both optimizers with the structures and methods that tests of every variant run over."""

from functools import partial
from typing import Any

from tnkfac import KFAC, SINGD

__all__ = ["VARIANTS"]

VARIANTS: dict[str, Any] = {
    "SINGD diagonal": partial(SINGD, structures="diagonal", T=1),
    "SINGD dense": partial(SINGD, structures="dense", T=1),
    "SINGD auto": partial(SINGD, T=2),
    "KFAC eigen": partial(KFAC, inv_update_steps=2),
    "KFAC ekfac": partial(KFAC, compute_method="ekfac", inv_update_steps=2),
    "KFAC cholesky": partial(KFAC, compute_method="cholesky", inv_update_steps=2),
}
"""Constructors by what they are called in the tests."""
