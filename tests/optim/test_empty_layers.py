"""Layers without entries, empty batches and lazy layers train as they do with AdamW."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.variants import VARIANTS
from tnkfac import KFAC, SINGD

STRUCTURES = (
    "block3diagonal",
    "hierarchical2_2",
    "triltoeplitz",
    "triutoeplitz",
    "triltopleftdiag",
    "trilbottomrightdiag",
    "triutopleftdiag",
    "triubottomrightdiag",
)
ALL: dict[str, Any] = {
    **VARIANTS,
    **{f"SINGD {name}": partial(SINGD, structures=name, T=1) for name in STRUCTURES},
    **{
        f"KFAC {method} {name}": partial(KFAC, structures=name, compute_method=method)
        for method in ("eigen", "ekfac", "cholesky")
        for name in ("diagonal", "block3diagonal")
    },
    "SINGD natural": partial(SINGD, structures="diagonal", grafting=None, kl_clip=1e-2),
    "SINGD adam": partial(SINGD, grafting="adam", max_state_ratio=1.0),
    "KFAC classic": partial(KFAC, damping=1e-2),
    "KFAC forward-only": partial(KFAC, fisher_type="forward-only"),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:max_state_ratio", "ignore:Initializing zero-element", "ignore:No statistics"
)


class Beside(nn.Module):
    """A layer beside one of ordinary size; it sees the first inputs only."""

    def __init__(self, layer: nn.Module, *seen: int) -> None:
        super().__init__()
        self.body, self.layer, self.seen = nn.Linear(4, 3), layer, seen

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.new_ones(len(x), *self.seen))
        return self.body(x) + y.flatten(1).sum(1, keepdim=True)


class Through(nn.Module):
    """Nothing passes between the two layers."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 0, bias=bias), nn.Linear(0, 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x))
        return y


Build = Callable[[], nn.Module]
MODELS: dict[str, Build] = {
    "no outputs": lambda: Beside(nn.Linear(4, 0), 4),
    "no outputs, no bias": lambda: Beside(nn.Linear(4, 0, bias=False), 4),
    "no inputs": lambda: Beside(nn.Linear(0, 5), 0),
    "no inputs, no bias": lambda: Beside(nn.Linear(0, 5, bias=False), 0),
    "neither": lambda: Beside(nn.Linear(0, 0), 0),
    "bottleneck": lambda: Through(True),
    "bottleneck, no bias": lambda: Through(False),
    "Conv1d": lambda: Beside(nn.Conv1d(0, 3, 2), 0, 4),
    "Conv2d in groups": lambda: Beside(nn.Conv2d(0, 3, 2, groups=3), 0, 4, 4),
    "Conv3d": lambda: Beside(nn.Conv3d(0, 3, 1), 0, 2, 2, 2),
    "lazy, no outputs": lambda: Beside(nn.LazyLinear(0), 4),
    "lazy, no inputs": lambda: Beside(nn.LazyLinear(5), 0),
    "lazy, no inputs, no bias": lambda: Beside(nn.LazyLinear(5, bias=False), 0),
}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().sum()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("model_name", MODELS)
def test_layers_without_entries(model_name: str, name: str) -> None:
    """Their biases move as AdamW moves them, and every way to look at them works."""
    torch.manual_seed(0)
    model = MODELS[model_name]()
    optimizer = ALL[name](model.parameters(), lr=1e-2)
    if model_name.startswith("lazy"):
        with torch.no_grad():
            model(torch.zeros(6, 4))
        nn.init.zeros_(model.get_parameter("layer.weight"))
        if model.layer.bias is not None:  # torch leaves it as it finds the memory
            nn.init.zeros_(model.layer.bias)
    train(model, optimizer, [torch.randn(6, 4) for _ in range(4)])
    assert optimizer.skipped_updates == 0
    assert all(p.isfinite().all() for p in model.parameters())
    assert len(optimizer.report()) == len(list(model.parameters()))
    for looked_at in (optimizer.diagnostics(), optimizer.report(), optimizer.placement()):
        assert str(looked_at)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, [torch.randn(6, 4)])
    for row in optimizer.report():
        if 0 in row.shape and not model_name.startswith("lazy"):
            assert row.reason in (
                "it has no entries",
                "its weight is not captured: it has no entries",
            )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_bias_without_weights_is_adamws(name: str) -> None:
    torch.manual_seed(0)
    model, twin = Through(True).double(), Through(True).double()
    twin.load_state_dict(model.state_dict())
    batches = [torch.randn(6, 4, dtype=torch.float64) for _ in range(5)]
    train(model, VARIANTS[name](model.parameters(), lr=1e-2), batches)
    train(twin, torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0), batches)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["SINGD dense", "KFAC eigen"])
@pytest.mark.parametrize("model_name", ["no outputs", "bottleneck", "lazy, no outputs"])
def test_pictures(model_name: str, name: str, tmp_path: Path) -> None:
    model = MODELS[model_name]()
    optimizer = ALL[name](model.parameters())
    train(model, optimizer, [torch.randn(6, 4)])
    assert optimizer.report().draw(tmp_path / "report.png").stat().st_size


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("empty", [(0,), (1,), (0, 1, 2)], ids=str)
def test_empty_batches(empty: tuple[int, ...], name: str) -> None:
    """They change no factor: training goes on as if they had not been seen by these."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = ALL[name](model.parameters(), lr=1e-2)
    batches = [torch.randn(0 if i in empty else 6, 4) for i in range(6)]
    before = loss_of(model, torch.cat(batches)).item()
    train(model, optimizer, batches)
    assert optimizer.skipped_updates == 0
    assert loss_of(model, torch.cat(batches)).item() < before
    assert all(row.last_update is not None for row in optimizer.report())


def _in_eval_mode(model: nn.Module) -> None:
    model.eval()


def _after_a_dry_run(model: nn.Module) -> None:
    with torch.no_grad():
        model(torch.randn(2, 4))


def _on_an_empty_batch(model: nn.Module) -> None:
    loss_of(model, torch.randn(0, 4)).backward()


STARTS = {
    f.__name__[1:].replace("_", " "): f
    for f in (_in_eval_mode, _after_a_dry_run, _on_an_empty_batch)
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("start", STARTS)
def test_lazy_layers_that_are_first_called(start: str, name: str) -> None:
    """They train from the first step, whatever the pass that made them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(2))
    optimizer = ALL[name](model.parameters(), lr=1e-2)
    STARTS[start](model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in eval mode: no statistics
        optimizer.step()
        before = [p.detach().clone() for p in model.parameters() if not nn.parameter.is_lazy(p)]
        train(model, optimizer, [torch.randn(6, 4) for _ in range(3)])
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=False))
    measured = {row.last_update is not None for row in optimizer.report()}
    assert measured == {start != "in eval mode"}
