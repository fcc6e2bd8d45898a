"""A model that uses weights by itself is trained as the same model of stock layers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

import tnkfac
from oracles.rewritten import CASES, SINGLE, Case

OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "SINGD": lambda m: tnkfac.SINGD(m.parameters(), lr=0.05, T=1),
    "SINGD dense": lambda m: tnkfac.SINGD(m.parameters(), lr=0.05, T=1, structures="dense"),
    "SINGD diagonal": lambda m: tnkfac.SINGD(m.parameters(), lr=0.05, T=1, structures="diagonal"),
    "SINGD reduce": lambda m: tnkfac.SINGD(
        m.parameters(), lr=0.05, T=1, structures="dense", kfac_approx="reduce"
    ),
    "KFAC": lambda m: tnkfac.KFAC(m.parameters(), lr=0.05),
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def step(model: nn.Module, optimizer: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    if optimizer is not None:
        optimizer.zero_grad()
    output = model(*inputs)
    (output - output.detach().roll(1, 0)).square().sum(-1).mean().backward()
    if optimizer is not None:
        optimizer.step()
    return output.detach()


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{words}-{name}")
        for words, case in CASES.items()
        for name in OPTIMIZERS
        # Sums of the gradients of keys over positions are zero: rounding errors would be compared.
        # Rows of experts are not sorted by samples.
        if not (words.startswith(("attention", "stack")) and name == "SINGD reduce")
    ],
)
def test_three_steps_are_those_of_the_rewritten_model(case: Case, name: str):
    compare(case, name, 1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("case", SINGLE.values(), ids=SINGLE)
def test_the_same_in_single_precision(case: Case, name: str):
    torch.set_default_dtype(torch.float32)
    compare(case, name, 1e-3)


def compare(case: Case, name: str, tolerance: float):
    model = case.build()
    other, pairs = case.rewrite(model)
    with torch.no_grad():
        for own, param in pairs:
            param.copy_(own)
    inputs = [case.inputs() for _ in range(3)]
    optimizers = [OPTIMIZERS[name](each) for each in (model, other)]
    for x in inputs:
        outputs = [step(*each, x) for each in zip((model, other), optimizers, strict=True)]
        torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    for own, param in pairs:
        torch.testing.assert_close(own, param.detach(), rtol=tolerance, atol=tolerance)
    assert all(row.last_update == 2 for row in optimizers[0].report())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_passes_are_bit_for_bit_those_of_an_untouched_model(case: Case):
    model, inputs = case.build(), case.inputs()
    untouched = deepcopy(model)
    optimizer = tnkfac.SINGD(model.parameters(), lr=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        untouched.zero_grad()
        assert torch.equal(step(model, None, inputs), step(untouched, None, inputs))
        for own, other in zip(model.parameters(), untouched.parameters(), strict=True):
            assert own.grad is not None
            assert torch.equal(own.grad, other.grad)
        optimizer.step()
