"""Checkpoints of optimizers of models that use weights by themselves."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import tnkfac
from oracles.rewritten import CASES, Case

CHOSEN = ("F.linear", "addmm", "chunks", "unequal parts", "attention, batch first", "stack, a loop")
OPTIMIZERS: dict[str, Any] = {
    "SINGD": lambda m: tnkfac.SINGD(m.parameters(), lr=0.05, T=2),
    "SINGD diagonal": lambda m: tnkfac.SINGD(m.parameters(), lr=0.05, T=2, structures="diagonal"),
    "SINGD sgd": lambda m: tnkfac.SINGD(m.parameters(), lr=0.01, T=2, fallback="sgd"),
    "KFAC": lambda m: tnkfac.KFAC(m.parameters(), lr=0.05, inv_update_steps=2),
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def train(model: nn.Module, optimizer: Any, inputs: Any) -> None:
    for x in inputs:
        optimizer.zero_grad()
        output = model(*x)
        (output - output.detach().roll(1, 0)).square().sum(-1).mean().backward()
        optimizer.step()


def through_file(state: Any) -> Any:
    """Plain tensors and numbers alone."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("case", [CASES[c] for c in CHOSEN], ids=CHOSEN)
def test_a_new_optimizer_goes_on_bit_for_bit(case: Case, name: str, steps: int):
    """It knows the parts of its parameters from their first use, the old ones from the file."""
    model, other = case.build(), case.build()
    optimizer = OPTIMIZERS[name](model)
    inputs = [case.inputs() for _ in range(steps + 3)]
    train(model, optimizer, inputs[:steps])
    other.load_state_dict(model.state_dict())
    resumed = OPTIMIZERS[name](other)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    train(model, optimizer, inputs[steps:])
    train(other, resumed, inputs[steps:])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    states = [each.state_dict()["state"] for each in (optimizer, resumed)]
    assert [s.keys() for s in states[0].values()] == [s.keys() for s in states[1].values()]


def test_names_of_parts_are_in_the_file():
    case = CASES["chunks"]
    model = case.build()
    optimizer = tnkfac.SINGD(model.parameters(), T=1)
    train(model, optimizer, [case.inputs()])
    weight, bias = optimizer.state_dict()["state"].values()
    assert {key.split("].")[0] for key in weight} == {"[0:8", "[8:16", "[16:24"}
    assert {key.split("].")[0] for key in bias} == {"[0:8", "[8:16", "[16:24"}


def test_a_file_of_other_parts_is_refused():
    """Chunks of eight, and parts of 8, 4 and 12."""
    model, other = CASES["chunks"].build(), CASES["unequal parts"].build()
    optimizers = [tnkfac.SINGD(m.parameters(), T=1) for m in (model, other)]
    for name, m, o in zip(("chunks", "unequal parts"), (model, other), optimizers, strict=True):
        train(m, o, [CASES[name].inputs()])
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(ValueError, match="state"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))
