"""Weights that models use by themselves, in all circumstances that a pass may be in."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import tnkfac


class Block(nn.Module):
    """Attention, and a packed weight that it uses by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.packed = nn.Parameter(torch.randn(12, 4) / 2)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0]
        q, k, v = (F.linear(x, w) for w in self.packed.chunk(3))
        return x + F.linear(q * k.sigmoid() + v, self.out.weight, self.out.bias)


class Model(nn.Module):
    """Two blocks."""

    def __init__(self, around: Callable[..., Tensor] = lambda block, x: block(x)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.around(block, x)
        return x


def called(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x.requires_grad_(), use_reentrant=True)


def non_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    assert not torch._C._len_torch_function_stack()


def singd(model: nn.Module) -> tnkfac.SINGD:
    return tnkfac.SINGD(model.parameters(), lr=0.05, T=1)


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 4, generator=generator) for _ in range(count)]


def train(model: Any, optimizer: Any, xs: list[Tensor], parts: int = 1) -> None:
    for x in xs:
        optimizer.zero_grad()
        for part in x.chunk(parts):
            (model(part).square().sum((1, 2)).mean() / parts).backward()
        optimizer.step()


def alike(model: nn.Module, other: nn.Module, tolerance: float = 1e-10) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def trained(around: Any = called, parts: int = 1) -> Model:
    torch.manual_seed(0)
    model = Model(around)
    train(model, singd(model), batches(), parts)
    return model


# ------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("around", [reentrant, non_reentrant])
def test_checkpoints_around_modules_change_nothing(around: Any):
    alike(trained(around), trained())


class PartlyCheckpointed(nn.Module):
    """Recomputes the product alone, outside of the module that runs."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.w, self.kind = nn.Parameter(torch.randn(4, 4)), use_reentrant
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return self.last(
            checkpoint(lambda y: F.linear(y, self.w).tanh(), x, use_reentrant=self.kind)
        )


@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "not"])
@pytest.mark.filterwarnings("ignore:The fallback trains")
def test_checkpoints_of_a_part_of_a_module_are_no_error(kind: bool):
    """The gradients are right, and what is not measured is told."""
    model = PartlyCheckpointed(kind)
    untouched = copy.deepcopy(model)
    optimizer = singd(model)
    for x in batches(2):
        untouched.load_state_dict(model.state_dict())
        untouched.zero_grad()
        optimizer.zero_grad()
        for each in (model, untouched):
            each(x).square().sum().backward()
        for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        optimizer.step()
    rows = {row.name: row for row in optimizer.report()}
    assert rows["last.weight"].last_update == 1
    assert rows["w"].last_update == 1 or "checkpoint" in rows["w"].reason


# ------------------------------------------------------------------------------- other passes


def test_micro_batches_are_one_batch():
    alike(trained(parts=3), trained())


def test_autocast_measures_what_float32_does():
    factors = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = Model().float()
        optimizer = tnkfac.SINGD(model.parameters(), T=1, structures="dense")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(batches(1)[0].float())
        out.float().square().sum((1, 2)).mean().backward()
        factors.append(
            [
                part
                for layer in optimizer._registry.layers
                for part in (*layer.statistics.factors().A, *layer.statistics.factors().B)
            ]
        )
    assert len(factors[0]) == 2 * 16
    for one, other in zip(*factors, strict=True):
        assert (one - other).norm() <= 0.05 * one.norm()


def functional(model: nn.Module, x: Tensor) -> None:
    torch.func.functional_call(model, dict(model.named_parameters()), (x,))


def functional_gradient(model: nn.Module, x: Tensor) -> None:
    params = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(params)


def mapped(model: nn.Module, x: Tensor) -> None:
    torch.func.vmap(lambda y: model(y.unsqueeze(0)))(x)


def forward_mode(model: nn.Module, x: Tensor) -> None:
    torch.func.jvp(model, (x,), (x,))


def evaluated(model: nn.Module, x: Tensor) -> None:
    model.eval()(x)
    model.train()


def without_gradients(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def inferred(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        model(x)


def forgotten(model: nn.Module, x: Tensor) -> None:
    model(x)


OTHERS = [
    functional, functional_gradient, mapped, forward_mode, evaluated, without_gradients, inferred,
    forgotten,
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=lambda f: f.__name__)
def test_other_passes_leave_nothing(other: Any):
    """Before the first step, and between a backward pass and its step."""
    expected = trained()
    torch.manual_seed(0)
    model = Model(called)
    optimizer = singd(model)
    other(model, batches(1)[0] + 1)
    for x in batches():
        optimizer.zero_grad()
        model(x).square().sum((1, 2)).mean().backward()
        other(model, x + 1)
        optimizer.step()
    alike(model, expected)


# ------------------------------------------------------------------------------- errors


class Stops(nn.Module):
    """Raises inside of the model when it is asked to."""

    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()], ids=repr)
def test_what_follows_an_interrupted_pass_is_right(error: BaseException):
    expected = trained()
    torch.manual_seed(0)
    model = Model(called)
    stops = Stops()
    optimizer = singd(model)
    for x in batches():
        hook = model.blocks[1].attention.register_forward_hook(lambda m, a, o: (stops(o[0]), o[1]))
        stops.error = error
        with pytest.raises(type(error)):
            model(x)
        hook.remove()
        train(model, optimizer, [x])
    alike(model, expected)


# ------------------------------------------------------------------------------- copies


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies_of_a_model_tell_its_optimizer_nothing(copied: Any):
    expected = trained()
    torch.manual_seed(0)
    model = Model(called)
    optimizer = singd(model)
    for x in batches():
        twin = copied(model)
        optimizer.zero_grad()
        model(x).square().sum((1, 2)).mean().backward()
        twin(x + 1).square().sum().backward()
        optimizer.step()
        train(twin, singd(twin), [x + 2])
    alike(model, expected)


def test_two_optimizers_have_a_half_each():
    expected = trained()
    torch.manual_seed(0)
    model = Model(called)
    optimizers = [tnkfac.SINGD(block.parameters(), lr=0.05, T=1) for block in model.blocks]
    for x in batches():
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x).square().sum((1, 2)).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    alike(model, expected)


@pytest.mark.parametrize("end", ["close", "del"])
def test_an_optimizer_that_is_gone_leaves_no_hooks(end: str):
    model = Model(called)
    optimizer = singd(model)
    train(model, optimizer, batches())
    if end == "close":
        optimizer.close()
    del optimizer
    gc.collect()
    model(batches()[0])
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# ------------------------------------------------------------------------------- threads, modes


def test_threads_do_not_see_each_other():
    expected = trained()
    models = []

    def work(model: nn.Module) -> None:
        torch.set_default_dtype(torch.float64)
        train(model, singd(model), batches())

    for _ in range(3):
        torch.manual_seed(0)
        models.append(Model(called))
    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models:
        alike(model, expected)


class Counting(TorchFunctionMode):
    """Somebody else's mode."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is F.linear
        return func(*args, **(kwargs or {}))


def inside(block: nn.Module, x: Tensor) -> Tensor:
    with Counting():
        return block(x)


def on_a_device(block: nn.Module, x: Tensor) -> Tensor:
    with torch.device("cpu"):
        return block(x)


@pytest.mark.parametrize("around", [inside, on_a_device])
def test_other_modes_inside(around: Any):
    alike(trained(around), trained())


def test_other_modes_outside_see_all_calls():
    counts = []
    for build in (singd, lambda m: torch.optim.SGD(m.parameters(), lr=0.05)):
        torch.manual_seed(0)
        model = Model(called)
        optimizer = build(model)
        with Counting() as mode, torch.device("cpu"):
            train(model, optimizer, batches())
        counts.append(mode.products)
    assert counts[0] >= counts[1] == 3 * 2 * 4
    torch.manual_seed(0)
    model = Model(called)
    with Counting():
        train(model, singd(model), batches())
    alike(model, trained())


# ------------------------------------------------------------------------------- experts


class Routed(nn.Module):
    """Tokens go to the expert that they are told to."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 4, 4) / 2)
        self.choice = torch.zeros(6, dtype=torch.long)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(3):
            mine = self.choice == e
            out[mine] = F.linear(x[mine], self.experts[e])
        return out


def test_experts_without_tokens_keep_their_state_and_place():
    model = Routed()
    optimizer = singd(model)
    model.choice = torch.tensor([0, 1, 2, 0, 1, 2])
    train(model, optimizer, batches(2))
    model.choice = torch.tensor([0, 1, 1, 0, 1, 0])
    state = optimizer.state[model.experts]["[2]"]
    before, kept = model.experts.detach().clone(), copy.deepcopy(state)
    train(model, optimizer, batches(2))
    assert torch.equal(model.experts[2], before[2])
    assert not torch.equal(model.experts[1], before[1])
    for key, value in kept.items():
        assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(value)), key
    assert int(optimizer.state[model.experts]["[1]"]["last_update"]) == 3


def test_factors_of_an_expert_are_means_over_its_own_rows():
    """Those of the batch normalise output gradients: the loss is their mean."""
    model = Routed()
    optimizer = tnkfac.SINGD(model.parameters(), T=1, structures="dense")
    model.choice = torch.tensor([0, 1, 1, 1, 1, 0])
    (x,) = batches(1)
    out = model(x)
    out.square().sum((1, 2)).mean().backward()
    for e, layer in enumerate(optimizer._registry.layers[:2]):
        rows = x[model.choice == e].flatten(0, 1)
        g = 2 * out[model.choice == e].detach().flatten(0, 1) / 6
        factors = layer.statistics.factors()
        torch.testing.assert_close(factors.A[0][0], rows.T @ rows / len(rows))
        torch.testing.assert_close(factors.B[0][0], 6 * g.T @ g)
    assert not optimizer._registry.layers[2].statistics.pending
