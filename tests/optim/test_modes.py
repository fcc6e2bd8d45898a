"""Steps in inference mode, and passes that compute nothing: neither raises nor leaves a trace."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from oracles.loops import assert_same_state, assert_same_weights, squares
from oracles.optimizers import EVERY_CURVATURE
from tnkfac import KFAC, SINGD, KFACPreconditioner

Make = Callable[..., Any]
Build = Callable[[nn.Module], Any]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 2)
    ).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1 + step, 48, dtype=torch.float64).reshape(6, 2, 4).sin()
    return x, torch.ones(6, 2, dtype=torch.float64)


MADE: dict[str, Build] = {
    **EVERY_CURVATURE,
    "SINGD of the paper": lambda model: SINGD(model, **SINGD.REFERENCE),
    "SINGD triangular": lambda model: SINGD(model, T=2, structures="triltoeplitz"),
    "SINGD hierarchical": lambda model: SINGD(model, T=2, structures="hierarchical1_1"),
    "SINGD with AdamW's norms": lambda model: SINGD(model, T=1, grafting="adam"),
    "SINGD with a trust region": lambda model: SINGD(model, T=1, kl_clip=1e-3),
    "SINGD beside SGD": lambda model: SINGD(model, T=1, fallback="sgd"),
    "KFAC in a trust region": lambda model: KFAC(model, damping=1e-2),
}


def train(model: nn.Module, optimizer: Any, where: Callable[[int], Any], steps: int = 4) -> None:
    for step in range(steps):
        model.zero_grad()
        squares(model(batch(step)[0]), batch(step)[1]).backward()
        with where(step):
            optimizer.step()


@pytest.mark.parametrize("inside", [(0,), (1,), (0, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("name", MADE)
def test_steps_in_inference_mode(name: str, inside: tuple[int, ...]) -> None:
    """State that is made there is used outside, and the other way round."""
    models = [network(), network()]
    optimizers = [MADE[name](model) for model in models]
    train(
        models[0],
        optimizers[0],
        lambda step: torch.inference_mode() if step in inside else nullcontext(),
    )
    train(models[1], optimizers[1], lambda step: nullcontext())
    assert_same_weights(*models)
    assert_same_state(models[0], optimizers[0], models[1], optimizers[1])


def adaptive_loop(model: nn.Module, optimizer: Any, where: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = squares(model(batch(0)[0]), batch(0)[1])
        loss.backward()
        return loss

    for _ in range(6):
        with where():
            optimizer.step(closure)


def preconditioned_loop(model: nn.Module, preconditioner: Any, where: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        squares(model(batch(step)[0]), batch(step)[1]).backward()
        with where():
            preconditioner.step()
        optimizer.step()


def restored_loop(model: nn.Module, optimizer: Any, where: Any) -> None:
    train(model, optimizer, lambda step: nullcontext())
    saved = copy.deepcopy(optimizer.state_dict())
    with where():
        optimizer.load_state_dict(saved)
    train(model, optimizer, lambda step: nullcontext())


def built_loop(model: nn.Module, make: Any, where: Any) -> None:
    with where():
        optimizer = make(model)
    train(model, optimizer, lambda step: nullcontext())


LOOPS: dict[str, tuple[Build, Callable[..., None]]] = {
    "closures": (lambda model: KFAC(model, adaptive_damping=True), adaptive_loop),
    "a preconditioner": (KFACPreconditioner, preconditioned_loop),
    "SINGD is restored": (lambda model: SINGD(model, T=1, structures="diagonal"), restored_loop),
    "KFAC is restored": (lambda model: KFAC(model, compact_state=True), restored_loop),
    "SINGD is built": (lambda model: SINGD, built_loop),
    "KFAC is built": (lambda model: KFAC, built_loop),
}


@pytest.mark.parametrize("name", LOOPS)
def test_what_else_happens_in_inference_mode(name: str) -> None:
    make, loop = LOOPS[name]
    models = [network(), network()]
    for model, where in zip(models, (torch.inference_mode, nullcontext), strict=True):
        loop(model, make(model), where)
    assert_same_weights(*models)


# --- passes that compute nothing -----------------------------------------------------------------


def parameters_of(model: nn.Module, make: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: nn.Parameter(make(p.detach())) for name, p in model.named_parameters()}


def meta_parameters(model: nn.Module) -> None:
    x = torch.empty(6, 2, 4, device="meta", dtype=torch.float64)
    params = parameters_of(model, lambda p: p.to("meta"))
    functional_call(model, params, (x,)).sum().backward()


def meta_modules(model: nn.Module) -> None:
    """Parameters are replaced for a while, as tools that measure memory do."""
    before = [(m, name, p) for m in model.modules() for name, p in m._parameters.items()]
    for module, name, p in before:
        module._parameters[name] = nn.Parameter(p.detach().to("meta"))
    model(torch.empty(6, 2, 4, device="meta", dtype=torch.float64)).sum().backward()
    for module, name, p in before:
        module._parameters[name] = p


def meta_copy(model: nn.Module) -> None:
    twin = copy.deepcopy(model).to("meta")
    twin(torch.empty(6, 2, 4, device="meta", dtype=torch.float64)).sum().backward()


def meta_by_default(model: nn.Module) -> None:
    x, _ = batch(0)
    with torch.device("meta"):
        model(x)


def fake_inputs(model: nn.Module) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.ones(6, 2, 4, dtype=torch.float64)).sum().backward()
    model.zero_grad()


def fake_forward(model: nn.Module) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False):
        model(torch.ones(6, 2, 4, dtype=torch.float64))


def fake_parameters(model: nn.Module) -> None:
    mode = FakeTensorMode()
    params = parameters_of(model, mode.from_tensor)
    with mode:
        functional_call(model, params, (torch.ones(6, 2, 4, dtype=torch.float64),))


def traced(model: nn.Module) -> None:
    torch.fx.experimental.proxy_tensor.make_fx(
        lambda x: model(x).sum(), tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(batch(0)[0])


ABSTRACT = (
    meta_parameters,
    meta_modules,
    meta_copy,
    meta_by_default,
    fake_inputs,
    fake_forward,
    fake_parameters,
    traced,
)


@pytest.mark.parametrize("abstract", ABSTRACT)
@pytest.mark.parametrize("kind", EVERY_CURVATURE)
def test_passes_without_numbers(kind: str, abstract: Callable[[nn.Module], None]) -> None:
    """Before the first pass, between backward and step, and after steps."""
    models = [network(), network()]
    optimizers = [EVERY_CURVATURE[kind](model) for model in models]
    abstract(models[0])
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            squares(model(batch(step)[0]), batch(step)[1]).backward()
            if model is models[0] and abstract is not fake_inputs:
                abstract(model)
            optimizer.step()
    assert_same_weights(*models)
    assert_same_state(models[0], optimizers[0], models[1], optimizers[1])


@pytest.mark.parametrize("kind", EVERY_CURVATURE)
def test_a_model_that_is_on_the_meta_device(kind: str) -> None:
    """It is built there with its optimizer, or moved there; its passes are no business of ours."""
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = network()
        EVERY_CURVATURE[kind](model)
        model.to("meta")
        model(torch.empty(6, 2, 4, device="meta", dtype=torch.float64)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
