"""Where nothing was measured, warning and report tell the true cause."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracles.twins import OPTIMIZERS, train
from oracles.zoo import mlp

Model = nn.Sequential
DOUBLE = "only backward passes with create_graph=True"


def batch(grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    return x.requires_grad_(grad)


def slope(model: Model) -> tuple[Tensor, Tensor]:
    x = batch(True)
    u = model(x)
    (found,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return u, found


def physics(model: Model) -> Tensor:
    """The residual of ``sum du/dx = 1``, without a boundary."""
    return (slope(model)[1].sum(1) - 1).square().mean()


def second_order(model: Model) -> Tensor:
    """A Laplacian."""
    x = batch(True)
    (du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    return (ddu.sum(1) - 1).square().mean()


def energy(model: Model) -> Tensor:
    """Energies and forces."""
    u, force = slope(model)
    return u.square().mean() + force.square().mean()


def evaluated(model: Model) -> Tensor:
    return model.eval()(batch()).square().mean()


def direct(model: Model) -> Tensor:
    x = torch.tanh(F.linear(batch(), model[0].weight, model[0].bias))
    return F.linear(x, model[2].weight, model[2].bias).square().mean()


def after_validation(model: Model) -> Tensor:
    """A pass without gradient before it is no cause."""
    model.eval()
    with torch.no_grad():
        model(batch())
    model.train()
    return direct(model)


def functional(model: Model) -> Tensor:
    weights = {name: p * 1.0 for name, p in model.named_parameters()}
    found: Tensor = torch.func.functional_call(model, weights, (batch(),)).square().mean()
    return found


def transformed(model: Model) -> Tensor:
    found: Tensor = torch.func.vmap(model)(batch()).square().mean()
    return found


def empty(model: Model) -> Tensor:
    found: Tensor = model(batch()[:0]).sum()
    return found


CAUSES: dict[str, tuple[Callable[[Model], Tensor], dict[str, str]]] = {
    "residual": (physics, {"2.weight": DOUBLE}),
    "Laplacian": (second_order, {"2.weight": DOUBLE}),
    "energy and forces": (energy, {}),
    "eval": (evaluated, {"0.weight": "eval() mode", "2.weight": "eval() mode"}),
    "direct": (direct, {"0.weight": "was not called", "2.weight": "was not called"}),
    "validated": (after_validation, {"0.weight": "was not called", "2.weight": "was not called"}),
    "functional": (
        functional,
        {"0.weight": "called with another tensor", "2.weight": "called with another tensor"},
    ),
    "vmap": (transformed, {"0.weight": "torch.func", "2.weight": "torch.func"}),
    "empty": (empty, {"0.weight": "empty batch", "2.weight": "empty batch"}),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", CAUSES)
def test_the_cause(name: str, kind: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss, causes = CAUSES[name]
    torch.manual_seed(0)
    model = mlp(3, 4, 1)
    optimizer = OPTIMIZERS[kind](model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(optimizer, lambda: loss(model), 2)
    said = [str(w.message) for w in caught if "No statistics" in str(w.message)]
    assert len(said) == bool(causes)
    reasons = {row.name: row.reason for row in optimizer.report()}
    for param in ("0.weight", "2.weight"):
        if param not in causes:
            assert reasons[param] == ""
            assert not any(param in message for message in said)
            continue
        assert param in said[0]
        assert causes[param] in said[0]
        assert reasons[param].startswith("no statistics yet")
        assert "was not called" in causes[param] or causes[param] in reasons[param]


def test_gradients_by_hand() -> None:
    """``torch.autograd.grad`` and an assignment are no backward pass."""
    model = mlp(3, 4, 1)
    optimizer = OPTIMIZERS["SINGD dense"](model.parameters())
    params = list(model.parameters())
    found = torch.autograd.grad(model(batch()).square().mean(), params)
    for p, g in zip(params, found, strict=True):
        p.grad = g
    with pytest.warns(UserWarning, match=r"0\.weight, 2\.weight \(.*torch\.autograd\.grad"):
        optimizer.step()


def test_each_layer_is_told_once_with_its_own_cause() -> None:
    model: Any = mlp(3, 4, 4, 1)
    optimizer = OPTIMIZERS["SINGD diagonal"](model.parameters())
    model[0].eval()

    def loss(used: bool) -> Tensor:
        x = torch.tanh(model[0](batch()))
        x = F.linear(x, model[2].weight) if used else model[2](x)
        y: Tensor = model[4](torch.tanh(x)).square().mean()
        return y

    with pytest.warns(UserWarning, match=r"0\.weight \(called in eval.*2\.weight \(its module"):
        train(optimizer, lambda: loss(True), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, lambda: loss(False), 2)


@pytest.mark.parametrize("loss", [physics, energy, second_order])
@pytest.mark.parametrize("kind", ["SINGD dense", "KFAC eigen"])
def test_what_passes_through_the_output_counts(
    kind: str, loss: Callable[[Model], Tensor], rtol: float = 1e-9
) -> None:
    """Sums are those of input and gradient of the output in the last backward pass, and no more."""
    torch.manual_seed(0)
    model: Any = mlp(3, 4, 1)
    twin: Any = mlp(3, 4, 1)
    twin.load_state_dict(model.state_dict())
    optimizer = OPTIMIZERS[kind](model.parameters())
    outputs: list[tuple[Tensor, Tensor]] = []
    for layer in (twin[0], twin[2]):
        layer.register_forward_hook(lambda m, args, out: outputs.append((args[0], out)))
    value = loss(twin)
    expected = torch.autograd.grad(value, [out for _, out in outputs], allow_unused=True)
    loss(model).backward()
    for (x, _), g, layer in zip(outputs, expected, optimizer._registry.layers, strict=True):
        if g is None:
            assert not layer.statistics.pending
            continue
        A, B, _ = layer.statistics.sums()
        u = torch.cat([x, torch.ones(5, 1, dtype=torch.float64)], 1).detach()
        torch.testing.assert_close(A[0], u.T @ u, rtol=rtol, atol=rtol)
        torch.testing.assert_close(B[0], g.T @ g, rtol=rtol, atol=rtol)
