"""Numbers at the ends of their range: no parameter and no state ever stops being finite."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from oracles.flags import Delayed, flag
from tnkfac import KFAC, SINGD, KFACPreconditioner
from tnkfac.optim import base

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SINGD": (SINGD, {}),
    "SINGD diagonal": (SINGD, {"structures": "diagonal"}),
    "SINGD hierarchical": (SINGD, {"structures": "hierarchical2_2"}),
    "SINGD Toeplitz": (SINGD, {"structures": "triltoeplitz"}),
    "paper": (SINGD, dict(SINGD.REFERENCE)),
    "paper, diagonal": (SINGD, {**SINGD.REFERENCE, "structures": "diagonal"}),
    "trust region": (SINGD, {"grafting": None, "kl_clip": 1e-3}),
    "AdamW's size": (SINGD, {"grafting": "adam"}),
    "KFAC": (KFAC, {}),
    "KFAC classic": (KFAC, {"damping": 1e-3}),
    "KFAC Cholesky": (KFAC, {"compute_method": "cholesky"}),
    "EKFAC": (KFAC, {"compute_method": "ekfac"}),
    "KFAC diagonal": (KFAC, {"structures": "diagonal", "grafting": None}),
    "KFAC natural": (KFAC, {"damping": None, "kl_clip": None, "grafting": None}),
    "kfac-pytorch": (KFAC, {"normalization": "kfac-pytorch"}),
}
EXPONENTS = {
    "inputs up and down": ("x", (0, -18, 18, -38, 38, -10, 10)),
    "losses that vanish": ("loss", (-18, -18, -18, 0, 0)),
    "losses up and down": ("loss", (0, 38, -38, 20, -20, 0)),
    "both": ("both", (0, 20, 0, -20, 38, -38)),
    "large inputs": ("x", (20, 20, 20)),
}


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5), nn.LayerNorm(5),
        nn.Linear(5, 3),
    ).to(dtype)  # fmt: skip


def assert_all_finite(model: nn.Module, optimizer: Any) -> None:
    for name, param in model.named_parameters():
        assert param.isfinite().all(), name
        for key, value in optimizer.state.get(param, {}).items():
            assert value.isfinite().all(), (name, key)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", EXPONENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_everything_stays_finite(kind: str, case: str, dtype: torch.dtype) -> None:
    cls, options = KINDS[kind]
    scaled, exponents = EXPONENTS[case]
    model = network(dtype)
    interval: dict[str, Any] = {"T": 1} if cls is SINGD else {"inv_update_steps": 2}
    optimizer = cls(model.parameters(), lr=1e-2, **interval, **options)
    for step, exponent in enumerate(exponents * 2):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 2, 4, 4, generator=generator, dtype=torch.float64)
        x = x * 10.0**exponent if scaled != "loss" else x
        y = torch.randint(3, (6,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(dtype)).float(), y)
        (loss * 10.0**exponent if scaled != "x" else loss).backward()
        optimizer.step()
        assert_all_finite(model, optimizer)


def two_layers() -> tuple[nn.Sequential, Any]:
    """After a step; in the next one the update of the first layer alone is not finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = SINGD(model.parameters(), grafting=None, structures="dense", T=100)
    x = torch.randn(8, 3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if not optimizer.param_groups[0]["step"]:
            optimizer.step()
    optimizer.state[model[0].weight]["K"].mul_(1e25)
    model[0].weight.grad.add_(1.0)
    return model, optimizer


@pytest.mark.parametrize("grafting", [None, 1.0, "adam", "sgd"], ids=str)
def test_a_layer_whose_update_is_not_finite_makes_no_step(grafting: Any) -> None:
    """Its state stays; all others make theirs; it is named, counted and warned of once."""
    model, optimizer = two_layers()
    for group in optimizer.param_groups:
        group["grafting"] = grafting
    before = copy.deepcopy(model.state_dict())
    buffer = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    with pytest.warns(UserWarning, match="The update of 0 is not finite"):
        optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) == name.startswith("0."), name
    assert torch.equal(optimizer.state[model[0].weight]["momentum_buffer"], buffer)
    assert optimizer.skipped_updates == 0
    report = optimizer.report()
    assert report.skipped_steps == {"0": 1}
    assert "0 made no step 1 times: its update was not finite." in str(report)
    assert_all_finite(model, optimizer)


def test_on_a_device_no_layer_makes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits to learn which one it is; the count tells when it is asked for."""
    model, optimizer = two_layers()
    monkeypatch.setattr(base, "non_finite", flag)
    optimizer._flags = Delayed()
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]), name
    assert optimizer.report().skipped_steps == {"0": 1}


@pytest.mark.filterwarnings("ignore:The update of 0")
def test_a_trust_region_is_that_of_the_finite_layers() -> None:
    """One layer that is not finite neither opens nor closes it."""
    scales = []
    for spoilt in (True, False):
        model, optimizer = two_layers()
        optimizer.param_groups[0]["kl_clip"] = 1e-9
        if not spoilt:
            model[0].weight.grad = model[0].bias.grad = None
        with pytest.MonkeyPatch.context():
            optimizer.step()
        scales.append(optimizer.report().trust_region)
        assert_all_finite(model, optimizer)
    assert scales[0] == pytest.approx(scales[1], rel=1e-6)
    assert 0 < scales[0] < 1


def test_gradients_that_are_replaced_are_zero_instead() -> None:
    """So that the optimizer that follows makes no step of that layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    preconditioner = KFACPreconditioner(model, kl_clip=None, inv_update_steps=100)
    x = torch.randn(8, 3)
    for step in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
        if step:
            state = preconditioner._kfac.state[model[0].weight]
            state["Q_A"].mul_(1e25)
        preconditioner.step()
    assert not model[0].weight.grad.any()
    assert model[2].weight.grad.any()
    assert all(param.grad.isfinite().all() for param in model.parameters())
    assert preconditioner.report().skipped_steps == {"0": 1}
