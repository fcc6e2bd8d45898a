"""A compiled model trains as the eager one does, whole graphs only, whatever came first."""

import pytest
import torch
from torch import nn

import tnkfac


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 8, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(144, 10),
    ).double()


def train(model: nn.Module, run: nn.Module, **options: object) -> tuple[list[torch.Tensor], object]:
    x = torch.linspace(-1, 1, 6 * 64, dtype=torch.float64).reshape(6, 1, 8, 8).sin()
    y = torch.arange(6)
    optimizer = tnkfac.SINGD(model.parameters(), lr=1e-2, T=2, **options)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], optimizer


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("structures", ["diagonal", "dense"])
@pytest.mark.parametrize("before", [False, True], ids=["fresh", "run-before-construction"])
def test_compiled_equals_eager(structures: str, approx: str, before: bool) -> None:
    options = {"structures": structures, "kfac_approx": approx}
    eager = network()
    expected, _ = train(eager, eager, **options)
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if before:  # such a model would ignore hooks that are added later
        compiled(torch.ones(6, 1, 8, 8, dtype=torch.float64)).sum().backward()
        model.zero_grad()
    actual, optimizer = train(model, compiled, **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert all(row.last_update == 2 for row in optimizer.report() if row.approximation)


@pytest.mark.parametrize("strict", [False, True])
def test_export_leaves_the_taps_out(strict: bool) -> None:
    model = network()
    optimizer = tnkfac.SINGD(model.parameters())
    x = torch.ones(6, 1, 8, 8, dtype=torch.float64)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))
    assert "autograd" not in str(program.graph).lower()
    optimizer.close()
