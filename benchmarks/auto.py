"""What blocks in the place of dense factors cost in quality: the rule behind ``structures="auto"``.

    python benchmarks/auto.py

A convolutional network with 128 channels learns the digits of scikit-learn for a few steps, with
dense factors, and with blocks of a quarter of the channels for the input factor, the output factor
or both. Printed is the mean loss of the last ten steps, one column per seed.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import tnkfac

PAIRS = {
    "both dense": ("dense", "dense"),
    "output in blocks": ("dense", "block32diagonal"),
    "input in blocks": ("block32diagonal", "dense"),
    "both in blocks": ("block32diagonal", "block32diagonal"),
}
FIXED = {"momentum": 0.9, "damping": 1e-3, "lr_cov": 0.01, "grafting": "rms"}
"""Hyper-parameters of SINGD that the figures in the docs were taken with."""
OPTIMIZERS: dict[str, Any] = {
    "SINGD": lambda params, pair: tnkfac.SINGD(params, lr=3e-3, structures=pair, **FIXED),
    "KFAC": lambda params, pair: tnkfac.KFAC(
        params, lr=0.02, damping=0.03, factor_update_steps=2, structures=pair
    ),
}


def network() -> nn.Sequential:
    """Images ``[N, 1, 8, 8]`` to logits ``[N, 10]``."""
    layers: list[nn.Module] = []
    for channels, stride in ((1, 1), (128, 2), (128, 1), (128, 2)):
        layers += [nn.Conv2d(channels, 128, 3, stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def last_loss(x: Tensor, y: Tensor, build: Any, pair: Any, seed: int, steps: int) -> float:
    """Train, and average the loss of the last ten steps."""
    torch.manual_seed(seed)
    model = network()
    optimizer = build(model.parameters(), pair)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def main(argv: list[str] | None = None) -> None:
    """Train with all pairs and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args(argv)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    for name, build in OPTIMIZERS.items():
        for words, pair in PAIRS.items():
            seeds = range(args.seeds)
            found = [last_loss(x, torch.tensor(labels), build, pair, s, args.steps) for s in seeds]
            columns = "".join(f"{loss:9.4f}" for loss in found)
            print(f"{name:8}{words:18}{columns}   mean{sum(found) / len(found):8.4f}", flush=True)


if __name__ == "__main__":
    main()
