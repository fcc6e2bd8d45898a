"""A compiled model trains as the eager one does, whole graphs only, whatever came first."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from oracles.grids import all_pairs
from oracles.optimizers import Optimizer, is_kfac

BOTH_OPTIMIZERS = True


Run = Callable[[torch.Tensor], torch.Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="circular", groups=2),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
        nn.Flatten(),
        nn.Linear(32, 6),
    ).double()


def images(count: int) -> torch.Tensor:
    x = torch.linspace(-1, 1, count * 32, dtype=torch.float64)
    return (3 * x).reshape(count, 2, 4, 4).sin()


def train(model: nn.Module, run: nn.Module, **options: object) -> tuple[list[torch.Tensor], object]:
    x, y = images(6), torch.arange(6)
    optimizer = Optimizer(model.parameters(), lr=1e-2, T=2, **options)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], optimizer


@pytest.mark.parametrize(
    ("structures", "approx", "before"),
    all_pairs(["diagonal", "dense"], ["expand", "reduce"], [False, True]),
)
def test_compiled_equals_eager(structures: str, approx: str, before: bool) -> None:
    options = {"structures": structures, "kfac_approx": approx}
    eager = network()
    expected, _ = train(eager, eager, **options)
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if before:  # such a model would ignore hooks that are added later
        compiled(images(6)).sum().backward()
        model.zero_grad()
    actual, optimizer = train(model, compiled, **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert all(row.last_update == 2 for row in optimizer.report() if row.approximation)


def whole(model: nn.Sequential) -> Run:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def in_place(model: nn.Sequential) -> Run:
    model.compile(backend="aot_eager")
    return model


def children(model: nn.Sequential) -> Run:
    for child in model:
        child.compile(backend="aot_eager")  # some run eagerly, beyond torch's limit of frames
    return model


def function(model: nn.Sequential) -> Run:
    return torch.compile(lambda x: model(x), backend="aot_eager", fullgraph=True)


def dynamic(model: nn.Sequential) -> Run:
    return torch.compile(model, backend="aot_eager", dynamic=True)


@pytest.mark.parametrize(
    ("way", "order"),
    [
        (whole, "optimizer first"),  # the other order is tested above
        (in_place, "compile first"),
        (in_place, "optimizer first"),
        (children, "compile first"),
        (function, "optimizer first"),
        (dynamic, "compile first"),
    ],
)
def test_every_way_to_compile(way: Callable[[Any], Run], order: str) -> None:
    """Batches of two sizes; the same factors and weights as the eager model, in any order."""
    if is_kfac() and way is not whole:
        pytest.skip("hooks do not know the optimizer")
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = network()
        run: Run = model
        if compiled and order == "compile first":
            run = way(model)
        optimizer = Optimizer(model.parameters(), lr=1e-2, T=1, structures="dense")
        if compiled and order == "optimizer first":
            run = way(model)
        for step in range(4):
            count = 6 - 2 * (step % 2)
            optimizer.zero_grad()
            nn.functional.cross_entropy(run(images(count)), torch.arange(count)).backward()
            optimizer.step()
        assert all(row.last_update == 3 for row in optimizer.report() if row.approximation)
        runs.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("strict", [False, True])
def test_export_leaves_the_taps_out(strict: bool) -> None:
    model = network()
    optimizer = Optimizer(model.parameters())
    x = images(6)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))
    assert "autograd" not in str(program.graph).lower()
    optimizer.close()
