"""Compiled training steps: the optimizer runs as it does in eager mode."""

import warnings
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.loops import assert_same_state, assert_same_weights
from oracles.optimizers import EVERY_CURVATURE
from tnkfac import KFAC, SINGD, KFACPreconditioner

Loop = Callable[[nn.Module, Any, Tensor], Tensor]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.LayerNorm(12),
        nn.Linear(12, 3),
    ).double()


def batch(step: int) -> Tensor:
    return torch.linspace(-1, 1 + step, 48, dtype=torch.float64).reshape(6, 2, 4).sin()


def cross_entropy(output: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, torch.arange(6) % 3)


def whole(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = cross_entropy(model(x))
    loss.backward()
    optimizer.step()
    return loss


def in_place_zeros(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=False)
    cross_entropy(model(x)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return x


def closure(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x))
        loss.backward()
        return loss

    return optimizer.step(evaluate)


def without_statistics(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = cross_entropy(model(x))
    loss.backward()
    with optimizer.no_stats():
        model(2 * x).square().mean().backward()
    optimizer.step()
    return loss


def micro_batches(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    for part in (x[:4], x[4:]):
        nn.functional.mse_loss(model(part), torch.ones(len(part), 3).double()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return x


def scaled(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer.zero_grad()
    loss = cross_entropy(model(x))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    return loss


def reporting(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    loss = whole(model, optimizer, x)
    optimizer.report()
    optimizer.diagnostics()
    return loss


def sampled(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    output = model(x)
    optimizer.sample_fisher(output, generator=torch.Generator().manual_seed(1))
    cross_entropy(output).backward()
    optimizer.step()
    return x


def fisher_pass(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    output = model(x)
    with optimizer.fisher_pass():
        output.square().mean().backward(retain_graph=True)
    cross_entropy(output).backward()
    optimizer.step()
    return x


def preconditioned(model: nn.Module, preconditioner: Any, x: Tensor) -> Tensor:
    model.zero_grad()
    cross_entropy(model(x)).backward()
    preconditioner.step()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad, alpha=0.1)
    return x


def assert_compiled_equals_eager(
    make: Callable[[nn.Module], Any], loop: Loop, backend: str, steps: int = 3
) -> None:
    """The same weights up to the rounding of the compiled model, and dates of updates."""
    torch._dynamo.reset()
    models = [network(), network()]
    optimizers = [make(model) for model in models]
    compiled = torch.compile(loop, backend=backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="tnkfac")
        for step in range(steps):
            compiled(models[0], optimizers[0], batch(step))
            loop(models[1], optimizers[1], batch(step))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    dates = [[row.last_update for row in optimizer.report()] for optimizer in optimizers]
    assert dates[0] == dates[1]
    assert max(date for date in dates[0] if date is not None) >= 0


@pytest.mark.parametrize("kind", ["SINGD auto", "SINGD diagonal", "KFAC ekfac"])
def test_a_compiled_training_step(kind: str) -> None:
    assert_compiled_equals_eager(EVERY_CURVATURE[kind], whole, "eager")


LOOPS = (in_place_zeros, closure, without_statistics, micro_batches, scaled, reporting)


@pytest.mark.parametrize(
    ("kind", "loop"), zip(cycle(["SINGD dense", "KFAC eigen"]), LOOPS, strict=False)
)
def test_compiled_loops_of_other_kinds(kind: str, loop: Loop) -> None:
    assert_compiled_equals_eager(EVERY_CURVATURE[kind], loop, "aot_eager")


OTHERS: dict[str, tuple[Callable[[nn.Module], Any], Loop]] = {
    "drawn targets": (lambda model: KFAC(model, fisher_type="mc"), sampled),
    "passes for the factors": (lambda model: KFAC(model, fisher_type="mc"), fisher_pass),
    "adaptive damping": (lambda model: KFAC(model, adaptive_damping=True), closure),
    "a preconditioner": (KFACPreconditioner, preconditioned),
    "a schedule of a preconditioner": (
        lambda model: KFACPreconditioner(model, lr=lambda step: 0.1 / (step + 1)),
        preconditioned,
    ),
    "a callable interval": (lambda model: SINGD(model, T=lambda step: 2), whole),
}


@pytest.mark.parametrize("name", OTHERS)
def test_compiled_loops_of_one_optimizer(name: str) -> None:
    make, loop = OTHERS[name]
    assert_compiled_equals_eager(make, loop, "aot_eager", steps=5)


@pytest.mark.parametrize("kind", EVERY_CURVATURE)
def test_methods_compiled_alone(kind: str) -> None:
    """To the last bit, with a scheduler, which wraps ``step``, and hooks around it."""
    torch._dynamo.reset()
    models, calls = [network(), network()], [[], []]
    optimizers = [EVERY_CURVATURE[kind](model, lr=0.01) for model in models]
    for optimizer, seen in zip(optimizers, calls, strict=True):
        optimizer.register_step_pre_hook(lambda *args, seen=seen: seen.append("before"))
        optimizer.register_step_post_hook(lambda *args, seen=seen: seen.append("after"))
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in optimizers]
    zero_grad = torch.compile(optimizers[0].zero_grad, backend="aot_eager")
    take_step = torch.compile(optimizers[0].step, backend="aot_eager")
    for step in range(4):
        for model, zero, take, schedule in (
            (models[0], zero_grad, take_step, schedules[0]),
            (models[1], optimizers[1].zero_grad, optimizers[1].step, schedules[1]),
        ):
            zero()
            cross_entropy(model(batch(step))).backward()
            take()
            schedule.step()
    assert_same_weights(*models)
    assert_same_state(models[0], optimizers[0], models[1], optimizers[1])
    assert calls[0] == calls[1] == ["before", "after"] * 4


@pytest.mark.slow
def test_a_compiled_step_in_the_default_backend() -> None:
    """Inductor orders the sums of the model otherwise; the rest is the same."""
    torch._dynamo.reset()
    models = [network(), network()]
    optimizers = [SINGD(model, T=2) for model in models]
    compiled = torch.compile(whole)
    for step in range(3):
        compiled(models[0], optimizers[0], batch(step))
        whole(models[1], optimizers[1], batch(step))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_a_model_compiled_for_itself_stays_so_in_a_closure() -> None:
    """A step is not compiled, but what it calls may be."""
    runs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph(*args)

        return run

    torch._dynamo.reset()
    model = network()
    optimizer = SINGD(model, T=1)
    compiled = torch.compile(model, backend=backend)
    for step in range(3):
        closure(compiled, optimizer, batch(step))
    assert len(runs) == 3
