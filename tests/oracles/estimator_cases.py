"""Models, losses and data for the estimators that run over a model."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from oracles.compare import assert_close

__all__ = ["KNOWN", "LOSSES", "MODELS", "Data", "assert_same", "make"]

Data = list[tuple[Tensor, Tensor]]


class Batchless(nn.Module):
    """Time first: the leading axis of the layer inside is not that of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1).sum(1)


class Scaled(nn.Module):
    """Parameters of its own beside those of its layers, one layer used twice, one functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))
        self.twice = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x * self.gain))))
        return self.last(x) + nn.functional.linear(x, self.last.weight.square())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return x.mean(1)


def convnet(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)), (4,)),
    "linear on sequences": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)),
        (3, 4),
    ),
    "conv1d": (lambda: convnet(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.ELU()), (2, 7)),
    "conv2d": (
        lambda: convnet(
            nn.Conv2d(2, 4, (3, 2), padding=(1, 0), dilation=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 2, groups=2, bias=False),
            nn.Sigmoid(),
        ),
        (2, 5, 6),
    ),
    "conv2d, padding modes": (
        lambda: convnet(
            nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
            nn.Tanh(),
            nn.Conv2d(2, 2, 2, padding="same", padding_mode="reflect"),
        ),
        (2, 4, 4),
    ),
    "conv2d, even kernel and same": (
        lambda: convnet(nn.Conv2d(2, 2, 2, padding="same")),
        (2, 4, 3),
    ),
    "conv3d": (lambda: convnet(nn.Conv3d(1, 2, 2, stride=(1, 2, 1))), (1, 3, 4, 3)),
    "conv_transpose1d": (
        lambda: convnet(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1)),
        (2, 4),
    ),
    "conv_transpose2d": (
        lambda: convnet(
            nn.ConvTranspose2d(4, 4, 3, 2, padding=2, output_padding=1, groups=2, dilation=2),
            nn.Softplus(),
        ),
        (4, 3, 4),
    ),
    "conv_transpose3d": (lambda: convnet(nn.ConvTranspose3d(2, 1, 2, stride=2)), (2, 2, 1, 2)),
    "batch normalisation": (
        lambda: convnet(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.GroupNorm(1, 3)),
        (2, 4, 4),
    ),
    "attention": (Attention, (3, 4)),
    "other parameters": (Scaled, (4,)),
    "time first": (Batchless, (4, 3)),
    "as many steps as samples": (Batchless, (5, 3)),
}
KNOWN = [name for name in MODELS if not name.startswith(("attention", "other", "time", "as many"))]
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "mse": nn.MSELoss,
    "cross-entropy": nn.CrossEntropyLoss,
    "bce": nn.BCEWithLogitsLoss,
}


def make(
    name: str, loss: str = "cross-entropy", sizes: tuple[int, ...] = (5, 2)
) -> tuple[nn.Module, Data]:
    build, shape = MODELS[name]
    model = build().eval()
    model(torch.randn(2, *shape))  # lazy layers learn their shape
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    data = []
    for size in sizes:
        x = torch.randn(size, *shape)
        outputs = model(x).detach()
        y = torch.randn_like(outputs)
        if loss == "cross-entropy":
            y = torch.randint(outputs.shape[1], (size,))
        elif loss == "bce":
            y = torch.rand_like(outputs)
        data.append((x, y))
    return model, data


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert_close(found[name], expected[name], tolerance)
