"""Modules that run inside of themselves, in eval() mode, or are not called but their forward."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.uses_training import OPTIMIZERS, assert_equal, gaussian, loss
from oracles.uses_zoo import BLOCKS, network

SHAPE = (4, 5, 4)
make = OPTIMIZERS["SINGD dense"]
OTHERS: dict[str, Callable[[], Any]] = {
    "with gradients": nullcontext,
    "without gradients": torch.no_grad,
    "without, and with": torch.no_grad,
}


def runs_inside(module: nn.Module, way: str) -> None:
    """Have a module run on another input inside of each of its calls, before it uses a weight."""
    depth = [0]

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if depth[0] == (2 if way == "without, and with" else 1):
            return
        depth[0] += 1
        try:
            with torch.enable_grad() if depth[0] == 2 else OTHERS[way]():
                module(args[0] + 1)
        finally:
            depth[0] -= 1

    module.register_forward_pre_hook(before)


@pytest.mark.parametrize("way", OTHERS)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_module_that_calls_itself(block: str, way: str) -> None:
    model, twin = network(block), network(block)
    optimizer, other = make(model.parameters()), make(twin.parameters())
    runs_inside(model[2], way)
    for step in range(3):
        for net, one in ((model, optimizer), (twin, other)):
            one.zero_grad()
            loss(net(gaussian(step, *SHAPE)), 4).backward()
            one.step()
    assert_equal([*zip(model.parameters(), twin.parameters(), strict=True)])
    assert torch._C._len_torch_function_stack() == 0


def evaluated(model: Any, x: Tensor) -> Tensor:
    return model.eval()(x)


def by_forward(model: Any, x: Tensor) -> Tensor:
    return model[4](model[3](model[2].forward(model[1](model[0](x)))))


@pytest.mark.parametrize(
    ("run", "reason"),
    [(evaluated, "called in eval() mode"), (by_forward, "not called itself")],
)
@pytest.mark.parametrize("block", ["parts", "kernel", "experts"])
def test_calls_that_cannot_be_looked_at_are_told_once(
    block: str, run: Callable[..., Tensor], reason: str
) -> None:
    """The fallback trains the parameter, and goes on with it where others are measured."""
    model = network(block)
    optimizer = make(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            optimizer.zero_grad()
            loss(run(model, gaussian(step, *SHAPE)), 4).backward()
            optimizer.step()
    told = [str(w.message) for w in caught if "2.weight" in str(w.message)]
    assert len(told) == 1
    assert reason in told[0]
    row = next(row for row in optimizer.report() if row.name == "2.weight")
    assert reason in row.reason
    model.train()
    optimizer.zero_grad()
    loss(model(gaussian(3, *SHAPE)), 4).backward()
    with pytest.warns(UserWarning, match="the fallback had begun"):
        optimizer.step()
    rows = {row.name: row for row in optimizer.report()}
    assert "the fallback had begun" in rows["2.weight"].reason
    assert rows["0.weight"].last_update == 3


@pytest.mark.parametrize("block", ["foreign", "subclass", "Conv1D", "attention"])
def test_promised_weights_in_evaluation(block: str) -> None:
    model = network(block)
    optimizer = make(model.parameters())
    with pytest.warns(UserWarning, match=r"2\..*\(called in eval\(\) mode\)"):
        loss(model.eval()(gaussian(0, *SHAPE)), 4).backward()
        optimizer.step()
