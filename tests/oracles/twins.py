"""Twins: the same training with and without something that must not change its numbers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tnkfac import KFAC, SINGD

__all__ = ["OPTIMIZERS", "assert_same_training", "train"]

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SINGD dense": lambda p: SINGD(p, 1e-2, structures="dense", T=1),
    "SINGD diagonal": lambda p: SINGD(p, 1e-2, structures="diagonal", T=1),
    "SINGD auto": lambda p: SINGD(p, 1e-2, T=1),
    "KFAC eigen": lambda p: KFAC(p, 1e-2, inv_update_steps=1),
    "KFAC ekfac": lambda p: KFAC(p, 1e-2, compute_method="ekfac", inv_update_steps=1),
    "KFAC cholesky": lambda p: KFAC(p, 1e-2, compute_method="cholesky", inv_update_steps=1),
}
"""One of each kind, from parameters."""


def train(optimizer: Any, loss: Callable[[], Tensor], steps: int = 3) -> None:
    """Some steps of the plainest loop."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def assert_same_training(
    model: nn.Module, optimizer: Any, twin: nn.Module, other: Any, tolerance: float = 1e-9
) -> None:
    """Every layer has taken its factors as late as its twin has, and the weights agree."""
    updates, others = ([row.last_update for row in o.report()] for o in (optimizer, other))
    assert updates == others
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            p, q, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
