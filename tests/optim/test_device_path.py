"""The path that never waits for a device gives what the path on the host gives.

On CUDA a step does not know whether its batch is finite: it is queued with every update gated by
a flag, and the flag is looked at later. Here the flag is kept a tensor on the CPU.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from oracles.flags import Delayed, flag
from oracles.optimizers import Optimizer, skip_unless_decomposable
from oracles.zoo import STRUCTURES
from tnkfac.optim import base

BOTH_OPTIMIZERS = True


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "non_finite", flag)
    monkeypatch.setattr(base, "AsyncFlags", Delayed)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, groups=2),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.ConvTranspose1d(4, 3, 2, stride=2),
        nn.Flatten(),
        nn.Linear(36, 3),
    ).double()


def batch(step: int, bad: bool = False) -> tuple[Tensor, Tensor]:
    x = torch.linspace(0, 5, 8 * 2 * 8, dtype=torch.float64).reshape(8, 2, 8)
    x = torch.sin(x * (step + 1))
    return (x * float("nan") if bad else x), torch.arange(8) % 3


def train(steps: int, bad: Iterable[int] = (), **options: Any) -> tuple[list[Tensor], Any]:
    model = network()
    optimizer = Optimizer(model.parameters(), lr=0.03, T=2, weight_decay=0.1, **options)
    for step in range(steps):
        optimizer.zero_grad()
        x, y = batch(step, step in bad)
        nn.functional.cross_entropy(model(x), y).backward()
        for module in model.modules():  # a NaN batch spoils running statistics, not our concern
            if isinstance(module, nn.BatchNorm1d):
                module.reset_running_stats()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], optimizer


OPTIONS: list[dict[str, Any]] = [
    {"structures": "dense"},
    {"structures": "diagonal", "fallback": "sgd"},
    {"structures": "block3diagonal", "grafting": None, "kl_clip": 1e-3},
    {"structures": "dense", "grafting": "sgd", "momentum": 0.0},
    {"structures": "diagonal", "decoupled_weight_decay": False, "grafting": None, "lr_cov": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gated_steps_equal_host_steps(
    options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    expected, _ = train(6, **options)
    request.getfixturevalue("on_device")
    actual, _ = train(6, **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bad", [0, 1, 2], ids=["first", "between-updates", "update"])
def test_a_bad_batch_changes_nothing_and_its_update_is_made_up_for(
    options: dict[str, Any], bad: int, on_device: None
) -> None:
    before, _ = train(bad, **options)
    after, optimizer = train(bad + 1, [bad], **options)
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b)
    assert optimizer.skipped_updates == 1
    state = [v for s in optimizer.state.values() for v in s.values()]
    assert all(bool(v.isfinite().all()) for v in state)
    _, optimizer = train(bad + 3, [bad], **options)
    updates = {row.last_update for row in optimizer.report() if row.approximation}
    assert updates <= {bad + 1, bad + 2}, updates


class Waiting(TorchDispatchMode):
    """Names the operations that would make the host wait for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kfac_approx": "reduce", "grafting": "adam"},
        {"grafting": None, "kl_clip": 1e-3, "normalize_lr_cov": True},
        {
            "init": "identity",
            "grafting": "sgd",
            "fallback": "sgd",
            "kfac_like": True,
            "alpha1": 0.0,
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("structures", ["auto", *STRUCTURES])
def test_no_wait_in_hooks_and_step(
    structures: str, options: dict[str, Any], on_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read back on steps with an update and without, once there is a start.

    The flags that arrive a step later are read by an event on CUDA; here they never arrive.
    """
    monkeypatch.setattr(Delayed, "receive", lambda self, wait=False: None)
    skip_unless_decomposable(structures)
    model = network()
    optimizer = Optimizer(model.parameters(), lr=0.01, T=2, structures=structures, **options)
    for group in optimizer.param_groups:
        group["inv_update_steps"] = 100  # a decomposition waits for the device
    for step in range(5):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        with Waiting() as waiting:
            loss.backward()
            monkeypatch.setattr(base, "non_finite", lambda tensors: torch.zeros(()))
            optimizer.step()
        assert step == 0 or not waiting.seen, (step, waiting.seen)
