"""Problems on which kfac-pytorch is recorded: where it is right, and where it errs.

Weights and data come from a formula, see ``singd_cases``. Weights are set anew before each step, so
that a step's factors do not depend on the decompositions of earlier ones, which that package makes
in float32 whatever the dtype is.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from oracles.singd_cases import batch, numbers

RECORD_FILE = Path(__file__).parent.parent / "data" / "kfac_pytorch.json"
STEPS = 5


@dataclass(frozen=True)
class Case:
    """Options of a preconditioner, and in how many parts each batch is."""

    name: str
    options: dict[str, Any] = field(hash=False)
    micro_batches: int = 1


CASES = [
    Case("eigen", {}),
    Case("inverse", {"compute_method": "inverse", "damping": 0.03}),
    Case("no-clip", {"kl_clip": None, "factor_decay": 0.6}),
    Case("strong-clip", {"kl_clip": 1e-8, "lr": 0.3}),
    Case("intervals", {"factor_update_steps": 2, "inv_update_steps": 4, "damping": 0.1}),
    Case("micro-batches", {"accumulation_steps": 2}, micro_batches=2),
    Case(
        "micro-batches-inverse",
        {"accumulation_steps": 3, "compute_method": "inverse", "kl_clip": None},
        micro_batches=3,
    ),
]


def build_model() -> nn.Sequential:
    """``[N, 2, 7, 6] -> [N, 3]``: strides, padding, no bias, weight sharing, each in some layer."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),  # [N, 4, 4, 3]
        nn.Tanh(),
        nn.Conv2d(4, 5, (2, 3), padding=(0, 1), bias=False),  # [N, 5, 3, 3]
        nn.Tanh(),
        nn.Flatten(2),
        nn.Linear(9, 7),  # shared by the 5 channels
        nn.Sigmoid(),
        nn.Flatten(1),
        nn.Linear(35, 3),
    ).double()


def set_weights(model: nn.Module, step: int) -> None:
    """Weights of a step, of the size ``1 / sqrt(fan_in)``."""
    for index, p in enumerate(model.parameters()):
        fan_in = p[0].numel() if p.ndim > 1 else 4
        p.data = numbers(*p.shape, seed=20 * step + index) / fan_in**0.5


def run(case: Case, precondition: Callable[..., Any], each: Callable[[Any], Any]) -> list[Any]:
    """``each(model)`` after every step of ``precondition(model, **options)``."""
    model = build_model()
    preconditioner = precondition(model, **case.options)
    found = []
    for step in range(STEPS):
        set_weights(model, step)
        model.zero_grad()
        x, y = batch(step)
        parts = zip(x.chunk(case.micro_batches), y.chunk(case.micro_batches), strict=True)
        for part, labels in parts:
            loss = functional.cross_entropy(2 * model(part), labels)
            (loss / case.micro_batches).backward()
        preconditioner.step()
        found.append(each(model))
    return found


class Trap(nn.Module):
    """One convolution on ``[N, 2, 5, 4]``, used in some way, and the mean of its squares."""

    def __init__(self, use: str = "plain", **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2, **options).double()
        self.use = use
        set_weights(self, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        if self.use == "no_grad":
            with torch.no_grad():
                self.conv(2 * x)
        y = checkpoint(self.conv, x, use_reentrant=False) if self.use == "checkpoint" else None
        y = self.conv(x) if y is None else y
        if self.use == "inplace":
            y = torch.tanh_(y)
        loss: Tensor = y.square().mean()
        return loss


TRAPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dilation": {"dilation": (1, 2)},
    "padding_mode": {"padding": 1, "padding_mode": "circular"},
    "groups": {"groups": 2},
    "padding-same": {"padding": "same"},
    "checkpoint": {"use": "checkpoint"},
    "no_grad": {"use": "no_grad"},
    "inplace": {"use": "inplace"},
}
"""In all but the first, kfac-pytorch has wrong factors or an error."""


def trap_input() -> Tensor:
    """``[3, 2, 5, 4]``."""
    return numbers(3, 2, 5, 4, seed=9).requires_grad_()


@cache
def load_records() -> Any:
    """``cases``: name -> steps; ``traps``: name -> ``A`` or ``error``."""
    return json.loads(RECORD_FILE.read_text())
