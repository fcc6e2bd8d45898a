"""torch's contract: groups of parameters, and hyper-parameters."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from oracles.contract import Behaviours, Check, Make, batches, moved, tiny
from oracles.loops import assert_same_weights, fit, weights

behaviour = Behaviours()


def halves(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of the first layer, and all others."""
    first = list(model.first.parameters())
    return first, [p for p in model.parameters() if all(p is not q for q in first)]


def momentum(group: dict[str, Any]) -> str:
    """The key that holds the decay of the averaged gradient."""
    return "betas" if "betas" in group else "momentum"


# --- groups ---------------------------------------------------------------------------------------


@behaviour
def options_of_a_group_win(make: Make) -> None:
    """What it does not set comes from the defaults."""
    first, rest = halves(tiny())
    groups = [{"params": first, "lr": 0.5, "weight_decay": 0.25}, {"params": rest}]
    one, two = make(groups, lr=0.125, weight_decay=0.0).param_groups
    assert (one["lr"], one["weight_decay"]) == (0.5, 0.25)
    assert (two["lr"], two["weight_decay"]) == (0.125, 0.0)


SPLITS: dict[str, tuple[str, ...]] = {
    "a layer": ("first.weight", "first.bias"),
    "biases": ("first.bias", "norm.bias"),
    "no layer": ("norm.weight", "norm.bias", "scale"),
}


def split(model: nn.Module, names: tuple[str, ...]) -> list[list[nn.Parameter]]:
    """Parameters of these names, and all others."""
    named = list(model.named_parameters())
    return [[p for name, p in named if (name in names) == chosen] for chosen in (True, False)]


def assert_steps_by_its_own_lr(make: Make, case: tuple[str, ...], kind: Any) -> None:
    steps = []
    for lr in (0.0, 0.01, 0.02):
        model = tiny()
        first, rest = split(model, case)
        before = weights(model)
        optimizer = make([{"params": first, "lr": kind(lr)}, {"params": rest}], lr=kind(0.01))
        fit(model, optimizer, batches(0, 1))
        steps.append({name: p - before[name] for name, p in weights(model).items()})
    for name, step in steps[1].items():
        scale = 0 if name in case else 1
        torch.testing.assert_close(steps[0][name], scale * step, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(steps[2][name], (2 - scale) * step, rtol=1e-9, atol=1e-15)


@behaviour.over(SPLITS)
def a_group_steps_by_its_own_lr(make: Make, case: tuple[str, ...]) -> None:
    """A learning rate of zero rests one group only; doubling it doubles its first step."""
    assert_steps_by_its_own_lr(make, case, float)


@behaviour.over(SPLITS)
def a_group_steps_by_its_own_tensor(make: Make, case: tuple[str, ...]) -> None:
    """The same where learning rates are tensors."""
    assert_steps_by_its_own_lr(make, case, partial(torch.tensor, dtype=torch.float64))


@behaviour.over(SPLITS)
def a_group_decays_by_its_own_weight_decay(make: Make, case: tuple[str, ...]) -> None:
    """It changes the first step of its own parameters only, towards zero."""
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        models = []
        for decay in (0.0, 0.5):
            model = tiny()
            for p in model.parameters():
                p.data += 0.25  # none is zero
            first, rest = split(model, case)
            groups = [{"params": first, "weight_decay": decay}, {"params": rest}]
            fit(model, make(groups, lr=lr, weight_decay=0.0), batches(0, 1))
            models.append(model)
        without, decayed = map(weights, models)
        assert moved(models[1], without) == set(case)
        assert all(decayed[name].norm() < without[name].norm() for name in case)


@behaviour
def unknown_keys_of_a_group_are_kept(make: Make) -> None:
    """In the group, in the state dict and after loading; without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = make([{"params": tiny().parameters(), "tag": "body", "depth": 3}])
    state = optimizer.state_dict()
    other = make(tiny().parameters())
    other.load_state_dict(state)
    for group in (optimizer.param_groups[0], state["param_groups"][0], other.param_groups[0]):
        assert (group["tag"], group["depth"]) == ("body", 3)


@behaviour
def a_generator_of_groups(make: Make) -> None:
    """Groups may come from a generator, and their parameters, too."""
    model, twin = tiny(), tiny()
    fit(model, make(({"params": c.parameters()} for c in model.children()), lr=0.01), batches(0, 3))
    listed = [{"params": list(child.parameters())} for child in twin.children()]
    fit(twin, make(listed, lr=0.01), batches(0, 3))
    assert_same_weights(model, twin)


@behaviour
def a_group_added_at_once_is_one_of_the_constructor(make: Make) -> None:
    """Bit for bit the same training."""
    model, twin = tiny(), tiny()
    first, rest = halves(model)
    optimizer = make(first, lr=0.01)
    optimizer.add_param_group({"params": rest, "lr": 0.02})
    fit(model, optimizer, batches(0, 4))
    first, rest = halves(twin)
    fit(twin, make([{"params": first}, {"params": rest, "lr": 0.02}], lr=0.01), batches(0, 4))
    assert_same_weights(model, twin)


@behaviour
def a_group_added_later_is_trained(make: Make) -> None:
    """From then on; the state of the others goes on, and the new one fills in the defaults."""
    model = tiny()
    first, rest = halves(model)
    optimizer = make(rest, lr=0.01)
    before = weights(model)
    fit(model, optimizer, batches(0, 3))
    assert moved(model, before) == set(before) - {"first.weight", "first.bias"}
    kept = {id(p): state for p, state in optimizer.state.items()}
    optimizer.add_param_group({"params": first, "weight_decay": 0.5})
    assert optimizer.param_groups[1]["lr"] == 0.01
    assert optimizer.param_groups[1]["weight_decay"] == 0.5
    before = weights(model)
    fit(model, optimizer, batches(3, 3))
    assert moved(model, before) == set(before)
    assert all(optimizer.state[p] is kept[id(p)] for p in rest)


@behaviour
def a_group_of_one_tensor(make: Make) -> None:
    """It need not be in a list."""
    model = tiny()
    optimizer = make(model.first.parameters())
    optimizer.add_param_group({"params": model.scale})
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(model.scale)]


@behaviour
def a_bad_group_is_not_added(make: Make) -> None:
    """What is no dict, has a parameter twice or a non-leaf: the optimizer is as before."""
    model, twin = tiny(), tiny()
    optimizer = make(model.parameters(), lr=0.01)
    bad: list[tuple[Any, type[Exception]]] = [
        ([model.scale], TypeError),
        ({"params": model.scale}, ValueError),
        ({"params": [model.scale * 2]}, ValueError),
        ({"params": {nn.Parameter(torch.ones(2))}}, TypeError),
    ]
    for group, error in bad:
        with pytest.raises(error):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    fit(model, optimizer, batches(0, 3))
    fit(twin, make(twin.parameters(), lr=0.01), batches(0, 3))
    assert_same_weights(model, twin)


# --- hyper-parameters -----------------------------------------------------------------------------

BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "a negative lr": ({"lr": -1.0}, ValueError),
    "a lr of two elements": ({"lr": torch.ones(2)}, ValueError),
    "a negative weight_decay": ({"weight_decay": -1.0}, ValueError),
    "an unknown name": ({"learning_rate": 1.0}, TypeError),
}


@behaviour.over(BAD_OPTIONS)
def refuses_the_option(make: Make, case: tuple[dict[str, Any], type[Exception]]) -> None:
    """With the same kind of error."""
    options, error = case
    with pytest.raises(error):
        make(tiny().parameters(), **options)


OF_ADAMW = ("maximize", "differentiable", "amsgrad", "capturable", "foreach", "fused")


@behaviour.beyond_torch("AdamW has these arguments")
def refuses_arguments_of_adamw(make: Make) -> None:
    """Rather than take them without effect."""
    for name in OF_ADAMW:
        with pytest.raises(TypeError, match=name):
            make(tiny().parameters(), **{name: True})


@behaviour
def maximize_in_a_group_is_not_ignored(make: Make) -> None:
    """The loss rises, or there is an error; it does not fall."""
    p = nn.Parameter(torch.ones(3))
    try:
        optimizer = make([{"params": [p], "maximize": True}], lr=0.1)
    except ValueError as error:
        assert "maximize" in str(error)
        return
    p.sum().backward()
    optimizer.step()
    assert (p > 1).all()


@behaviour.beyond_torch("AdamW reads it from its defaults only")
def differentiable_in_a_group_is_not_ignored(make: Make) -> None:
    """Steps are in place and without a graph."""
    with pytest.raises(ValueError, match="differentiable"):
        make([{"params": tiny().parameters(), "differentiable": True}])


@behaviour
def a_disabled_option_of_adamw_in_a_group_is_accepted(make: Make) -> None:
    """Groups of another optimizer may be handed on."""
    model = tiny()
    groups = torch.optim.AdamW(model.parameters(), lr=0.01).param_groups
    before = weights(model)
    fit(model, make(groups), batches(0, 2))
    assert moved(model, before) == set(before)


@behaviour
def the_lr_in_the_group_is_used(make: Make) -> None:
    """Changed by hand between steps, it scales the next step."""
    steps = []
    for lr in (0.01, 0.03):
        model = tiny()
        optimizer = make(model.parameters(), lr=0.01)
        fit(model, optimizer, batches(0, 3))
        optimizer.param_groups[0]["lr"] = lr
        before = weights(model)
        fit(model, optimizer, batches(3, 1))
        steps.append({name: p - before[name] for name, p in weights(model).items()})
    for name, step in steps[0].items():
        torch.testing.assert_close(steps[1][name], 3 * step, rtol=1e-9, atol=1e-14)


@behaviour
def the_weight_decay_in_the_group_is_used(make: Make) -> None:
    """Changed by hand between steps, it makes weights smaller."""
    norms = []
    for decay in (0.0, 0.5):
        model = tiny()
        optimizer = make(model.parameters(), lr=0.01, weight_decay=0.0)
        fit(model, optimizer, batches(0, 2))
        optimizer.param_groups[0]["weight_decay"] = decay
        fit(model, optimizer, batches(2, 1))
        norms.append(model.last.weight.norm().item())
    assert norms[1] < norms[0]


@behaviour
def the_momentum_in_the_group_is_used(make: Make) -> None:
    """Changed by hand between steps, it changes every layer's next step."""
    found = []
    for value in (0.9, 0.1):
        model = tiny()
        optimizer = make(model.parameters(), lr=0.01)
        group = optimizer.param_groups[0]
        fit(model, optimizer, batches(0, 2))
        key = momentum(group)
        group[key] = (value, 0.999) if key == "betas" else value
        fit(model, optimizer, batches(2, 1))
        found.append(model)
    layers = {"first.weight", "first.bias", "last.weight"}
    assert moved(found[1], weights(found[0])) >= layers


@behaviour
def without_lr_nothing_moves(make: Make) -> None:
    """A learning rate of zero leaves weights as they are, weight decay or not."""
    model = tiny()
    optimizer = make(model.parameters(), lr=0.0, weight_decay=0.5)
    before = weights(model)
    fit(model, optimizer, batches(0, 3))
    assert not moved(model, before)


@behaviour
def zero_is_a_start_of_lr(make: Make) -> None:
    """Warm-up from zero by hand trains as soon as it is more."""
    model = tiny()
    optimizer = make(model.parameters(), lr=0.0)
    fit(model, optimizer, batches(0, 1))
    optimizer.param_groups[0]["lr"] = 0.01
    before = weights(model)
    fit(model, optimizer, batches(1, 1))
    assert moved(model, before) == set(before)


TENSORS = {
    "0-d": torch.tensor(0.01),
    "1-d": torch.tensor([0.01]),
    "float64": torch.tensor(0.01, dtype=torch.float64),
}


@behaviour.over(TENSORS)
def a_tensor_is_a_lr(make: Make, case: torch.Tensor) -> None:
    """Kept as it is in the group; it trains as the number."""
    model, twin = tiny(), tiny()
    lr = case.clone()
    optimizer = make(model.parameters(), lr=lr)
    assert optimizer.param_groups[0]["lr"] is lr
    fit(model, optimizer, batches(0, 4))
    fit(twin, make(twin.parameters(), lr=lr.item()), batches(0, 4))
    trained = weights(twin)
    for name, p in weights(model).items():
        torch.testing.assert_close(p, trained[name], rtol=1e-6, atol=1e-9, msg=name)
    assert torch.equal(lr, case)


@behaviour
def a_tensor_lr_is_read_at_every_step(make: Make) -> None:
    """Filled in place, it scales the next step."""
    steps = []
    for lr in (0.01, 0.03):
        model = tiny()
        optimizer = make(model.parameters(), lr=torch.tensor(0.01, dtype=torch.float64))
        fit(model, optimizer, batches(0, 3))
        optimizer.param_groups[0]["lr"].fill_(lr)
        before = weights(model)
        fit(model, optimizer, batches(3, 1))
        steps.append({name: p - before[name] for name, p in weights(model).items()})
    for name, step in steps[0].items():
        torch.testing.assert_close(steps[1][name], 3 * step, rtol=1e-6, atol=1e-12)


@behaviour.for_every_kind()
def test_groups(check: Check, make: Make) -> None:
    """Each behaviour, for each kind of optimizer."""
    check(make)
