"""States that come to a layer from other circumstances: another size, or other frozen parts."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from oracles.grids import all_pairs
from oracles.loops import assert_same_state, assert_same_weights, fit, mlp_batch, weights
from tnkfac import KFAC, SINGD

STRUCTURES = (
    "dense", "diagonal", "block3diagonal", "hierarchical2_2", "triltoeplitz", "triutoeplitz",
    "triltopleftdiag", "trilbottomrightdiag", "triutopleftdiag", "triubottomrightdiag", "auto",
)  # fmt: skip
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    **{f"SINGD {each}": partial(SINGD, structures=each, T=2) for each in STRUCTURES},
    "SINGD of the paper": partial(SINGD, **SINGD.REFERENCE),
    "SINGD with AdamW's norms": partial(SINGD, structures="diagonal", T=2, grafting="adam"),
    **{
        f"KFAC {method} {each}": partial(
            KFAC, structures=each, compute_method=method, inv_update_steps=2
        )
        for method in ("eigen", "ekfac", "cholesky")
        for each in ("dense", "diagonal", "block3diagonal")
    },
    "KFAC beside SGD": partial(KFAC, fallback="sgd"),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    body = (nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 2), nn.Flatten())
    return nn.Sequential(*body, nn.LayerNorm(6), nn.Linear(6, 3)).double()


def data(start: int, count: int, outputs: int = 3) -> list[Any]:
    return [mlp_batch(seed, 4, outputs, samples=16) for seed in range(start, start + count)]


@pytest.mark.parametrize(
    ("name", "steps", "saved"), all_pairs(OPTIMIZERS, [1, 2, 3], [False, True])
)
def test_a_larger_layer(name: str, steps: int, saved: bool) -> None:
    """Moments padded with zeros, as a head takes more classes; its curvature starts anew."""
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
    fit(model, optimizer, data(0, steps))
    old, model[5] = model[5], nn.Linear(6, 5).double()
    for key, new in model[5].named_parameters():
        was = old.get_parameter(key)
        state = optimizer.state.pop(was)
        for moment in ("momentum_buffer", "exp_avg_sq"):
            if moment in state:
                state[moment] = torch.zeros_like(new)
        optimizer.state[new] = state
        (group,) = optimizer.param_groups
        group["params"] = [new if p is was else p for p in group["params"]]
    if saved:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = weights(model)
    losses = fit(model, optimizer, data(0, 6, 5) * 4)
    assert sum(losses[-6:]) < sum(losses[:6])
    assert not any(torch.equal(p, before[key]) for key, p in model.named_parameters())
    measured = {row.name: row.last_update for row in optimizer.report()}
    assert measured["5.weight"] is not None


TIMES = ("at first", "when built", "later", "never")


def freeze(model: nn.Module, kind: str) -> None:
    for key, p in model.named_parameters():
        if key[0] in "025" and key.endswith(kind):
            p.requires_grad_(False)


def built(name: str, kind: str, time: str) -> tuple[nn.Module, Any]:
    model = network()
    if time == "at first":
        freeze(model, kind)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
    if time == "when built":
        freeze(model, kind)
    return model, optimizer


@pytest.mark.parametrize(
    ("name", "frozen", "times"),
    all_pairs(
        [
            "SINGD dense", "SINGD diagonal", "SINGD hierarchical2_2", "SINGD triltoeplitz",
            "SINGD auto", "SINGD with AdamW's norms", "KFAC eigen dense",
            "KFAC ekfac block3diagonal", "KFAC cholesky diagonal",
        ],
        ["weight", "bias"],
        [(a, b) for a in TIMES for b in TIMES if a != b and b != "later"],
    ),
)  # fmt: skip
def test_what_is_frozen_at_other_times(name: str, frozen: str, times: tuple[str, str]) -> None:
    """A file goes on, bit for bit, whether parts were frozen before the optimizer was built."""
    saves, loads = times
    model, optimizer = built(name, frozen, saves)
    fit(model, optimizer, data(0, 2))
    if saves == "later":
        optimizer.zero_grad()
        freeze(model, frozen)
    fit(model, optimizer, data(2, 2))
    other, loaded = built(name, frozen, loads)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.requires_grad_(p.requires_grad)
    for trainable in (None, True):
        for m, o in ((model, optimizer), (other, loaded)):
            if trainable:
                m.requires_grad_(True)
            fit(m, o, data(4, 3))
        assert_same_weights(other, model)
        assert_same_state(other, loaded, model, optimizer)
