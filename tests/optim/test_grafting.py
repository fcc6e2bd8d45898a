"""The order of a step: natural gradient, trust region, grafting, momentum, decay."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.layer_matrices import to_matrix
from oracles.loops import dense_factor, gradients, squares, weights
from oracles.zoo import AllLayers, all_layers_batch, fixed_weights, mlp
from tnkfac import SINGD

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

LR = 0.01
LAYERS = [name for name, _ in AllLayers().named_children()]


def joint(model: nn.Module, name: str, values: dict[str, Tensor]) -> Tensor:
    """Joint matrix ``[G, Co / G, D]`` of a layer, from values by parameter name."""
    return to_matrix(
        model.get_submodule(name), values[f"{name}.weight"], values.get(f"{name}.bias")
    )


def step(model: nn.Module, optimizer: SINGD, x: Tensor, y: Tensor) -> tuple[Any, Any]:
    """One step; returns gradients and updates ``(old - new)`` by parameter name."""
    before = weights(model)
    optimizer.zero_grad()
    loss = squares(model(x), y)
    found = gradients(model, loss)
    loss.backward()
    optimizer.step()
    after = weights(model)
    return found, {name: before[name] - after[name] for name in before}


def natural(model: nn.Module, optimizer: SINGD, name: str, matrix: Tensor) -> Tensor:
    """``C C^T G K K^T`` with the layer's present factors."""
    state = optimizer.state[model.get_submodule(name).weight]
    K, C = dense_factor(state, "K"), dense_factor(state, "C")
    return C @ C.mT @ matrix @ K @ K.mT


def direction(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm()


def build(grafting: str | None, **options: Any) -> tuple[Any, SINGD]:
    model = fixed_weights(AllLayers())
    options = {"lr": LR, "momentum": 0.0, "T": 2, **options}
    return model, SINGD(model.parameters(), grafting=grafting, **options)


@pytest.mark.parametrize("init", ["first_batch", "identity"])
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_no_grafting_is_the_raw_natural_gradient(structure: str, init: str) -> None:
    model, optimizer = build(None, structures=structure, init=init)
    for seed in range(3):
        found, moved = step(model, optimizer, *all_layers_batch(seed))
        for name in LAYERS:
            expected = LR * natural(model, optimizer, name, joint(model, name, found))
            actual = joint(model, name, moved)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("init", ["first_batch", "identity"])
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_rms(structure: str, init: str) -> None:
    """Joint ``[W | b]`` over all channel groups has RMS 0.2, along the natural gradient."""
    model, optimizer = build("rms", structures=structure, init=init)
    for seed in range(3):
        found, moved = step(model, optimizer, *all_layers_batch(seed))
        for name in LAYERS:
            actual = joint(model, name, moved)
            rms = actual.square().mean().sqrt().item()
            assert rms == pytest.approx(0.2 * LR, rel=1e-9)
            expected = direction(natural(model, optimizer, name, joint(model, name, found)))
            torch.testing.assert_close(direction(actual), expected, rtol=1e-7, atol=1e-10)


def test_sgd() -> None:
    """The norm of the gradient, along the natural gradient."""
    model, optimizer = build("sgd")
    for seed in range(3):
        found, moved = step(model, optimizer, *all_layers_batch(seed))
        for name in LAYERS:
            actual, gradient = joint(model, name, moved), joint(model, name, found)
            assert actual.norm().item() == pytest.approx(LR * gradient.norm().item(), rel=1e-9)
            expected = direction(natural(model, optimizer, name, gradient))
            torch.testing.assert_close(direction(actual), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.9), "eps": 1e-3}], ids=["", "options"])
def test_adam(options: dict[str, Any]) -> None:
    """The norm of the AdamW update without first moment, with its betas and eps."""
    model, optimizer = build("adam", fallback_options=options)
    twin = fixed_weights(AllLayers())
    _, beta2 = options.get("betas", (0.9, 0.999))
    adamw = torch.optim.AdamW(
        twin.parameters(),
        lr=1.0,
        betas=(0.0, beta2),
        eps=options.get("eps", 1e-8),
        weight_decay=0.0,
    )
    for seed in range(4):
        found, moved = step(model, optimizer, *all_layers_batch(seed))
        before = weights(twin)
        for name, p in twin.named_parameters():
            p.grad = found[name].clone()
        adamw.step()
        updates = {name: before[name] - p for name, p in weights(twin).items()}
        for name in LAYERS:
            size = joint(model, name, updates).norm().item()
            actual = joint(model, name, moved)
            assert actual.norm().item() == pytest.approx(LR * size, rel=1e-6)
            expected = direction(natural(model, optimizer, name, joint(model, name, found)))
            torch.testing.assert_close(direction(actual), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("grafting", ["rms", "sgd", "adam", None])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_zero_gradients_stay_zero(grafting: str | None, momentum: float) -> None:
    """A layer behind a zero factor gets exactly zero gradients; nothing is divided by them."""
    model = mlp(3, 4, 2)
    optimizer = SINGD(model.parameters(), lr=LR, grafting=grafting, momentum=momentum, T=1)
    before = weights(model)
    for _ in range(3):
        optimizer.zero_grad()
        (0.0 * model(torch.ones(5, 3).double())).sum().backward()
        optimizer.step()
    for name, p in weights(model).items():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("grafting", ["rms", "sgd", "adam", None])
def test_momentum(grafting: str | None) -> None:
    """A moving average with grafting; without, it accumulates as in the reference."""
    (plain, without), (model, optimizer) = build(grafting), build(grafting, momentum=0.9)
    buffers: dict[str, Tensor] = {}
    for seed in range(4):
        plain.load_state_dict(model.state_dict())
        batch = all_layers_batch(seed)
        _, updates = step(plain, without, *batch)
        _, moved = step(model, optimizer, *batch)
        for name, update in updates.items():
            fresh = update / LR
            old = buffers.get(name, torch.zeros_like(fresh))
            buffers[name] = 0.9 * old + (fresh if grafting is None else 0.1 * fresh)
            torch.testing.assert_close(moved[name], LR * buffers[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("grafting", ["rms", "adam", "sgd", None])
def test_decoupled_decay_shrinks_exactly(grafting: str | None) -> None:
    """At zero gradient weights shrink by ``1 - lr * weight_decay``, those of the fallback too."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    optimizer = SINGD(model.parameters(), lr=LR, weight_decay=0.3, grafting=grafting, T=1)
    expected = weights(model)
    for _ in range(3):
        optimizer.zero_grad()
        (0.0 * model(torch.ones(5, 3).double())).sum().backward()
        optimizer.step()
        expected = {name: p * (1 - LR * 0.3) for name, p in expected.items()}
        for name, p in weights(model).items():
            torch.testing.assert_close(p, expected[name], rtol=1e-15, atol=0)


def test_decoupled_decay_is_beside_the_update() -> None:
    """It changes neither the size of the grafted update nor the momentum buffer."""
    (plain, without), (model, optimizer) = (
        build("rms", momentum=0.9, weight_decay=decay) for decay in (0.0, 0.3)
    )
    for seed in range(3):
        plain.load_state_dict(model.state_dict())
        batch, before = all_layers_batch(seed), weights(model)
        _, updates = step(plain, without, *batch)
        _, moved = step(model, optimizer, *batch)
        for name, update in updates.items():
            expected = update + LR * 0.3 * before[name]
            torch.testing.assert_close(moved[name], expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("grafting", ["rms", None])
def test_coupled_decay_goes_through_momentum(grafting: str | None) -> None:
    """Without decoupling the decay is added after preconditioning and grafting, as in SGD."""
    model, optimizer = build(grafting, weight_decay=0.3, momentum=0.5, decoupled_weight_decay=False)
    plain, without = build(grafting)
    before = weights(model)
    plain.load_state_dict(model.state_dict())
    _, updates = step(plain, without, *all_layers_batch(0))
    _, moved = step(model, optimizer, *all_layers_batch(0))
    for name, update in updates.items():
        fresh = update / LR + 0.3 * before[name]
        expected = LR * (fresh if grafting is None else 0.5 * fresh)
        torch.testing.assert_close(moved[name], expected, rtol=1e-8, atol=1e-13)


# --- trust region -------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1e-9, 1e-5, 1e9], ids="kl_clip={:g}".format)
def test_kl_clip(bound: float) -> None:
    """One factor for two layers with different learning rates; one that does not bind is 1."""
    model = mlp(3, 4, 2)
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
    optimizer = SINGD(groups, lr=0.02, momentum=0.0, grafting=None, kl_clip=bound, T=1)
    for _ in range(3):
        x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
        found, moved = step(model, optimizer, x, y)
        raw = {n: natural(model, optimizer, n, joint(model, n, found)) for n in ("0", "2")}
        lrs = {"0": 0.1, "2": 0.02}
        inner = sum(
            lrs[n] ** 2 * (raw[n] * joint(model, n, found)).sum().item() for n in ("0", "2")
        )
        factor = min(1.0, (bound / abs(inner)) ** 0.5)
        assert (factor == 1.0) == (bound == 1e9)
        for name in ("0", "2"):
            expected = lrs[name] * factor * raw[name]
            torch.testing.assert_close(joint(model, name, moved), expected, rtol=1e-6, atol=1e-16)


def test_kl_clip_comes_before_grafting() -> None:
    """Grafting fixes the size, so a tiny bound does not change a grafted step."""
    (a, free), (b, bound) = build("rms", kl_clip=None), build("rms", kl_clip=1e-12)
    _, expected = step(a, free, *all_layers_batch(0))
    _, actual = step(b, bound, *all_layers_batch(0))
    for name, update in expected.items():
        torch.testing.assert_close(actual[name], update, rtol=1e-6, atol=1e-12)


def test_kl_clip_of_zero_stops_the_layers() -> None:
    """Zero is a value, not a missing one."""
    model, optimizer = build(None, kl_clip=0.0)
    _, moved = step(model, optimizer, *all_layers_batch(0))
    assert not any(update.any() for update in moved.values())


# --- weight and bias apart ----------------------------------------------------------------------


def test_size_counts_what_is_trained() -> None:
    """With a bias frozen in between, the weight alone has RMS 0.2."""
    model = mlp(3, 4, 2)
    optimizer = SINGD(model.parameters(), lr=LR, momentum=0.0, T=1, grafting="rms")
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    step(model, optimizer, x, y)
    bias = model[0].bias
    bias.requires_grad_(False)
    bias.grad = None
    before = weights(model)
    optimizer.zero_grad()
    squares(model(x), y).backward()
    optimizer.step()
    moved = before["0.weight"] - model[0].weight.detach()
    assert torch.equal(model[0].bias, before["0.bias"])
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2 * LR, rel=1e-9)


def test_weight_and_bias_use_their_own_groups() -> None:
    """One joint update; learning rate, decay and momentum are those of each parameter."""
    model, twin = mlp(3, 4), mlp(3, 4)
    twin.load_state_dict(model.state_dict())
    plain = SINGD(twin.parameters(), lr=1.0, momentum=0.0)
    groups = [
        {"params": [model[0].weight], "lr": 0.1, "weight_decay": 0.2, "momentum": 0.5},
        {"params": [model[0].bias], "lr": 0.3, "weight_decay": 0.0, "momentum": 0.0},
    ]
    optimizer = SINGD(groups, lr=7.0)
    x, y = torch.randn(8, 3).double(), torch.randn(8, 4).double()
    before = weights(model)
    _, update = step(twin, plain, x, y)
    _, moved = step(model, optimizer, x, y)
    expected = 0.1 * 0.5 * update["0.weight"] + 0.1 * 0.2 * before["0.weight"]
    torch.testing.assert_close(moved["0.weight"], expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(moved["0.bias"], 0.3 * update["0.bias"], rtol=1e-9, atol=1e-14)
