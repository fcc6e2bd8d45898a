"""Small networks that between them have every kind of layer and parameter."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from oracles.singd_cases import numbers

__all__ = [
    "STRUCTURES",
    "AllLayers",
    "Everyday",
    "Mixed",
    "all_layers_batch",
    "everyday_batch",
    "mixed_batch",
    "mixed_loss",
    "mlp",
]


STRUCTURES = (
    "dense",
    "diagonal",
    "block3diagonal",
    "hierarchical2_3",
    "triltoeplitz",
    "triutoeplitz",
    "triltopleftdiag",
    "trilbottomrightdiag",
    "triutopleftdiag",
    "triubottomrightdiag",
)
"""One of each kind."""


class AllLayers(nn.Module):
    """Every supported layer type in a chain ``[N, 2, 4, 3] -> [N, 3]``.

    With grouped layers, all padding modes, uneven padding, output padding, dilation, weight
    sharing in linear layers, layers without bias and in-place activations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(2, 4, (2, 3), padding="same", padding_mode="circular", groups=2)
        self.up2 = nn.ConvTranspose2d(4, 2, (2, 3), (1, 2), (0, 1), groups=2, bias=False)
        self.conv1 = nn.Conv1d(2, 3, 3, 3, 2, dilation=2, padding_mode="reflect")
        self.up1 = nn.ConvTranspose1d(3, 2, 3, 2, 1, output_padding=1)
        self.conv3 = nn.Conv3d(
            2, 2, (1, 2, 2), padding=(0, 1, 0), padding_mode="replicate", bias=False
        )
        self.up3 = nn.ConvTranspose3d(2, 1, (1, 2, 1), stride=(1, 1, 2))
        self.zeros = nn.Conv2d(1, 2, 3, padding=1, stride=2)
        self.shared = nn.Linear(3, 4)
        self.no_bias = nn.Linear(4, 2, bias=False)
        self.last = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 2, 4, 3]`` to ``[N, 3]``."""
        n = x.shape[0]
        x = functional.softplus(self.grouped(x))  # [N, 4, 4, 3]
        x = torch.tanh(self.up2(x)).flatten(2)  # [N, 2, 25]
        x = self.up1(torch.tanh(self.conv1(x)))  # [N, 2, 18]
        x = torch.tanh_(self.conv3(x.view(n, 2, 2, 3, 3)))  # [N, 2, 2, 4, 2]
        x = self.up3(x).view(n, 1, 10, 3)
        x = x[:, 0] + self.zeros(x).mean((1, 2, 3), keepdim=True)[:, 0]
        x = torch.tanh_(self.shared(x))  # [N, 10, 4]
        y: Tensor = self.last(self.no_bias(x).flatten(1))
        return y


def all_layers_batch(seed: int, samples: int = 5) -> tuple[Tensor, Tensor]:
    """Inputs and targets of :class:`AllLayers` in float64."""
    return numbers(samples, 2, 4, 3, seed=seed), numbers(samples, 3, seed=seed + 50)


def fixed_weights(model: nn.Module, scale: float = 1.0) -> Any:
    """The model in float64 with weights from a formula, not from a random generator."""
    model = model.double()
    for seed, parameter in enumerate(model.parameters()):
        fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
        parameter.data = scale * numbers(*parameter.shape, seed=seed) / fan_in**0.5
    return model


class Everyday(nn.Module):
    """What a step usually sees: images ``[N, 3, 6, 6]`` to logits ``[N, 4]``.

    A convolution, a grouped one after a norm and an in-place activation, a transposed one, a
    linear layer on three axes and a last one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(6, 3, 2, stride=2, bias=False)
        self.shared = nn.Linear(4, 5)
        self.last = nn.Linear(60, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 3, 6, 6]`` to ``[N, 4]``."""
        x = torch.relu_(self.norm(self.conv(x)))
        x = torch.relu_(self.grouped(x))  # [N, 6, 2, 2]
        x = torch.tanh(self.up(x)).flatten(1, 2)  # [N, 12, 4]
        y: Tensor = self.last(torch.tanh(self.shared(x)).flatten(1))
        return y


def everyday_batch(seed: int, samples: int = 8, dtype: torch.dtype = torch.float64) -> Any:
    """Images whose mean over a quarter tells their class: it can be learnt."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (samples,), generator=generator)
    x = 0.3 * torch.randn(samples, 3, 6, 6, generator=generator, dtype=torch.float64)
    for image, label in zip(x, y.tolist(), strict=True):
        row, column = 3 * (label // 2), 3 * (label % 2)
        image[:, row : row + 3, column : column + 3] += 1
    return x.to(dtype), y


def mlp(*sizes: int, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Linear layers with Tanh between; seeded by the caller."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        layers += [nn.Linear(d_in, d_out, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


class Mixed(nn.Module):
    """Embedding, convolution, norms, LSTM, attention, a free parameter, and linear layers.

    Maps token indices ``[N, 4]`` to ``[N, 3]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.full((4, 4), 0.1))
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``[N, 4]`` to ``[N, 3]``."""
        x = self.embedding(tokens) + self.position
        x = torch.relu_(self.batch_norm(self.conv(x.mT))).mT
        x = x + self.lstm(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        y: Tensor = self.head(self.norm(x).mean(1))
        return y


def mixed_batch(seed: int, samples: int = 6) -> tuple[Tensor, Tensor]:
    """Tokens and classes of :class:`Mixed`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 7, (samples, 4), generator=generator)
    return tokens, torch.randint(0, 3, (samples,), generator=generator)


def mixed_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy."""
    return functional.cross_entropy(output, target)
