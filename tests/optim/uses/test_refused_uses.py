"""Weights that cannot be captured: they are trained all the same, and told once, truly."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import tnkfac
from oracles.rewritten import Uses


@dataclass(frozen=True)
class Refused:
    """A model, its input, and why a parameter of it has no curvature."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    name: str
    why: str


def used(shape: tuple[int, ...], use: Callable[..., Tensor], why: str) -> Refused:
    """One weight that a function uses, and nothing else."""
    return Refused(lambda: Uses(shape, shape[0], use), (6, 4), "w", why)


def standardised(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True))


def scaled(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b, x, w.T, alpha=2.0)


def both_biases(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b).tanh() + F.linear(x, w)


def later_whole(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w[:3]).sum(1, keepdim=True) + F.linear(x, w)


class Recurrent(nn.Module):
    """Weights inside of a fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


CASES = {
    "standardised": used((5, 4), standardised, "no product takes it, but (mean|sub)"),
    "exponential": used((5, 4), lambda x, w, b: x @ w.exp().T, "no product takes it, but exp"),
    "scaled by alpha": used((5, 4), scaled, "no product takes it"),
    "both ways": used((4, 4), lambda x, w, b: (x @ w).tanh() @ w.T, "W and as its transpose"),
    "overlapping": used(
        (5, 4),
        lambda x, w, b: F.linear(x, w[:3]).sum(1, keepdim=True) * F.linear(x, w[2:]),
        "overlap",
    ),
    "a part, then all": used((5, 4), later_whole, "overlap"),
    "a part alone": used((5, 4), lambda x, w, b: F.linear(x, w[:3]), "not all of it"),
    "with its bias and without": used((5, 4), both_biases, "another bias"),
    "product and penalty": used(
        (5, 4), lambda x, w, b: F.linear(x, w) + w.square().sum(), "by products and by square"
    ),
    "rows skipped": used((5, 4), lambda x, w, b: F.linear(x[:, ::2], w[:, ::2]), "no block"),
    "parametrized": Refused(
        lambda: parametrizations.weight_norm(nn.Linear(4, 5)),
        (6, 4),
        "parametrizations.weight.original1",
        "parametrization",
    ),
    "recurrent": Refused(Recurrent, (6, 2, 4), "lstm.weight_ih_l0", "LSTM is not a supported"),
}


def step(model: nn.Module, optimizer: tnkfac.SINGD, shape: tuple[int, ...]) -> list[str]:
    """One step; what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.zero_grad()
        model(torch.randn(shape)).square().mean().backward()
        optimizer.step()
    return [str(w.message) for w in caught if "allback" in str(w.message)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_refused_weights_are_trained_by_the_fallback(case: Refused):
    torch.manual_seed(0)
    model = case.build()
    optimizer = tnkfac.SINGD(model.parameters(), lr=0.01, T=1)
    told: list[str] = []
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        told += step(model, optimizer, case.shape)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n, p in model.named_parameters() if p.grad is not None}
    (row,) = (row for row in optimizer.report() if row.name == case.name)
    assert not row.approximation
    assert re.search(case.why, row.reason)
    assert "exp_avg" in optimizer.state[dict(model.named_parameters())[case.name]]
    assert len(told) == (case.name == "w")
    assert all(re.search(case.why, message) for message in told)


OF_WEIGHTS = [n for n, case in CASES.items() if case.name == "w" and "bias" not in n]


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_an_error_can_be_asked_for(name: str):
    """At the first step, when it is known."""
    case = CASES[name]
    model = case.build()
    optimizer = tnkfac.SINGD([model.w], lr=0.01, T=1, fallback="error")
    with pytest.raises(ValueError, match=r"fallback is 'error'"):
        for _ in range(2):
            step(model, optimizer, case.shape)


def test_small_ones_are_not_worth_a_word():
    """A position table beside a large layer."""
    model = nn.Sequential(Uses((2, 4), 0, lambda x, w, b: x @ w.exp().T), nn.Linear(2, 2000))
    optimizer = tnkfac.SINGD(model.parameters(), lr=0.01, T=1)
    assert not step(model, optimizer, (6, 4))
    rows = {row.name: row for row in optimizer.report()}
    assert rows["0.w"].reason == "no product takes it, but exp"
