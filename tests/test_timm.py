"""The optimizers by their names in timm."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tnkfac

timm = pytest.importorskip("timm")
create = pytest.importorskip("timm.optim").create_optimizer_v2


def trained(optimizer: Any, model: Any, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, 32, 32, generator=generator)
        optimizer.zero_grad()
        for part, target in zip(x.chunk(2), torch.arange(8).chunk(2), strict=True):  # accumulation
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(part), target % 4) / 2
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def network() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_byobnet", num_classes=4)


@pytest.mark.parametrize("name", ["singd", "kfac"])
def test_the_factory_of_timm_makes_them(name: str, tmp_path: Path) -> None:
    """With its groups (no decay for biases), mixed precision, clipping, and a resumed run."""
    tnkfac.register_timm()
    options = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.8, "structures": "diagonal"}
    model = network()
    optimizer = create(model, name, **options)
    assert type(optimizer) is {"singd": tnkfac.SINGD, "kfac": tnkfac.KFAC}[name]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.8}
    assert all(row.approximation for row in optimizer.report() if "conv.weight" in row.name)
    trained(optimizer, model, 3)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
    twin = network()
    other = create(twin, name, **options)
    weights, state = torch.load(tmp_path / "run.pt")
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    assert trained(optimizer, model, 3) == trained(other, twin, 3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_lookahead_and_layer_decay() -> None:
    """What timm adds to optimizers works with them."""
    tnkfac.register_timm()
    model = network()
    optimizer = create(model, "lookahead_singd", lr=1e-3, layer_decay=0.8)
    assert len(trained(optimizer, model, 3)) == 3
    assert all(p.isfinite().all() for p in model.parameters())
