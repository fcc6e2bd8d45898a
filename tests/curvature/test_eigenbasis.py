"""Squares of per-sample gradients in a basis, against a backward pass for every sample."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from oracles.layer_matrices import to_matrix
from tnkfac.curvature.eigenbasis import second_moments
from tnkfac.curvature.layers import describe
from tnkfac.curvature.structures import resolve_structure

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 2), (5, 3)),
    "linear, positions": (lambda: nn.Linear(3, 4), (5, 2, 3)),
    "linear, no bias": (lambda: nn.Linear(7, 6, bias=False), (5, 2, 7)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 2, groups=2), (3, 4, 3, 2)),
    "conv1d, many positions": (lambda: nn.Conv1d(2, 2, 2), (3, 2, 9)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 2, 2, stride=2, groups=2), (3, 4, 2)),
}


def rotations(groups: int, dim: int) -> Tensor:
    return torch.linalg.qr(torch.randn(groups, dim, dim, dtype=torch.float64))[0]


@pytest.mark.parametrize("rows", [False, True], ids=["the cheaper way", "by rows"])
@pytest.mark.parametrize("name", LAYERS)
def test_squares_in_a_basis(name: str, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions are summed, and the bias counts, before anything is squared."""
    build, shape = LAYERS[name]
    module, x = build().double(), torch.randn(shape, dtype=torch.float64)
    y = module(x)
    g = torch.randn_like(y)
    layer = describe(module)
    Q_A, Q_B = rotations(layer.groups, layer.in_dim), rotations(layer.groups, layer.out_dim)
    expected = torch.zeros(layer.groups, layer.out_dim, layer.in_dim, dtype=torch.float64)
    parameters = list(module.parameters())
    for n in range(len(x)):
        found = torch.autograd.grad(y[n], parameters, g[n], retain_graph=True)
        W = to_matrix(module, found[0], found[1] if len(found) > 1 else None)
        expected += (Q_B.mT @ W @ Q_A).square()
    k, c = (resolve_structure("dense", dim) for dim in (layer.in_dim, layer.out_dim))
    if rows:  # as where it is traced
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    result = second_moments(layer, x, g, k, c, ((Q_A,), (Q_B,)))
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)
