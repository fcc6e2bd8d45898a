"""Every warning points at the line of the user: those below that say so."""

import copy
import linecache
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from oracles.loops import mlp_batch, squares
from oracles.zoo import mlp
from tnkfac import KFAC, SINGD, KFACPreconditioner, curvature

OPTIMIZERS: tuple[Any, ...] = (SINGD, KFAC)


def untouched(model: Any, optimizer: Any) -> None:
    """Nothing: no gradient reaches any parameter."""


def in_evaluation_mode(model: Any, optimizer: Any) -> None:
    """Gradients, but no statistics."""
    model.eval()
    x, y = mlp_batch(0, 3, 2)
    squares(model(x), y).backward()


def with_broken_factors(model: Any, optimizer: Any) -> None:
    """What KFAC says of a factor that is not finite."""
    x, y = mlp_batch(0, 3, 2)
    squares(model(x), y).backward()
    inner = getattr(optimizer, "_kfac", optimizer)
    inner.step()
    for state in inner.state.values():
        if "A" in state:
            state["A"].fill_(float("nan"))
    inner.zero_grad()
    for group in inner.param_groups:
        group["inv_update_steps"] = 1
    squares(model(x), y).backward()
    for state in inner.state.values():
        if "last_refresh" in state:
            state["last_refresh"].fill_(-1)


def plainly(model: Any, optimizer: Any) -> None:
    optimizer.step()  # warns


def with_a_closure(model: Any, optimizer: Any) -> None:
    optimizer.step(lambda: torch.zeros(()))  # warns


def through_a_scaler(model: Any, optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))
    for p in model.parameters():  # a scaler wants some gradient
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        break
    scaler.step(optimizer)  # warns


def under_a_scheduler(model: Any, optimizer: Any) -> None:
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()  # warns


def with_hooks(model: Any, optimizer: Any) -> None:
    optimizer.register_step_pre_hook(lambda *args: None)
    optimizer.register_step_post_hook(lambda *args: None)
    optimizer.step()  # warns


def under_the_profiler(model: Any, optimizer: Any) -> None:
    with torch.profiler.profile():
        optimizer.step()  # warns


def without_gradients(model: Any, optimizer: Any) -> None:
    with torch.no_grad():
        optimizer.step()  # warns


@torch.no_grad()
def decorated(model: Any, optimizer: Any) -> None:
    optimizer.step()  # warns


STEPS: tuple[Any, ...] = (
    plainly,
    with_a_closure,
    through_a_scaler,
    under_a_scheduler,
    with_hooks,
    under_the_profiler,
    without_gradients,
    decorated,
)


@contextmanager
def pointing_here() -> Iterator[None]:
    """At least one warning, and all of them at marked lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [w for w in caught if "lr_scheduler.step()" not in str(w.message)]
    assert ours
    for warning in ours:
        assert warning.filename == __file__, warning
        assert "# warns" in linecache.getline(__file__, warning.lineno), warning


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("before", [untouched, in_evaluation_mode])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step(kind: Any, before: Callable[..., None], step: Callable[..., None]) -> None:
    model = mlp(3, 4, 2)
    optimizer = kind(model.parameters())
    before(model, optimizer)
    with pointing_here():
        step(model, optimizer)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_cannot_decompose(step: Callable[..., None]) -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model.parameters())
    with_broken_factors(model, optimizer)
    with pointing_here():
        step(model, optimizer)


@pytest.mark.parametrize("before", [untouched, in_evaluation_mode, with_broken_factors])
def test_a_step_of_the_preconditioner(before: Callable[..., None]) -> None:
    model = mlp(3, 4, 2)
    preconditioner = KFACPreconditioner(model)
    before(model, preconditioner)
    with pointing_here():
        preconditioner.step()  # warns


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_of_a_subclass(kind: Any) -> None:
    class Own(kind):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)  # warns

    optimizer = Own(mlp(3, 4, 2).parameters())
    with pointing_here():
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_of_a_copy(kind: Any) -> None:
    optimizer = copy.deepcopy(kind(mlp(3, 4, 2).parameters()))
    with pointing_here():
        optimizer.step()  # warns


def test_a_step_with_adaptive_damping() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model.parameters(), adaptive_damping=True, damping=0.1)
    x, y = mlp_batch(0, 3, 2)
    with pointing_here():
        optimizer.step(lambda: squares(model(x), y))  # warns


def misspelled_group(kind: Any) -> None:
    kind([{"params": list(mlp(3, 2).parameters()), "weight_deca": 0.1}])  # warns


def misspelled_added_group(kind: Any) -> None:
    optimizer = kind(mlp(3, 2).parameters())
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "momentm": 0.1})  # warns


@pytest.mark.parametrize("construct", [misspelled_group, misspelled_added_group])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_construction(kind: Any, construct: Callable[[Any], None]) -> None:
    with pointing_here():
        construct(kind)


def test_options_of_singd() -> None:
    model = mlp(9, 9)
    with pointing_here():
        SINGD(model.parameters(), kfac_like=True, alpha1=0.5)  # warns
    with pointing_here():
        SINGD(model.parameters(), max_state_ratio=0.1)  # warns


def test_a_start_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrix: Any) -> Any:
        raise torch.linalg.LinAlgError("failed")  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    model = mlp(3, 4, 2)
    optimizer = SINGD(model.parameters(), structures="dense")
    x, y = mlp_batch(0, 3, 2)
    squares(model(x), y).backward()
    with pointing_here():
        optimizer.step()  # warns


def test_estimators() -> None:
    model = mlp(3, 2)
    model.unused = nn.Linear(2, 2).double()
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    x, y = mlp_batch(0, 3, 2)
    with pointing_here():
        curvature.kfac(model, nn.MSELoss(), [(x, y)])  # warns
