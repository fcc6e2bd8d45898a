"""Where torch cannot compile function modes, compiled models are left alone, and trained."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

import tnkfac
from oracles.rewritten import CASES
from tnkfac.curvature.uses import scopes

CHOSEN = ("F.linear", "a subclass", "addmm", "chunks", "attention, batch first", "stack, bmm")


@pytest.fixture(autouse=True)
def older(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scopes, "TRACEABLE", False)
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    assert not torch._C._len_torch_function_stack()


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.filterwarnings("ignore:The fallback", "ignore:No statistics reached")
def test_compiled_models_train_as_without_curvature(name: str):
    """Whole graphs, gradients of the model alone, steps of every parameter."""
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    untouched = deepcopy(model)
    optimizer = tnkfac.SINGD(model.parameters(), lr=0.01, T=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        untouched.load_state_dict(model.state_dict())
        untouched.zero_grad()
        optimizer.zero_grad()
        for each in (compiled, untouched):
            each(*inputs).square().sum().backward()
        for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(row.last_update is None and row.reason for row in optimizer.report())


def test_the_same_model_not_compiled_is_captured():
    case = CASES["attention, batch first"]
    model = case.build()
    optimizer = tnkfac.SINGD(model.parameters(), lr=0.01, T=1)
    model(*case.inputs()).square().sum().backward()
    optimizer.step()
    assert all(row.last_update == 0 for row in optimizer.report())
