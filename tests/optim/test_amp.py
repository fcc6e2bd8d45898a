"""Mixed precision: loss scaling, autocast, and steps that overflow."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.loops import (
    assert_same_numbers,
    assert_same_weights,
    fit,
    mlp_batch,
    squares,
    state_by_name,
    weights,
)
from oracles.optimizers import Optimizer, is_kfac

BOTH_OPTIMIZERS = True


SCALE = 2.0**10
OPTIONS: dict[str, Any] = {"lr": 0.01, "T": 2, "lr_cov": 0.05}


def network() -> nn.Sequential:
    """Layers and a norm, in float32."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    return mlp_batch(step, 4, 3, dtype=torch.float32)


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": SCALE, **options})


def finite(model: nn.Module, optimizer: Any) -> bool:
    tensors = [*weights(model).values(), *state_by_name(model, optimizer).values()]
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def last_update(model: Any, optimizer: Any) -> int:
    return int(optimizer.state[model[0].weight]["last_update"])


def assert_close(model: nn.Module, optimizer: Any, twin: nn.Module, other: Any) -> None:
    """Weights and state agree but for rounding in float32."""
    expected = {**weights(twin), **state_by_name(twin, other)}
    for key, value in {**weights(model), **state_by_name(model, optimizer)}.items():
        torch.testing.assert_close(value, expected[key], rtol=2e-4, atol=2e-5, msg=key)


def scaled_step(
    model: nn.Module,
    optimizer: Any,
    grads: torch.amp.GradScaler,
    step: int,
    unscale: bool = False,
    clip: float | None = None,
    factor: float = 1.0,
    zero: Any = None,
) -> None:
    """A step as training scripts write it; ``factor`` may be infinite."""
    (zero or optimizer.zero_grad)()
    x, y = batch(step)
    grads.scale(factor * squares(model(x), y)).backward()
    if unscale:
        grads.unscale_(optimizer)
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    grads.step(optimizer)
    grads.update()


@pytest.mark.parametrize("grafting", ["rms", None])
@pytest.mark.parametrize("init", ["first_batch", "identity"])
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_"])
def test_scaling_changes_nothing(unscale: bool, init: str, grafting: str | None) -> None:
    """Factors are un-scaled, whether or not gradients were before the step."""
    model, twin = network(), network()
    options = {**OPTIONS, "init": init, "grafting": grafting}
    optimizer, other = (
        Optimizer(model.parameters(), **options),
        Optimizer(twin.parameters(), **options),
    )
    grads = scaler()
    for step in range(5):
        scaled_step(model, optimizer, grads, step, unscale)
        fit(twin, other, [batch(step)])
    assert_close(model, optimizer, twin, other)


@pytest.mark.parametrize("accumulate", [False, True], ids=["whole", "micro-batches"])
def test_unscale_and_clip(accumulate: bool) -> None:
    """Clipping sees un-scaled gradients; the factors are those of the gradients before it."""
    model, twin = network(), network()
    optimizer, other = (
        Optimizer(model.parameters(), **OPTIONS),
        Optimizer(twin.parameters(), **OPTIONS),
    )
    grads = scaler()
    slices = (slice(3), slice(3, None)) if accumulate else (slice(None),)
    for step in range(5):
        x, y = batch(step)
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            for part in slices:
                loss = squares(m(x[part]), y[part]) * (len(x[part]) / len(x))
                (grads.scale(loss) if m is model else loss).backward()
            if m is model:
                grads.unscale_(o)
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            if m is model:
                grads.step(o)
                grads.update()
            else:
                o.step()
    assert_close(model, optimizer, twin, other)


def test_growing_scale() -> None:
    """The scale of this step counts, not that of the step before."""
    model, twin = network(), network()
    options = {**OPTIONS, "T": 1, "grafting": None, "init": "identity"}
    optimizer, other = (
        Optimizer(model.parameters(), **options),
        Optimizer(twin.parameters(), **options),
    )
    grads = scaler(growth_interval=1, growth_factor=4.0)
    for step in range(4):
        scaled_step(model, optimizer, grads, step)
        fit(twin, other, [batch(step)])
    assert grads.get_scale() == SCALE * 4**4
    assert_close(model, optimizer, twin, other)


def test_disabled_scaler() -> None:
    model, twin = network(), network()
    optimizer, other = (
        Optimizer(model.parameters(), **OPTIONS),
        Optimizer(twin.parameters(), **OPTIONS),
    )
    grads = scaler(enabled=False)
    for step in range(3):
        scaled_step(model, optimizer, grads, step)
        fit(twin, other, [batch(step)])
    assert_same_weights(model, twin)


def test_scaler_as_an_argument() -> None:
    """For loops that un-scale and step by themselves; the scaler is never part of a group."""
    model, twin = network(), network()
    grads = scaler()
    optimizer = Optimizer(model.parameters(), grad_scaler=grads, **OPTIONS)
    other = Optimizer(twin.parameters(), **OPTIONS)
    for step in range(4):
        optimizer.zero_grad()
        x, y = batch(step)
        grads.scale(squares(model(x), y)).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.div_(SCALE)
        optimizer.step()
        fit(twin, other, [(x, y)])
    assert "grad_scaler" not in optimizer.param_groups[0]
    assert_close(model, optimizer, twin, other)


@pytest.mark.parametrize("zero", ["optimizer", "model"])
@pytest.mark.parametrize("at", [0, 1, 2], ids="overflow at step {}".format)
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_"])
def test_overflow_is_skipped(unscale: bool, at: int, zero: str) -> None:
    """Nothing moves, and the update that was due is taken at the next good step."""
    model, twin = network(), network()
    optimizer, other = (
        Optimizer(model.parameters(), **OPTIONS),
        Optimizer(twin.parameters(), **OPTIONS),
    )
    grads = scaler()
    clear = (model if zero == "model" else optimizer).zero_grad
    for step in range(at):
        scaled_step(model, optimizer, grads, step, unscale, zero=clear)
    before, state = weights(model), state_by_name(model, optimizer)
    scaled_step(model, optimizer, grads, 50, unscale, factor=float("inf"), zero=clear)
    assert grads.get_scale() == SCALE / 2
    assert_same_numbers(weights(model), before)
    assert_same_numbers(state_by_name(model, optimizer), state)
    for step in range(at, 6):
        scaled_step(model, optimizer, grads, step, unscale, zero=clear)
        assert finite(model, optimizer)
        if step == at:
            assert last_update(model, optimizer) == at - at % 2
    fit(twin, other, [batch(step) for step in range(6)])
    assert_close(model, optimizer, twin, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4], ids="step {}".format)
def test_a_bad_batch_without_scaler(at: int, value: float) -> None:
    """Skipped whole, counted, and the missed update is taken within the next two steps."""
    model = network()
    optimizer = Optimizer(model.parameters(), **{**OPTIONS, "weight_decay": 0.1, "T": 4})
    fit(model, optimizer, [batch(step) for step in range(at)])
    assert optimizer.skipped_updates == 0
    before, state = weights(model), state_by_name(model, optimizer)
    x, y = batch(50)
    fit(model, optimizer, [(x, value * y)])
    assert optimizer.skipped_updates == 1
    assert_same_numbers(weights(model), before)
    after = state_by_name(model, optimizer)
    if at:
        assert_same_numbers(after, state)
    assert finite(model, optimizer)
    fit(model, optimizer, [batch(at + 1), batch(at + 2)])
    assert optimizer.skipped_updates == 1
    assert finite(model, optimizer)
    due = at - at % 4
    assert last_update(model, optimizer) >= due
    if at == due:
        assert at < last_update(model, optimizer) <= at + 2
    assert all(not torch.equal(p, before[key]) for key, p in weights(model).items())


@pytest.mark.parametrize("where", ["0.weight", "2.weight", "3.bias"])
def test_one_bad_gradient_skips_everything(where: str) -> None:
    """In a layer, in a parameter of the fallback, or in a bias."""
    model = network()
    optimizer = Optimizer(model.parameters(), **OPTIONS)
    fit(model, optimizer, [batch(0)])
    before, state = weights(model), state_by_name(model, optimizer)
    optimizer.zero_grad()
    x, y = batch(1)
    squares(model(x), y).backward()
    grad = model.get_parameter(where).grad
    assert grad is not None
    grad.view(-1)[0] = float("nan")
    optimizer.step()
    assert_same_numbers(weights(model), before)
    assert_same_numbers(state_by_name(model, optimizer), state)
    assert optimizer.skipped_updates == 1


def test_one_bad_micro_batch_skips_the_step() -> None:
    model = network()
    optimizer = Optimizer(model.parameters(), **{**OPTIONS, "T": 1})
    fit(model, optimizer, [batch(0)])
    before = weights(model)
    optimizer.zero_grad()
    for factor in (1.0, float("nan")):
        x, y = batch(1)
        (factor * squares(model(x), y)).backward()
    optimizer.step()
    assert_same_numbers(weights(model), before)
    fit(model, optimizer, [batch(2)])
    assert last_update(model, optimizer) == 2


def test_training_survives_many_bad_batches() -> None:
    model, (x, y) = network(), batch(0)
    optimizer = Optimizer(model.parameters(), **OPTIONS)
    for step in range(12):
        fit(model, optimizer, [(x * (float("inf") if step % 3 == 0 else 1.0), y)])
    assert optimizer.skipped_updates == 4
    assert finite(model, optimizer)


@pytest.mark.parametrize("with_scaler", [False, True])
def test_autocast(with_scaler: bool) -> None:
    """bfloat16 in the forward pass, float32 factors close to those without."""
    model, twin = network(), network()
    optimizer, other = (
        Optimizer(model.parameters(), **OPTIONS),
        Optimizer(twin.parameters(), **OPTIONS),
    )
    grads = scaler(enabled=with_scaler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            optimizer.zero_grad()
            x, y = batch(step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(x)
            assert out.dtype == torch.bfloat16
            grads.scale(squares(out.float(), y)).backward()
            grads.step(optimizer)
            grads.update()
            fit(twin, other, [(x, y)])
    expected = weights(twin)
    for key, p in weights(model).items():
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, expected[key], rtol=0.1, atol=0.02, msg=key)
    reference = state_by_name(twin, other)
    for key, value in state_by_name(model, optimizer).items():
        if key.endswith(("/K", "/C")):
            assert value.dtype == torch.float32
            error = (value - reference[key]).norm() / reference[key].norm()
            assert error < 0.1, key


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_backward_under_autocast(where: str) -> None:
    """Statistics are taken in full precision; what reaches the last layer is not rounded."""
    model, twin = network(), network()
    optimizer, other = (
        Optimizer(model.parameters(), **OPTIONS),
        Optimizer(twin.parameters(), **OPTIONS),
    )
    x, y = batch(0)
    for m, o, enabled in ((model, optimizer, where == "inside"), (twin, other, False)):
        loss = squares(m(x), y)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss.backward()
        o.step()
    for name in ("A", "B") if is_kfac() else ("K", "C"):
        actual = optimizer.state[model[3].weight][name]
        torch.testing.assert_close(actual, other.state[twin[3].weight][name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_model(dtype: torch.dtype) -> None:
    """Parameters in low precision, factors in float32 on demand; everything stays finite."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    optimizer = Optimizer(model.parameters(), preconditioner_dtype=torch.float32, **OPTIONS)
    before = weights(model)
    for step in range(4):
        x, y = batch(step)
        fit(model, optimizer, [(x.to(dtype), y.to(dtype))])
    assert optimizer.skipped_updates == 0
    assert finite(model, optimizer)
    assert all(not torch.equal(p, before[key]) for key, p in weights(model).items())
