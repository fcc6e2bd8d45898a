"""What the loops of other packages train: a small network on the digits of scikit-learn."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from oracles.singd_cases import numbers

LOOPS = Path(__file__).parent.parent / "data" / "migration"
PAGE = Path(__file__).parent.parent.parent / "docs" / "migration.md"
STEPS, BATCH_SIZE = 20, 32


def build_model() -> nn.Module:
    """Images ``[N, 1, 8, 8]`` to logits ``[N, 10]``, in float64 and with fixed weights."""
    model = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 6, 3, padding=1),
            relu=nn.ReLU(),
            down=nn.Conv2d(6, 8, 3, stride=2, bias=False),
            tanh=nn.Tanh(),
            flatten=nn.Flatten(),
            hidden=nn.Linear(72, 20),
            act=nn.Tanh(),
            head=nn.Linear(20, 10),
        )
    ).double()
    for seed, p in enumerate(model.parameters()):
        fan_in = p[0].numel() if p.ndim > 1 else 100
        p.data = 1.5 * numbers(*p.shape, seed=seed) / fan_in**0.5
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    """The first digits, batch by batch."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).view(-1, 1, 8, 8), torch.tensor(labels)
    end = STEPS * BATCH_SIZE
    return list(zip(x[:end].split(BATCH_SIZE), y[:end].split(BATCH_SIZE), strict=True))


def train(program: str, name: str = "loop") -> tuple[list[float], nn.Module]:
    """Losses, and the model, of a program with a function ``train(model, loader)``."""
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    exec(compile(program, name, "exec"), namespace)
    model = build_model()
    return namespace["train"](model, batches()), model
