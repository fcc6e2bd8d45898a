"""torch's contract: the step, its closure and its hooks."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from oracles.contract import Behaviours, Check, Make, batches, moved, tiny
from oracles.loops import assert_same_weights, fit, squares, weights

behaviour = Behaviours()


def backward(model: nn.Module, step: int = 0) -> None:
    """Gradients of one batch."""
    model.zero_grad()
    for x, y in batches(step, 1):
        squares(model(x), y).backward()


def closure_for(model: nn.Module, optimizer: Any, step: int, calls: list[Any]) -> Callable[[], Any]:
    """A closure as torch documents it, which notes whether gradients are recorded."""

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        for x, y in batches(step, 1):
            loss = squares(model(x), y)
        loss.backward()
        return loss

    return closure


# --- closures -------------------------------------------------------------------------------------


@behaviour
def a_step_returns_none(make: Make) -> None:
    """Without a closure."""
    model = tiny()
    optimizer = make(model.parameters())
    backward(model)
    assert optimizer.step() is None


@behaviour
def a_closure_is_called_once(make: Make) -> None:
    """With gradients recorded; its result is returned, and the training is that of the loop."""
    model, twin = tiny(), tiny()
    optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))
    for step in range(4):
        calls: list[Any] = []
        loss = optimizer.step(closure_for(model, optimizer, step, calls))
        assert calls == [True]
        assert [loss.item()] == fit(twin, other, batches(step, 1))
    assert_same_weights(model, twin)


@behaviour
def a_closure_by_keyword(make: Make) -> None:
    """The argument has torch's name."""
    model = tiny()
    optimizer = make(model.parameters(), lr=0.01)
    before, calls = weights(model), []
    assert optimizer.step(closure=closure_for(model, optimizer, 0, calls)) > 0
    assert calls == [True]
    assert moved(model, before) == set(before)


@behaviour
def a_closure_may_return_anything(make: Make) -> None:
    """It is handed on as it is."""
    optimizer = make(tiny().parameters())
    for value in (None, 3.5, "loss", (1, 2)):
        assert optimizer.step(lambda value=value: value) is value


@behaviour
def a_closure_that_raises(make: Make) -> None:
    """The error passes, and no parameter has moved."""
    model = tiny()
    optimizer = make(model.parameters(), lr=0.01)
    fit(model, optimizer, batches(0, 1))
    before = weights(model)

    def closure() -> Tensor:
        raise KeyError("no batch")

    with pytest.raises(KeyError, match="no batch"):
        optimizer.step(closure)
    assert not moved(model, before)


MODES = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "anomaly detection": torch.autograd.detect_anomaly,
}


@behaviour.over(MODES)
def a_step_under(make: Make, case: Any) -> None:
    """The mode that it is called in makes no difference, and is what it was afterwards."""
    model, twin = tiny(), tiny()
    optimizer, other = (make(m.parameters(), lr=0.01, weight_decay=0.1) for m in (model, twin))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anomaly detection says that it is slow
        for step in range(4):
            backward(model, step)
            with case():
                mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
                optimizer.step()
                assert mode == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            backward(twin, step)
            other.step()
    assert_same_weights(model, twin)


@behaviour
def a_closure_under_no_grad(make: Make) -> None:
    """It records gradients all the same."""
    model = tiny()
    optimizer = make(model.parameters(), lr=0.01)
    before, calls = weights(model), []
    with torch.no_grad():
        optimizer.step(closure_for(model, optimizer, 0, calls))
    assert calls == [True]
    assert moved(model, before) == set(before)


# --- hooks of the step ----------------------------------------------------------------------------


@behaviour
def hooks_of_the_step(make: Make) -> None:
    """Called with optimizer, positional and keyword arguments, before and after, in order."""
    model = tiny()
    optimizer = make(model.parameters(), lr=0.01)
    calls: list[Any] = []

    def note(name: str) -> Callable[..., None]:
        def hook(o: Any, args: Any, kwargs: Any) -> None:
            assert o is optimizer
            assert args[0] is optimizer and len(args) == 1 and set(kwargs) <= {"closure"}
            calls.append((name, len(moved(model, before)), list(kwargs)))

        return hook

    for name in ("one", "two"):
        optimizer.register_step_pre_hook(note(f"before {name}"))
        optimizer.register_step_post_hook(note(f"after {name}"))
    before = weights(model)
    backward(model)
    optimizer.step()
    assert calls == [
        ("before one", 0, []),
        ("before two", 0, []),
        ("after one", len(before), []),
        ("after two", len(before), []),
    ]
    calls.clear()
    optimizer.step(closure=lambda: calls.append("closure"))
    names = [call if isinstance(call, str) else call[0] for call in calls]
    assert names == ["before one", "before two", "closure", "after one", "after two"]
    assert calls[0][2] == ["closure"]


@behaviour
def hooks_of_the_step_are_removed(make: Make) -> None:
    """By their handles."""
    model = tiny()
    optimizer = make(model.parameters())
    calls: list[str] = []
    before = optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    after = optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    backward(model)
    optimizer.step()
    before.remove()
    optimizer.step()
    after.remove()
    optimizer.step()
    assert calls == ["before", "after", "after"]


@behaviour
def a_hook_may_change_the_arguments(make: Make) -> None:
    """What it returns is what the step is called with, and the next hook, too."""
    model, twin = tiny(), tiny()
    optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))
    calls: list[Any] = []

    def add(o: Any, args: Any, kwargs: Any) -> Any:
        return args, {"closure": closure_for(model, optimizer, 0, calls)}

    optimizer.register_step_pre_hook(add)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(list(kwargs)))
    assert optimizer.step() > 0
    assert calls == [["closure"], True]
    fit(twin, other, batches(0, 1))
    assert_same_weights(model, twin)


@behaviour
def a_hook_that_returns_something_else(make: Make) -> None:
    """It is an error."""
    optimizer = make(tiny().parameters())
    optimizer.register_step_pre_hook(lambda *_: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


@behaviour
def a_hook_may_change_gradients(make: Make) -> None:
    """As clipping in a hook does: the step uses what it leaves."""
    model, twin = tiny(), tiny()
    optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))

    def flip(o: Any, args: Any, kwargs: Any) -> None:
        for p in model.parameters():
            p.grad.neg_()

    optimizer.register_step_pre_hook(flip)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        backward(twin, step)
        for p in twin.parameters():
            p.grad.neg_()
        other.step()
    assert_same_weights(model, twin)


@behaviour
def a_hook_may_change_the_lr(make: Make) -> None:
    """Before the step, for the step."""
    model, twin = tiny(), tiny()
    optimizer, other = make(model.parameters(), lr=0.01), make(twin.parameters(), lr=0.03)

    def raise_lr(o: Any, args: Any, kwargs: Any) -> None:
        o.param_groups[0]["lr"] = 0.03

    optimizer.register_step_pre_hook(raise_lr)
    fit(model, optimizer, batches(0, 3))
    fit(twin, other, batches(0, 3))
    assert_same_weights(model, twin)


@behaviour
def hooks_of_all_optimizers(make: Make) -> None:
    """Global ones come first before the step, and last after it."""
    model = tiny()
    optimizer = make(model.parameters())
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("every, before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("every, after")),
    ]
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    backward(model)
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["every, before", "before", "after", "every, after"]
    optimizer.step()
    assert calls[4:] == ["before", "after"]


@behaviour
def hooks_after_loading_and_adding_groups(make: Make) -> None:
    """They stay, and are called once a step."""
    model = tiny()
    optimizer = make(model.first.parameters())
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.add_param_group({"params": model.last.parameters()})
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    backward(model)
    optimizer.step()
    assert calls == ["after"]


@behaviour
def steps_have_names_in_profiles(make: Make) -> None:
    """As torch gives them: by the class."""
    model = tiny()
    optimizer = make(model.parameters())
    backward(model)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.function_events]
    kind = type(optimizer).__name__
    assert names.count(f"Optimizer.step#{kind}.step") == 1
    assert names.count(f"Optimizer.zero_grad#{kind}.zero_grad") == 1


@behaviour
def a_subclass_is_an_optimizer(make: Make) -> None:
    """One that adds to the step, with hooks."""
    kind = type(make(tiny().parameters()))
    calls: list[str] = []

    class Counting(kind):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            calls.append("step")
            return super().step(closure)

    keywords = getattr(make, "keywords", {})
    model, twin = tiny(), tiny()
    fit(model, Counting(model.parameters(), lr=0.01, **keywords), batches(0, 3))
    fit(twin, make(twin.parameters(), lr=0.01), batches(0, 3))
    assert calls == ["step"] * 3
    assert_same_weights(model, twin)


@behaviour.for_every_kind()
def test_steps(check: Check, make: Make) -> None:
    """Each behaviour, for each kind of optimizer."""
    check(make)
