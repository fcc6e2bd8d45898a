"""torch's contract: what training loops do around the step."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from oracles.contract import Behaviours, Check, Make, assert_close_weights, batches, moved, tiny
from oracles.loops import assert_same_state, assert_same_weights, fit, squares, weights

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


@behaviour
def training_is_repeatable(make: Make) -> None:
    """Twice the same, bit for bit; and the loss falls."""
    model, twin = tiny(), tiny()
    (batch,) = batches(0, 1)
    losses = fit(model, make(model.parameters(), lr=0.01), [batch] * 20)
    assert losses == fit(twin, make(twin.parameters(), lr=0.01), [batch] * 20)
    assert_same_weights(model, twin)
    assert losses[-1] < 0.9 * losses[0]


@behaviour
def clipping_by_norm(make: Make) -> None:
    """``clip_grad_norm_`` is scaling by hand."""
    model, twin = tiny(), tiny()
    optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))
    for step in range(4):
        backward(model, step)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        backward(twin, step)
        for p in twin.parameters():
            p.grad.mul_(0.1 / (norm + 1e-6))
        other.step()
    assert_close_weights(model, twin)


@behaviour
def clipping_by_value(make: Make) -> None:
    """The step uses what ``clip_grad_value_`` leaves."""
    model, twin = tiny(), tiny()
    optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))
    for step in range(4):
        backward(model, step)
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
        backward(twin, step)
        for p in twin.parameters():
            p.grad = p.grad.clamp(-0.01, 0.01)
        other.step()
    assert_same_weights(model, twin)


@behaviour
def a_grad_scaler_changes_nothing(make: Make) -> None:
    """Scaled by a power of two, gradients are the same."""
    for unscale in (False, True):
        model, twin = tiny(), tiny()
        optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step, (x, y) in enumerate(batches(0, 4)):
            optimizer.zero_grad()
            scaler.scale(squares(model(x), y)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            fit(twin, other, batches(step, 1))
        assert_close_weights(model, twin)


@behaviour
def a_grad_scaler_skips_what_is_not_finite(make: Make) -> None:
    """Parameters and momenta stay; the next step is as if the batch had not been."""
    model, twin = tiny(), tiny()
    optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in (0, 1, 2):
        for x, y in batches(step, 1):
            optimizer.zero_grad()
            scale = float("inf") if step == 1 else 1.0
            before = weights(model)
            scaler.scale(squares(model(x), y) * scale).backward()
            scaler.step(optimizer)
            scaler.update()
        if step == 1:
            assert not moved(model, before)
            assert scaler.get_scale() == 2.0**9
        else:
            fit(twin, other, batches(step, 1))
    assert_close_weights(model, twin)


@behaviour
def an_average_follows(make: Make) -> None:
    """``AveragedModel`` has the mean of the weights, and does not disturb the training."""
    model, twin = tiny(), tiny()
    optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))
    average = AveragedModel(model)
    seen = []
    for step in range(4):
        fit(model, optimizer, batches(step, 1))
        average.update_parameters(model)
        seen.append(weights(model))
        for x, y in batches(10, 1):
            squares(average(x), y).backward()
    update_bn([x for x, _ in batches(0, 1)], average)
    fit(twin, other, batches(0, 4))
    assert_same_weights(model, twin)
    for name, p in weights(average.module).items():
        torch.testing.assert_close(p, sum(w[name] for w in seen) / 4, msg=name)


@behaviour
def an_exponential_average_may_be_swapped_in(make: Make) -> None:
    """Weights are replaced in place for a while; training goes on as if they had not been."""
    model, twin = tiny(), tiny()
    optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(4):
        fit(model, optimizer, batches(step, 1))
        average.update_parameters(model)
        kept = weights(model)
        model.load_state_dict(average.module.state_dict())
        model.eval()
        for x, _ in batches(10, 1):
            model(x)
        model.train()
        model.load_state_dict(kept)
    fit(twin, other, batches(0, 4))
    assert_same_weights(model, twin)


@behaviour
def weights_may_be_written_from_outside(make: Make) -> None:
    """In place or through ``data``: steps go on from there."""
    model, twin = tiny(), tiny()
    optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))
    for step in range(4):
        fit(model, optimizer, batches(step, 1))
        fit(twin, other, batches(step, 1))
        for p in model.parameters():
            p.data = p.data.clone()  # what vector_to_parameters and flatteners do
        flat = nn.utils.parameters_to_vector(twin.parameters())
        nn.utils.vector_to_parameters(flat, twin.parameters())
    assert_same_weights(model, twin)


@behaviour
def moving_the_model_before_the_first_step(make: Make) -> None:
    """To another dtype, with the optimizer already there."""
    model, twin = tiny(torch.float32), tiny()
    optimizer = make(model.parameters(), lr=0.01)
    model.double()
    twin.load_state_dict(model.state_dict())
    fit(model, optimizer, batches(0, 3))
    fit(twin, make(twin.parameters(), lr=0.01), batches(0, 3))
    assert_same_weights(model, twin)


@behaviour
def two_optimizers_on_one_model(make: Make) -> None:
    """Each trains its own layers, as one does with two groups."""
    model, twin = tiny(), tiny()

    def parts(m: nn.Module) -> list[list[nn.Parameter]]:
        return [[*m.first.parameters(), m.scale], [*m.norm.parameters(), *m.last.parameters()]]

    pair = [make(params, lr=lr) for params, lr in zip(parts(model), (0.01, 0.02), strict=True)]
    groups = [{"params": p, "lr": lr} for p, lr in zip(parts(twin), (0.01, 0.02), strict=True)]
    other = make(groups)
    for step in range(5):
        backward(model, step)
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
        fit(twin, other, batches(step, 1))
    assert_same_weights(model, twin)


@behaviour
def an_optimizer_per_parameter_in_backward(make: Make) -> None:
    """A step as soon as a gradient is there, as to save memory, is the step of all at once."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 8, bias=False), nn.Tanh(), nn.LayerNorm(8)]
        return nn.Sequential(*layers, nn.Linear(8, 3, bias=False)).double()

    model, twin = network(), network()
    own = {p: make([p], lr=0.01) for p in model.parameters()}

    def hook(p: Tensor) -> None:
        own[p].step()
        own[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for x, y in batches(0, 5):
        squares(model(x), y).backward()
        assert all(p.grad is None for p in model.parameters())
    fit(twin, make(twin.parameters(), lr=0.01), batches(0, 5))
    assert_close_weights(model, twin)


@behaviour
def gradients_add_up(make: Make) -> None:
    """Two halves of a batch are the batch."""
    model, twin = tiny(), tiny()
    optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))
    for x, y in batches(0, 4):
        optimizer.zero_grad()
        for part in (slice(4), slice(4, 8)):
            (squares(model(x[part]), y[part]) / 2).backward()
        optimizer.step()
        fit(twin, other, [(x, y)])
    assert_close_weights(model, twin, rtol=1e-8)


@behaviour
def a_model_may_be_copied(make: Make) -> None:
    """Passes of the copy do not disturb the training of the model."""
    model, twin = tiny(), tiny()
    optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))
    fit(model, optimizer, batches(0, 2))
    copied = copy.deepcopy(model)
    for step in range(2, 5):
        backward(copied, step + 10)
        fit(model, optimizer, batches(step, 1))
    fit(twin, other, batches(0, 5))
    assert_same_weights(model, twin)
    assert_same_state(model, optimizer, twin, other)


@behaviour
def an_optimizer_may_be_replaced(make: Make) -> None:
    """A second one on the same parameters trains as one on a fresh model with these weights."""
    model, twin = tiny(), tiny()
    fit(model, make(model.parameters(), lr=0.01), batches(0, 3))
    twin.load_state_dict(model.state_dict())
    fit(model, make(model.parameters(), lr=0.02), batches(3, 4))
    fit(twin, make(twin.parameters(), lr=0.02), batches(3, 4))
    assert_same_weights(model, twin)


@behaviour.for_every_kind()
def test_loops(check: Check, make: Make) -> None:
    """Each behaviour, for each kind of optimizer."""
    check(make)
