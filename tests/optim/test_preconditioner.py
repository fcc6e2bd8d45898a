"""KFAC that only rewrites gradients, in front of any optimizer."""

import enum
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from oracles.loops import weights
from oracles.zoo import Everyday, Mixed, everyday_batch, fixed_weights, mixed_batch, mlp
from tnkfac import KFAC, SINGD, KFACPreconditioner


def network() -> Any:
    return fixed_weights(Everyday(), 2.0)


def loss_of(model: Any, seed: int) -> Any:
    x, y = everyday_batch(seed)
    return functional.cross_entropy(model(x), y)


@pytest.mark.parametrize(("method", "twin"), [("eigen", "eigen"), ("inverse", "cholesky")])
@pytest.mark.parametrize("normalization", ["fisher", "kfac-pytorch"])
def test_followed_by_sgd_it_is_kfac(method: str, twin: str, normalization: str) -> None:
    """The same trajectory as of the optimizer, with momentum, and with the same options."""
    first, second = network(), network()
    options: dict[str, Any] = {"lr": 0.05, "kl_clip": 1e-2, "damping": 1e-2, "inv_update_steps": 2}
    options["normalization"] = normalization
    factor = {"damping_type": "factor"} if twin == "cholesky" else {}
    kfac = KFAC(
        first.parameters(),
        compute_method=twin,
        structures="dense",
        fallback="sgd",
        **options,
        **factor,
    )
    preconditioner = KFACPreconditioner(second, compute_method=method, **options)
    sgd = torch.optim.SGD(second.parameters(), lr=0.05, momentum=0.9)
    for seed in range(6):
        for model, optimizer in ((first, kfac), (second, sgd)):
            optimizer.zero_grad()
            loss_of(model, seed).backward()
        kfac.step()
        preconditioner.step()
        sgd.step()
    expected = weights(first)
    for name, p in weights(second).items():
        torch.testing.assert_close(p, expected[name], rtol=1e-9, atol=1e-11, msg=name)
    assert preconditioner.steps == 6


def test_only_gradients_of_layers_change() -> None:
    torch.manual_seed(0)
    model = Mixed()
    preconditioner = KFACPreconditioner(model)
    tokens, labels = mixed_batch(0)
    functional.cross_entropy(model(tokens), labels).backward()
    before = weights(model)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    preconditioner.step()
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
    rows = {row.name.partition("[")[0] for row in preconditioner.report() if row.structure}
    for name, p in model.named_parameters():
        if p.grad is not None and gradients[name].any():
            assert torch.equal(p.grad, gradients[name]) == (name not in rows), name
    assert {"conv.weight", "head.weight", "head.bias"} <= rows


def test_schedules_follow_the_step() -> None:
    model = network()
    seen = []

    def damping(step: int) -> float:
        seen.append(step)
        return 0.1 / (step + 1)

    preconditioner = KFACPreconditioner(
        model,
        damping=damping,
        lr=lambda step: 0.5**step,
        factor_update_steps=lambda step: 1 if step < 2 else 4,
        inv_update_steps=2,
    )
    updates = []
    for seed in range(6):
        model.zero_grad()
        loss_of(model, seed).backward()
        preconditioner.step()
        updates.append({row.last_update for row in preconditioner.report() if row.structure})
    assert updates == [{0}, {1}, {1}, {1}, {4}, {4}]
    assert seen == [0, *range(6)]


SCHEDULES: dict[str, Any] = {
    "damping": lambda step: 0.1 / (step + 1),
    "factor_decay": lambda step: 1 - 1 / (step + 2),
    "kl_clip": lambda step: 0.01 * (step + 1),
    "lr": lambda step: 0.5**step,
    "factor_update_steps": lambda step: 1 if step < 2 else 4,
    "inv_update_steps": lambda step: 1 if step < 1 else 2,
}
CONSTANTS: dict[str, Any] = {
    "damping": 0.02,
    "factor_decay": 0.9,
    "kl_clip": None,
    "lr": 0.3,
    "factor_update_steps": 2,
    "inv_update_steps": 4,
}


@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_attributes_show_what_the_next_step_takes(name: str, scheduled: bool) -> None:
    """Before the first step, after every one, and in an unpickled state; they cannot be set."""
    given = SCHEDULES[name] if scheduled else CONSTANTS[name]
    model = network()
    preconditioner = KFACPreconditioner(model, **{name: given})

    def expected() -> Any:
        return given(preconditioner.steps) if scheduled else given

    for step in range(4):
        assert preconditioner.steps == step
        assert getattr(preconditioner, name) == expected()
        for value in (0.5, None, given):
            with pytest.raises(AttributeError, match=name):
                setattr(preconditioner, name, value)
        assert getattr(preconditioner, name) == expected()
        assert f"    {name}: {expected()}\n" in repr(preconditioner)
        model.zero_grad()
        loss_of(model, step).backward()
        preconditioner.step()
        if name not in ("factor_update_steps", "inv_update_steps"):
            taken = given(step) if scheduled else given
            assert preconditioner._kfac.param_groups[0][name] == taken
    other = KFACPreconditioner(network(), **({name: given} if scheduled else {}))
    other.load_state_dict(preconditioner.state_dict())
    assert getattr(other, name) == expected()


def test_unknown_attributes() -> None:
    preconditioner = KFACPreconditioner(mlp(3, 2))
    with pytest.raises(AttributeError, match="momentum"):
        _ = preconditioner.momentum  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="steps"):
        preconditioner.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("method", ["eigen", "inverse"])
def test_representation(method: str) -> None:
    """One line for each hyper-parameter, under the name that the constructor has for it."""
    preconditioner = KFACPreconditioner(
        network(), compute_method=method, damping=lambda step: 0.5, accumulation_steps=3
    )
    first, *lines, last = repr(preconditioner).splitlines()
    assert (first, last) == ("KFACPreconditioner (", ")")
    shown = dict(line.strip().split(": ", 1) for line in lines)
    assert shown["compute_method"] == method
    assert shown["damping"] == "0.5"
    assert shown["kl_clip"] == "0.001"
    assert shown["accumulation_steps"] == "3"
    assert shown["structures"] == "('dense', 'dense')"
    assert (shown["layers"], shown["steps"]) == ("5", "0")
    constructor = inspect.signature(KFACPreconditioner).parameters
    assert set(shown) - {"layers", "steps"} <= set(constructor)
    assert list(shown) == sorted(shown)


@pytest.mark.parametrize("optimizer", [SINGD, KFAC])
def test_representation_of_optimizers(optimizer: Any) -> None:
    """As of torch's: a line for each hyper-parameter of each group, and no parameters."""
    model = network()
    made = optimizer([{"params": model.conv.parameters(), "lr": 0.25}, {"params": model.up.weight}])
    text = repr(made)
    assert text.startswith(f"{optimizer.__name__} (\nParameter Group 0\n")
    assert "    lr: 0.25\n" in text
    assert "    lr: 0.001\n" in text
    assert "tensor" not in text
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    assert len(lines) == sum(len(group) - 1 for group in made.param_groups)


@pytest.mark.parametrize("as_function", [False, True])
def test_scaled_losses(as_function: bool) -> None:
    """Gradients are unscaled before, the factors by the scaler's scale."""
    first, second = network(), network()
    plain = KFACPreconditioner(first)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    given = scaler.get_scale if as_function else scaler
    scaled = KFACPreconditioner(second, grad_scaler=given)
    sgd = torch.optim.SGD(second.parameters(), lr=0.1)
    for seed in range(3):
        first.zero_grad()
        second.zero_grad()
        loss_of(first, seed).backward()
        plain.step()
        scaler.scale(loss_of(second, seed)).backward()
        scaler.unscale_(sgd)
        scaled.step()
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)
        scaler.update()


def test_micro_batches_need_not_be_announced() -> None:
    first, second = network(), network()
    whole, split = (KFACPreconditioner(m, normalization="fisher") for m in (first, second))
    x, y = everyday_batch(0)
    functional.cross_entropy(first(x), y).backward()
    for part in (slice(0, 5), slice(5, 8)):
        loss = functional.cross_entropy(second(x[part]), y[part])
        (loss * len(y[part]) / 8).backward()
    whole.step()
    split.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)


def test_state_and_memory() -> None:
    model, other = network(), network()
    preconditioner = KFACPreconditioner(model, inv_update_steps=3, damping=0.1)
    for seed in range(4):
        model.zero_grad()
        loss_of(model, seed).backward()
        preconditioner.step()
    usage = preconditioner.memory_usage()
    assert usage.pop("total") == sum(usage.values())
    dims = {28: 1, 19: 2, 24: 1, 5: 1, 61: 1}  # rows of input factors, and how many there are
    assert usage["a_factors"] == 8 * sum(count * dim**2 for dim, count in dims.items())
    assert usage["a_inverses"] == usage["a_factors"] + 8 * sum(c * d for d, c in dims.items())
    assert usage["g_factors"] == 8 * (4**2 + 2 * 3**2 + 3**2 + 5**2 + 4**2)
    second = KFACPreconditioner(other, inv_update_steps=3)
    second.load_state_dict(preconditioner.state_dict())
    assert second.damping == 0.1
    model.zero_grad()
    for m, p in ((model, preconditioner), (other, second)):
        loss_of(m, 9).backward()
        p.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert not preconditioner.state_dict(include_factors=False)["state"]


def test_reset_batch_drops_what_was_measured() -> None:
    first, second = network(), network()
    plain, reset = KFACPreconditioner(first), KFACPreconditioner(second)
    loss_of(second, 7).backward()
    reset.reset_batch()
    second.zero_grad()
    for model, preconditioner in ((first, plain), (second, reset)):
        loss_of(model, 0).backward()
        preconditioner.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(
    ("patterns", "skipped"),
    [
        (["^conv$"], {"conv"}),
        (["Conv"], {"conv", "grouped", "up"}),
        (["Linear", "up"], {"shared", "last", "up", "grouped"}),
    ],
    ids=["name", "type", "both"],
)
def test_skipped_layers(patterns: list[str], skipped: set[str]) -> None:
    preconditioner = KFACPreconditioner(network(), skip_layers=patterns)
    captured = {row.name.split(".")[0] for row in preconditioner.report() if row.structure}
    assert captured == {"conv", "grouped", "up", "shared", "last"} - skipped


class Method(enum.Enum):
    """As in kfac-pytorch."""

    EIGEN = 1
    INVERSE = 2


def test_enumerations_name_methods() -> None:
    for method in Method:
        KFACPreconditioner(mlp(3, 2), compute_method=method).close()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"compute_method": "svd"}, ValueError, "compute_method: got 'svd'.*'eigen', 'inverse'"),
        ({"damping": -1.0}, ValueError, "damping: got -1.0"),
        ({"skip_layers": "conv"}, TypeError, "skip_layers: got 'conv'"),
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps: got 0"),
        ({"momentum": 0.9}, TypeError, "momentum"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KFACPreconditioner(mlp(3, 2), **arguments)


def test_wrong_models() -> None:
    with pytest.raises(TypeError, match="model: got a list"):
        KFACPreconditioner([nn.Linear(2, 2)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no supported layer"):
        KFACPreconditioner(nn.LayerNorm(3))
