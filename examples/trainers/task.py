"""What all trainers are shown on: handwritten digits, and a small network."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


def digits() -> TensorDataset:
    """Images ``[1, 8, 8]`` and classes; they ship inside scikit-learn."""
    images, labels = load_digits(return_X_y=True)
    pictures = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return TensorDataset(pictures[:1024], torch.tensor(labels)[:1024])


def network() -> nn.Sequential:
    """Two convolutions, a normalisation, a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def options(description: str | None) -> argparse.ArgumentParser:
    """Where to, how long, and from where."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--resume", type=Path, default=None, help="a checkpoint of such a run")
    return parser
