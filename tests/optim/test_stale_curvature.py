"""Curvature that is not measured any more: told once, with names and cause."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from oracles.loops import mlp_batch, squares
from oracles.optimizers import EVERY_CURVATURE
from oracles.zoo import mlp


def clear_hooks(model: nn.Module) -> None:
    for module in model.modules():
        module._forward_hooks.clear()


def evaluate(model: nn.Module) -> None:
    model.eval()


def evaluate_one(model: nn.Module) -> None:
    model[0].eval()


STALE: dict[Callable[[nn.Module], None], tuple[str, tuple[str, ...]]] = {
    clear_hooks: ("hooks of 0.weight, 2.weight were removed", ("0.weight", "2.weight")),
    evaluate: ("not called in training mode", ("0.weight", "2.weight")),
    evaluate_one: ("not called in training mode", ("0.weight",)),
}


def stale_messages(
    model: nn.Module, optimizer: Any, count: int, loop: Callable[..., Any] | None = None
) -> list[list[str]]:
    """Messages about stale curvature, step by step."""
    found = []
    x, y = mlp_batch(0, 4, 2)
    for _ in range(count):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if loop is None:
                optimizer.zero_grad()
                squares(model(x), y).backward()
                optimizer.step()
            else:
                loop(model, optimizer, x, y)
        found.append([str(w.message) for w in caught if "in a row" in str(w.message)])
    return found


@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize("change", STALE)
@pytest.mark.parametrize("kind", EVERY_CURVATURE)
def test_curvature_that_is_not_measured_any_more(
    kind: str, change: Callable[[nn.Module], None], T: int
) -> None:
    """Told once, at the third update that is missed, with names and cause."""
    model = mlp(4, 3, 2)
    name = "T" if kind.startswith("SINGD") else "factor_update_steps"
    optimizer = EVERY_CURVATURE[kind](model, **{name: T})
    assert stale_messages(model, optimizer, T) == [[]] * T
    change(model)
    cause, names = STALE[change]
    found = stale_messages(model, optimizer, 5 * T)
    (message,) = found[2 * T]
    assert sum(map(len, found)) == 1
    assert cause in message
    assert all((name in message) == (name in names) for name in ("0.weight", "2.weight"))


def loop_excluded(model: Any, optimizer: Any, x: Tensor, y: Tensor) -> None:
    with optimizer.no_stats():
        squares(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def loop_without_gradients(model: Any, optimizer: Any, x: Tensor, y: Tensor) -> None:
    model.eval()
    optimizer.zero_grad()
    optimizer.step()


def loop_bad_batches(model: Any, optimizer: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    squares(model(x * float("nan")), y).backward()
    optimizer.step()


def loop_closed(model: Any, optimizer: Any, x: Tensor, y: Tensor) -> None:
    """The user asked for it."""
    optimizer.close()
    squares(model(x), y).backward()
    optimizer.step()


def loop_now_and_then(model: Any, optimizer: Any, x: Tensor, y: Tensor) -> None:
    """Never three in a row."""
    for training in (False, False, True):
        model.train(training)
        optimizer.zero_grad()
        squares(model(x), y).backward()
        optimizer.step()


def loop_resting(model: Any, optimizer: Any, x: Tensor, y: Tensor) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model.eval()
    squares(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["SINGD auto", "KFAC eigen"])
@pytest.mark.parametrize(
    "loop",
    [
        loop_excluded,
        loop_without_gradients,
        loop_bad_batches,
        loop_closed,
        loop_now_and_then,
        loop_resting,
    ],
)
def test_nobody_else_is_told_of_stale_curvature(kind: str, loop: Callable[..., None]) -> None:
    model = mlp(4, 3, 2)
    optimizer = EVERY_CURVATURE[kind](model, **({"T": 1} if "SINGD" in kind else {}))
    assert stale_messages(model, optimizer, 2) == [[]] * 2
    assert stale_messages(model, optimizer, 6, loop) == [[]] * 6
