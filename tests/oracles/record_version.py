"""Record what a version of the package has saved, and where it went on to: run with that version.

``python -m oracles.record_version FILE`` in ``tests``; ``tests/optim/test_versions.py`` compares.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tnkfac import KFAC, SINGD

__all__ = ["CASES", "network", "train"]

CASES: dict[str, Callable[..., Any]] = {
    "SINGD": lambda params: SINGD(params, T=2),
    "SINGD diagonal, AdamW's size": lambda params: SINGD(
        params, T=2, structures="diagonal", grafting="adam"
    ),
    "SINGD Toeplitz": lambda params: SINGD(params, T=3, structures="triltoeplitz"),
    "SINGD bounded": lambda params: SINGD(params, T=2, max_state_ratio=1.2),
    "KFAC": lambda params: KFAC(params, inv_update_steps=3),
    "EKFAC": lambda params: KFAC(params, inv_update_steps=3, compute_method="ekfac"),
    "KFAC compact": lambda params: KFAC(params, inv_update_steps=2, compact_state=True),
}


def network() -> nn.Sequential:
    """Layers with curvature, and a norm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    ).double()


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    """Steps on batches that depend on their numbers."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 2, 3, 3, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x[:, :, 1, 1]).square().mean().backward()
        optimizer.step()


if __name__ == "__main__":
    records = {}
    for name, build in CASES.items():
        model = network()
        optimizer = build(model.parameters())
        train(model, optimizer, range(4))
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        other = network()
        other.load_state_dict(saved["model"])
        resumed = build(other.parameters())
        resumed.load_state_dict(saved["optimizer"])
        records[name] = copy.deepcopy(saved)
        train(other, resumed, range(4, 9))
        records[name]["after"] = other.state_dict()
    torch.save(records, sys.argv[1])
