"""Convolutions by functions, and subclasses with a ``forward`` of their own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles.uses_training import OPTIMIZERS, assert_equal, assert_untouched, copy_weights, train


class Calling(nn.Module):
    """The weights of a stock layer, without the layer."""

    def __init__(self, stock: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(stock.weight))
        self.bias = None if stock.bias is None else nn.Parameter(torch.zeros_like(stock.bias))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        """What the function returns."""
        return self.call(x, self.weight, self.bias)


class Case(NamedTuple):
    """A stock layer, and a model that does the same."""

    stock: Callable[[], nn.Module]
    used: Callable[[nn.Module], nn.Module]
    shape: tuple[int, ...]


def calling(call: Callable[..., Tensor]) -> Callable[[nn.Module], nn.Module]:
    return lambda stock: Calling(stock, call)


class Same(nn.Conv2d):
    """Pads as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        """Pad on the right and at the bottom more than on the left and on top."""
        x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Plain(nn.Linear):
    """As PyTorch image models have it."""

    def forward(self, x: Tensor) -> Tensor:
        """Cast the bias if scripted; here it is not."""
        return F.linear(x, self.weight, self.bias)


class Scaled(nn.Linear):
    """Does more than the stock layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice the output."""
        return 2 * F.linear(x, self.weight, self.bias)


class Twofold(nn.Module):
    """The oracle of the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


class Conv1D(nn.Module):
    """As the transformers of Hugging Face have it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf, self.nx = outputs, inputs
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[.., inputs] -> [.., outputs]``."""
        size = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


IMAGES, ROWS, VOLUMES = (4, 4, 6, 5), (4, 4, 7), (4, 4, 3, 4, 3)
CASES: dict[str, Case] = {
    "conv1d": Case(
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
        calling(lambda x, w, b: F.conv1d(x, w, b, 2, 1)),
        ROWS,
    ),
    "conv2d": Case(
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        calling(lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 0), (1, 2))),
        IMAGES,
    ),
    "conv2d, named": Case(
        lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False),
        calling(lambda x, w, b: F.conv2d(weight=w, input=x, groups=2, padding=1)),
        IMAGES,
    ),
    "torch.conv2d": Case(
        lambda: nn.Conv2d(4, 6, 2, groups=2),
        calling(lambda x, w, b: torch.conv2d(x, w, b, groups=2)),
        IMAGES,
    ),
    "conv2d, same": Case(
        lambda: nn.Conv2d(4, 6, 3, padding="same"),
        calling(lambda x, w, b: F.conv2d(x, w, b, padding="same")),
        IMAGES,
    ),
    "conv2d, valid": Case(
        lambda: nn.Conv2d(4, 6, 3, padding="valid"),
        calling(lambda x, w, b: F.conv2d(x, w, b, padding="valid")),
        IMAGES,
    ),
    "conv2d, list": Case(
        lambda: nn.Conv2d(4, 6, 3, stride=2),
        calling(lambda x, w, b: F.conv2d(x, w, b, [2, 2])),
        IMAGES,
    ),
    "conv2d, depthwise": Case(
        lambda: nn.Conv2d(4, 4, 3, groups=4),
        calling(lambda x, w, b: F.conv2d(x, w, b, 1, 0, 1, 4)),
        IMAGES,
    ),
    "conv2d, cast": Case(
        lambda: nn.Conv2d(4, 6, 2),
        calling(lambda x, w, b: F.conv2d(x, w.to(x.dtype), b)),
        IMAGES,
    ),
    "conv3d": Case(
        lambda: nn.Conv3d(4, 2, 2, padding=1),
        calling(lambda x, w, b: F.conv3d(x, w, b, padding=1)),
        VOLUMES,
    ),
    "conv_transpose1d": Case(
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1),
        calling(lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1, 1)),
        ROWS,
    ),
    "conv_transpose2d": Case(
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2),
        calling(lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 0, 0, 2, 2)),
        IMAGES,
    ),
    "conv_transpose3d": Case(
        lambda: nn.ConvTranspose3d(4, 2, 2, bias=False),
        calling(lambda x, w, b: F.conv_transpose3d(x, w)),
        VOLUMES,
    ),
    "Conv2dSame": Case(
        lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 6, 3, 2, groups=2)),
        lambda _: Same(4, 6, 3, 2, groups=2),
        IMAGES,
    ),
    "Linear": Case(lambda: nn.Linear(4, 3), lambda _: Plain(4, 3), (4, 5, 4)),
    "Linear, one output": Case(lambda: nn.Linear(4, 1), lambda _: Plain(4, 1), (4, 5, 4)),
    "Linear, rows": Case(lambda: nn.Linear(4, 3), lambda _: Plain(4, 3), (6, 4)),
    "Linear, scaled": Case(Twofold, lambda _: Scaled(4, 3), (4, 5, 4)),
    "Conv1D": Case(lambda: nn.Linear(4, 3), lambda _: Conv1D(3, 4), (4, 5, 4)),
}


def twins(case: Case) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """Both behind a layer that is the same; what has to stay equal."""
    torch.manual_seed(0)
    rows = case.shape[-1] == 4 and len(case.shape) < 4
    stock = case.stock()
    used = case.used(stock)
    nn.init.normal_(used.weight, std=0.3)
    kind: Any = nn.Linear if rows else getattr(nn, f"Conv{len(case.shape) - 2}d")
    models = []
    for layer in (used, stock):
        first = kind(4, 4) if rows else kind(4, 4, 1)
        models.append(nn.Sequential(first, nn.Tanh(), layer).double())
    weight, theirs = used.weight.detach(), [*stock.parameters()]
    ours = [weight.T if weight.shape != theirs[0].shape else weight]
    ours += [] if used.bias is None else [used.bias]
    pairs = [*zip(models[0][0].parameters(), models[1][0].parameters(), strict=True)]
    pairs += zip(ours, theirs, strict=True)
    copy_weights(pairs)
    return *models, pairs


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_stock_layers(name: str, kind: str) -> None:
    case = CASES[name]
    used, stock, pairs = twins(case)
    optimizer, other = (train(net, OPTIMIZERS[kind], case.shape) for net in (used, stock))
    assert_equal(pairs)
    assert not any(row.reason for row in optimizer.report())
    assert len(optimizer.report()) == len(other.report())


@pytest.mark.parametrize(("approx", "micro"), [("expand", 2), ("reduce", 1), ("reduce", 2)])
@pytest.mark.parametrize("name", CASES)
def test_samples_are_those_of_the_batch(name: str, approx: str, micro: int) -> None:
    case = CASES[name]
    used, stock, pairs = twins(case)
    for net in (used, stock):
        train(net, OPTIMIZERS["SINGD dense"], case.shape, micro, kfac_approx=approx)
    assert_equal(pairs)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_model_alone(name: str) -> None:
    used, _, _ = twins(CASES[name])
    assert_untouched(used, CASES[name].shape)
