"""Parameters, gradients and states whose numbers lie in memory in different ways.

Fused kernels walk through memory, whatever the strides say. The control is the same training with
everything contiguous, by ``torch.optim.AdamW`` or ``SGD`` where the fallback steps.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.loops import fit, squares
from oracles.optimizers import OPTIMIZERS
from tnkfac.optim.step import fallback
from tnkfac.optim.step.fallback import share_layout

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "every second number": lambda t: torch.stack([t, t + 7], -1)[..., 0],
    "a column of a wider one": lambda t: torch.cat([t, t + 7], -1)[..., : t.shape[-1]],
    "a row of a longer one": lambda t: torch.cat([t, t + 7], 0)[: t.shape[0]],
    "axes in reverse order": lambda t: (
        t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim)))
    ),
    "last axis first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "second axis last": lambda t: (
        t.movedim(min(1, t.ndim - 1), -1).contiguous().movedim(-1, min(1, t.ndim - 1))
    ),
}
"""The same numbers in other places."""
SHAPES = [(12,), (10, 5), (4, 3, 5), (4, 3, 2, 5), (1, 6, 5, 1), (2, 3, 2, 2, 3)]
CONTROLS: dict[str, tuple[dict[str, Any], Callable[..., torch.optim.Optimizer]]] = {
    "adamw": ({}, lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)),
    "sgd": (
        {"fallback_options": {"momentum": 0.5}},
        lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.5, weight_decay=0.1),
    ),
}


def moved_to(tensor: Tensor, layout: str) -> Tensor:
    moved = LAYOUTS[layout](tensor.detach().clone())
    assert torch.equal(moved, tensor)
    return moved


def held(tensors: Iterable[Tensor]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(tensor) for tensor in tensors)


def step(optimizer: torch.optim.Optimizer, params: nn.ParameterList, layouts: list[str]) -> None:
    """A step with gradients that depend on the parameters, assigned by hand in some layouts."""
    generator = torch.Generator().manual_seed(1)
    for param, layout in zip(params, layouts, strict=True):
        noise = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        param.grad = moved_to(param.detach() + noise, layout)
    optimizer.step()


def fused_kernels_take(param: Tensor) -> bool:
    return share_layout([param, param.grad])


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_the_fallback(layout: str, name: str, control: str) -> None:
    """Difference to torch's own optimizer: none, but where a fused kernel rounds otherwise."""
    options, torchs = CONTROLS[control]
    starts = [moved_to(torch.randn(shape), layout) for shape in SHAPES for _ in range(2)]
    ours, theirs = held(starts), held(moved_to(start, layout) for start in starts)
    optimizer = OPTIMIZERS[name](
        ours.parameters(), lr=0.01, weight_decay=0.1, fallback=control, **options
    )
    reference = torchs(theirs.parameters())
    for _ in range(4):
        step(optimizer, ours, ["contiguous", layout] * len(SHAPES))
        step(reference, theirs, ["contiguous", layout] * len(SHAPES))
    for mine, expected in zip(ours, theirs, strict=True):
        atol = 1e-6 if fused_kernels_take(mine) else 0
        torch.testing.assert_close(mine, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_parameters_that_change_their_layout(dtype: torch.dtype, layout: str, control: str) -> None:
    """States keep the layout in which they were made, as after ``model.to(memory_format=...)``."""
    options, torchs = CONTROLS[control]
    ours, theirs = (held([torch.ones(4, 3, 2, 5, dtype=dtype)]) for _ in range(2))
    optimizer = OPTIMIZERS["SINGD diagonal"](
        ours.parameters(), lr=0.01, weight_decay=0.1, fallback=control, **options
    )
    for params, each in ((ours, optimizer), (theirs, torchs(theirs.parameters()))):
        for then in ("contiguous", layout, "contiguous"):
            if then == layout:
                params[0].data = moved_to(params[0], layout)
            for _ in range(3):
                step(each, params, [then])
    atol = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=atol)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision(layout: str, control: str) -> None:
    """Moments are in float32 here, other than torch's, so contiguous training is the control."""
    trained = []
    for where in (layout, "contiguous"):
        params = held([moved_to(torch.ones(4, 3, 2, 5, dtype=torch.bfloat16), where)])
        optimizer = OPTIMIZERS["SINGD diagonal"](params.parameters(), lr=0.01, fallback=control)
        for _ in range(4):
            step(optimizer, params, [where])
        trained.append(params[0])
    torch.testing.assert_close(trained[0], trained[1], rtol=0, atol=0)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_skip_on_the_device_respects_layouts(control: str) -> None:
    """The kernel of a GPU is told by a flag to leave everything as it is; so is that of a CPU."""
    options, torchs = CONTROLS[control]
    starts = [moved_to(torch.ones(4, 6), layout) for layout in LAYOUTS]
    ours, theirs = (held(start.clone() for start in starts) for _ in range(2))
    for param, start in zip(ours, starts, strict=True):
        param.data = start
    (group,) = OPTIMIZERS["KFAC eigen"](
        ours.parameters(), lr=0.01, weight_decay=0.1, fallback=control, **options
    ).param_groups
    states = [fallback.init_state(param, group) for param in ours]
    reference = torchs(theirs.parameters())
    for turn in range(4):
        for param in (*ours, *theirs):
            param.grad = torch.arange(24.0).view(4, 6) - turn
        skipped = turn == 1
        fallback.update(list(ours), states, group, torch.tensor(float(skipped)))
        if not skipped:
            reference.step()
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)


class Convolutions(nn.Module):
    """Convolutions, a linear layer that may be large, and a table of positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 2, groups=2)
        self.table = nn.Parameter(torch.zeros(1, 8, 3, 3))
        self.large = nn.Linear(72, width)
        self.head = nn.Linear(width, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.first(x).relu()) + self.table
        return self.head(self.large(x.flatten(1)).tanh())


def batches(start: int, count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(start)
    options = {"generator": generator, "dtype": torch.float64}
    return [
        (torch.randn(96, 3, 6, 6, **options), torch.randn(96, 2, **options)) for _ in range(count)
    ]


def to_channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def to_reverse_order(model: nn.Module) -> None:
    for param in model.parameters():
        param.data = moved_to(param, "axes in reverse order")


def to_views(model: nn.Module) -> None:
    for param in model.parameters():
        param.data = moved_to(param, "every second number")


MOVES = {"channels last": to_channels_last, "reverse": to_reverse_order, "views": to_views}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("when", [0, 3])
def test_layers_train_alike_in_every_layout(name: str, move: str, when: int) -> None:
    """Captured layers too, large ones included: contiguous training is the control."""
    moved, control = (trained_until(name, when) for _ in range(2))
    MOVES[move](moved[0])
    for model, optimizer in (moved, control):
        fit(model, optimizer, batches(1, 4), squares)
    for ours, expected in zip(moved[0].parameters(), control[0].parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


def trained_until(name: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Convolutions(4096 if "diagonal" in name else 6).double()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-3, weight_decay=0.1)
    fit(model, optimizer, batches(0, steps), squares)
    return model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_contiguous_checkpoint_in_a_model_with_channels_last(name: str) -> None:
    (model, optimizer), (other, resumed) = trained_until(name, 3), trained_until(name, 0)
    to_channels_last(other)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for each, its in ((model, optimizer), (other, resumed)):
        fit(each, its, batches(1, 4), squares)
    for ours, expected in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_assigned_by_hand(name: str, layout: str) -> None:
    """As averaging or compression of gradients leaves them."""
    assigned, control = trained_until(name, 2), trained_until(name, 2)
    for model, optimizer in (assigned, control):
        for x, y in batches(2, 3):
            optimizer.zero_grad()
            squares(model(x), y).backward()
            if model is assigned[0]:
                for param in model.parameters():
                    param.grad = moved_to(param.grad, layout)
            optimizer.step()
    for ours, expected in zip(assigned[0].parameters(), control[0].parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a sign that is yet to be applied": lambda t: torch._neg_view(-t),
    "complex": lambda t: torch.complex(t, t.flip(0)),
    "conjugated": lambda t: torch.complex(t, -t.flip(0)).conj(),
    "complex columns of a wider one": lambda t: torch.complex(
        torch.cat([t, t], 1), torch.cat([t, t], 1)
    )[:, : t.shape[1]],
}


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_skip_on_the_device_respects_numbers(numbers: str, control: str, skips: bool) -> None:
    """Whatever the gradient is made of, a flag that is one leaves everything as it is."""
    options, torchs = CONTROLS[control]
    gradient = NUMBERS[numbers](torch.arange(1.0, 25.0).view(4, 6))
    start = torch.ones(4, 6, dtype=gradient.dtype)
    ours, theirs = held([start.clone()]), held([start.clone()])
    (group,) = OPTIMIZERS["SINGD dense"](
        ours.parameters(), lr=0.01, weight_decay=0.1, fallback=control, **options
    ).param_groups
    states = [fallback.init_state(ours[0], group)]
    reference = torchs(theirs.parameters())
    for turn in range(3):
        ours[0].grad, theirs[0].grad = gradient, gradient.clone()
        skipped = skips and turn == 1
        fallback.update(list(ours), states, group, torch.tensor(float(skipped)))
        if not skipped:
            reference.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-6)
