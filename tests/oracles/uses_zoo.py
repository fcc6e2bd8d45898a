"""Modules that use weights by themselves, one of each kind that models have."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BLOCKS", "Conv1D", "network"]


class Foreign(nn.Module):
    """Reads the weight and the bias of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``[.., 4]`` to the same."""
        return F.linear(x, self.layer.weight, self.layer.bias)


class Subclass(nn.Linear):
    """Has a ``forward`` of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """``[.., 4]`` to the same."""
        return F.linear(x, self.weight, self.bias)


class Conv1D(nn.Module):
    """As the transformers of Hugging Face have it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 2)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[.., inputs] -> [.., outputs]``."""
        size = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(size)


class Attention(nn.Module):
    """Stock attention of a tensor to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4]`` to the same."""
        return self.attention(x, x, x, need_weights=False)[0]


class Parts(nn.Module):
    """One parameter, used as two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4) / 2)
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        """``[.., 4]`` to the same."""
        gate = torch.sigmoid(F.linear(x, self.weight[:4], self.bias[:4]))
        return gate * F.linear(x, self.weight[4:], self.bias[4:])


class Experts(nn.Module):
    """Rows go to one of three matrices, by their first number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[.., 4]`` to the same."""
        rows = x.reshape(-1, 4)
        chosen = torch.bucketize(rows[:, 0].detach(), rows.new_tensor([-0.3, 0.3]))
        out = torch.zeros_like(rows)
        for e in range(3):
            (place,) = torch.where(chosen == e)
            if len(place):
                out = out.index_add(0, place, F.linear(rows[place], self.weight[e]))
        return out.view_as(x)


class Kernel(nn.Module):
    """A parameter with which a function convolves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 3) / 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4]`` to the same."""
        return F.conv1d(x.mT, self.weight, padding=1, groups=2).mT


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "foreign": Foreign,
    "subclass": lambda: Subclass(4, 4),
    "Conv1D": lambda: Conv1D(4, 4),
    "attention": Attention,
    "parts": Parts,
    "experts": Experts,
    "kernel": Kernel,
}
"""All of them ``[N, T, 4]`` to the same."""


def network(name: str) -> nn.Sequential:
    """One of them between layers, in float64, with the same weights at every call."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 4), nn.Tanh(), BLOCKS[name](), nn.Tanh(), nn.Linear(4, 3)
    return nn.Sequential(*layers).double()
