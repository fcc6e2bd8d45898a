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
from tnkfac.curvature.uses.scopes import TRACEABLE

pytestmark = pytest.mark.skipif(not TRACEABLE, reason="torch compiles function modes since 2.14")


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


class Breaks(nn.Module):
    """Its graph is broken between the products of a module that uses weights by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 4, 4) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for e, weight in enumerate(self.experts):
            rows = (x.detach()[:, 0] > 0).eq(bool(e)).nonzero()[:, 0]
            out[rows] = nn.functional.linear(x[rows], weight)
        return out


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("around", [lambda m: m, nn.Sequential], ids=["alone", "inside"])
@pytest.mark.filterwarnings("ignore:The fallback trains", "ignore:No statistics reached")
def test_broken_graphs_have_the_gradients_of_the_model_alone(around: Any, prepare: bool):
    """What their pieces hide is told, and trained."""
    model = around(Breaks())
    untouched, optimizer = deepcopy(model), singd(model)
    inputs = [torch.randn(6, 4) for _ in range(3)]
    if prepare:
        optimizer.prepare(inputs[0])
    compiled = torch.compile(model, backend="aot_eager")
    for x in inputs:
        untouched.load_state_dict(model.state_dict())
        untouched.zero_grad()
        optimizer.zero_grad()
        for each in (compiled, untouched):
            each(x).square().sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
        optimizer.step()
        assert not torch._C._len_torch_function_stack()
        assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(row.reason or row.last_update == 2 for row in optimizer.report())
