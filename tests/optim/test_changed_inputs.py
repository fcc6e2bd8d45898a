"""Inputs that are changed in place after the call, where the plain model trains all the same."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oracles.twins import OPTIMIZERS, assert_same_training, train
from tnkfac import SINGD, curvature

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "circular": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), lambda x: x),
    "circular, strided": (
        lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1, padding_mode="circular"),
        lambda x: x,
    ),
    "even same": (lambda: nn.Conv2d(4, 4, 2, padding="same"), lambda x: x),
    "grouped": (
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=2),
        lambda x: x,
    ),
    "transposed linear": (lambda: nn.Linear(4, 3), lambda x: x.mT),
    "transposed linear, no bias": (lambda: nn.Linear(4, 3, bias=False), lambda x: x.mT),
    "one dimension": (
        lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
        lambda x: x[0],
    ),
    "unbatched": (
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        lambda x: x[0],
    ),
}


class Changing(nn.Module):
    """A layer whose input is changed after its call, in place or not."""

    def __init__(self, name: str, in_place: bool, mode: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        build, self.view = LAYERS[name]
        self.in_place, self.mode = in_place, mode
        self.first, self.layer, self.last = nn.Conv2d(4, 4, 1), build(), nn.Linear(1, 2)

    def body(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.layer(self.view(x))
        x = x.mul_(0.5) if self.in_place else 0.5 * x
        return torch.tanh(y).mean() + torch.tanh(x).mean()

    def forward(self, x: Tensor) -> Tensor:
        """A scalar as ``[2]``."""
        if self.mode:
            total = checkpoint(self.body, x, use_reentrant=self.mode == "reentrant")
        else:
            total = self.body(x)
        y: Tensor = self.last(total[None])
        return y


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 4, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", LAYERS)
def test_where_torch_keeps_a_copy(name: str, kind: str) -> None:
    """From the first step on as if the change had been out of place."""
    x = images()
    model, twin = Changing(name, True).double(), Changing(name, False).double()
    optimizer, other = (OPTIMIZERS[kind](net.parameters()) for net in (model, twin))
    train(optimizer, lambda: model(x).square().sum())
    train(other, lambda: twin(x).square().sum())
    assert_same_training(model, optimizer, twin, other)


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["circular", "even same", "transposed linear"])
def test_inside_of_checkpointing(name: str, mode: str) -> None:
    """Hooks of saved tensors forbid a look at the copy: at the latest the second pass counts."""
    x = images().requires_grad_()
    model = Changing(name, True, mode).double()
    twin = Changing(name, False).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = SINGD(model.parameters(), 0.0, structures="dense", T=1)
        train(optimizer, lambda: model(x).square().sum(), 1)
        optimizer = SINGD(model.parameters(), 1e-2, structures="dense", T=1)
        other = SINGD(twin.parameters(), 1e-2, structures="dense", T=1)
        for p in (*model.parameters(), *twin.parameters()):
            p.grad = None
        measured = []
        for net, one in ((model, optimizer), (twin, other)):
            for _ in range(2):
                one.zero_grad()
                net(x).square().sum().backward()
                (layer,) = [la for la in one._registry.layers if la.name == "layer"]
                measured.append([t.clone() for t in layer.statistics.sums()])
    for a, b in zip(measured[1], measured[3], strict=True):
        torch.testing.assert_close(a, b)


def test_a_lost_pass_says_so() -> None:
    x = images()
    model = Changing("circular", True, "non-reentrant").double()
    optimizer = SINGD(model.parameters(), T=1)
    with pytest.warns(UserWarning, match=r"layer\.weight \(.*changed in place"):
        train(optimizer, lambda: model(x).square().sum(), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, lambda: model(x).square().sum(), 1)
    assert {row.last_update for row in optimizer.report()} == {1}


class Residual(nn.Module):
    """Blocks ``x += f(x)``, as code for autocast has them."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_place = in_place
        self.blocks = nn.ModuleList(
            [nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1)]
        )
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        x = x.float() * 1.0
        for block in (*self.blocks, self.linear):
            if self.in_place:
                x += block(x).tanh()
            else:
                x = x + block(x).tanh()
        return x


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_residuals_under_autocast(kind: str) -> None:
    """What counts is the cast copy, which is what the weight has multiplied."""
    x = images().float()
    model, twin = Residual(True), Residual(False)
    optimizer, other = (OPTIMIZERS[kind](net.parameters()) for net in (model, twin))

    def loss(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x).square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, lambda: loss(model))
    train(other, lambda: loss(twin))
    assert_same_training(model, optimizer, twin, other, 2e-2)


def test_what_the_weight_has_multiplied() -> None:
    """The sums are those of the bfloat16 input, to the last digit of float32."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), torch.randn(6, 4)
    optimizer = SINGD(layer.parameters(), structures="dense", T=1)
    original = x.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        x += 1
        out.float().square().sum().backward()
    A = optimizer._registry.layers[0].statistics.sums()[0][0]
    u = torch.cat([original.bfloat16().float(), torch.ones(6, 1)], 1)
    torch.testing.assert_close(A, u.T @ u, rtol=1e-6, atol=1e-6)


def test_what_torch_refuses_stays_refused() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), torch.randn(6, 4)
    SINGD(layer.parameters(), T=1)
    out = layer(x)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("name", ["circular", "even same", "transposed linear", "grouped"])
def test_kronecker_factors_of_a_changed_input(name: str, fisher_type: str) -> None:
    x, y = images(), torch.zeros(2, dtype=torch.float64)[None]
    found = []
    for in_place in (True, False):
        model = nn.Sequential(Changing(name, in_place), nn.Unflatten(0, (1, 2))).double()
        found.append(curvature.kfac(model, nn.MSELoss(), [(x, y)], fisher_type=fisher_type))
    for key, expected in found[1].items():
        torch.testing.assert_close(found[0][key].A, expected.A)
        torch.testing.assert_close(found[0][key].B, expected.B)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Linear(3, 4), (5, 2, 3)),
        (lambda: nn.Linear(3, 4, bias=False), (5, 2, 3)),
        (lambda: nn.Conv1d(3, 4, 1), (3, 2)),
    ],
    ids=["linear 3-d", "linear 3-d, no bias", "conv unbatched"],
)
def test_estimators_where_the_output_is_a_view(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """Changed in place behind the layer, its gradients arrive at the base of the view."""
    found = []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(build(), nn.ReLU(in_place), nn.Flatten()).double()
        x = torch.randn(shape, dtype=torch.float64)
        data = [(x, torch.zeros_like(model(x)))]
        (factors,) = curvature.kfac(model, nn.MSELoss(), data).values()
        found.append((factors.A, factors.B))
    assert found[1][1].abs().max() > 0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_an_estimator_refuses_what_nobody_has_kept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Any) -> Tensor:
            x = x * 1.0
            y: Tensor = self.layer(x)
            x += 1
            return y

    data = [(torch.randn(2, 3), torch.randn(2, 3))]
    with pytest.raises(RuntimeError, match="changed in place"):
        curvature.kfac(Model(), nn.MSELoss(), data, fisher_type="forward-only")
