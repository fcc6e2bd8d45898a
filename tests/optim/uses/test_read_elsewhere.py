"""Layers that are called, and whose weight a method of their module reads, too."""

import pytest
import torch
from torch import Tensor, nn

from tnkfac import SINGD


class Penalised(nn.Module):
    """Reads the weight of a layer that it calls."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def norm(self) -> Tensor:
        """Of the weight."""
        return self.layer.weight.square().sum()

    def forward(self, x: Tensor) -> Tensor:
        """What the layer returns."""
        return self.layer(x)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "one output": (lambda: nn.Linear(4, 1), (5, 4)),
    "one input": (lambda: nn.Linear(1, 4), (5, 1)),
    "one number": (lambda: nn.Linear(1, 1), (5, 1)),
    "convolution": (lambda: nn.Conv2d(2, 3, 2), (5, 2, 3, 3)),
    "one channel": (lambda: nn.Conv1d(1, 1, 3), (5, 1, 4)),
    "depthwise": (lambda: nn.Conv1d(3, 3, 1, groups=3), (5, 3, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_they_train_as_they_would_alone(name: str) -> None:
    build, shape = LAYERS[name]
    layer = build().double()
    model, alone = Penalised(layer), build().double()
    alone.load_state_dict(layer.state_dict())
    for net in (model, alone):
        optimizer = SINGD(net.parameters(), lr=1e-2, structures="dense", T=1)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            (net(torch.randn(shape).double()) - 1).square().mean().backward()
            optimizer.step()
        assert [row.last_update for row in optimizer.report()] == [2, 2]
    for p, q in zip(layer.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
