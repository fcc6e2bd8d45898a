"""A state is gone on with exactly, or refused at once with the optimizer unchanged."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from oracles.loops import assert_same_numbers, state_by_name, weights
from oracles.soap import SOAP
from tnkfac import KFAC, SINGD

KINDS: dict[str, Callable[..., Any]] = {
    "SINGD": lambda params, **given: SINGD(params, **{"T": 2, **given}),
    "SINGD diagonal": lambda params, **given: SINGD(
        params, **{"T": 2, "structures": "diagonal", **given}
    ),
    "KFAC": lambda params, **given: KFAC(params, **{"inv_update_steps": 2, **given}),
    "EKFAC": lambda params, **given: KFAC(
        params, **{"inv_update_steps": 2, "compute_method": "ekfac", **given}
    ),
    "SOAP": lambda params, **given: SOAP(params, **{"precondition_frequency": 2, **given}),
}
OTHERS: dict[str, Callable[..., Any]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}


def network(width: int = 5, dtype: torch.dtype = torch.float64, more: bool = False) -> Any:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, width)]
    layers += [nn.Tanh(), nn.Linear(width, 2)]
    return nn.Sequential(*layers, *([nn.Linear(2, 2)] if more else [])).to(dtype)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        x = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :, 1, 1]).square().mean().backward()
        optimizer.step()


def saved_after(make: Callable[..., Any], steps: int = 3, **given: Any) -> tuple[Any, Any, Any]:
    """A model, its optimizer, and what both have saved."""
    model = network()
    optimizer = make(model.parameters(), **given)
    train(model, optimizer, range(steps))
    return model, optimizer, copy.deepcopy((model.state_dict(), optimizer.state_dict()))


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SINGD": [
        {"structures": "diagonal"},
        {"structures": ("block2diagonal", "dense")},
        {"structures": "triltoeplitz"},
        {"kfac_approx": "reduce"},
        {"loss_average": None},
        {"skip_layers": ["4"]},
        {"skip_layers": ["Conv2d"]},
        {"alpha1": 0.0},
        {"kfac_like": True, "alpha1": 0.0},
        {"grafting": "adam"},
        {"init": "identity"},
        {"max_state_ratio": 1.0},
        {"preconditioner_dtype": torch.float32},
        {"T": 3, "lr_cov": 0.1, "momentum": 0.5, "damping": 0.1, "weight_decay": 0.1},
        {"fallback": "sgd"},
        {"lr": 0.1},
    ],
    "KFAC": [
        {"structures": "diagonal"},
        {"kfac_approx": "reduce"},
        {"loss_average": "batch+sequence"},
        {"fisher_type": "forward-only"},
        {"compute_method": "cholesky"},
        {"compute_method": "ekfac"},
        {"normalization": "kfac-pytorch"},
        {"skip_layers": ["6"]},
        {"damping": 1e-2},
        {"inv_dtype": torch.float64, "factor_decay": 0.5, "inv_update_steps": 3},
        {"nesterov": True},
        {"compact_state": True, "inv_update_steps": 3},
    ],
}
PAIRS = [(kind, index) for kind, rows in OPTIONS.items() for index in range(len(rows))]


@pytest.mark.filterwarnings("ignore:alpha1")
@pytest.mark.parametrize("given_to", ["saved", "constructor"])
@pytest.mark.parametrize(("kind", "index"), PAIRS)
def test_what_was_saved_wins(kind: str, index: int, given_to: str) -> None:
    """Options, structures, statistics: bit-equal with the optimizer that never stopped."""
    options = OPTIONS[kind][index]
    own, other = (options, {}) if given_to == "saved" else ({}, options)
    steps = 3 if "compact_state" in own else 4  # where nothing derived is in use
    model, optimizer, saved = saved_after(KINDS[kind], steps, **own)
    twin = network()
    resumed = KINDS[kind](twin.parameters(), **other)
    twin.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for group, live in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in live.items() if k != "params"
        }
    assert str(resumed.report()) == str(optimizer.report()) or "compact_state" in own
    for net, its in ((model, optimizer), (twin, resumed)):
        train(net, its, range(steps, steps + 4))
    for name, value in weights(model).items():
        assert torch.equal(value, weights(twin)[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str
)
def test_the_dtype_of_the_model_wins(kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """As in torch's optimizers: a float64 model takes a file of float32."""
    model = network(dtype=dtypes[0])
    optimizer = KINDS[kind](model.parameters())
    train(model, optimizer, range(3))
    twin = network(dtype=dtypes[1])
    resumed = KINDS[kind](twin.parameters())
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for net, its in ((model, optimizer), (twin, resumed)):
        train(net, its, range(3, 5))
    for name, value in weights(twin).items():
        assert value.dtype == dtypes[1]
        torch.testing.assert_close(
            value.double(), weights(model)[name].double(), rtol=2e-3, atol=2e-4
        )


def assert_refused(kind: str, state: Any, message: str = "") -> None:
    """A ValueError, and training goes on as if nothing had been tried."""
    model, optimizer, _ = saved_after(KINDS[kind])
    before = copy.deepcopy(state_by_name(model, optimizer))
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    report = str(optimizer.report())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict()["param_groups"] == groups
    assert_same_numbers(state_by_name(model, optimizer), before)
    assert str(optimizer.report()) == report
    control, untouched, _ = saved_after(KINDS[kind])
    for net, its in ((model, optimizer), (control, untouched)):
        train(net, its, range(3, 6))
    for name, value in weights(model).items():
        assert torch.equal(value, weights(control)[name]), name


@pytest.mark.parametrize("other", [*KINDS, *OTHERS])
@pytest.mark.parametrize("kind", KINDS)
def test_other_optimizers_are_refused(kind: str, other: str) -> None:
    if KINDS[kind] is KINDS.get(other) or {kind, other} <= {"SINGD", "SINGD diagonal"}:
        pytest.skip("The same optimizer.")
    if {kind, other} <= {"KFAC", "EKFAC"}:
        pytest.skip("The same optimizer.")
    *_, (_, state) = saved_after({**KINDS, **OTHERS}[other])
    assert_refused(kind, state, "keys of another optimizer")


def of_another_width(state: Any, make: Callable[..., Any]) -> Any:
    model = network(width=6)
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    return optimizer.state_dict()


def of_a_layer_more(state: Any, make: Callable[..., Any]) -> Any:
    model = network(more=True)
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    return optimizer.state_dict()


def permuted(state: Any, make: Callable[..., Any]) -> Any:
    model = network()
    optimizer = make(list(model.parameters())[::-1])
    train(model, optimizer, range(3))
    return optimizer.state_dict()


def without_a_matrix(state: Any, make: Callable[..., Any]) -> Any:
    own = state["state"][4]
    own.pop(next(key for key in own if key.split(".")[0] in ("K", "A", "L")))
    return state


def without_momentum(state: Any, make: Callable[..., Any]) -> Any:
    del state["state"][0]["momentum_buffer"]
    return state


def misshapen(state: Any, make: Callable[..., Any]) -> Any:
    own = state["state"][4]
    key = next(key for key in own if key.split(".")[0] in ("K", "A", "L"))
    own[key] = own[key][..., :-1]
    return state


def no_tensor(state: Any, make: Callable[..., Any]) -> Any:
    state["state"][0]["momentum_buffer"] = [0.0]
    return state


def more_than_there_is(state: Any, make: Callable[..., Any]) -> Any:
    state["state"][0]["squares"] = torch.ones(3)
    return state


def before_all_time(state: Any, make: Callable[..., Any]) -> Any:
    state["state"][0]["last_update"] = torch.tensor(-7)
    return state


def of_fallback(state: Any, make: Callable[..., Any]) -> Any:
    del state["state"][2]["exp_avg"]
    return state


def group_with(**entries: Any) -> Callable[[Any, Any], Any]:
    def change(state: Any, make: Callable[..., Any]) -> Any:
        state["param_groups"][0].update(entries)
        return state

    return change


BROKEN: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "another width": (of_another_width, "state of 4.weight: got a tensor of shape .*Supported: a"),
    "a layer more": (of_a_layer_more, "doesn't match the size"),
    "another order": (permuted, "state of .*: got"),
    "a matrix is missing": (without_a_matrix, "state of 4.weight: got nothing for"),
    "momentum is missing": (without_momentum, "got nothing for 'momentum_buffer'"),
    "a matrix is misshapen": (misshapen, "state of 4.weight: got a tensor of shape"),
    "no tensor": (no_tensor, "got a list for 'momentum_buffer'"),
    "unknown": (more_than_there_is, "got a tensor of shape .3,. for 'squares'"),
    "a step before all": (before_all_time, "got last_update=-7"),
    "part of the fallback": (of_fallback, "state of 3.weight: got nothing for 'exp_avg'"),
    "lr is no number": (group_with(lr=float("nan")), "lr: got nan"),
    "lr is text": (group_with(lr="0.1"), "lr: got '0.1'"),
    "an unknown structure": (group_with(structures=("dense", "full")), "structures"),
    "a step that is none": (group_with(step=-1), "step=-1"),
    "no state": (lambda state, make: {"param_groups": state["param_groups"]}, "state_dict: got"),
    "no dict": (lambda state, make: [state], "state_dict: got|dict"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused(kind: str, case: str) -> None:
    change, message = BROKEN[case]
    *_, (_, state) = saved_after(KINDS[kind])
    assert_refused(kind, change(state, KINDS[kind]), message)


def corrupted(state: Any, rng: random.Random) -> Any:
    """A state of which one entry was lost, cut, retyped, renamed or exchanged."""
    index = rng.choice(list(state["state"]))
    own = state["state"][index]
    key = rng.choice(sorted(own))
    how = rng.choice(("lose", "cut", "retype", "rename", "exchange", "group", "transpose"))
    if how == "lose" and len(own) > 1:  # without any state a parameter starts anew, as torch has it
        del own[key]
    elif how == "cut":
        own[key] = own[key].reshape(-1)[: rng.randrange(own[key].numel())]
    elif how == "retype":
        own[key] = rng.choice((None, "0", own[key].tolist(), own[key].to(torch.complex64)))
    elif how == "rename":
        own[key + "_"] = own.pop(key)
    elif how in ("exchange", "lose"):
        other = rng.choice(list(state["state"]))
        state["state"][index], state["state"][other] = state["state"][other], own
    elif how == "transpose":
        own[key] = own[key].reshape(own[key].shape[::-1])
    else:
        group = state["param_groups"][0]
        name = rng.choice(sorted(group.keys() - {"params"}))
        group[name] = rng.choice((float("nan"), -1, "none", [], {}))
    return state


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_no_corruption_changes_training_silently(kind: str) -> None:
    """Sixty of each kind: refused, or training is what it was."""
    model, optimizer, saved = saved_after(KINDS[kind])
    train(model, optimizer, range(3, 6))
    expected, refused = weights(model), 0
    for seed in range(60):
        state = corrupted(copy.deepcopy(saved[1]), random.Random(seed))
        twin = network()
        twin.load_state_dict(saved[0])
        resumed = KINDS[kind](twin.parameters())
        try:
            resumed.load_state_dict(state)
        except (ValueError, TypeError, AttributeError):
            refused += 1
            continue
        train(twin, resumed, range(3, 6))
        for name, value in weights(twin).items():
            assert torch.equal(value, expected[name]), (seed, name)
    assert refused > 30
