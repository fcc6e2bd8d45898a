"""What ``report()`` says beside its rows: which guards acted."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oracles.loops import mlp_batch, squares
from oracles.optimizers import Optimizer
from oracles.zoo import mlp

BOTH_OPTIMIZERS = True


@pytest.mark.parametrize("bound", [1e-9, 1e9, None])
def test_the_trust_region_shows(bound: float | None) -> None:
    model = mlp(3, 4, 2)
    optimizer = Optimizer(model, lr=0.1, grafting=None, kl_clip=bound)
    assert optimizer.report().trust_region is None
    x, y = mlp_batch(0, 3, 2)
    squares(model(x), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    report = optimizer.report()
    if bound is None:
        assert report.trust_region is None
    elif bound > 1:
        assert report.trust_region == 1
    else:
        moved = sum((p - q).abs().sum() for p, q in zip(model.parameters(), before, strict=True))
        assert 0 < report.trust_region < 1
        assert 0 < moved < 1e-2
        assert f"kl_clip scaled the last updates by {report.trust_region:.3g}." in str(report)
    assert ("kl_clip" in str(report)) == (bound == 1e-9)


def test_skipped_batches_show() -> None:
    model = mlp(3, 4, 2)
    optimizer = Optimizer(model, lr=0.1)
    assert "skipped" not in str(optimizer.report())
    for _ in range(2):
        optimizer.zero_grad()
        x, y = mlp_batch(0, 3, 2)
        squares(model(x), torch.full_like(y, float("nan"))).backward()
        optimizer.step()
    report = optimizer.report()
    assert report.skipped_updates == 2
    assert "2 batches skipped for numbers that are not finite." in str(report)


@pytest.mark.parametrize("steps", [0, 2], ids=["before the first step", "after two"])
def test_the_report_as_a_picture(steps: int, tmp_path: Path) -> None:
    """Also where nothing is known yet."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    optimizer = Optimizer(model.parameters())
    for _ in range(steps):
        model(torch.randn(8, 2, 4, 4)).square().mean().backward()
        optimizer.step()
    path = optimizer.report().draw(tmp_path / "report.png")
    assert path.stat().st_size > 10_000


def trained() -> tuple[nn.Module, Any]:
    """A model whose weights alone are more than half a megabyte, after a step."""
    model = mlp(300, 300, 2)
    optimizer = Optimizer(model, T=1)
    x, y = mlp_batch(0, 300, 2)
    squares(model(x), y).backward()
    optimizer.step()
    return model, optimizer


RETURNED: dict[str, Callable[[Any], Any]] = {
    "report": lambda optimizer: optimizer.report(),
    "diagnostics": lambda optimizer: optimizer.diagnostics(),
    "placement": lambda optimizer: optimizer.placement(),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda found, protocol=protocol: pickle.loads(
            pickle.dumps(found, protocol)
        )
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", RETURNED)
def test_what_is_returned_is_copied_without_the_optimizer(name: str, way: str) -> None:
    """The same rows, numbers and text, after the optimizer is gone."""
    _, optimizer = trained()
    found = RETURNED[name](optimizer)
    size = len(pickle.dumps(found))
    copied = COPIES[way](found)
    expected = [vars(row) for row in found], str(found), len(vars(found))
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None  # nothing that was returned or copied keeps it
    assert type(copied) is type(found)
    assert ([vars(row) for row in copied], str(copied)) == expected[:2]
    spectra = sum(t.nbytes for pair in getattr(found, "spectra", {}).values() for t in pair)
    assert size < 2_000 + 2 * spectra
    for key, value in vars(found).items():
        if key not in ("diagnose", "spectra"):
            assert getattr(copied, key) == value


def test_a_report_is_drawn_while_its_optimizer_lives(tmp_path: Path) -> None:
    _, optimizer = trained()
    report = optimizer.report()
    path = report.draw(tmp_path / "report.png")
    assert path.stat().st_size > 10_000
    for copied in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        with pytest.raises(RuntimeError, match="optimizer"):
            copied.draw(path)
    del optimizer
    gc.collect()
    with pytest.raises(RuntimeError, match="optimizer"):
        report.draw(path)
