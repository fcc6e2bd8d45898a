"""Whatever happens inside of a module, nothing stays behind; whoever else looks at functions."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from oracles.uses_training import OPTIMIZERS, assert_equal, gaussian, loss, train
from oracles.uses_zoo import BLOCKS, network

SHAPE = (4, 5, 4)
make = OPTIMIZERS["SINGD dense"]


@pytest.fixture(autouse=True)
def _empty_stack() -> Iterator[None]:
    yield
    assert torch._C._len_torch_function_stack() == 0


def pairs(model: nn.Module, twin: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [*zip(model.parameters(), twin.parameters(), strict=True)]


class Tripping(TorchFunctionMode):
    """Raises at the first product."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("linear", "addmm", "conv1d", "scaled_dot_product_attention"):
            raise self.error
        return func(*args, **(kwargs or {}))


class Counting(TorchFunctionMode):
    """Counts functions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("block", BLOCKS)
def test_an_error_inside_leaves_nothing(block: str, error: type[BaseException]) -> None:
    """In the middle of a module that is looked at; the next steps are those of a twin."""
    model, twin = network(block), network(block)
    optimizer, other = make(model.parameters()), make(twin.parameters())
    for step in range(3):
        for net, one in ((model, optimizer), (twin, other)):
            if net is model and step != 1:
                with pytest.raises(error), Tripping(error()):
                    net[2](gaussian(step, *SHAPE))
            one.zero_grad()
            loss(net(gaussian(step, *SHAPE)), 4).backward()
            one.step()
        assert torch._C._len_torch_function_stack() == 0
    assert_equal(pairs(model, twin))


@pytest.mark.parametrize("then", ["step", "zero_grad", "the module runs"])
@pytest.mark.parametrize("around", [0, 1, 2])
def test_an_interrupt_is_healed(around: int, then: str) -> None:
    """Modes that the user has entered around it end as they should, those entered since stay."""
    model = network("foreign")
    optimizer = make(model.parameters())
    loss(model(gaussian(0, *SHAPE)), 4).backward()

    def interrupted(error: BaseException) -> Tensor:
        raise error

    handle = model[2].register_forward_pre_hook(lambda *_: interrupted(KeyboardInterrupt()))
    outer, since = Counting(), Counting()
    with outer:
        with pytest.raises(KeyboardInterrupt), ExitStack() as stack:
            for _ in range(around):
                stack.enter_context(Counting())
            model[2](gaussian(1, *SHAPE))
        handle.remove()
        with since:
            if then == "the module runs":
                model[2](gaussian(1, *SHAPE))
            else:
                getattr(optimizer, then)()
            own = torch._C._len_torch_function_stack()
            found = [torch._C._get_function_stack_at(place) for place in range(own)]
            assert found == [outer, since]


class Within(nn.Module):
    """Enters a mode inside of a module."""

    def __init__(self, module: nn.Module, mode: Callable[[], Any]) -> None:
        super().__init__()
        self.module, self.mode = module, mode
        self.extra = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        """What the module returns, and a product of its own before."""
        with self.mode():
            return self.module(x @ self.extra)


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("mode", [Counting, lambda: torch.device("cpu")], ids=["own", "device"])
@pytest.mark.parametrize("block", ["foreign", "attention", "Conv1D", "parts"])
def test_other_modes(block: str, mode: Callable[[], Any], where: str) -> None:
    models = []
    for kind in (mode, torch.enable_grad):
        model = network(block)
        model[2] = Within(model[2], kind if where == "inside" else torch.enable_grad).double()
        optimizer = make(model.parameters())
        for step in range(3):
            optimizer.zero_grad()
            with (kind if where == "outside" else torch.enable_grad)():
                loss(model(gaussian(step, *SHAPE)), 4).backward()
            optimizer.step()
        assert not any(row.reason for row in optimizer.report())
        models.append(model)
    assert_equal(pairs(*models))


@pytest.mark.parametrize("block", BLOCKS)
def test_two_optimizers_of_one_model(block: str) -> None:
    """Each with parameters of its own; the same as one with two groups."""
    model, twin = network(block), network(block)
    halves = [[*model[:2].parameters(), *model[4].parameters()], [*model[2].parameters()]]
    optimizers = [make(half) for half in halves]
    others = [[*twin[:2].parameters(), *twin[4].parameters()], [*twin[2].parameters()]]
    other = make([{"params": half} for half in others])
    for step in range(3):
        for net, those in ((model, optimizers), (twin, [other])):
            net.zero_grad()
            loss(net(gaussian(step, *SHAPE)), 4).backward()
            for each in those:
                each.step()
    assert_equal(pairs(model, twin))


def test_two_optimizers_of_one_module() -> None:
    """A weight for each, in the same scope."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(4, 4) / 2) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.first) @ self.second

    torch.manual_seed(0)
    model, twin = Both().double(), Both().double()
    twin.load_state_dict(model.state_dict())
    optimizers = [make([model.first]), make([model.second])]
    other = make([{"params": [twin.first]}, {"params": [twin.second]}])
    for step in range(3):
        for net, those in ((model, optimizers), (twin, [other])):
            net.zero_grad()
            loss(net(gaussian(step, *SHAPE)), 4).backward()
            for each in those:
                each.step()
    assert_equal(pairs(model, twin))
    assert not any(row.reason for each in optimizers for row in each.report())


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("way", ["deleted", "closed", "inside"])
@pytest.mark.parametrize("block", BLOCKS)
def test_an_optimizer_that_is_gone_leaves_no_hook(block: str, way: str) -> None:
    model = network(block)
    optimizer = train(model, make, SHAPE, steps=1)
    assert hooks(model)
    out = model(gaussian(0, *SHAPE)) if way == "inside" else None
    if way == "closed":
        optimizer.close()
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    assert not hooks(model)
    loss(model(gaussian(1, *SHAPE)) if out is None else out, 4).backward()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_new_optimizer_goes_on(block: str) -> None:
    """As one on a copy of the model does, whatever its predecessor has seen."""
    model = network(block)
    train(model, make, SHAPE).close()
    twin = network(block)
    twin.load_state_dict(model.state_dict())
    for net in (model, twin):
        train(net, make, SHAPE)
    assert_equal(pairs(model, twin))


def in_threads(*work: Callable[[], None]) -> None:
    """Run functions at the same time; raise what they raise."""
    errors: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("block", BLOCKS)
def test_two_threads_with_a_model_each(block: str) -> None:
    models, twin = [network(block), network(block)], network(block)
    in_threads(*(lambda net=net: train(net, make, SHAPE, steps=10) for net in models))
    train(twin, make, SHAPE, steps=10)
    for model in models:
        assert_equal(pairs(model, twin))


@pytest.mark.parametrize("block", BLOCKS)
def test_two_threads_with_one_model(block: str) -> None:
    """Forward passes at the same time, one backward pass of both, as a step of their sum."""
    model, twin = network(block), network(block)
    optimizer, other = make(model.parameters()), make(twin.parameters())
    barrier = threading.Barrier(2)
    for step in range(3):
        outputs: dict[int, Tensor] = {}

        def work(part: int, step: int = step, outputs: dict[int, Tensor] = outputs) -> None:
            barrier.wait()
            outputs[part] = model(gaussian(2 * step + part, *SHAPE))
            assert torch._C._len_torch_function_stack() == 0

        in_threads(lambda: work(0), lambda: work(1))
        optimizer.zero_grad()
        other.zero_grad()
        (loss(outputs[0], 4) + loss(outputs[1], 4)).backward()
        (
            loss(twin(gaussian(2 * step, *SHAPE)), 4)
            + loss(twin(gaussian(2 * step + 1, *SHAPE)), 4)
        ).backward()
        optimizer.step()
        other.step()
    assert_equal(pairs(model, twin))
