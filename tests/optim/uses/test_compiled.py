"""Compiled models whose modules use weights by themselves: whole graphs, once."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from oracles.uses_training import OPTIMIZERS, assert_equal, gaussian, loss, train
from oracles.uses_zoo import network
from tnkfac.curvature.uses.scopes import TRACEABLE

SHAPE = (4, 5, 4)
KNOWN = ["foreign", "subclass", "Conv1D", "attention"]
"""Their matrices are known before any call."""
UNKNOWN = ["parts", "kernel"]
make = OPTIMIZERS["SINGD dense"]
Run = Callable[[Tensor], Tensor]
pytestmark = pytest.mark.skipif(not TRACEABLE, reason="torch compiles function modes since 2.14")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


def steps(
    optimizer: Any, run: Run, count: int = 5, samples: Callable[[int], int] = lambda _: 4
) -> None:
    for step in range(count):
        optimizer.zero_grad()
        loss(run(gaussian(step, samples(step), *SHAPE[1:])), samples(step)).backward()
        optimizer.step()


def assert_same(model: nn.Module, twin: nn.Module) -> None:
    assert_equal([*zip(model.parameters(), twin.parameters(), strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize("first", ["optimizer", "compiled", "compiled and run"])
@pytest.mark.parametrize("block", KNOWN)
def test_one_graph_for_all_steps(block: str, first: str) -> None:
    model, twin = network(block), network(block)
    steps(make(twin.parameters()), twin)
    backend = CompileCounterWithBackend("aot_eager")
    if first == "optimizer":
        optimizer = make(model.parameters())
        run = torch.compile(model, backend=backend, fullgraph=True)
    else:
        run = torch.compile(model, backend=backend, fullgraph=True)
        if first == "compiled and run":
            loss(run(gaussian(0, *SHAPE)), 4).backward()
            backend.frame_count = 0
        optimizer = make(model.parameters())
    steps(optimizer, run)
    assert_same(model, twin)
    assert backend.frame_count == 1
    assert not any(row.reason for row in optimizer.report())
    assert {row.last_update for row in optimizer.report()} == {4}


@pytest.mark.slow
@pytest.mark.parametrize("block", KNOWN)
def test_other_optimizers_and_micro_batches(block: str) -> None:
    model, twin = network(block), network(block)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizers = [
        OPTIMIZERS["KFAC"](net.parameters(), kfac_approx="reduce", damping=0.1)
        for net in (model, twin)
    ]
    for optimizer, net in zip(optimizers, (run, twin), strict=True):
        for step in range(2):
            optimizer.zero_grad()
            for x in gaussian(step, *SHAPE).chunk(2):
                (loss(net(x), 2) / 2).backward()
            optimizer.step()
    assert_same(model, twin)


@pytest.mark.parametrize("block", KNOWN)
def test_a_graph_break(block: str) -> None:
    """Behind the module."""

    def break_here(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return out

    model, twin = network(block), network(block)
    model[2].register_forward_hook(break_here)
    optimizer, other = make(model.parameters()), make(twin.parameters())
    run = torch.compile(model, backend="aot_eager")
    steps(optimizer, run, 3)
    steps(other, twin, 3)
    assert_same(model, twin)
    assert not any(row.reason for row in optimizer.report())


@pytest.mark.slow
@pytest.mark.parametrize("block", KNOWN)
def test_dynamic_shapes(block: str) -> None:
    model, twin = network(block), network(block)
    optimizer, other = make(model.parameters()), make(twin.parameters())
    run = torch.compile(model, backend="aot_eager", dynamic=True)
    for one, net in ((optimizer, run), (other, twin)):
        steps(one, net, 4, samples=lambda step: 4 + step % 3)
    assert_same(model, twin)
    assert {row.last_update for row in optimizer.report()} == {3}


@pytest.mark.parametrize("block", UNKNOWN)
def test_what_a_graph_cannot_know_is_told(block: str) -> None:
    """The fallback trains it, with one warning, and the report says what to do."""
    model = network(block)
    optimizer = make(model.parameters())
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(optimizer, run, 3)
    rows = {row.name: row for row in optimizer.report()}
    assert "run one pass before compiling" in rows["2.weight"].reason
    assert rows["0.weight"].last_update == rows["4.weight"].last_update == 2
    assert len([w for w in caught if "The fallback trains" in str(w.message)]) == 1
    assert "exp_avg" in optimizer.state[model[2].weight]


@pytest.mark.parametrize("how", ["pass", "step"])
@pytest.mark.parametrize("block", UNKNOWN)
def test_one_eager_pass_is_enough(block: str, how: str) -> None:
    model, twin = network(block), network(block)
    optimizer, other = make(model.parameters()), make(twin.parameters())
    if how == "pass":
        loss(model(gaussian(9, *SHAPE)), 4).backward()
    else:
        steps(optimizer, model, 1)
        steps(other, twin, 1)
    backend = CompileCounterWithBackend("aot_eager")
    steps(optimizer, torch.compile(model, backend=backend, fullgraph=True))
    steps(other, twin)
    assert_same(model, twin)
    assert backend.frame_count == 1
    assert not any(row.reason for row in optimizer.report())


@pytest.mark.parametrize("block", KNOWN)
def test_evaluation_and_training_by_turns(block: str) -> None:
    model, twin = network(block), network(block)
    optimizer, other = make(model.parameters()), make(twin.parameters())
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(3):
        for one, net in ((optimizer, run), (other, twin)):
            net.eval()
            with torch.no_grad():
                net(gaussian(7, *SHAPE))
            net.train()
            one.zero_grad()
            loss(net(gaussian(step, *SHAPE)), 4).backward()
            one.step()
    assert_same(model, twin)
    assert {row.last_update for row in optimizer.report()} == {2}


def test_a_compiled_copy_of_an_eager_run() -> None:
    """Steps with one and with the other are those of either."""
    model, twin = network("attention"), network("attention")
    optimizer = make(model.parameters())
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(4):
        optimizer.zero_grad()
        loss((run if step % 2 else model)(gaussian(step, *SHAPE)), 4).backward()
        optimizer.step()
    train(twin, make, SHAPE, steps=4)
    assert_same(model, twin)
