"""Weights that compiled models use by themselves: one graph, and the steps of the eager model."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import tnkfac
from oracles.rewritten import ATTENTION, CASES, Case


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch.set_default_dtype(torch.float32)


class Counting:
    """Counts the graphs that it compiles, but not those of hooks of the outermost module."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += bool(inputs)
        return aot_eager(graph, inputs)


def train(model: nn.Module, optimizer: Any, inputs: Any) -> None:
    for x in inputs:
        optimizer.zero_grad()
        output = model(*x)
        (output - output.detach().roll(1, 0)).square().sum(-1).mean().backward()
        optimizer.step()


def compare(case: Case, build: Any, prepare: bool, **options: Any) -> tuple[Any, int]:
    """Train eager and compiled; the optimizer of the compiled model, and how many graphs."""
    eager = case.build()
    model, inputs = deepcopy(eager), [case.inputs() for _ in range(5)]
    optimizers = [build(each) for each in (eager, model)]
    if prepare:
        for optimizer in optimizers:
            optimizer.prepare(*case.inputs())
    backend = Counting()
    compiled = torch.compile(model, backend=backend, **options)
    train(eager, optimizers[0], inputs)
    train(compiled, optimizers[1], inputs)
    for one, other in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    return optimizers[1], backend.graphs


WHOLE_GRAPHS = {name: case for name, case in CASES.items() if "a loop" not in name}
"""Cases without indices that depend on numbers."""
QUICK = ("F.linear", "addmm", "slices", "unbound", "stack, bmm", "stack, blocks of a matrix")
"""Those of the default run."""


def singd(model: nn.Module) -> Any:
    return tnkfac.SINGD(model.parameters(), lr=0.05, T=1)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, case in WHOLE_GRAPHS.items()
    ],
)
def test_one_graph_takes_the_steps_of_the_eager_model(case: Case):
    optimizer, graphs = compare(case, singd, prepare=True, fullgraph=True, dynamic=False)
    assert graphs == 1
    assert all(row.last_update == 4 for row in optimizer.report())


PROMISED = {
    **ATTENTION,
    "a subclass": CASES["a subclass"],
    "a convolution that pads": CASES["padded before"],
}


@pytest.mark.parametrize("case", PROMISED.values(), ids=PROMISED)
def test_what_modules_promise_is_captured_at_once(case: Case):
    """Without an eager pass, and without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(curvature|statistics).*")
        optimizer, _ = compare(case, singd, prepare=False, fullgraph=True)
    assert all(row.last_update == 4 for row in optimizer.report())
