"""Checkpoints, copies and schedules."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from oracles.loops import (
    assert_same_numbers,
    assert_same_state,
    assert_same_weights,
    fit,
    mlp_batch,
    squares,
    state_by_name,
    weights,
)
from oracles.optimizers import Optimizer, is_kfac, only_singd, translated
from oracles.zoo import Mixed, mixed_batch, mixed_loss, mlp
from tnkfac import SINGD

BOTH_OPTIMIZERS = True


T = 3


def saved(state: dict[str, Any]) -> Any:
    """The state as it comes back from a file, read without trusting it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True, map_location="cpu")


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Linear layers, a grouped convolution, a norm and an embedding-free head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.Tanh(),
        nn.LayerNorm(6),
        nn.Unflatten(1, (2, 3)),
        nn.Conv1d(2, 4, 2, groups=2),
        nn.Flatten(),
        nn.Linear(8, 3, bias=False),
    ).to(dtype)


def batches(start: int, count: int, dtype: torch.dtype = torch.float64) -> Iterator[Any]:
    return (mlp_batch(step, 4, 3, dtype=dtype) for step in range(start, start + count))


# What the resumed optimizer is built with; the checkpoint brings the rest.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no momentum": {"momentum": 0.0, "alpha1": 0.0},
    "diagonal, adam": {"structures": "diagonal", "grafting": "adam", "kl_clip": 1e-3},
    "blocks, reduce": {"structures": ("block3diagonal", "dense"), "kfac_approx": "reduce"},
    "reference": {**SINGD.REFERENCE, "weight_decay": 0.1},
    "kfac-like, sgd": {
        "kfac_like": True,
        "alpha1": 0.0,
        "fallback": "sgd",
        "fallback_options": {"lr": 0.1, "momentum": 0.5},
    },
}


@pytest.mark.parametrize("phase", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_resume_is_bit_equal(name: str, phase: int) -> None:
    """From before the first step, and from every phase of the interval."""
    options = {"lr": 0.01, "T": T, "lr_cov": 0.05, **OPTIONS[name]}
    model = network()
    optimizer = Optimizer(model.parameters(), **options)
    fit(model, optimizer, batches(0, phase))
    state, model_state = saved(optimizer.state_dict()), saved(model.state_dict())

    resumed = network()
    other = Optimizer(resumed.parameters(), **options)
    resumed.load_state_dict(model_state)
    other.load_state_dict(state)
    assert_same_state(resumed, other, model, optimizer)
    first, second = (
        fit(m, o, batches(phase, 10)) for m, o in ((model, optimizer), (resumed, other))
    )
    assert first == second
    assert_same_weights(resumed, model)
    assert_same_state(resumed, other, model, optimizer)


def test_resume_into_an_optimizer_that_has_run() -> None:
    """Loading replaces what the optimizer did before, pending statistics included."""
    model, other = network(), network()
    optimizer, used = (Optimizer(m.parameters(), lr=0.01, T=T) for m in (model, other))
    fit(model, optimizer, batches(0, 2))
    fit(other, used, batches(20, 4))
    x, y = mlp_batch(30, 4, 3)
    squares(other(x), y).backward()
    other.load_state_dict(model.state_dict())
    used.load_state_dict(saved(optimizer.state_dict()))
    for p in (*model.parameters(), *other.parameters()):
        p.grad = None
    for m, o in ((model, optimizer), (other, used)):
        for x, y in batches(2, 10):
            squares(m(x), y).backward()
            o.step()
            for p in m.parameters():
                p.grad = None
    assert_same_weights(other, model)
    assert_same_state(other, used, model, optimizer)


def test_hyper_parameters_come_from_the_checkpoint() -> None:
    """As with every torch optimizer."""
    model = network()
    optimizer = Optimizer(model.parameters(), lr=0.25, damping=0.125, T=7, structures="diagonal")
    fit(model, optimizer, batches(0, 2))
    other = Optimizer(network().parameters(), structures="diagonal")
    other.load_state_dict(saved(optimizer.state_dict()))
    (group,) = other.param_groups
    interval = "factor_update_steps" if is_kfac() else "T"
    assert (group["lr"], group["damping"], group[interval]) == (0.25, 0.125, 7)


def test_resume_right_after_a_skipped_step() -> None:
    """The skipped step was due; the update that it missed is taken by the resumed run too."""
    model = network()
    optimizer = Optimizer(model.parameters(), lr=0.01, T=T)
    fit(model, optimizer, batches(0, T))
    x, y = mlp_batch(50, 4, 3)
    fit(model, optimizer, [(x * float("nan"), y)])
    assert optimizer.skipped_updates == 1
    resumed = network()
    other = Optimizer(resumed.parameters(), lr=0.01, T=T)
    resumed.load_state_dict(saved(model.state_dict()))
    other.load_state_dict(saved(optimizer.state_dict()))
    for m, o in ((model, optimizer), (resumed, other)):
        fit(m, o, batches(T, 2))
        assert int(o.state[m[0].weight]["last_update"]) > T
        fit(m, o, batches(T + 2, 8))
    assert_same_weights(resumed, model)
    assert_same_state(resumed, other, model, optimizer)


@pytest.mark.parametrize("phase", [0, 1, 3])
def test_saved_in_the_middle_of_accumulation(phase: int) -> None:
    """Gradients are in no checkpoint and neither are pending statistics: the batch is repeated."""
    model = network()
    optimizer = Optimizer(model.parameters(), lr=0.01, T=T)
    fit(model, optimizer, batches(0, phase))
    x, y = mlp_batch(phase, 4, 3)
    squares(model(x[:3]), y[:3]).backward()
    state, model_state = saved(optimizer.state_dict()), saved(model.state_dict())
    optimizer.zero_grad()
    resumed = network()
    other = Optimizer(resumed.parameters(), lr=0.01, T=T)
    resumed.load_state_dict(model_state)
    other.load_state_dict(state)
    for m, o in ((model, optimizer), (resumed, other)):
        for x, y in batches(phase, 10):
            o.zero_grad()
            for part in (slice(3), slice(3, None)):
                (squares(m(x[part]), y[part]) * (len(x[part]) / len(x))).backward()
            o.step()
    assert_same_weights(resumed, model)
    assert_same_state(resumed, other, model, optimizer)


def snapshot(value: Any) -> Any:
    return copy.deepcopy(value)


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors_of(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_of(entry)


def assert_equal_nested(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal_nested(actual[key], value)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_equal_nested(a, e)
    else:
        assert actual == expected


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_loading_neither_mutates_nor_aliases(lr: Any) -> None:
    model, other = network(), network()
    optimizer, loaded = (Optimizer(m.parameters(), lr=copy.copy(lr), T=1) for m in (model, other))
    fit(model, optimizer, batches(0, 2))
    state = saved(optimizer.state_dict())
    before = snapshot(state)
    loaded.load_state_dict(state)
    assert_equal_nested(state, before)
    theirs = {t.data_ptr() for t in tensors_of(state) if t.numel()}
    ours = {t.data_ptr() for t in tensors_of(dict(loaded.state)) if t.numel()}
    assert not theirs & ours
    fit(other, loaded, batches(2, 2))
    if isinstance(lr, Tensor):
        loaded.param_groups[0]["lr"].mul_(2)
    assert_equal_nested(state, before)


def test_loading_from_a_live_optimizer() -> None:
    """Without a file in between the two optimizers must not share a tensor."""
    model, other = network(), network()
    optimizer, loaded = (Optimizer(m.parameters(), lr=0.01, T=1) for m in (model, other))
    fit(model, optimizer, batches(0, 2))
    loaded.load_state_dict(optimizer.state_dict())
    before = state_by_name(model, optimizer)
    fit(other, loaded, batches(2, 2))
    assert_same_numbers(state_by_name(model, optimizer), before)


@pytest.mark.parametrize("kept", [torch.float32, torch.float64, None], ids=str)
@pytest.mark.parametrize("structures", ["dense", "diagonal", "block2diagonal"])
def test_dtypes_survive(structures: str, kept: torch.dtype | None) -> None:
    """torch would cast every state tensor to the dtype of its parameter."""
    only_singd()
    dtype = torch.bfloat16
    model, other = network(dtype), network(dtype)
    options = {"lr": 0.01, "T": 1, "structures": structures, "preconditioner_dtype": kept}
    optimizer, loaded = (Optimizer(m.parameters(), **options) for m in (model, other))
    fit(model, optimizer, batches(0, 3, dtype))
    state = saved(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(state)
    assert_same_state(other, loaded, model, optimizer)
    key = "K.0" if structures.startswith("block") else "K"
    assert loaded.state[other[0].weight][key].dtype == (dtype if kept is None else kept)
    fit(model, optimizer, batches(3, 4, dtype))
    fit(other, loaded, batches(3, 4, dtype))
    assert_same_weights(other, model)
    assert_same_state(other, loaded, model, optimizer)


@pytest.mark.parametrize("name", OPTIONS)
def test_state_is_plain_tensors(name: str) -> None:
    """Per-parameter state is tensors only; groups hold numbers, strings, None and tuples."""
    model = network()
    optimizer = Optimizer(model.parameters(), **OPTIONS[name])
    fit(model, optimizer, batches(0, 2))
    for state in optimizer.state.values():
        assert all(type(value) is Tensor for value in state.values())
        assert not any(value.requires_grad for value in state.values())

    def plain(value: Any) -> bool:
        if isinstance(value, tuple | list):
            return all(plain(entry) for entry in value)
        return value is None or type(value) in (int, float, bool, str)

    for group in optimizer.state_dict()["param_groups"]:
        assert all(plain(value) for value in group.values())


def half(step: int) -> float:
    """A schedule of ``lr_cov``."""
    return 0.05 / (step + 1)


def test_callables_are_not_saved_and_stay_live() -> None:
    calls = []

    def interval(step: int) -> int:
        calls.append(step)
        return 2

    options: dict[str, Any] = {
        "T": interval,
        "lr_cov": half,
        "loss_average": lambda module, shape: shape[0],
    }
    model = network()
    optimizer = Optimizer(model.parameters(), lr=0.01, **options)
    fit(model, optimizer, batches(0, 3))
    state = saved(optimizer.state_dict())
    kept = translated(options) if is_kfac() else options
    assert not set(kept) & set(state["param_groups"][0])
    resumed = network()
    other = Optimizer(resumed.parameters(), lr=0.01, **options)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    assert all(other.param_groups[0][name] is value for name, value in kept.items())
    assert all(optimizer.param_groups[0][name] is value for name, value in kept.items())
    fit(model, optimizer, batches(3, 5))
    fit(resumed, other, batches(3, 5))
    assert_same_weights(resumed, model)
    assert calls


def test_a_schedule_of_the_interval() -> None:
    """A callable ``T`` decides at every step; ``lr_cov`` sees the step."""
    model, twin = network(), network()
    options = {"lr": 0.01, "lr_cov": 0.05}
    scheduled = Optimizer(model.parameters(), T=lambda step: 1 if step < 2 else 3, **options)
    plain = Optimizer(twin.parameters(), T=1, **options)
    marks = []
    for step in range(7):
        fit(model, scheduled, batches(step, 1))
        marks.append(int(scheduled.state[model[0].weight]["last_update"]))
    assert marks == [0, 1, 1, 3, 3, 3, 6]
    fit(twin, plain, batches(0, 2))


def test_an_interval_that_grows_by_itself() -> None:
    """``T="auto"`` is such a callable, but lies in the checkpoint and goes on from there."""

    def growing(step: int) -> int:
        return 1 if step < 10 else 2 if step < 20 else 5 if step < 50 else 10

    model, twin, resumed = network(), network(), network()
    grows = SINGD(model.parameters(), lr=0.01, T="auto")
    called = SINGD(twin.parameters(), lr=0.01, T=growing)
    marks = []
    for step in range(60):
        for net, optimizer in ((model, grows), (twin, called)):
            fit(net, optimizer, batches(step, 1))
        marks.append(int(grows.state[model[0].weight]["last_update"]))
        assert marks[-1] == int(called.state[twin[0].weight]["last_update"])
        if step == 7:
            other = SINGD(resumed.parameters(), lr=0.01)
            other.load_state_dict(copy.deepcopy(grows.state_dict()))
            resumed.load_state_dict(model.state_dict())
            assert other.param_groups[0]["T"] == "auto"
        elif 7 < step < 14:
            fit(resumed, other, batches(step, 1))
        if step == 13:
            assert_same_weights(resumed, model)
    assert_same_weights(model, twin)
    assert sorted(set(marks)) == [*range(10), *range(10, 20, 2), *range(20, 50, 5), 50]


# --- distributed checkpoints --------------------------------------------------------------------


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("name", OPTIONS)
def test_distributed_checkpoint_round_trip(name: str, flatten: bool) -> None:
    """The functions that distributed trainers use to save and load, on one process."""
    options = {"lr": 0.01, "T": T, **OPTIONS[name]}
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = network()
    optimizer = Optimizer(model.parameters(), **options)
    fit(model, optimizer, batches(0, 4))
    state = saved(get_optimizer_state_dict(model, optimizer, options=how))
    resumed = network()
    other = Optimizer(resumed.parameters(), **options)
    resumed.load_state_dict(model.state_dict())
    before = weights(resumed)
    set_optimizer_state_dict(resumed, other, state, options=how)
    assert_same_numbers(weights(resumed), before)
    assert_same_state(resumed, other, model, optimizer)
    fit(model, optimizer, batches(4, 10))
    fit(resumed, other, batches(4, 10))
    assert_same_weights(resumed, model)
    assert_same_state(resumed, other, model, optimizer)


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
@pytest.mark.parametrize("build", [network, Mixed])
def test_template_step_moves_nothing(build: Callable[[], nn.Module], lr: Any) -> None:
    """On a fresh optimizer the template creates every key, and leaves the clock at zero."""
    torch.manual_seed(0)
    model, twin = build(), build()
    twin.load_state_dict(model.state_dict())
    optimizer, other = (Optimizer(m.parameters(), lr=lr, weight_decay=0.1) for m in (model, twin))
    before = weights(model)
    template = get_optimizer_state_dict(model, optimizer)
    assert_same_numbers(weights(model), before)
    assert optimizer.param_groups[0]["step"] == 0
    assert optimizer.param_groups[0]["lr"] == lr
    if build is Mixed:
        fit(twin, other, [mixed_batch(0)], mixed_loss)
    else:
        fit(twin, other, batches(0, 1))
    real = get_optimizer_state_dict(twin, other)
    keys = {name: set(state) for name, state in template["state"].items()}
    assert keys == {name: set(state) for name, state in real["state"].items()}
    shapes = {n: {k: v.shape for k, v in s.items()} for n, s in template["state"].items()}
    assert shapes == {n: {k: v.shape for k, v in s.items()} for n, s in real["state"].items()}


def test_training_after_the_template_is_training_from_the_start() -> None:
    model, twin = network(), network()
    optimizer, other = (Optimizer(m.parameters(), lr=0.01, T=T) for m in (model, twin))
    get_optimizer_state_dict(model, optimizer)
    fit(model, optimizer, batches(0, 5))
    fit(twin, other, batches(0, 5))
    assert_same_weights(model, twin)


# --- copies -------------------------------------------------------------------------------------


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_torch,
}
each_copy = pytest.mark.parametrize("how", COPIES)


@each_copy
def test_a_copied_model_is_inert(how: str) -> None:
    """It contributes no statistics, and training goes on as if there were no copy."""
    model, twin = network(), network()
    optimizer, other = (Optimizer(m.parameters(), lr=0.01, T=1) for m in (model, twin))
    fit(model, optimizer, batches(0, 2))
    fit(twin, other, batches(0, 2))
    copied = COPIES[how](model)
    x, y = mlp_batch(40, 4, 3)
    squares(copied(x), y).backward()
    for x, y in batches(2, 3):
        optimizer.zero_grad()
        squares(model(x), y).backward()
        squares(copied(3 * x), y).backward()
        optimizer.step()
    fit(twin, other, batches(2, 3))
    assert_same_weights(model, twin)


def test_an_averaged_model_is_inert() -> None:
    model, twin = network(), network()
    optimizer, other = (Optimizer(m.parameters(), lr=0.01, T=1) for m in (model, twin))
    average = torch.optim.swa_utils.AveragedModel(model)
    for x, y in batches(0, 4):
        fit(model, optimizer, [(x, y)])
        average.update_parameters(model)
        average(x)
    fit(twin, other, batches(0, 4))
    assert_same_weights(model, twin)


def as_dict(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"model": model, "optimizer": optimizer}


def optimizer_first(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"optimizer": optimizer, "model": model}


@pytest.mark.parametrize("together", [as_dict, optimizer_first])
@each_copy
def test_model_and_optimizer_copied_together(how: str, together: Callable[..., Any]) -> None:
    """The copy captures for itself, and trains on exactly as the original does."""
    model = network()
    optimizer = Optimizer(model.parameters(), lr=0.01, T=T)
    fit(model, optimizer, batches(0, 4))
    both = COPIES[how](together(model, optimizer))
    copied, other = both["model"], both["optimizer"]
    assert_same_state(copied, other, model, optimizer)
    for step in range(4, 12):
        fit(model, optimizer, batches(step, 1))
        fit(copied, other, batches(step, 1))
    assert_same_weights(copied, model)
    assert_same_state(copied, other, model, optimizer)
    assert {r.name: r.last_update for r in other.report()} == {
        r.name: r.last_update for r in optimizer.report()
    }


@each_copy
def test_an_optimizer_copied_alone_does_no_harm(how: str) -> None:
    model = network()
    optimizer = Optimizer(model.parameters(), lr=0.01, T=T)
    fit(model, optimizer, batches(0, 2))
    other = COPIES[how](optimizer)
    before = weights(model)
    other.step()
    assert_same_numbers(weights(model), before)
    fit(model, optimizer, batches(2, 2))
    state = other.state_dict()
    assert len(state["state"]) == len(optimizer.state_dict()["state"])


# --- schedules ----------------------------------------------------------------------------------

Scheduler = Callable[[Any], Any]
SCHEDULERS: dict[str, Scheduler] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)],
        [3],
    ),
}


def advance(scheduler: Any, step: int) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(float(step))
    else:
        scheduler.step()


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tensor: bool) -> None:
    """The update follows learning rate and momentum as AdamW and SGD under the same scheduler."""
    lr: Any = torch.tensor(0.08, dtype=torch.float64) if tensor else 0.08
    model, twin = network(), network()
    optimizer = Optimizer(model.parameters(), lr=lr, T=2, momentum=0.9)
    manual = Optimizer(twin.parameters(), lr=0.08, T=2, momentum=0.9)
    shadow = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.08, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler, other = SCHEDULERS[name](optimizer), SCHEDULERS[name](shadow)
        seen = []
        for step in range(8):
            (group,), (expected,) = manual.param_groups, shadow.param_groups
            group["lr"], group["momentum"] = float(expected["lr"]), expected["momentum"]
            seen.append(group["lr"])
            fit(model, optimizer, batches(step, 1))
            fit(twin, manual, batches(step, 1))
            shadow.step()
            advance(scheduler, step)
            advance(other, step)
    assert len(set(seen)) > 1
    trained = weights(twin)
    for key, p in weights(model).items():
        torch.testing.assert_close(p, trained[key], rtol=1e-6, atol=1e-8, msg=key)


def test_scheduler_resumes_with_the_optimizer() -> None:
    model = network()
    optimizer = Optimizer(model.parameters(), lr=0.08)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)
    for step in range(4):
        fit(model, optimizer, batches(step, 1))
        scheduler.step()
    resumed = network()
    other = Optimizer(resumed.parameters(), lr=0.08)
    again = lr_scheduler.OneCycleLR(other, 0.1, total_steps=12)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(saved(optimizer.state_dict()))
    again.load_state_dict(saved(scheduler.state_dict()))
    for step in range(4, 9):
        for m, o, s in ((model, optimizer, scheduler), (resumed, other, again)):
            fit(m, o, batches(step, 1))
            s.step()
    assert_same_weights(resumed, model)


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "LambdaLR"])
@pytest.mark.parametrize("resume", [False, True], ids=["", "resumed"])
def test_fallback_learning_rate_follows_the_ratio(name: str, resume: bool) -> None:
    """With its own learning rate the fallback is scaled by what the scheduler does to ``lr``."""
    model = nn.LayerNorm(3).double()
    options = {"lr": 0.5, "weight_decay": 0.0, "momentum": 0.0}
    optimizer = Optimizer(model.parameters(), lr=0.08, fallback="sgd", fallback_options=options)
    scheduler = SCHEDULERS[name](optimizer)
    for step in range(5):
        x, y = mlp_batch(step, 3, 3)
        before, lr = weights(model), float(optimizer.param_groups[0]["lr"])
        fit(model, optimizer, [(x, y)])
        for key, p in model.named_parameters():
            expected = before[key] - 0.5 * (lr / 0.08) * p.grad
            torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-14)
        scheduler.step()
        if resume and step == 2:
            state, positions = saved(optimizer.state_dict()), saved(scheduler.state_dict())
            optimizer = Optimizer(
                model.parameters(), lr=0.08, fallback="sgd", fallback_options=options
            )
            scheduler = SCHEDULERS[name](optimizer)
            optimizer.load_state_dict(state)
            scheduler.load_state_dict(positions)


def test_tensor_lr_is_not_baked_in() -> None:
    """A tensor that changes in place changes the next step."""
    lr = torch.tensor(0.01)
    model = mlp(4, 3)
    optimizer = Optimizer(model.parameters(), lr=lr, momentum=0.0)
    sizes = []
    for scale in (1.0, 3.0):
        optimizer.param_groups[0]["lr"].fill_(0.01 * scale)
        before = weights(model)
        fit(model, optimizer, [mlp_batch(0, 4, 3)])
        moved = [before[key] - p for key, p in weights(model).items()]
        sizes.append(torch.cat([m.flatten() for m in moved]).square().mean().sqrt().item())
    assert sizes[1] == pytest.approx(3 * sizes[0], rel=1e-6)
