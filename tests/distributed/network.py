"""The network that all processes train, and its batches."""

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Convolutions with and without groups, a transposed one, a linear layer on 3-d input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.grouped = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=3, bias=False)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.mix = nn.Linear(4, 5)
        self.extra = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, extra: bool = True) -> Tensor:
        """``[N, 2, 6, 6] -> [N, 3]``."""
        x = torch.tanh(self.norm(self.conv(x)))
        x = torch.tanh(self.up(torch.tanh(self.grouped(x))))
        x = torch.tanh(self.mix(x.flatten(2).transpose(1, 2)))
        x = torch.tanh(self.extra(x)) if extra else x
        return self.head(x.mean(1))


class Using(nn.Module):
    """Weights that are used without calling their layer: attention, parts, stacks, a child's.

    Samples go to one of two experts, so that some processes have none for one of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
        self.packed = nn.Parameter(torch.randn(9, 2))
        self.bias = nn.Parameter(torch.zeros(9))
        self.experts = nn.Parameter(torch.randn(2, 3, 4))
        self.across = nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=3)
        self.routed = nn.Parameter(torch.randn(2, 4, 4))
        self.read = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 2, 6, 6] -> [N, 3]``."""
        x = x.flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        parts = zip(self.packed.chunk(3), self.bias.chunk(3), strict=True)
        q, k, v = (nn.functional.linear(x, w, b) for w, b in parts)
        x = torch.tanh(q * k.sigmoid() + v)
        halves = torch.tanh(x[:, :18] @ self.experts[0]) + torch.tanh(x[:, 18:] @ self.experts[1])
        halves = halves + self.across(halves, x, x, need_weights=False)[0]
        chosen = (halves[:, 0, 0] > 0).long()
        routed = torch.zeros_like(halves)
        for e in chosen.unique().tolist():
            (place,) = torch.where(chosen == e)
            part = nn.functional.linear(halves[place], self.routed[e])
            routed = routed.index_add(0, place, part)
        read = nn.functional.linear(torch.tanh(routed), self.read.weight, self.read.bias)
        return self.head((halves + read).mean(1))


def using() -> Using:
    """The same weights in every process."""
    torch.manual_seed(0)
    return Using().double()


def network() -> Network:
    """The same weights in every process."""
    torch.manual_seed(0)
    return Network().double()


def batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    """The same numbers in every process."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(size, 3, generator=generator, dtype=torch.float64)


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared error, averaged over samples."""
    return (output - target).square().sum(1).mean()
