"""Three steps of networks that people train: every parameter moves, the report says how."""

from collections import Counter
from itertools import cycle

import pytest
import torch
from torch import nn
from torch.nn import functional

from oracles.loops import weights
from oracles.optimizers import Optimizer, skip_unless_decomposable
from oracles.real_models import REAL_MODELS, RealModel

BOTH_OPTIMIZERS = True


STOCK = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def called_layers(model: nn.Module, case: RealModel) -> set[str]:
    """Names of the parameters of all stock layers that a forward pass calls, and of attention."""
    called: set[nn.Module] = set()
    stock = [m for m in model.modules() if any(type(m).forward is kind.forward for kind in STOCK)]
    handles = [m.register_forward_hook(lambda m, _, __: called.add(m)) for m in stock]
    with torch.no_grad():
        model(case.x())
    for handle in handles:
        handle.remove()
    own = {p for m in called for p in m._parameters.values() if "weight" in m._parameters}
    names = {name for name, p in model.named_parameters() if p in own}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):  # as the matrices that it multiplies with
            size = module.embed_dim
            spans = [f"[{i * size}:{(i + 1) * size}]" for i in range(3)]
            names |= {f"{name}.in_proj_{p}{s}" for p in ("weight", "bias") for s in spans}
            names |= {f"{name}.out_proj.{p}" for p in ("weight", "bias")}
    return names


@pytest.mark.parametrize(
    ("name", "approx"),
    [
        pytest.param(name, approx, marks=pytest.mark.slow if case.slow else ())
        for (name, case), approx in zip(
            REAL_MODELS.items(), cycle(["expand", "reduce"]), strict=False
        )
    ],
)
def test_three_steps(name: str, approx: str) -> None:
    case = REAL_MODELS[name]
    model = case.build().train()
    expected = called_layers(model, case)
    optimizer = Optimizer(
        model.parameters(), lr=1e-2, T=1, structures="diagonal", kfac_approx=approx
    )
    before = weights(model)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(case.x())
        functional.mse_loss(output, torch.randn_like(output)).backward()
        optimizer.step()
    assert optimizer.skipped_updates == 0
    for key, p in weights(model).items():
        assert p.isfinite().all(), key
        assert not torch.equal(p, before[key]), key

    report = optimizer.report()
    captured = {row.name for row in report if row.structure}
    assert {row.name for row in report if row.last_update == 2} == captured
    assert not [row.name for row in report if row.structure and row.reason]
    tied = {"wte.weight", "head.weight"} if hasattr(model, "wte") else set()  # one parameter
    assert captured == expected - tied
    assert len(captured) == case.captured
    others = Counter((row.module, row.reason) for row in report if not row.structure)
    assert others == case.others


@pytest.mark.parametrize("structures", ["auto", "dense", "hierarchical15_15", "triltoeplitz"])
@pytest.mark.parametrize("name", ["U-Net", "audio", "GPT"])
def test_other_structures_on_small_networks(name: str, structures: str) -> None:
    skip_unless_decomposable(structures)
    case = REAL_MODELS[name]
    model = case.build().train()
    optimizer = Optimizer(model.parameters(), lr=1e-2, T=2, structures=structures)
    before = weights(model)
    x = case.x()
    target = torch.randn_like(model(x))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), target)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[key]) for key, p in weights(model).items())
