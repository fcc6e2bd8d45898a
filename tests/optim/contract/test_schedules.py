"""torch's contract: every scheduler of learning rate and momentum."""

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from oracles.contract import Behaviours, Check, Make, batches, through_a_file, tiny
from oracles.loops import assert_same_weights, fit, weights

behaviour = Behaviours()
LR = 0.08
STEPS = 8


def sequential(o: Any) -> Any:
    """Warm-up, then decay."""
    parts = [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)]
    return lr_scheduler.SequentialLR(o, parts, [3])


def chained(o: Any) -> Any:
    """Two factors at once."""
    parts = [lr_scheduler.ConstantLR(o, 0.5, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer=o)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.25, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6, power=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "CyclicLR without momentum": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, step_size_up=2, cycle_momentum=False
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "OneCycleLR without momentum": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=12, cycle_momentum=False
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": lambda o: SWALR(o, swa_lr=0.02, anneal_epochs=5),
}
CYCLES_MOMENTUM = ("CyclicLR", "OneCycleLR")


def test_all_schedulers_of_torch_are_in_the_table() -> None:
    """A new one has to be entered."""
    classes = inspect.getmembers(lr_scheduler, inspect.isclass)
    found = {name for name, kind in classes if issubclass(kind, LRScheduler)}
    assert found - {"LRScheduler", "_LRScheduler"} <= SCHEDULERS.keys()


def momentum(group: dict[str, Any]) -> Any:
    """The decay of the averaged gradient, which some schedulers cycle."""
    return group["betas"][0] if "betas" in group else group["momentum"]


def set_momentum(group: dict[str, Any], value: float) -> None:
    """Set it by hand."""
    if "betas" in group:
        group["betas"] = (value, *group["betas"][1:])
    else:
        group["momentum"] = value


def advance(scheduler: Any, step: int) -> None:
    """One step of any scheduler."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(float(step))
    else:
        scheduler.step()


def assert_follows(make: Make, name: str, lr: Any) -> None:
    """Training is that of an optimizer whose lr and momentum are set by hand.

    They are those that SGD has under the same scheduler.
    """
    model, twin = tiny(), tiny()
    optimizer, manual = make(model.parameters(), lr=lr), make(twin.parameters(), lr=LR)
    start = momentum(optimizer.param_groups[0])
    shadow = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=LR, momentum=start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler, other = SCHEDULERS[name](optimizer), SCHEDULERS[name](shadow)
        lrs, momenta = [], []
        for step in range(STEPS):
            (group,), (expected,) = optimizer.param_groups, shadow.param_groups
            assert float(group["lr"]) == pytest.approx(expected["lr"], rel=1e-9)
            assert momentum(group) == pytest.approx(expected["momentum"], rel=1e-9)
            lrs.append(expected["lr"])
            momenta.append(expected["momentum"])
            manual.param_groups[0]["lr"] = lrs[-1]
            set_momentum(manual.param_groups[0], momenta[-1])
            fit(model, optimizer, batches(step, 1))
            fit(twin, manual, batches(step, 1))
            shadow.step()
            advance(scheduler, step)
            advance(other, step)
    assert len(set(lrs)) > 1
    assert (len(set(momenta)) > 1) == (name in CYCLES_MOMENTUM)
    expected_weights = weights(twin)
    for key, p in weights(model).items():
        torch.testing.assert_close(p, expected_weights[key], rtol=1e-7, atol=1e-9, msg=key)


@behaviour.over({name: name for name in SCHEDULERS})
def follows(make: Make, case: str) -> None:
    """Learning rate and momentum are the scheduler's, and the update uses them."""
    assert_follows(make, case, LR)


@behaviour.over({name: name for name in SCHEDULERS})
def follows_with_a_tensor(make: Make, case: str) -> None:
    """The same where the learning rate is a tensor."""
    assert_follows(make, case, torch.tensor(LR, dtype=torch.float64))


@behaviour
def a_tensor_is_written_in_place(make: Make) -> None:
    """It stays the one that was given."""
    model = tiny()
    lr = torch.tensor(LR)
    optimizer = make(model.parameters(), lr=lr)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    fit(model, optimizer, batches(0, 1))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(LR / 2)


@behaviour
def the_size_of_the_step_follows(make: Make) -> None:
    """Half the learning rate is half the step."""
    steps = []
    for gamma in (1.0, 0.5):
        model = tiny()
        optimizer = make(model.parameters(), lr=0.01)
        scheduler = lr_scheduler.ExponentialLR(optimizer, gamma)
        fit(model, optimizer, batches(0, 1))
        scheduler.step()
        before = weights(model)
        fit(model, optimizer, batches(1, 1))
        steps.append({name: p - before[name] for name, p in weights(model).items()})
    for name, step in steps[0].items():
        torch.testing.assert_close(2 * steps[1][name], step, rtol=1e-9, atol=1e-14)


@behaviour
def each_group_has_its_schedule(make: Make) -> None:
    """From its own learning rate, by its own function."""
    model = tiny()
    groups = [{"params": model.first.parameters()}, {"params": [model.scale], "lr": 0.5}]
    optimizer = make(groups, lr=0.1)
    lambdas = [lambda step: 0.5**step, lambda step: 1.0]
    scheduler = lr_scheduler.LambdaLR(optimizer, lambdas)
    for expected in ([0.1, 0.5], [0.05, 0.5], [0.025, 0.5]):
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(expected)
        assert scheduler.get_last_lr() == pytest.approx(expected)
        fit(model, optimizer, batches(0, 1))
        scheduler.step()


@behaviour
def a_group_added_between_schedules(make: Make) -> None:
    """The next scheduler takes it up; its momentum is cycled, too."""
    model = tiny()
    optimizer = make(model.first.parameters(), lr=0.1)
    scheduler: Any = lr_scheduler.ExponentialLR(optimizer, 0.5)
    fit(model, optimizer, batches(0, 1))
    scheduler.step()
    optimizer.add_param_group({"params": model.last.parameters(), "lr": 0.2, "initial_lr": 0.2})
    scheduler = lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=8)
    before = weights(model)
    for step in range(4):
        one, two = optimizer.param_groups
        assert two["lr"] == pytest.approx(2 * one["lr"])
        assert momentum(one) == momentum(two)
        fit(model, optimizer, batches(step, 1))
        scheduler.step()
    assert not torch.equal(model.last.weight, before["last.weight"])


@behaviour
def a_group_added_under_a_schedule(make: Make) -> None:
    """A scheduler that multiplies goes on, with its groups and the new one."""
    model = tiny()
    optimizer = make(model.first.parameters(), lr=0.1)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    fit(model, optimizer, batches(0, 1))
    scheduler.step()
    optimizer.add_param_group({"params": model.last.parameters(), "lr": 0.2})
    fit(model, optimizer, batches(1, 1))
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.025, 0.1])


@behaviour
def schedulers_may_be_stacked(make: Make) -> None:
    """Two on one optimizer, each of which wraps the step."""
    model, twin = tiny(), tiny()
    optimizer, manual = (make(m.parameters(), lr=0.1) for m in (model, twin))
    pair = [lr_scheduler.ExponentialLR(optimizer, g) for g in (0.5, 0.8)]
    for step in range(4):
        manual.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        fit(model, optimizer, batches(step, 1))
        fit(twin, manual, batches(step, 1))
        for scheduler in pair:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.4**4)
    assert_same_weights(model, twin)


@behaviour
def the_wrapped_step_is_the_step(make: Make) -> None:
    """With its closure, its result, and hooks once a step."""
    model = tiny()
    optimizer = make(model.parameters())
    lr_scheduler.ExponentialLR(optimizer, 0.5)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    assert optimizer.step(lambda: calls.append("closure") or 3.5) == 3.5
    assert calls == ["before", "closure", "after"]


@behaviour
def the_wrong_order_warns(make: Make) -> None:
    """Where a scheduler steps first; and in the right order nothing does."""
    model = tiny()
    optimizer = make(model.parameters())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()
    other = make(model.parameters())
    scheduler = lr_scheduler.ExponentialLR(other, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, other, batches(0, 1))
        scheduler.step()


RESUMED = ("OneCycleLR", "CyclicLR", "CosineAnnealingWarmRestarts", "ReduceLROnPlateau")


@behaviour.over({name: name for name in RESUMED})
def goes_on_from_a_file(make: Make, case: str) -> None:
    """Model, optimizer and scheduler, bit for bit."""
    model = tiny()
    optimizer = make(model.parameters(), lr=LR)
    scheduler = SCHEDULERS[case](optimizer)
    for step in range(3):
        fit(model, optimizer, batches(step, 1))
        advance(scheduler, step)
    other = tiny()
    other.load_state_dict(model.state_dict())
    loaded = make(other.parameters(), lr=LR)
    again = SCHEDULERS[case](loaded)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    again.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    for step in range(3, STEPS):
        for m, o, s in ((model, optimizer, scheduler), (other, loaded, again)):
            fit(m, o, batches(step, 1))
            advance(s, step)
        assert loaded.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert_same_weights(other, model)


@behaviour
def a_new_scheduler_goes_on_by_last_epoch(make: Make) -> None:
    """It finds ``initial_lr`` in the loaded groups; without it there is an error."""
    model = tiny()
    optimizer = make(model.parameters(), lr=LR)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for step in range(3):
        fit(model, optimizer, batches(step, 1))
        scheduler.step()
    loaded = make(tiny().parameters(), lr=0.5)
    with pytest.raises(KeyError, match="initial_lr"):
        lr_scheduler.CosineAnnealingLR(loaded, 8, last_epoch=3)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    lr_scheduler.CosineAnnealingLR(loaded, 8, last_epoch=scheduler.last_epoch - 1)
    assert loaded.param_groups[0]["initial_lr"] == LR
    assert loaded.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


@behaviour.over(COPIES)
def an_optimizer_with_a_scheduler_may_be_copied(make: Make, case: Any) -> None:
    """The copy steps its own parameters, and a new scheduler may be put on it."""
    model = tiny()
    optimizer = make(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    fit(model, optimizer, batches(0, 1))
    scheduler.step()
    other, copied = case((model, optimizer))
    kept = weights(model)
    again = lr_scheduler.ExponentialLR(copied, 0.5)
    fit(other, copied, batches(1, 1))
    again.step()
    assert copied.param_groups[0]["lr"] == pytest.approx(0.025)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    fit(model, optimizer, batches(1, 1))
    assert_same_weights(other, model)
    assert not torch.equal(kept["last.weight"], model.last.weight)


@behaviour.for_every_kind()
def test_schedules(check: Check, make: Make) -> None:
    """Each behaviour, for each kind of optimizer."""
    check(make)
