"""Small learning problems that need no download: digits, textures, tones and text.

A :class:`Task` builds its network for a seed and draws batches without end; ``loss`` is what is
trained. Data that is generated comes from a generator seeded by the run, and held-out data from
seeds that no run uses.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]
HELD_OUT = 10**6
"""Seed of held-out data."""


@dataclass(frozen=True)
class Task:
    """One problem.

    Attributes:
        build: Makes the network; torch is seeded before.
        draw: A batch of some size from a generator, from training or held-out data.
        loss: Scalar loss of the network's output for a batch.
        batch_size: Of training.
    """

    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator, int, bool], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch_size: int = 64


# ------------------------------------------------------------------ data


@cache
def _digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)


def digits(generator: torch.Generator, count: int, held_out: bool) -> Batch:
    """Images ``[N, 1, 8, 8]`` and their classes ``[N]``; every fifth image is held out."""
    x, y = _digits()
    places = torch.arange(len(x))
    places = places[(places % 5 == 0) == held_out]
    chosen = places[torch.randint(len(places), (count,), generator=generator)]
    return x[chosen], y[chosen]


def pictures(generator: torch.Generator, count: int, held_out: bool) -> Batch:
    """Digits ``[N, 1, 8, 8]`` that are their own targets ``[N, 64]``."""
    x, _ = digits(generator, count, held_out)
    return x, x.flatten(1)


def textures(generator: torch.Generator, count: int, held_out: bool) -> Batch:
    """Gratings of five directions and two widths in noise, ``[N, 3, 32, 32]``, classes ``[N]``."""
    y = torch.randint(10, (count,), generator=generator)
    angle = (y % 5) * math.pi / 5 + 0.08 * torch.randn(count, generator=generator)
    width = torch.where(y < 5, 0.55, 1.1) * (1 + 0.1 * torch.randn(count, generator=generator))
    phase = 2 * math.pi * torch.rand(count, 3, 1, 1, generator=generator)
    at = torch.arange(32.0)
    along = angle.cos()[:, None, None] * at[:, None] + angle.sin()[:, None, None] * at
    waves = (width[:, None, None, None] * along[:, None] + phase).sin()
    return waves + 1.0 * torch.randn(count, 3, 32, 32, generator=generator), y


def tones(generator: torch.Generator, count: int, held_out: bool) -> Batch:
    """Two overtones of eight pitches, rising or not, in noise, ``[N, 1, 256]``, classes ``[N]``."""
    y = torch.randint(8, (count,), generator=generator)
    pitch = 0.15 * 1.25 ** (y % 4).float() * (1 + 0.03 * torch.randn(count, generator=generator))
    slope = torch.where(y < 4, 0.0, 4e-4)
    at = torch.arange(256.0)
    turn = pitch[:, None] * at + slope[:, None] * at.square()
    phase = 2 * math.pi * torch.rand(count, 1, generator=generator)
    wave = (turn + phase).sin() + 0.5 * (2 * turn + phase).sin()
    return (wave + 0.7 * torch.randn(count, 256, generator=generator)).unsqueeze(1), y


MODULES = ("argparse", "collections", "decimal", "fractions", "functools", "inspect", "itertools")
MODULES += ("logging", "os", "pathlib", "random", "shutil", "socket", "statistics", "string")
MODULES += ("subprocess", "tarfile", "tempfile", "threading", "unittest", "zipfile")
CONTEXT = 64


@cache
def _text() -> Tensor:
    found = []
    for name in MODULES:
        module = import_module(name)
        members = [module, *(value for _, value in inspect.getmembers(module))]
        found += [inspect.getdoc(member) or "" for member in members if callable(member)]
    codes = torch.frombuffer(
        bytearray("\n".join(found).encode("ascii", "ignore")), dtype=torch.uint8
    )
    return codes.clamp(max=127).long()


def text(generator: torch.Generator, count: int, held_out: bool) -> Batch:
    """Documentation strings of Python's library: codes ``[N, 64]`` and the next ones."""
    codes = _text()
    split = len(codes) * 9 // 10
    low, high = (split, len(codes)) if held_out else (0, split)
    starts = torch.randint(low, high - CONTEXT - 1, (count,), generator=generator)
    rows = codes[starts[:, None] + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


# ------------------------------------------------------------------ networks


def digits_cnn() -> nn.Module:
    """Three convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def conv_autoencoder() -> nn.Module:
    """Convolutions down to a code of 8 numbers, transposed ones back."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(128, 8),
        nn.Linear(8, 128),
        nn.Tanh(),
        nn.Unflatten(1, (32, 2, 2)),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
        nn.Flatten(),
    )


def deep_autoencoder() -> nn.Module:
    """Ten linear layers with a code of 6 numbers in the middle: hard for first-order methods."""
    widths = [64, 96, 64, 48, 24, 6, 24, 48, 64, 96, 64]
    layers: list[nn.Module] = [nn.Flatten()]
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """Residual block with batch norms."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.short = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """``[N, c_in, H, W]`` to ``[N, c_out, H / stride, W / stride]``."""
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + (x if self.short is None else self.short(x)))


def resnet() -> nn.Module:
    """Seven convolutions, three of them in each of two strided blocks, with batch norms."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Attention(nn.Module):
    """A transformer block with linear layers that optimizers see."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, dim]`` to the same."""
        n, t, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(*qkv, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, dim))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches of 8 x 8 pixels, two blocks of width 64."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 64, 8, stride=8)
        self.place = nn.Parameter(0.02 * torch.randn(16, 64))
        self.blocks = nn.Sequential(*(Attention(64, 4, False) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, 32, 32]`` to ``[N, 10]``."""
        y = self.patch(x).flatten(2).mT + self.place
        return self.head(self.norm(self.blocks(y)).mean(1))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Causal blocks; by default two of width 64 on characters."""

    def __init__(
        self,
        words: int = 128,
        context: int | None = None,
        dim: int = 64,
        blocks: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(words, dim)
        self.place = nn.Embedding(CONTEXT if context is None else context, dim)
        self.blocks = nn.Sequential(*(Attention(dim, heads, True) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, words)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T]`` to ``[N, T, words]``."""
        y = self.token(x) + self.place(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(y)))  # type: ignore[no-any-return]


def audio_net() -> nn.Module:
    """Strided convolutions over time."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 9, stride=2, padding=4),
        nn.ReLU(),
        nn.Conv1d(16, 32, 9, stride=2, padding=4),
        nn.ReLU(),
        nn.Conv1d(32, 32, 9, stride=2, padding=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(4),
        nn.Flatten(),
        nn.Linear(128, 8),
    )


# ------------------------------------------------------------------ tasks


def pixels(output: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over the pixels of a picture."""
    return (output - target).square().sum(1).mean()


def characters(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy per character."""
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


TASKS: dict[str, Task] = {
    "digits CNN": Task(digits_cnn, digits, functional.cross_entropy),
    "convolutional autoencoder": Task(conv_autoencoder, pictures, pixels),
    "deep autoencoder": Task(deep_autoencoder, pictures, pixels),
    "ResNet on textures": Task(resnet, textures, functional.cross_entropy),
    "ViT on textures": Task(ViT, textures, functional.cross_entropy),
    "GPT on documentation": Task(GPT, text, characters, batch_size=32),
    "tones": Task(audio_net, tones, functional.cross_entropy),
}


def held_out_loss(task: Task, model: Any) -> float:
    """Loss on 512 held-out samples, in evaluation mode."""
    x, y = task.draw(torch.Generator().manual_seed(HELD_OUT), 512, True)
    model.eval()
    with torch.no_grad():
        return float(task.loss(model(x), y))
