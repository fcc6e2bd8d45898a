"""HesScale and BL89 against Hessians, where they are exact, and against their definition."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from oracles.compare import assert_close
from oracles.curvature import loss_hessian, unflatten
from oracles.estimator_cases import LOSSES, assert_same, make
from tnkfac.curvature import diagonal

EXACT = 1e-9


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


LINEAR_CHAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3)), (4,)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, 2, padding=1, groups=2)), (2, 5, 4)),
    "conv2d, circular": (
        lambda: nn.Sequential(nn.Conv2d(2, 1, 3, padding=1, padding_mode="circular")),
        (2, 3, 3),
    ),
    "conv_transpose2d": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 3, 2, 1, output_padding=1)),
        (2, 3, 2),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2)), (1, 3, 2, 3)),
    "conv_transpose1d": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 1, 3, dilation=2)), (2, 4)),
}


@pytest.mark.parametrize("kind", ["hesscale", "bl89"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("name", LINEAR_CHAINS)
def test_recursions_are_exact_at_an_elementwise_loss(name: str, loss: str, kind: str) -> None:
    build, shape = LINEAR_CHAINS[name]
    model = nn.Sequential(build(), nn.Sigmoid())
    x = torch.randn(3, *shape)
    data = [(x, torch.rand_like(model(x)))]
    expected = loss_hessian(model, LOSSES[loss](), data).diagonal()
    found = diagonal(model, LOSSES[loss](), data, kind=kind)
    assert_same(found, unflatten(model, expected), EXACT)


def test_hesscale_is_exact_at_the_last_layer_of_a_classifier() -> None:
    model, data = make("linear", sizes=(4, 3))
    expected = unflatten(model, loss_hessian(model, nn.CrossEntropyLoss(), data).diagonal())
    found = diagonal(model, nn.CrossEntropyLoss(), data, kind="hesscale")
    for key in ("2.weight", "2.bias"):
        assert_close(found[key], expected[key], EXACT)
    neglecting = diagonal(model, nn.CrossEntropyLoss(), data, kind="bl89")
    assert float((neglecting["2.bias"] - expected["2.bias"]).norm()) > 0.1 * float(
        expected["2.bias"].norm()
    )


def recursion_by_matrices(model: nn.Sequential, x: Tensor, h: Tensor, g: Tensor) -> list[Tensor]:
    """The recursion from Jacobians and Hessians of every module: diagonals of the inputs."""
    inputs = [x]
    for module in model:
        inputs.append(module(inputs[-1].clone()).detach())
    found = []
    for module, x in reversed(list(zip(model, inputs, strict=False))):
        flat = x.flatten()
        run = lambda v, m=module, x=x: m(v.view_as(x).clone()).flatten()  # noqa: E731
        jacobian = torch.func.jacrev(run)(flat)
        weighted = lambda v, g=g, run=run: (g.flatten() * run(v)).sum()  # noqa: E731
        curved = torch.autograd.functional.hessian(weighted, flat).diagonal()
        h = (jacobian.square().T @ h.flatten() + curved).view_as(x)
        g = (jacobian.T @ g.flatten()).view_as(x)
        found.append(h)
    return found


CHAIN: dict[str, Callable[[], list[nn.Module]]] = {
    "convolutions": lambda: [nn.Conv2d(2, 3, 2, groups=1), nn.SiLU(), nn.ConvTranspose2d(3, 2, 2)],
    "average pooling": lambda: [nn.AvgPool2d(3, 2, padding=1, ceil_mode=True)],
    "average pooling, inside": lambda: [nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)],
    "average pooling, divisor": lambda: [nn.AvgPool2d((2, 1), divisor_override=3)],
    "adaptive pooling": lambda: [nn.AdaptiveAvgPool2d((3, 2))],
    "maximum": lambda: [nn.MaxPool2d(2), nn.GELU()],
    "batch normalisation": lambda: [nn.BatchNorm2d(2).eval(), nn.Tanh()],
    "rearranging": lambda: [nn.ZeroPad2d(1), nn.PixelUnshuffle(1), nn.Identity(), nn.Mish()],
    "dropout": lambda: [nn.Dropout(0.5).eval(), nn.Hardswish(), nn.Softsign()],
}


@pytest.mark.parametrize("name", CHAIN)
def test_modules_on_the_way(name: str) -> None:
    """The diagonal with respect to the bias of a first layer is that of its output, summed."""
    first = nn.Conv2d(1, 2, 1)
    rest = nn.Sequential(*CHAIN[name]())
    model = nn.Sequential(first, nn.Sequential(rest, nn.Flatten()))
    x = torch.randn(2, 1, 3, 4)
    y = torch.randn_like(model(x))
    loss_fn = nn.MSELoss(reduction="sum")
    found = diagonal(model, loss_fn, [(x, y)], kind="hesscale")
    outputs = model(x).detach()
    hidden = first(x).detach()
    flat = nn.Sequential(*rest, nn.Flatten())
    h = recursion_by_matrices(flat, hidden, torch.full_like(outputs, 2.0), 2 * (outputs - y))[-1]
    assert_close(found["0.bias"], h.sum((0, 2, 3)), EXACT)
    assert_close(found["0.weight"].flatten(), (h * x.square()).sum((0, 2, 3)), EXACT)


@pytest.mark.parametrize("dims", [1, 3])
def test_pooling_in_other_dimensions(dims: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](1, 2, 1)
    pool = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1](2, 1, padding=1)
    adaptive = (nn.AdaptiveAvgPool1d, None, nn.AdaptiveAvgPool3d)[dims - 1](2)
    x = torch.randn(2, 1, *[3] * dims)
    for module in (pool, adaptive):
        model = nn.Sequential(conv, module)
        y = torch.randn_like(model(x))
        found = diagonal(model, nn.MSELoss(reduction="sum"), [(x, y)], kind="bl89")
        hidden = conv(x).detach()
        outputs = module(hidden)
        h = recursion_by_matrices(
            nn.Sequential(module), hidden, torch.full_like(outputs, 2.0), 2 * (outputs - y)
        )[-1]
        assert_close(found["0.bias"], h.flatten(2).sum((0, 2)), EXACT)
