"""A parameter that a model multiplies with by itself is trained as stock layers of it are."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.uses_products import PRODUCTS, STACKS, pairs, twins
from tnkfac import KFAC, SINGD

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SINGD dense": partial(SINGD, lr=1e-2, structures="dense", T=1),
    "SINGD diagonal": partial(SINGD, lr=1e-2, structures="diagonal", T=1),
    "SINGD": partial(SINGD, lr=1e-2),
    "KFAC": partial(KFAC, lr=1e-2, inv_update_steps=1),
}
FORMS = {**PRODUCTS, **STACKS}


def batch(seed: int) -> Tensor:
    return torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(out: Tensor, x: Tensor) -> Tensor:
    """The mean over samples; the order of rows does not matter, that of outputs does."""
    wanted = torch.linspace(-1, 2, out.shape[-1], dtype=out.dtype)
    return (out - wanted).square().sum() / len(x)


def train(model: nn.Module, make: Callable[..., Any], micro: int = 1, **options: Any) -> Any:
    """Three steps, each of some micro-batches."""
    optimizer = make(model.parameters(), **options)
    for step in range(3):
        optimizer.zero_grad()
        for x in batch(step).chunk(micro):
            (loss(model(x), x) / micro).backward()
        optimizer.step()
    return optimizer


def assert_equal(pairs: Iterable[tuple[Tensor, Tensor]], tolerance: float) -> None:
    for view, param in pairs:
        torch.testing.assert_close(view, param, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", FORMS)
def test_steps_are_those_of_stock_layers(name: str, kind: str) -> None:
    form = FORMS[name]
    used, stock = twins(form)
    optimizer, other = (train(net, OPTIMIZERS[kind]) for net in (used, stock))
    assert_equal(pairs(used, stock), form.tolerance)
    rows = {row.name: row for row in optimizer.report()}
    assert [n for n, row in rows.items() if row.reason] == ["bias"] * (form.added)
    assert len(rows) == len(other.report())


@pytest.mark.parametrize(("approx", "micro"), [("expand", 2), ("reduce", 1), ("reduce", 3)])
@pytest.mark.parametrize("name", PRODUCTS)
def test_samples_are_those_of_the_batch(name: str, approx: str, micro: int) -> None:
    """Also where rows are flattened or in windows, and of batches in several parts."""
    form = PRODUCTS[name]
    used, stock = twins(form)
    for net in (used, stock):
        train(net, OPTIMIZERS["SINGD dense"], micro, kfac_approx=approx)
    assert_equal(pairs(used, stock), form.tolerance)


@pytest.mark.parametrize("name", FORMS)
def test_outputs_and_gradients_are_those_of_the_model_alone(name: str) -> None:
    """Bit for bit, in the first pass and in those that follow."""
    used, _ = twins(FORMS[name])
    alone = copy.deepcopy(used)
    optimizer = SINGD(used.parameters(), lr=0.0, T=1)
    for seed in range(2):
        outputs, found = [], []
        for net in (used, alone):
            net.zero_grad()
            outputs.append(net(batch(seed)))
            (outputs[-1] - torch.ones_like(outputs[-1]).cumsum(0)).square().sum().backward()
            found.append([p.grad for p in net.parameters()])
        assert torch.equal(*outputs)
        assert all(map(torch.equal, *found))
        optimizer.step()
