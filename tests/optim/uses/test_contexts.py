"""What may be around a pass, or beside one, that must leave its step as it is."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from oracles.uses_training import OPTIMIZERS, assert_equal, gaussian, loss
from oracles.uses_zoo import BLOCKS, network
from tnkfac.curvature.uses.scopes import TRACEABLE

SHAPE = (4, 5, 4)
make = OPTIMIZERS["SINGD dense"]


def train_pass(model: nn.Module, x: Tensor) -> None:
    loss(model(x), len(x)).backward()


class Passing(TorchDispatchMode):
    """Hands all operations on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def per_sample_gradients(model: nn.Module, x: Tensor) -> None:
    params = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(params: Any, sample: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, params, (sample[None],)), 1)

    torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0))(params, x)


def traced_to_a_graph(model: nn.Module, x: Tensor) -> None:
    make_fx(lambda y: model(y))(x)


def exported(model: nn.Module, x: Tensor) -> None:
    torch.export.export(model, (x,))


def jacobian(model: nn.Module, x: Tensor) -> None:
    torch.autograd.functional.jacobian(model, x[:1])


def penalty(model: nn.Module, x: Tensor) -> None:
    y = x.clone().requires_grad_()
    torch.autograd.grad(model(y).sum(), y, create_graph=True)


def returned_gradients(model: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(loss(model(x), 4), [*model.parameters()])


def frozen(model: Any, x: Tensor) -> None:
    model[2].requires_grad_(False)
    model(x)
    model[2].requires_grad_(True)


def failing_backward(model: Any, x: Tensor) -> None:
    out = model[1](model[0](x))

    def fail(g: Tensor) -> None:
        raise ValueError("stop")

    out.register_hook(fail)
    with pytest.raises(ValueError, match="stop"):
        loss(model[4](model[3](model[2](out))), 4).backward()
    model.zero_grad()


BESIDE = [
    per_sample_gradients, traced_to_a_graph, exported, jacobian, penalty, returned_gradients,
    frozen, failing_backward,
]  # fmt: skip
AROUND: dict[str, Callable[[], Any]] = {
    "dispatch": Passing,
    "flops": lambda: FlopCounterMode(display=False),
    "anomalies": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "saved elsewhere": torch.autograd.graph.save_on_cpu,
    "mutations": torch.autograd.graph.allow_mutation_on_saved_tensors,
}


def in_a_thread(function: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def beside_evaluation(model: nn.Module, x: Tensor) -> None:
    """While another thread evaluates the same model without gradients."""
    ends = threading.Event()

    def evaluate() -> None:
        with torch.no_grad():
            while not ends.is_set():
                model(x + 1)

    errors: list[BaseException] = []
    thread = threading.Thread(target=lambda: _caught(evaluate, errors))
    thread.start()
    try:
        for _ in range(3):
            model(x)
        train_pass(model, x)
    finally:
        ends.set()
        thread.join()
    assert not errors


def _caught(function: Callable[[], None], errors: list[BaseException]) -> None:
    try:
        function()
    except BaseException as error:
        errors.append(error)


def backward_elsewhere(model: nn.Module, x: Tensor) -> None:
    out = loss(model(x), 4)
    in_a_thread(out.backward)


def all_elsewhere(model: nn.Module, x: Tensor) -> None:
    in_a_thread(lambda: train_pass(model, x))


def in_two_passes(model: nn.Module, x: Tensor) -> None:
    out = loss(model(x), 4)
    out.backward(retain_graph=True)
    model.zero_grad()
    out.backward()


def within(name: str) -> Callable[[nn.Module, Tensor], None]:
    def run(model: nn.Module, x: Tensor) -> None:
        with AROUND[name]():
            train_pass(model, x)

    return run


def after(other: Callable[[nn.Module, Tensor], None]) -> Callable[[nn.Module, Tensor], None]:
    def run(model: nn.Module, x: Tensor) -> None:
        other(model, x + 1)
        train_pass(model, x)

    return run


RUNS: dict[str, Callable[[nn.Module, Tensor], None]] = {
    **{name: within(name) for name in AROUND},
    **{other.__name__: after(other) for other in BESIDE},
    **{
        run.__name__: run
        for run in (beside_evaluation, backward_elsewhere, all_elsewhere, in_two_passes)
    },
}
UNTRACEABLE = ("per_sample_gradients", "traced_to_a_graph", "exported")


@pytest.mark.parametrize("block", BLOCKS)
def test_steps_are_as_without(block: str) -> None:
    """One run for each; experts cannot be traced, since they ask which tokens are whose."""
    twin = network(block)
    other = make(twin.parameters())
    for step in range(2):
        other.zero_grad()
        train_pass(twin, gaussian(step, *SHAPE))
        other.step()
    for name, run in RUNS.items():
        if block == "experts" and name in UNTRACEABLE:
            continue
        model = network(block)
        optimizer = make(model.parameters())
        for step in range(2):
            optimizer.zero_grad()
            run(model, gaussian(step, *SHAPE))
            assert torch._C._len_torch_function_stack() == 0, name
            optimizer.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=name)
        assert not any(row.reason for row in optimizer.report()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["autocast", "float32"])
@pytest.mark.parametrize("block", BLOCKS)
def test_outputs_and_gradients_are_bit_equal(block: str, dtype: torch.dtype | None) -> None:
    model, alone = network(block).float(), network(block).float()
    optimizer = make(model.parameters())
    for step in range(2):
        alone.load_state_dict(model.state_dict())
        found = []
        for net in (model, alone):
            net.zero_grad()
            with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
                out = net(gaussian(step, *SHAPE).float())
            loss(out.float(), 4).backward()
            found.append([out, *(p.grad for p in net.parameters())])
        assert all(map(torch.equal, *found))
        optimizer.step()


@pytest.mark.skipif(not TRACEABLE, reason="torch compiles function modes since 2.14")
@pytest.mark.parametrize("block", ["foreign", "subclass", "Conv1D", "attention"])
def test_compiled_autocast_steps_as_eager(block: str) -> None:
    torch._dynamo.reset()
    models = []
    for compiled in (True, False):
        model = network(block).float()
        optimizer = make(model.parameters())
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for step in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = run(gaussian(step, *SHAPE).float())
            loss(out.float(), 4).backward()
            optimizer.step()
        assert {row.last_update for row in optimizer.report()} == {1}
        models.append(model)
    assert_equal([*zip(*(model.parameters() for model in models), strict=True)], 2e-3)


@pytest.mark.skipif(not TRACEABLE, reason="torch compiles function modes since 2.14")
@pytest.mark.slow
@pytest.mark.parametrize("block", ["foreign", "attention"])
def test_inductor(block: str) -> None:
    torch._dynamo.reset()
    models = []
    for compiled in (True, False):
        model = network(block)
        optimizer = make(model.parameters())
        run = torch.compile(model, fullgraph=True) if compiled else model
        for step in range(3):
            optimizer.zero_grad()
            train_pass(run, gaussian(step, *SHAPE))
            optimizer.step()
        assert {row.last_update for row in optimizer.report()} == {2}
        models.append(model)
    assert_equal([*zip(*(model.parameters() for model in models), strict=True)])
