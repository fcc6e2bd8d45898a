"""What is multiplied with in ways that have no Kronecker factors: the fallback trains it."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from oracles.loops import weights
from tnkfac import KFAC, SINGD

ANYTHING = torch.arange(40) % 5


class Using(nn.Module):
    """A supported layer, and parameters that are used by a function."""

    def __init__(self, run: Callable[..., Tensor], *shape: int, bias: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(shape) / 2)
        self.bias = nn.Parameter(torch.randn(bias)) if bias else None
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 4]`` to anything."""
        x = torch.tanh(self.first(x))
        return self.run(x, self.weight) if self.bias is None else self.run(x, self)


class Reading(nn.Module):
    """Reads a number out of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell = nn.Linear(4, 4), nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 4]`` to ``[N, 2, 3]``."""
        x = torch.tanh(self.first(x))
        return self.cell(torch.stack([x, x.sin()], 1))[0]


class Normed(nn.Module):
    """A layer whose weight is computed of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layer = parametrizations.weight_norm(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 4]`` to ``[N, 3]``."""
        return self.layer(torch.tanh(self.first(x)))


def turned() -> nn.Module:
    """A parameter whose rows do not lie one after the other."""
    model = Using(lambda x, w: torch.cat([x @ w[:, :3], x @ w[:, 3:]], -1), 4, 6)
    model.weight = nn.Parameter(torch.randn(6, 4).T / 2)
    return model


class Case(NamedTuple):
    """A model with parameters that cannot be captured.

    Attributes:
        build: The model.
        reasons: Why, by name of the parameter.
        warns: Whether it is worth a warning, or expected of such modules.
        early: Whether it is known before any pass.
    """

    build: Callable[[], nn.Module]
    reasons: dict[str, str]
    warns: bool = True
    early: bool = False


def standardised(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True))


def computed(run: Callable[..., Tensor], names: str, *shape: int) -> Case:
    return Case(lambda: Using(run, *shape), {"weight": f"no product takes it, but {names}"})


CASES = {
    "standardised": computed(standardised, "mean, std, sub", 3, 4),
    "exp": computed(lambda x, w: F.linear(x, w.exp()), "exp", 3, 4),
    "mul": computed(lambda x, w: F.linear(x, 2 * w), "mul", 3, 4),
    "convolution": computed(
        lambda x, w: F.conv1d(x.unsqueeze(1), w / w.norm()), "div, norm", 2, 1, 2
    ),
    "alpha": computed(
        lambda x, w: torch.addmm(x.sum() + x.new_zeros(3), x, w, alpha=2), "addmm", 4, 3
    ),
    "beta": computed(
        lambda x, w: torch.addmm(x.new_ones(3), x, w, beta=0.5), "addmm", 4, 3
    ),
    "three operands": computed(
        lambda x, w: torch.einsum("ni,io,no->no", x, w, x.new_ones(len(x), 3)), "einsum", 4, 3
    ),
    "bilinear": computed(
        lambda x, w: F.bilinear(x, x, w), "bilinear", 3, 4, 4
    ),
    "W and its transpose": Case(
        lambda: Using(lambda x, w: F.linear(torch.tanh(F.linear(x, w)), w.T), 3, 4),
        {"weight": "used as W and as its transpose"},
    ),
    "overlapping rows": Case(
        lambda: Using(lambda x, w: torch.cat([F.linear(x, w[:3]), F.linear(x, w[2:])], -1), 5, 4),
        {"weight": "used in parts that overlap"},
    ),
    "all and a part": Case(
        lambda: Using(lambda x, w: torch.cat([F.linear(x, w), F.linear(x, w[2:])], -1), 5, 4),
        {"weight": "used in parts that overlap"},
    ),
    "a part": Case(
        lambda: Using(lambda x, w: F.linear(x, w[:3]), 5, 4),
        {"weight": "used in parts that are not all of it"},
    ),
    "a part of a bias": Case(
        lambda: Using(lambda x, own: F.linear(x, own.weight, own.bias[1:4]), 3, 4, bias=5),
        {
            "weight": "used with a part of a bias",
            "bias": "used with a part of a bias",
        },
    ),
    "every other input": Case(
        lambda: Using(lambda x, w: F.linear(x[:, ::2], w[:, ::2]), 3, 4),
        {"weight": "used through a view that is no block of it"},
    ),
    "another bias": Case(
        lambda: Using(
            lambda x, own: F.linear(F.linear(x, own.weight, own.bias), own.weight), 4, 4, bias=4
        ),
        {"weight": "called with another bias than before"},
    ),
    "a part of a convolution": Case(
        lambda: Using(lambda x, w: F.conv1d(x.unsqueeze(1), w[:2]), 4, 1, 2),
        {"weight": "a convolution uses a part of it"},
    ),
    "groups that change": Case(
        lambda: Using(
            lambda x, w: F.conv1d(x[..., None], w)
            + F.conv1d(x.repeat(1, 2)[..., None], w, groups=2),
            4, 4, 1,
        ),
        {"weight": "used by calls of other shapes"},
    ),
    "product and penalty": Case(
        lambda: Using(lambda x, w: F.linear(x, w) + w.square().sum(), 3, 4),
        {"weight": "taken by products and by square"},
    ),
    "in parts that lie apart": Case(
        turned, {"weight": "used in parts, but its numbers do not lie in order"}
    ),
    "inside of a checkpoint": Case(
        lambda: Using(
            lambda x, w: checkpoint(lambda x: F.linear(x, w), x, use_reentrant=False), 3, 4
        ),
        {"weight": "used inside of a checkpoint of a part of its module"},
    ),
    "table": Case(
        lambda: Using(lambda x, w: x + F.embedding(ANYTHING[: len(x)], w), 5, 4),
        {"weight": "no product takes it, but embedding"},
        warns=False,
    ),
    "positions": Case(
        lambda: Using(lambda x, w: x + w[: len(x)], 6, 4),
        {"weight": "no product takes it, but add"},
        warns=False,
    ),
    "vector": Case(
        lambda: Using(lambda x, w: F.linear(x, w.view(3, 4)), 12),
        {"weight": "Using is not a supported layer"},
        warns=False,
        early=True,
    ),
    "recurrent": Case(
        Reading, {"cell.weight_ih_l0": "LSTM is not a supported layer"}, warns=False, early=True
    ),
    "parametrisation": Case(
        Normed,
        {"layer.parametrizations.weight.original1": "(a parametrization)"},
        warns=False,
        early=True,
    ),
}  # fmt: skip


def step(model: nn.Module, optimizer: Any, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(6, 4)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("make", [SINGD, KFAC])
@pytest.mark.parametrize("name", CASES)
def test_the_fallback_trains_it_and_the_report_says_why(name: str, make: Any) -> None:
    case = CASES[name]
    model = case.build()
    optimizer = make(model.parameters(), lr=1e-2)
    before = weights(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            step(model, optimizer, seed)
    rows = {row.name: row for row in optimizer.report()}
    for param, reason in case.reasons.items():
        assert reason in rows[param].reason, rows[param].reason
        assert rows[param].approximation == ""
    assert rows["first.weight"].reason == ""
    moved = {key: not torch.equal(param, before[key]) for key, param in weights(model).items()}
    assert all(moved.values()), moved
    told = [str(w.message) for w in caught]
    assert len(told) == case.warns, told
    assert all(any(key in text for key in case.reasons) for text in told)
    for param in model.parameters():
        assert "exp_avg" in optimizer.state[param] or "momentum_buffer" in optimizer.state[param]


@pytest.mark.parametrize("name", CASES)
def test_it_can_be_an_error(name: str) -> None:
    """When the optimizer is built, where that is known; else in the first step."""
    case = CASES[name]
    model = case.build()
    if case.early:
        with pytest.raises(ValueError, match="fallback is 'error'"):
            SINGD(model.parameters(), fallback="error")
        return
    optimizer = SINGD(model.parameters(), fallback="error")
    before = weights(model)
    with pytest.raises(ValueError, match=r"(weight|bias).*fallback is 'error'"):
        step(model, optimizer, 0)
    assert all(torch.equal(param, before[key]) for key, param in weights(model).items())


def test_what_weighs_little_is_not_warned_of() -> None:
    model = Using(lambda x, w: F.linear(x, w.exp()), 2, 4)
    model.first = nn.Sequential(nn.Linear(4, 200), nn.Linear(200, 4))
    optimizer = SINGD(model.parameters(), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(2):
            step(model, optimizer, seed)
    rows = {row.name: row.reason for row in optimizer.report()}
    assert "exp" in rows["weight"]


def test_several_are_one_warning() -> None:
    """Also where some are seen later than others."""
    model = Using(lambda x, w: F.linear(x, w.exp()), 3, 4)
    model.second = Using(lambda x, w: F.linear(x, w.sin()), 3, 4)
    optimizer = SINGD(model.parameters(), lr=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(4):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            x = torch.randn(6, 4)
            out = model(x) if seed < 2 else model(x) + model.second(x)
            out.square().mean().backward()
            optimizer.step()
    texts = [str(w.message) for w in caught if "The fallback trains" in str(w.message)]
    assert len(texts) == 1, texts
    rows = {row.name: row.reason for row in optimizer.report()}
    assert "exp" in rows["weight"]
    assert "sin" in rows["second.weight"]
