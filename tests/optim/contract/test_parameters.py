"""torch's contract: parameters, their names and their gradients."""

from collections import defaultdict
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


# --- what an optimizer is -------------------------------------------------------------------------


@behaviour
def is_an_optimizer(make: Make) -> None:
    """It passes every check of type, and can be a key of a dict."""
    optimizer = make(tiny().parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert {optimizer: 1}[optimizer] == 1


@behaviour
def repr_shows_the_groups(make: Make) -> None:
    """The name of the class, and every hyper-parameter of every group."""
    first, rest = halves(tiny())
    optimizer = make([{"params": first, "lr": 0.125}, {"params": rest}], lr=0.25)
    shown = repr(optimizer)
    assert shown.startswith(f"{type(optimizer).__name__} (")
    assert "Parameter Group 0" in shown and "Parameter Group 1" in shown
    assert "lr: 0.125" in shown and "lr: 0.25" in shown


@behaviour
def defaults_are_an_attribute(make: Make) -> None:
    """They hold every hyper-parameter, and are what groups start from."""
    optimizer = make(tiny().parameters(), lr=0.25, weight_decay=0.5)
    assert optimizer.defaults["lr"] == 0.25
    assert optimizer.defaults["weight_decay"] == 0.5
    for name, value in optimizer.defaults.items():
        assert optimizer.param_groups[0][name] == value, name


@behaviour
def groups_hold_the_very_parameters(make: Make) -> None:
    """In their order, as a list."""
    model = tiny()
    (group,) = make(model.parameters()).param_groups
    assert type(group["params"]) is list
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


@behaviour
def state_is_a_defaultdict_by_parameter(make: Make) -> None:
    """Empty at first; then its keys are the parameters, its values dicts."""
    model = tiny()
    optimizer = make(model.parameters())
    assert isinstance(optimizer.state, defaultdict)
    assert len(optimizer.state) == 0
    fit(model, optimizer, batches(0, 1))
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    assert all(type(state) is dict and state for state in optimizer.state.values())


# --- parameters -----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, type[Exception], str | None]] = {
    "a tensor": (lambda p: p, TypeError, None),
    "a number": (lambda p: 3, TypeError, None),
    "an empty list": (lambda p: [], ValueError, "parameter"),
    "an empty generator": (lambda p: (q for q in ()), ValueError, "parameter"),
    "a list of numbers": (lambda p: [3], TypeError, "can only optimize Tensors"),
    "a list of strings": (lambda p: ["weight"], TypeError, "can only optimize Tensors"),
    "a number among tensors": (lambda p: [p, 3], TypeError, "can only optimize Tensors"),
    "a module in a list": (lambda p: [nn.Linear(2, 2)], TypeError, "can only optimize Tensors"),
    "a non-leaf": (lambda p: [p * 2], ValueError, "can't optimize a non-leaf Tensor"),
    "a group with a non-leaf": (lambda p: [{"params": p * 2}], ValueError, "non-leaf"),
    "a group with a set": (lambda p: [{"params": {p}}], TypeError, "order"),
    "a group with a number": (lambda p: [{"params": 3}], TypeError, None),
    "two groups with one parameter": (
        lambda p: [{"params": p}, {"params": p}],
        ValueError,
        "more than one parameter group",
    ),
    "some names missing": (
        lambda p: [("a", p), nn.Parameter(torch.ones(2))],
        ValueError,
        "with/without names",
    ),
    "some names missing, the first": (
        lambda p: [p, ("a", nn.Parameter(torch.ones(2)))],
        ValueError,
        "with/without names",
    ),
    "one group without names": (
        lambda p: [{"params": [("a", p)]}, {"params": [nn.Parameter(torch.ones(2))]}],
        ValueError,
        "with/without names",
    ),
}


@behaviour.over(REFUSED)
def refuses(make: Make, case: tuple[Any, type[Exception], str | None]) -> None:
    """Parameters that cannot be optimized, by the same kind of error."""
    params, error, words = case
    with pytest.raises(error, match=words):
        make(params(nn.Parameter(torch.ones(2, 2))))


@behaviour
def a_non_leaf_that_retains_its_gradient_is_accepted(make: Make) -> None:
    """And stepped in place."""
    tensor = (torch.ones(3, requires_grad=True) * 2).double()
    tensor.retain_grad()
    optimizer = make([tensor], lr=0.1)
    tensor.square().sum().backward()
    before = tensor.detach().clone()
    optimizer.step()
    assert (tensor < before).all()


@behaviour
def a_plain_leaf_tensor_is_accepted(make: Make) -> None:
    """It need not be a ``torch.nn.Parameter``."""
    tensor = torch.ones(3, requires_grad=True)
    optimizer = make([tensor], lr=0.1)
    tensor.square().sum().backward()
    optimizer.step()
    assert (tensor < 1).all() and tensor.is_leaf


@behaviour
def duplicates_in_a_group_warn(make: Make) -> None:
    """Across groups they are an error."""
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = make([p, p], lr=0.1)
    p.square().sum().backward()
    optimizer.step()
    assert (p < 1).all() and torch.isfinite(p).all()


@behaviour
def an_empty_group_is_accepted(make: Make) -> None:
    """A filter may leave a group without parameters."""
    model, twin = tiny(), tiny()
    optimizer = make([{"params": model.parameters()}, {"params": []}], lr=0.01)
    fit(model, optimizer, batches(0, 3))
    fit(twin, make(twin.parameters(), lr=0.01), batches(0, 3))
    assert len(optimizer.param_groups) == 2
    assert_same_weights(model, twin)


@behaviour
def frozen_parameters_are_accepted(make: Make) -> None:
    """They stay, and have no state."""
    model = tiny()
    model.first.requires_grad_(False)
    model.scale.requires_grad_(False)
    optimizer = make(model.parameters(), lr=0.01)
    before = weights(model)
    fit(model, optimizer, batches(0, 3))
    assert moved(model, before) == {"norm.weight", "norm.bias", "last.weight"}
    assert not any(optimizer.state.get(p) for p in [*model.first.parameters(), model.scale])


@behaviour
def parameters_without_gradient_are_skipped(make: Make) -> None:
    """At any step, with their state; they go on where they have one again."""
    model = tiny()
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1)
    names = {name for name, _ in model.named_parameters()}
    skipped = {"first.weight", "first.bias", "norm.bias"}
    for step in range(3):
        before = weights(model)
        optimizer.zero_grad()
        for x, y in batches(step, 1):
            (model(x) - y).square().sum().backward()
        for name, p in model.named_parameters():
            if step != 1 and name in skipped:
                p.grad = None
        optimizer.step()
        assert moved(model, before) == (names if step == 1 else names - skipped)


@behaviour
def a_step_without_gradients_changes_nothing(make: Make) -> None:
    """Neither before the first backward pass nor after some."""
    model = tiny()
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        before = weights(model)
        optimizer.zero_grad()
        optimizer.step()
        assert not moved(model, before)
        fit(model, optimizer, batches(step, 1))


@behaviour
def a_parameter_of_two_modules_is_stepped_once(make: Make) -> None:
    """Sharing a layer is calling it twice."""

    class Twice(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            if shared:
                self.b.weight, self.b.bias = self.a.weight, self.a.bias
            else:
                self.b = self.a
            self.last = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return self.last(torch.tanh(self.b(torch.tanh(self.a(x)))))

    models = []
    for shared in (True, False):
        torch.manual_seed(0)
        model = Twice(shared).double()
        fit(model, make(model.parameters(), lr=0.01), batches(0, 4))
        models.append(model)
    trained = weights(models[1])
    for name, p in weights(models[0]).items():
        torch.testing.assert_close(p, trained[name], rtol=1e-9, atol=1e-12, msg=name)


# --- names ----------------------------------------------------------------------------------------


@behaviour
def named_parameters_train_alike(make: Make) -> None:
    """Names change nothing but ``param_names``."""
    model, twin = tiny(), tiny()
    optimizer = make(model.named_parameters(), lr=0.01)
    fit(model, optimizer, batches(0, 4))
    fit(twin, make(twin.parameters(), lr=0.01), batches(0, 4))
    assert_same_weights(model, twin)
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names


@behaviour
def names_in_groups(make: Make) -> None:
    """Each group has its own; they are in the state dict."""
    model = tiny()
    groups = [
        {"params": model.first.named_parameters()},
        {"params": list(model.norm.named_parameters()), "lr": 0.1},
    ]
    optimizer = make(groups)
    for source in (optimizer.param_groups, optimizer.state_dict()["param_groups"]):
        assert [group["param_names"] for group in source] == [["weight", "bias"]] * 2
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": model.last.parameters()})
    assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": model.last.named_parameters()})
    assert optimizer.param_groups[2]["param_names"] == ["weight"]


@behaviour
def without_names_there_is_no_key(make: Make) -> None:
    """And a group with names cannot be added."""
    model = tiny()
    optimizer = make(model.first.parameters())
    assert "param_names" not in optimizer.param_groups[0]
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": model.last.named_parameters()})
    assert len(optimizer.param_groups) == 1


# --- gradients ------------------------------------------------------------------------------------


@behaviour
def zero_grad_sets_to_none(make: Make) -> None:
    """By default."""
    model = tiny()
    optimizer = make(model.parameters())
    fit(model, optimizer, batches(0, 1))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@behaviour
def zero_grad_in_place(make: Make) -> None:
    """On request the same tensors are filled with zeros; training is the same."""
    model, twin = tiny(), tiny()
    optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))
    for x, y in batches(0, 4):
        optimizer.zero_grad(set_to_none=False)
        kept = {name: p.grad for name, p in model.named_parameters()}
        assert all(g is None or not g.any() for g in kept.values())
        (model(x) - y).square().sum().backward()
        assert all(
            g is None or g is dict(model.named_parameters())[n].grad for n, g in kept.items()
        )
        optimizer.step()
        other.zero_grad()
        (twin(x) - y).square().sum().backward()
        other.step()
    assert_same_weights(model, twin)


@behaviour
def a_step_leaves_gradients_alone(make: Make) -> None:
    """Nothing is written to them, and parameters stay leaves that require them."""
    model = tiny()
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        for x, y in batches(step, 1):
            (model(x) - y).square().sum().backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            assert torch.equal(p.grad, before[name]), name
            assert p.is_leaf and p.requires_grad


@behaviour
def a_step_writes_in_place(make: Make) -> None:
    """Parameters stay where they are, and autograd notices that they have changed."""
    model = tiny()
    optimizer = make(model.parameters(), lr=0.01)
    places = [p.data_ptr() for p in model.parameters()]
    for x, y in batches(0, 2):
        optimizer.zero_grad()
        versions = [p._version for p in model.parameters()]
        loss = (model(x) - y).square().sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        assert [p.data_ptr() for p in model.parameters()] == places
        assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@behaviour
def a_gradient_set_by_hand_is_used(make: Make) -> None:
    """There was no backward pass; steps go against it."""
    model = tiny()
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(3):
        before = weights(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for name, p in weights(model).items():
            assert (p < before[name]).all(), name


@behaviour
def a_sparse_gradient_is_an_error(make: Make) -> None:
    """Nothing has moved then."""
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = make(embedding.parameters(), lr=0.01)
    before = weights(embedding)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises((ValueError, RuntimeError), match="sparse"):
        optimizer.step()
    assert not moved(embedding, before)


@behaviour.for_every_kind()
def test_parameters(check: Check, make: Make) -> None:
    """Each behaviour, for each kind of optimizer."""
    check(make)
