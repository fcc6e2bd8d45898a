"""torch's contract: state dicts, saved and loaded."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from oracles.contract import (
    Behaviours,
    Check,
    Make,
    assert_goes_on_alike,
    assert_same,
    batches,
    like,
    moved,
    through_a_file,
    tiny,
    trained,
)
from oracles.loops import (
    assert_same_weights,
    fit,
    weights,
)

behaviour = Behaviours()
PHASES = {f"{steps} steps": steps for steps in range(4)}


# --- what a state dict is -------------------------------------------------------------------------


@behaviour
def a_state_dict_has_two_parts(make: Make) -> None:
    """State by number of the parameter, and groups that list these numbers."""
    model = tiny()
    first, *rest = model.parameters()
    optimizer = make([{"params": [first]}, {"params": rest, "lr": 0.5}], lr=0.25)
    fit(model, optimizer, batches(0, 1))
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups"}
    assert state["state"].keys() == set(range(len(rest) + 1))
    assert [g["params"] for g in state["param_groups"]] == [[0], list(range(1, len(rest) + 1))]
    assert [g["lr"] for g in state["param_groups"]] == [0.25, 0.5]
    for number, p in enumerate([first, *rest]):
        assert state["state"][number].keys() == optimizer.state[p].keys()


@behaviour
def a_state_dict_before_the_first_step(make: Make) -> None:
    """It has the groups and no state, and loads."""
    model = tiny()
    optimizer = make(model.parameters(), lr=0.01)
    state = through_a_file(optimizer.state_dict())
    assert state["state"] == {}
    other = like(model)
    loaded = make(other.parameters(), lr=0.5)
    loaded.load_state_dict(state)
    assert_goes_on_alike(model, optimizer, other, loaded, start=0)


@behaviour
def groups_are_those_of_the_optimizer(make: Make) -> None:
    """Keys and values, with numbers in the place of parameters."""
    _, optimizer = trained(make)
    (saved,), (live,) = optimizer.state_dict()["param_groups"], optimizer.param_groups
    assert saved.keys() == live.keys()
    assert all(saved[key] == live[key] for key in saved.keys() - {"params"})


@behaviour
def a_state_dict_changes_nothing(make: Make) -> None:
    """Neither now nor in later steps."""
    model, optimizer = trained(make)
    twin, other = trained(make)
    before = copy.deepcopy(optimizer.state_dict())
    assert_same(optimizer.state_dict(), before)
    assert_goes_on_alike(model, optimizer, twin, other)


@behaviour
def the_dict_of_a_state_dict_is_ones_own(make: Make) -> None:
    """Keys may be taken out of it, and groups be edited."""
    model, optimizer = trained(make)
    twin, other = trained(make)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 7.0
    state["param_groups"][0]["params"].clear()
    del state["state"][0], state["param_groups"]
    assert_goes_on_alike(model, optimizer, twin, other)


# --- loading --------------------------------------------------------------------------------------


@behaviour.over(PHASES)
def training_goes_on_from_a_file(make: Make, case: int) -> None:
    """Bit for bit, in a fresh optimizer, at any phase of the intervals."""
    model, optimizer = trained(make, case)
    other = like(model)
    loaded = make(other.parameters(), lr=0.01)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_goes_on_alike(model, optimizer, other, loaded, start=case)


@behaviour
def training_goes_on_from_a_file_in_groups(make: Make) -> None:
    """With groups that differ, and names."""

    def grouped(model: nn.Module) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        return [{"params": named[:3], "lr": 0.02}, {"params": named[3:], "weight_decay": 0.1}]

    model = tiny()
    optimizer = make(grouped(model), lr=0.01)
    fit(model, optimizer, batches(0, 3))
    other = like(model)
    loaded = make(grouped(other), lr=0.01)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_goes_on_alike(model, optimizer, other, loaded)


@behaviour
def a_file_is_replaced_by_what_is_loaded(make: Make) -> None:
    """What the optimizer has done before leaves no trace."""
    model, optimizer = trained(make)
    other = tiny()
    used = make(other.parameters(), lr=0.5)
    fit(other, used, batches(20, 4))
    other.load_state_dict(model.state_dict())
    used.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_goes_on_alike(model, optimizer, other, used)


@behaviour
def hyper_parameters_are_loaded(make: Make) -> None:
    """They win over those of the constructor."""
    _, optimizer = trained(make, lr=0.125, weight_decay=0.25)
    loaded = make(tiny().parameters(), lr=0.5)
    loaded.load_state_dict(optimizer.state_dict())
    (group,) = loaded.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.125, 0.25)
    assert_same(loaded.state_dict(), optimizer.state_dict())


@behaviour
def a_tensor_lr_is_loaded(make: Make) -> None:
    """As a tensor of its own."""
    _, optimizer = trained(make, lr=torch.tensor(0.125))
    state = through_a_file(optimizer.state_dict())
    loaded = make(tiny().parameters(), lr=0.5)
    loaded.load_state_dict(state)
    lr = loaded.param_groups[0]["lr"]
    assert isinstance(lr, Tensor) and lr == 0.125
    assert lr is not state["param_groups"][0]["lr"]


@behaviour
def loading_leaves_its_argument_alone(make: Make) -> None:
    """It is not changed; groups are copied."""
    _, optimizer = trained(make)
    state = through_a_file(optimizer.state_dict())
    before = copy.deepcopy(state)
    loaded = make(tiny().parameters())
    loaded.load_state_dict(state)
    loaded.param_groups[0]["lr"] = 7.0
    loaded.param_groups[0]["tag"] = 1
    assert_same(state, before)


SOURCES = {"a file": through_a_file, "a live optimizer": lambda state: state}


@behaviour.over(SOURCES, beyond_torch="AdamW keeps the loaded tensors of its counters")
def nothing_is_shared_with_what_was_loaded(make: Make, case: Any) -> None:
    """Later steps do not change it, whether it comes from a file or another optimizer."""
    model, optimizer = trained(make, lr=torch.tensor(0.01, dtype=torch.float64))
    state = case(optimizer.state_dict())
    before = copy.deepcopy(state)
    other = like(model)
    loaded = make(other.parameters())
    loaded.load_state_dict(state)
    fit(other, loaded, batches(3, 3))
    loaded.param_groups[0]["lr"].fill_(7.0)
    assert_same(state, before)


@behaviour
def loading_ones_own_state_changes_nothing(make: Make) -> None:
    """Bit for bit."""
    model, optimizer = trained(make)
    twin, other = trained(make)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_goes_on_alike(model, optimizer, twin, other)


@behaviour
def loading_keeps_parameters_and_keys(make: Make) -> None:
    """Groups hold the optimizer's own parameters; so do the keys of a defaultdict."""
    model, optimizer = trained(make)
    other = like(model)
    loaded = make(other.parameters())
    loaded.load_state_dict(optimizer.state_dict())
    ids = [id(p) for p in other.parameters()]
    assert [id(p) for p in loaded.param_groups[0]["params"]] == ids
    assert {id(p) for p in loaded.state} == set(ids)
    assert loaded.state[nn.Parameter(torch.ones(1))] == {}


def one_more_group(state: dict[str, Any]) -> None:
    state["param_groups"].append({**state["param_groups"][0], "params": []})


def one_parameter_less(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"].pop()


MISMATCHES = {"a group too many": one_more_group, "a parameter less": one_parameter_less}


@behaviour.over(MISMATCHES)
def a_state_dict_of_other_groups_is_refused(make: Make, case: Any) -> None:
    """With a ValueError; the optimizer is as it was."""
    model, optimizer = trained(make)
    twin, other = trained(make)
    state = through_a_file(optimizer.state_dict())
    case(state)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(state)
    assert_goes_on_alike(model, optimizer, twin, other)


@behaviour
def names_that_are_loaded_win(make: Make) -> None:
    """And are not asked for."""
    model = tiny()
    named, plain = make(model.named_parameters()), make(tiny().parameters())
    names = named.param_groups[0]["param_names"]
    plain_state = plain.state_dict()
    plain.load_state_dict(named.state_dict())
    assert plain.param_groups[0]["param_names"] == names
    named.load_state_dict(plain_state)
    assert named.param_groups[0]["param_names"] == names
    renamed = named.state_dict()
    renamed["param_groups"][0]["param_names"] = [f"body.{name}" for name in names]
    named.load_state_dict(renamed)
    assert named.param_groups[0]["param_names"] == [f"body.{name}" for name in names]


@behaviour
def state_that_is_missing_starts_anew(make: Make) -> None:
    """A parameter that the file has no state of trains as a new one."""
    model, optimizer = trained(make)
    state = through_a_file(optimizer.state_dict())
    number = [name for name, _ in model.named_parameters()].index("norm.weight")
    del state["state"][number]
    other = like(model)
    loaded = make(other.parameters())
    loaded.load_state_dict(state)
    before = weights(other)
    fit(other, loaded, batches(3, 2))
    assert moved(other, before) == set(before)
    assert all(torch.isfinite(p).all() for p in other.parameters())


@behaviour
def state_of_no_parameter_is_kept(make: Make) -> None:
    """Entries under other keys, which old files have."""
    _, optimizer = trained(make)
    state = optimizer.state_dict()
    state["state"]["note"] = {"text": "kept"}
    loaded = make(tiny().parameters())
    loaded.load_state_dict(state)
    assert loaded.state["note"] == {"text": "kept"}


CASTS = {"float32 to float64": (torch.float32, torch.float64)}
CASTS["float64 to float32"] = CASTS["float32 to float64"][::-1]


@behaviour.over(CASTS)
def state_follows_the_dtype_of_the_model(make: Make, case: tuple[torch.dtype, ...]) -> None:
    """A file of one precision goes on in another, close to what it would have been."""
    kind, new = case
    model = tiny(kind)
    optimizer = make(model.parameters(), lr=0.01)
    fit(model, optimizer, batches(0, 3, kind))
    other = tiny(new)
    other.load_state_dict(model.state_dict())
    loaded = make(other.parameters())
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    fit(model, optimizer, batches(3, 4, kind))
    fit(other, loaded, batches(3, 4, new))
    expected = weights(model)
    for name, p in weights(other).items():
        assert p.dtype == new
        torch.testing.assert_close(p.double(), expected[name].double(), rtol=1e-3, atol=1e-4)
    (fresh := make(tiny(new).parameters())).load_state_dict(loaded.state_dict())
    kinds = [{k: v.dtype for k, v in s.items()} for s in fresh.state.values()]
    native = tiny(new)
    fit(native, reference := make(native.parameters()), batches(0, 1, new))
    assert kinds == [{k: v.dtype for k, v in s.items()} for s in reference.state.values()]


@behaviour
def training_goes_on_in_bfloat16(make: Make) -> None:
    """Bit for bit, and finite."""
    kind = torch.bfloat16
    model = tiny(kind)
    optimizer = make(model.parameters(), lr=0.01)
    fit(model, optimizer, batches(0, 3, kind))
    other = tiny(kind)
    other.load_state_dict(model.state_dict())
    loaded = make(other.parameters())
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, loaded)):
        fit(m, o, batches(3, 4, kind))
        assert all(torch.isfinite(p).all() for p in m.parameters())
    assert_same_weights(other, model)


@behaviour
def training_goes_on_through_the_distributed_functions(make: Make) -> None:
    """Those of ``torch.distributed.checkpoint.state_dict``, which name parameters."""
    model, optimizer = trained(make)
    state = through_a_file(get_optimizer_state_dict(model, optimizer))
    assert state["state"].keys() == dict(model.named_parameters()).keys()
    other = like(model)
    loaded = make(other.parameters(), lr=0.01)
    set_optimizer_state_dict(other, loaded, state)
    assert_goes_on_alike(model, optimizer, other, loaded)


@behaviour.for_every_kind()
def test_checkpoints(check: Check, make: Make) -> None:
    """Each behaviour, for each kind of optimizer."""
    check(make)
