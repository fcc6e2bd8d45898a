"""What happens to parameters in the course of a training: frozen, replaced, removed, restarted."""

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.loops import assert_same_weights, fit, mlp_batch, squares, weights
from oracles.optimizers import OPTIMIZERS

pytestmark = pytest.mark.parametrize("name", OPTIMIZERS)


def network() -> nn.Sequential:
    """Two linear layers around a convolution, and a norm for the fallback."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 2), nn.Flatten(), nn.LayerNorm(6),
        nn.Linear(6, 3),
    ).double()  # fmt: skip


LAYERS = ("0", "2", "5")


def batches(start: int, count: int) -> list[tuple[Tensor, Tensor]]:
    return [mlp_batch(seed, 4, 3, samples=16) for seed in range(start, start + count)]


def intervals(name: str, every: int) -> dict[str, Any]:
    if name.startswith("SINGD"):
        return {"T": every}
    return {"factor_update_steps": every, "inv_update_steps": every}


def rows(optimizer: Any) -> dict[str, Any]:
    return {row.name: row for row in optimizer.report()}


# -------------------------------------------------------------------------------- frozen weights


def freeze(layer: nn.Module) -> None:
    layer.weight.requires_grad_(False)


def forget_gradient(layer: nn.Module) -> None:
    layer.weight.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))


@pytest.mark.parametrize("which", [LAYERS, LAYERS[:1], LAYERS[1:]], ids=len)
@pytest.mark.parametrize("how", [freeze, forget_gradient])
def test_only_biases_are_trained(
    how: Callable[[nn.Module], None], which: tuple[str, ...], name: str
) -> None:
    """Decided after the optimizer was built: biases take steps of the size of grafting, 1 here."""
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01, momentum=0.0)
    for layer in which:
        how(model.get_submodule(layer))
    for x, y in batches(0, 3):
        before = weights(model)
        optimizer.zero_grad()
        squares(model(x), y).backward()
        optimizer.step()
        after = weights(model)
        for layer in LAYERS:
            moved = {key: after[key] - before[key] for key in (f"{layer}.weight", f"{layer}.bias")}
            if layer in which:
                assert not moved[f"{layer}.weight"].any()
                rms = moved[f"{layer}.bias"].square().mean().sqrt()
                assert rms.item() == pytest.approx(0.01, rel=1e-9)
            else:
                assert all(move.any() for move in moved.values())
    assert len(optimizer.diagnostics()) == len(LAYERS)
    assert len(optimizer.placement()) == len(LAYERS)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fit(model, optimizer, batches(3, 2), squares)


@pytest.mark.parametrize("grafting", ["rms", 1.0, "adam", "sgd", None])
def test_a_weight_that_is_unfrozen_is_captured(name: str, grafting: Any) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01, grafting=grafting)
    freeze(model[0])
    fit(model, optimizer, batches(0, 3), squares)
    assert rows(optimizer)["0.weight"].last_update is None
    state = optimizer.state_dict()
    model[0].weight.requires_grad_(True)
    fit(model, optimizer, batches(3, 12), squares)
    assert rows(optimizer)["0.weight"].last_update is not None
    optimizer.load_state_dict(state)  # of a time when there was no curvature
    fit(model, optimizer, batches(15, 3), squares)
    assert all(p.isfinite().all() for p in model.parameters())


# -------------------------------------------------------------------------------- bias correction


def shrinking_steps(model: nn.Module, optimizer: Any, layer: str, steps: int) -> list[float]:
    sizes = []
    for x, y in batches(100, steps):
        before = weights(model)
        optimizer.zero_grad()
        squares(model(x), y).backward()
        optimizer.step()
        moved = [after - before[key] for key, after in weights(model).items() if key[0] == layer]
        sizes.append(torch.cat([move.flatten() for move in moved]).square().mean().sqrt().item())
    return sizes


def skip_ten_batches(model: nn.Module, optimizer: Any) -> None:
    for x, y in batches(0, 10):
        optimizer.zero_grad()
        (squares(model(x), y) * torch.nan).backward()
        optimizer.step()
    assert optimizer.skipped_updates == 10


def train_without_the_weight(model: nn.Module, optimizer: Any) -> None:
    model[0].weight.requires_grad_(False)
    fit(model, optimizer, batches(0, 500), squares)
    model[0].weight.requires_grad_(True)


def train_without_the_layer(model: nn.Module, optimizer: Any) -> None:
    model[0].requires_grad_(False)
    fit(model, optimizer, batches(0, 500), squares)
    model[0].requires_grad_(True)


@pytest.mark.parametrize(
    "before", [skip_ten_batches, train_without_the_weight, train_without_the_layer]
)
def test_bias_correction_counts_the_updates_of_a_parameter(
    before: Callable[[nn.Module, Any], None], name: str
) -> None:
    """An update of ``grafting="adam"`` without momentum is of size one at first, as AdamW's."""
    model = network()
    every = intervals(name, 50)
    optimizer = OPTIMIZERS[name](
        model.parameters(), lr=1e-4, momentum=0.0, grafting="adam", **every
    )
    before(model, optimizer)
    first, *_ = shrinking_steps(model, optimizer, "0", 1)
    assert 0.3e-4 < first < 1.5e-4


def test_the_second_moments_of_an_older_checkpoint(name: str) -> None:
    """Up to 0.1 weight and bias had one of them together, and the steps of the group counted."""
    model, resumed = network(), network()
    options = {"lr": 0.01, "grafting": "adam", **intervals(name, 2)}
    optimizer, other = (OPTIMIZERS[name](m.parameters(), **options) for m in (model, resumed))
    fit(model, optimizer, batches(0, 4), squares)
    saved = copy.deepcopy(optimizer.state_dict())
    params = list(model.parameters())
    for layer in LAYERS:
        module = model.get_submodule(layer)
        weight, bias = (
            saved["state"][next(i for i, p in enumerate(params) if p is own)]
            for own in (module.weight, module.bias)
        )
        joint = torch.cat([weight["exp_avg_sq"].flatten(1), bias.pop("exp_avg_sq")[:, None]], 1)
        weight["exp_avg_sq"] = joint[None]
        del weight["step"], bias["step"]
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    for each, its in ((model, optimizer), (resumed, other)):
        fit(each, its, batches(4, 4), squares)
    assert_same_weights(resumed, model)


# -------------------------------------------------------------------------------- trust region


def test_the_trust_region_takes_the_learning_rate_of_each_parameter(name: str) -> None:
    """A bias with a learning rate of its own moves the loss with that one."""
    options = {"grafting": None, "momentum": 0.0, "damping": 0.1, "kl_clip": None}
    lrs = {"weight": 0.1, "bias": 0.7}
    bound, found = 1e-3, {}
    for kl_clip in (None, bound):
        model = network()
        split = [
            {"params": [p for key, p in model.named_parameters() if key.endswith(kind)], "lr": lr}
            for kind, lr in lrs.items()
        ]
        optimizer = OPTIMIZERS[name](split, **{**options, "kl_clip": kl_clip})
        before = weights(model)
        ((x, y),) = batches(0, 1)
        squares(model(x), y).backward()
        optimizer.step()
        found[kl_clip] = {key: before[key] - p for key, p in weights(model).items()}
        gradients = {key: p.grad for key, p in model.named_parameters()}
    of_layers = [f"{layer}.{kind}" for layer in LAYERS for kind in lrs]
    change = sum(
        lrs[key.split(".")[1]] * (found[None][key] * gradients[key]).sum() for key in of_layers
    )  # the natural gradient times the squared learning rate
    factor = min(1.0, (bound / change.item()) ** 0.5)
    assert factor < 0.9
    for key in of_layers:
        torch.testing.assert_close(found[bound][key], factor * found[None][key], rtol=1e-5, atol=0)


# -------------------------------------------------------------------------------- groups


def replace_a_weight(model: nn.Module, optimizer: Any) -> None:
    old = model[5].weight
    model[5].weight = nn.Parameter(old.detach().clone())
    swap(optimizer, old, model[5].weight)


def grow_a_layer(model: nn.Module, optimizer: Any) -> None:
    old = model[0]
    model[0] = nn.Linear(4, 12).double()
    model[2], before = nn.Conv1d(4, 3, 2).double(), model[2]
    model[1] = nn.Unflatten(1, (4, 3))
    for was, now in ((old, model[0]), (before, model[2])):
        swap(optimizer, was.weight, now.weight)
        swap(optimizer, was.bias, now.bias)


def replace_a_bias(model: nn.Module, optimizer: Any) -> None:
    old = model[0].bias
    model[0].bias = nn.Parameter(torch.zeros_like(old))
    swap(optimizer, old, model[0].bias)


def remove_a_bias(model: nn.Module, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not model[0].bias]


def replace_a_norm(model: nn.Module, optimizer: Any) -> None:
    old = model[4].weight
    model[4].weight = nn.Parameter(torch.ones_like(old))
    swap(optimizer, old, model[4].weight)


def remove_a_group(model: nn.Module, optimizer: Any) -> None:
    optimizer.param_groups.pop()


def remove_and_add_again(model: nn.Module, optimizer: Any) -> None:
    group = optimizer.param_groups.pop(0)
    optimizer.add_param_group({"params": group["params"], "lr": 0.01})


def move_between_groups(model: nn.Module, optimizer: Any) -> None:
    first, second = optimizer.param_groups
    second["params"].append(first["params"].pop())


def swap(optimizer: Any, old: Tensor, new: nn.Parameter) -> None:
    """As point clouds and pruning do it: the place in the group, and the state with it."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None and all(
        value.shape == new.shape for key, value in state.items() if key in MOMENTS
    ):
        optimizer.state[new] = state


MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")
CHANGES = [
    replace_a_weight, grow_a_layer, replace_a_bias, remove_a_bias, replace_a_norm, remove_a_group,
    remove_and_add_again, move_between_groups,
]  # fmt: skip


def in_two_groups(name: str, model: nn.Module) -> Any:
    params = list(model.parameters())
    groups = [{"params": params[:4]}, {"params": params[4:]}]
    return OPTIMIZERS[name](groups, lr=0.01, **intervals(name, 2))


@pytest.mark.filterwarnings("ignore:No gradient reached")
@pytest.mark.parametrize("steps", [0, 3, 4])
@pytest.mark.parametrize("change", CHANGES)
def test_groups_changed_by_hand(
    change: Callable[[nn.Module, Any], None], steps: int, name: str
) -> None:
    """What is in a group trains, captured where it can be; what has left stays as it is."""
    model = network()
    optimizer = in_two_groups(name, model)
    fit(model, optimizer, batches(0, steps), squares)
    change(model, optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    before = weights(model)
    fit(model, optimizer, batches(steps, 6), squares)
    for key, param in model.named_parameters():
        assert param.isfinite().all()
        assert torch.equal(param, before[key]) == (id(param) not in held), key
    for row in optimizer.report():
        if row.name[0] in LAYERS and row.name.endswith("weight"):
            assert row.last_update is not None, row.name
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("change", [replace_a_weight, move_between_groups])
def test_a_change_of_groups_without_effect_changes_nothing(
    change: Callable[[nn.Module, Any], None], name: str
) -> None:
    """The same numbers and the same state under another parameter: training goes on."""
    model, control = network(), network()
    optimizer, other = in_two_groups(name, model), in_two_groups(name, control)
    fit(model, optimizer, batches(0, 3), squares)
    fit(control, other, batches(0, 3), squares)
    change(model, optimizer)
    fit(model, optimizer, batches(3, 5), squares)
    fit(control, other, batches(3, 5), squares)
    assert_same_weights(model, control)


# -------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize("accumulate", [1, 2])
def test_factors_are_measured_while_the_learning_rate_is_zero(name: str, accumulate: int) -> None:
    """A burn-in leaves parameters alone; factors, counters and moments are those of training."""
    model = network()
    start = weights(model)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.0, **intervals(name, 3))
    updates = []
    for step in range(8):
        optimizer.zero_grad()
        for x, y in batches(step, accumulate):
            (squares(model(x), y) / accumulate).backward()
        optimizer.step()
        updates.append(rows(optimizer)["0.weight"].last_update)
    assert optimizer.param_groups[0]["step"] == 8
    assert updates == [0, 0, 0, 3, 3, 3, 6, 6]
    assert all(torch.equal(p, start[key]) for key, p in model.named_parameters())


def test_a_burn_in_of_the_fallback_is_that_of_adamw(name: str) -> None:
    """Also of a model without any layer: moments and counters move at a learning rate of zero."""
    ours, theirs = (nn.LayerNorm(5) for _ in range(2))
    optimizers = (
        OPTIMIZERS[name](ours.parameters(), lr=0.0, weight_decay=0.0),
        torch.optim.AdamW(theirs.parameters(), lr=0.0, weight_decay=0.0),
    )
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        for step in range(6):
            optimizer.param_groups[0]["lr"] = 0.0 if step < 3 else 0.01
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(8, 5, generator=generator)).pow(3).mean().backward()
            optimizer.step()
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-7)


def test_a_step_without_passes_at_a_learning_rate_of_zero_is_none(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.0, **intervals(name, 3))
    for _ in range(3):
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 0
    model.eval()
    ((x, y),) = batches(0, 1)
    squares(model(x), y).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 0


# -------------------------------------------------------------------------------- restarts


def assign_an_empty_state(optimizer: Any) -> None:
    optimizer.state = defaultdict(dict)


def clear_the_state(optimizer: Any) -> None:
    optimizer.state.clear()
    optimizer.zero_grad()


def pop_every_parameter(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state.pop(param)
    optimizer.zero_grad()


def assign_empty_dicts(optimizer: Any) -> None:
    for param in list(optimizer.state):
        optimizer.state[param] = {}
    optimizer.zero_grad()


RESTARTS = [assign_an_empty_state, clear_the_state, pop_every_parameter, assign_empty_dicts]


@pytest.mark.parametrize("grafting", [1.0, "adam"])
@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("restart", RESTARTS)
def test_an_emptied_state_starts_anew(
    restart: Callable[[Any], None], steps: int, grafting: Any, name: str
) -> None:
    """At the very next batch, as a new optimizer would."""
    model = network()
    options = {"lr": 0.01, "grafting": grafting, **intervals(name, 3)}
    optimizer = OPTIMIZERS[name](model.parameters(), **options)
    fit(model, optimizer, batches(0, steps), squares)
    fresh = copy.deepcopy(model)
    restart(optimizer)
    for each, its in ((model, optimizer), (fresh, OPTIMIZERS[name](fresh.parameters(), **options))):
        ((x, y),) = batches(steps, 1)
        for param in each.parameters():
            param.grad = None
        squares(each(x), y).backward()
        its.step()
    assert_same_weights(model, fresh)
    assert rows(optimizer)["0.weight"].last_update == steps


@pytest.mark.parametrize("restart", RESTARTS)
def test_no_stats_holds_through_a_restart(restart: Callable[[Any], None], name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
    fit(model, optimizer, batches(0, 2), squares)
    with optimizer.no_stats():
        restart(optimizer)
        fit(model, optimizer, batches(2, 1), squares)
    assert rows(optimizer)["0.weight"].last_update is None
    fit(model, optimizer, batches(3, 1), squares)
    assert rows(optimizer)["0.weight"].last_update == 3
