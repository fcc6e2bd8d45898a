"""What an optimizer says, and when it keeps quiet."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from oracles.loops import fit, mlp_batch, squares, weights
from oracles.optimizers import Optimizer, only_singd
from oracles.zoo import mlp

BOTH_OPTIMIZERS = True


class Direct(nn.Module):
    """Uses the weight of a layer without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.used = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 4]`` to ``[N, 4]``."""
        return functional.linear(self.called(x), self.used.weight, self.used.bias)


def steps(optimizer: Any, loss: Callable[[], Tensor], count: int = 3) -> list[str]:
    """Train; the messages about statistics."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    return [str(w.message) for w in caught if "No statistics" in str(w.message)]


def test_weight_used_directly_is_captured_at_its_call() -> None:
    model = Direct()
    optimizer = Optimizer(model.parameters(), T=1)
    before = weights(model)
    assert not steps(optimizer, lambda: model(torch.ones(2, 4)).square().sum())
    assert all(not torch.equal(p, before[name]) for name, p in weights(model).items())
    reasons = {row.name: row.reason for row in optimizer.report()}
    assert reasons["used.weight"] == reasons["called.weight"] == ""


def double(layer: nn.Linear, x: Tensor) -> Tensor:
    """A function far from the model, which no method of it tells of."""
    return functional.linear(x, layer.weight, layer.bias)


class Handed(nn.Module):
    """Hands a layer to a function that uses its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.used = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 4]`` to ``[N, 4]``."""
        return double(self.used, self.called(x))


def test_weight_used_elsewhere_is_named_once() -> None:
    """It moves all the same, and all calls are looked at from then on."""
    model = Handed()
    optimizer = Optimizer(model.parameters(), T=1)
    before = weights(model)
    found = steps(optimizer, lambda: model(torch.ones(2, 4)).square().sum())
    assert len(found) == 1
    assert "used.weight" in found[0]
    assert "called.weight" not in found[0]
    assert all(not torch.equal(p, before[name]) for name, p in weights(model).items())
    reasons = {row.name: row.reason for row in optimizer.report()}
    assert reasons["used.weight"] == reasons["called.weight"] == ""
    assert all(row.last_update == 2 for row in optimizer.report())


def test_evaluation_mode_is_named() -> None:
    """A model fine-tuned in ``eval()`` mode measures nothing: never without a word."""
    model = mlp(4, 3, 2).eval()
    optimizer = Optimizer(model.parameters(), T=1)
    x, y = mlp_batch(0, 4, 2)
    (message,) = steps(optimizer, lambda: squares(model(x), y))
    assert "0.weight, 2.weight" in message
    model.train()
    assert not steps(optimizer, lambda: squares(model(x), y))
    assert all(row.last_update is not None for row in optimizer.report())


def quiet_ordinary(model: Any, optimizer: Any) -> None:
    fit(model, optimizer, [mlp_batch(step, 4, 2) for step in range(4)])


def quiet_bad_batches(model: Any, optimizer: Any) -> None:
    x, y = mlp_batch(0, 4, 2)
    fit(model, optimizer, [(x * float("nan"), y), (x, y), (x * float("nan"), y), (x, y)])


def quiet_excluded(model: Any, optimizer: Any) -> None:
    """The user asked for it."""
    x, y = mlp_batch(0, 4, 2)
    with optimizer.no_stats():
        squares(model(x), y).backward()
    optimizer.step()


def quiet_frozen_and_unused(model: Any, optimizer: Any) -> None:
    model[0].weight.requires_grad_(False)
    x, y = mlp_batch(0, 3, 2)
    squares(model[2](x), y).backward()
    optimizer.step()


def quiet_template_step(model: Any, optimizer: Any) -> None:
    """What distributed checkpoints do to create the state."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(closure=None)


QUIET = (
    quiet_ordinary,
    quiet_bad_batches,
    quiet_excluded,
    quiet_frozen_and_unused,
    quiet_template_step,
)


@pytest.mark.parametrize("loop", QUIET)
def test_no_false_alarm(loop: Callable[[Any, Any], None]) -> None:
    model = mlp(4, 3, 2)
    optimizer = Optimizer(model.parameters(), T=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop(model, optimizer)
    assert not [w for w in caught if "No statistics" in str(w.message)]


def test_a_failed_decomposition_starts_at_a_scaled_identity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training goes on, and says so."""
    only_singd()

    def fails(matrix: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError("failed to converge")  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    model = mlp(4, 3, 2)
    optimizer = Optimizer(model.parameters(), T=2, structures=("dense", "block2diagonal"))
    with pytest.warns(UserWarning, match="failed to converge"):
        fit(model, optimizer, [mlp_batch(0, 4, 2)])
    K = optimizer.state[model[0].weight]["K"][0]
    torch.testing.assert_close(K, K[0, 0] * torch.eye(5).double())
    losses = fit(model, optimizer, [mlp_batch(0, 4, 2)] * 20)
    assert losses[-1] < losses[0]
