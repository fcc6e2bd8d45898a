"""torch's contract: copies of an optimizer, and the hooks around its state dict."""

import copy
import io
import pickle
from typing import Any

import torch
from torch import nn

from oracles.contract import (
    Behaviours,
    Check,
    Make,
    assert_goes_on_alike,
    assert_same,
    batches,
    like,
    through_a_file,
    tiny,
    trained,
)
from oracles.loops import (
    assert_same_state,
    fit,
    weights,
)

behaviour = Behaviours()
PHASES = {f"{steps} steps": steps for steps in range(4)}


# --- copies ---------------------------------------------------------------------------------------


def through_torch(value: Any) -> Any:
    """What comes back from ``torch.save`` of the whole object."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_torch,
}


@behaviour.over(COPIES)
def a_copy_of_model_and_optimizer_goes_on(make: Make, case: Any) -> None:
    """Bit for bit as the originals do."""
    model, optimizer = trained(make)
    other, copied = case((model, optimizer))
    assert type(copied) is type(optimizer)
    assert_same(copied.state_dict(), optimizer.state_dict())
    assert_goes_on_alike(model, optimizer, other, copied)


@behaviour.over(COPIES)
def a_copy_alone_has_all_of_the_state(make: Make, case: Any) -> None:
    """It has parameters of its own, and may be stepped without harm."""
    model, optimizer = trained(make)
    twin, other = trained(make)
    optimizer.zero_grad()
    copied = case(optimizer)
    assert_same(copied.state_dict(), optimizer.state_dict())
    assert repr(copied) == repr(optimizer)
    copied.step()
    copied.zero_grad()
    copied.add_param_group({"params": nn.Parameter(torch.ones(2))})
    assert len(optimizer.param_groups) == 1
    assert_goes_on_alike(model, optimizer, twin, other)


@behaviour
def a_copy_has_no_hooks(make: Make) -> None:
    """Hooks are code of the original."""
    _, optimizer = trained(make)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    copied = copy.deepcopy(optimizer)
    copied.step()
    assert calls == []
    optimizer.step()
    assert calls == [1]


# --- hooks of state dicts -------------------------------------------------------------------------


@behaviour
def hooks_before_saving(make: Make) -> None:
    """Called with the optimizer, in order; a handle removes one."""
    _, optimizer = trained(make)
    calls: list[Any] = []
    first = optimizer.register_state_dict_pre_hook(lambda o: calls.append(("first", o)))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(("second", o)))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(("zeroth", o)), prepend=True)
    optimizer.state_dict()
    assert calls == [("zeroth", optimizer), ("first", optimizer), ("second", optimizer)]
    first.remove()
    calls.clear()
    optimizer.state_dict()
    assert [name for name, _ in calls] == ["zeroth", "second"]


@behaviour
def a_hook_before_saving_may_change_the_optimizer(make: Make) -> None:
    """What is saved is what it has left."""
    _, optimizer = trained(make)

    def halve(o: Any) -> None:
        for group in o.param_groups:
            group["lr"] = 0.5

    optimizer.register_state_dict_pre_hook(halve)
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.5


@behaviour
def hooks_after_saving(make: Make) -> None:
    """They see the whole state dict; what they return takes its place."""
    _, optimizer = trained(make)
    plain = copy.deepcopy(optimizer.state_dict())
    seen: list[Any] = []

    def look(o: Any, state: dict[str, Any]) -> None:
        assert o is optimizer
        seen.append(copy.deepcopy(state))
        state["param_groups"][0]["tag"] = "in place"

    def wrap(o: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "version": 2}

    optimizer.register_state_dict_post_hook(wrap)
    handle = optimizer.register_state_dict_post_hook(look, prepend=True)
    state = optimizer.state_dict()
    assert_same(seen[0], plain)
    assert state["version"] == 2
    assert state["param_groups"][0]["tag"] == "in place"
    assert "tag" not in optimizer.param_groups[0]
    handle.remove()
    assert_same(optimizer.state_dict(), {**plain, "version": 2})


@behaviour
def what_a_hook_after_saving_returns_need_not_be_a_state_dict(make: Make) -> None:
    """It is returned as it is."""
    _, optimizer = trained(make)
    optimizer.register_state_dict_post_hook(lambda o, state: {"packed": state})
    assert optimizer.state_dict().keys() == {"packed"}


@behaviour
def hooks_before_loading(make: Make) -> None:
    """They are given a shallow copy, in order; what they return is loaded in its place."""
    model, optimizer = trained(make)
    packed = {"packed": through_a_file(optimizer.state_dict())}
    other = like(model)
    loaded = make(other.parameters())
    calls: list[Any] = []

    def unpack(o: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append(("unpack", o))
        assert state is not packed
        return dict(state["packed"])

    def look(o: Any, state: dict[str, Any]) -> None:
        calls.append(("look", o))
        assert state.keys() == {"state", "param_groups"}

    loaded.register_load_state_dict_pre_hook(look)
    handle = loaded.register_load_state_dict_pre_hook(unpack, prepend=True)
    loaded.load_state_dict(packed)
    assert calls == [("unpack", loaded), ("look", loaded)]
    assert_goes_on_alike(model, optimizer, other, loaded)
    handle.remove()
    loaded.load_state_dict(optimizer.state_dict())
    assert calls[2:] == [("look", loaded)]


@behaviour
def hooks_before_loading_may_adapt_by_names(make: Make) -> None:
    """A file of the parameters in another order, put right by ``param_names``."""
    model = tiny()
    optimizer = make(reversed(list(model.named_parameters())), lr=0.01)
    fit(model, optimizer, batches(0, 3))
    other = like(model)
    loaded = make(other.named_parameters(), lr=0.01)

    def adapt(o: Any, state: dict[str, Any]) -> dict[str, Any]:
        group = state["param_groups"][0]
        at = dict(zip(group["param_names"], group["params"], strict=True))
        names = o.param_groups[0]["param_names"]
        found = {number: state["state"][at[name]] for number, name in enumerate(names)}
        new = {**group, "params": list(found), "param_names": names}
        return {"state": found, "param_groups": [new]}

    loaded.register_load_state_dict_pre_hook(adapt)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_state(other, loaded, model, optimizer)
    fit(model, optimizer, batches(3, 4))
    fit(other, loaded, batches(3, 4))
    trained_weights = weights(model)
    for name, p in weights(other).items():
        torch.testing.assert_close(p, trained_weights[name], rtol=1e-9, atol=1e-12, msg=name)


@behaviour
def hooks_after_loading(make: Make) -> None:
    """They see the optimizer as it goes on: all state is there."""
    model, optimizer = trained(make)
    other = like(model)
    loaded = make(other.parameters())
    calls = []

    def look(o: Any) -> None:
        calls.append("look")
        assert o is loaded
        assert_same(copy.deepcopy(o.state_dict()), optimizer.state_dict())

    def change(o: Any) -> None:
        calls.append("change")
        o.param_groups[0]["lr"] = 0.5

    loaded.register_load_state_dict_post_hook(change)
    handle = loaded.register_load_state_dict_post_hook(look, prepend=True)
    loaded.load_state_dict(optimizer.state_dict())
    assert calls == ["look", "change"]
    assert loaded.param_groups[0]["lr"] == 0.5
    handle.remove()
    loaded.load_state_dict(optimizer.state_dict())
    assert calls == ["look", "change", "change"]


@behaviour
def hooks_after_loading_may_replace_state(make: Make) -> None:
    """What they write into ``state`` stays."""
    model, optimizer = trained(make)
    other = like(model)
    loaded = make(other.parameters())
    key = "exp_avg"

    def write(o: Any) -> None:
        o.state[other.scale][key] = torch.full_like(other.scale, 7.0)

    loaded.register_load_state_dict_post_hook(write)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.state[other.scale][key] == 7


@behaviour.for_every_kind()
def test_copies(check: Check, make: Make) -> None:
    """Each behaviour, for each kind of optimizer."""
    check(make)
