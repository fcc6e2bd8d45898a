"""Gradients that somebody else resets take the statistics of their passes along."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oracles.grids import all_pairs
from oracles.loops import assert_same_state, assert_same_weights, mlp_batch, squares
from oracles.optimizers import EVERY_CURVATURE
from tnkfac import KFAC
from tnkfac.curvature.capture.resets import Resets

Reset = Callable[[], None]
Run = Callable[[Tensor], Tensor]


def foreach_zero(model: nn.Module) -> None:
    torch._foreach_zero_([p.grad for p in model.parameters()])


def each(change: Callable[[Any], Any]) -> Callable[[nn.Module], None]:
    """The same change of every parameter."""

    def reset(model: nn.Module) -> None:
        for p in model.parameters():
            if p.grad is not None:
                change(p)

    return reset


def assign_zeros(p: nn.Parameter) -> None:
    p.grad = torch.zeros_like(p)


def assign_none(p: nn.Parameter) -> None:
    p.grad = None


def other_optimizer(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters()).zero_grad(set_to_none=False)


IN_PLACE: dict[str, Callable[[nn.Module], None]] = {
    "model.zero_grad in place": lambda model: model.zero_grad(set_to_none=False),
    "zero_": each(lambda p: p.grad.zero_()),
    "zero_ of a detached gradient": each(lambda p: p.grad.detach().zero_()),
    "foreach": foreach_zero,
    "fill_": each(lambda p: p.grad.fill_(0)),
    "copy_": each(lambda p: p.grad.copy_(torch.zeros_like(p))),
    "mul_": each(lambda p: p.grad.mul_(0)),
    "zeros assigned": each(assign_zeros),
    "another optimizer": other_optimizer,
}
UNNOTICED: dict[str, Callable[[nn.Module], None]] = {
    "zero_ of data": each(lambda p: p.grad.data.zero_()),
    "data assigned": each(lambda p: setattr(p.grad, "data", torch.zeros_like(p))),
    "NumPy": each(lambda p: p.grad.numpy().fill(0)),
}
"""No version of a gradient tells of these."""
TO_NONE: dict[str, Callable[[nn.Module], None]] = {
    "model.zero_grad": lambda model: model.zero_grad(),
    "None assigned": each(assign_none),
}


def sam(model: nn.Module, run: Run, optimizer: Any, reset: Reset, x: Tensor, y: Tensor) -> None:
    """Sharpness-aware minimisation: the gradient at a point uphill."""
    squares(run(x), y).backward()
    climbs = [0.3 * p.grad for p in model.parameters()]
    for sign in (1, -1):
        with torch.no_grad():
            for p, climb in zip(model.parameters(), climbs, strict=True):
                p.add_(sign * climb)
        if sign == 1:
            reset()
            squares(run(x), y).backward()
    optimizer.step()
    reset()


def dropped(model: nn.Module, run: Run, optimizer: Any, reset: Reset, x: Tensor, y: Tensor) -> None:
    """Two passes of much larger gradients are thrown away, two are kept."""
    for scale in (40, 30):
        (scale * squares(run(x), y)).backward()
    reset()
    for part in (slice(0, 5), slice(5, 8)):
        squares(run(x[part]), y[part]).backward()
    optimizer.step()
    reset()


def late(model: nn.Module, run: Run, optimizer: Any, reset: Reset, x: Tensor, y: Tensor) -> None:
    """The reset comes between the forward pass that counts and its backward pass."""
    (40 * squares(run(x), y)).backward()
    loss = squares(run(x), y)
    reset()
    loss.backward()
    optimizer.step()
    reset()


def unread(model: nn.Module, run: Run, optimizer: Any, reset: Reset, x: Tensor, y: Tensor) -> None:
    """Nothing comes after the reset but a step."""
    squares(run(x), y).backward()
    optimizer.step()
    (40 * squares(run(x), y)).backward()
    reset()
    optimizer.step()
    reset()


LOOPS = (sam, dropped, late, unread)


def network(last: float = 1.0) -> nn.Sequential:
    """With a fallback parameter; the last layer's weights may be zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).double()
    with torch.no_grad():
        model[-1].weight.mul_(last)
    return model


def train(
    kind: str,
    loop: Callable[..., None],
    way: Callable[[nn.Module], None] | None,
    to_none: bool,
    model: nn.Module | None = None,
    wrapped: Callable[[nn.Module], Run] | None = None,
) -> tuple[nn.Module, Any]:
    """Three rounds; ``way`` None for ``optimizer.zero_grad``, which is told to drop statistics."""
    model = network() if model is None else model
    intervals = {"T": 1} if kind.startswith("SINGD") else {"inv_update_steps": 1}
    optimizer = EVERY_CURVATURE[kind](model, lr=0.02, **intervals)
    run = model if wrapped is None else wrapped(model)

    def reset() -> None:
        if way is None:
            optimizer.zero_grad(set_to_none=to_none)
        else:
            way(model)

    for step in range(3):
        loop(model, run, optimizer, reset, *mlp_batch(step, 4, 2))
    return model, optimizer


def assert_as_zero_grad(
    kind: str,
    loop: Callable[..., None],
    way: Callable[[nn.Module], None],
    to_none: bool,
    make: Callable[[], nn.Module] = network,
    wrapped: Callable[[nn.Module], Run] | None = None,
) -> None:
    actual, optimizer = train(kind, loop, way, to_none, make(), wrapped)
    expected, twin = train(kind, loop, None, to_none, make(), wrapped)
    assert_same_weights(actual, expected)
    assert_same_state(actual, optimizer, expected, twin)
    assert [r.last_update for r in optimizer.report()] == [r.last_update for r in twin.report()]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", EVERY_CURVATURE)
def test_gradients_reset_in_place(kind: str, loop: Callable[..., None]) -> None:
    assert_as_zero_grad(kind, loop, IN_PLACE["model.zero_grad in place"], False)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", [*IN_PLACE, *TO_NONE])
def test_every_way_to_reset(name: str, loop: Callable[..., None]) -> None:
    way = {**IN_PLACE, **TO_NONE}[name]
    assert_as_zero_grad("SINGD dense", loop, way, name in TO_NONE)


@pytest.mark.parametrize("loop", [sam, dropped, late])
@pytest.mark.parametrize("name", UNNOTICED)
@pytest.mark.parametrize("kind", EVERY_CURVATURE)
def test_resets_that_autograd_does_not_count(
    kind: str, name: str, loop: Callable[..., None]
) -> None:
    """Zero gradients contradict inputs and output gradients that are not."""
    assert_as_zero_grad(kind, loop, UNNOTICED[name], False)


class Reused(nn.Module):
    """A layer that is called three times, and one without bias that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.inner.weight
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 4]`` to ``[N, 2]``."""
        for layer in (self.inner, self.tied, self.inner, self.inner):
            x = torch.tanh(layer(x))
        y: Tensor = self.last(x)
        return y


class Checkpointed(nn.Module):
    """Its activations are made twice."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.last = nn.Linear(4, 2)
        self._reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 4]`` to ``[N, 2]``."""
        x = x.detach().requires_grad_()
        for block in (*self.blocks, self.blocks[0]):
            x = torch.tanh(checkpoint(block, x, use_reentrant=self._reentrant))
        y: Tensor = self.last(x)
        return y


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().double()

    return build


MODELS: dict[str, Callable[[], nn.Module]] = {
    "reused and tied": seeded(Reused),
    "checkpointed": seeded(lambda: Checkpointed(False)),
    "checkpointed, reentrant": seeded(lambda: Checkpointed(True)),
    "frozen bias": seeded(lambda: frozen_bias(network())),
    "no bias": seeded(lambda: nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2))),
}


def frozen_bias(model: nn.Sequential) -> nn.Sequential:
    model[0].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("loop", [dropped, late, unread])
@pytest.mark.parametrize("kind", ["SINGD diagonal", "KFAC eigen"])
@pytest.mark.parametrize("name", MODELS)
def test_models_whose_gradients_are_reset(name: str, kind: str, loop: Callable[..., None]) -> None:
    for way, to_none in ((IN_PLACE["zero_"], False), (TO_NONE["model.zero_grad"], True)):
        assert_as_zero_grad(kind, loop, way, to_none, MODELS[name])


@pytest.mark.parametrize(
    ("kind", "loop", "way"),
    all_pairs(
        ["SINGD dense", "KFAC ekfac"],
        [sam, dropped, late],
        [IN_PLACE["foreach"], TO_NONE["None assigned"]],
    ),
)
def test_compiled_models_whose_gradients_are_reset(
    kind: str, loop: Callable[..., None], way: Callable[[nn.Module], None]
) -> None:
    torch._dynamo.reset()

    def wrapped(model: nn.Module) -> Run:
        return torch.compile(model, backend="aot_eager", fullgraph=True)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()

    assert_as_zero_grad(kind, loop, way, way is TO_NONE["None assigned"], make, wrapped)


@pytest.mark.parametrize("loop", [sam, dropped, late])
@pytest.mark.parametrize("kind", EVERY_CURVATURE)
def test_gradients_that_cannot_be_read_without_waiting(
    kind: str, loop: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device: what is stale is multiplied away, and nothing is asked for."""
    monkeypatch.setattr(Resets, "on_host", False)
    monkeypatch.setattr(Resets, "all_zero", lambda self: pytest.fail("waits"))
    assert_as_zero_grad(kind, loop, IN_PLACE["zero_"], False)


def test_a_dropped_pass_that_cannot_be_read_is_not_half_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A forward pass without a backward one after the reset: nothing is left to measure."""
    monkeypatch.setattr(Resets, "on_host", False)
    model = network()
    optimizer = EVERY_CURVATURE["SINGD dense"](model)
    x, y = mlp_batch(0, 4, 2)
    squares(model(x), y).backward()
    IN_PLACE["zero_"](model)
    model(x)
    optimizer.step()
    assert all(row.last_update is None for row in optimizer.report())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_layers_without_gradient_uphill() -> None:
    """Zero weights behind them: their first gradients are zero before anybody resets them."""
    assert_as_zero_grad("KFAC eigen", sam, IN_PLACE["zero_"], False, lambda: network(last=0.0))


# --- what is no reset ----------------------------------------------------------------------------


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def clip_values(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def unscale(model: nn.Module) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros((), dtype=torch.float64))
    scaler.unscale_(torch.optim.SGD(model.parameters()))


def assign_half(p: nn.Parameter) -> None:
    p.grad = 0.5 * p.grad


def nothing(model: nn.Module) -> None:
    pass


KEEPING: dict[str, Callable[[nn.Module], None]] = {
    "nothing": nothing,
    "clip_grad_norm_": clip,
    "clip_grad_value_": clip_values,
    "unscale_": unscale,
    "mean over processes": each(lambda p: p.grad.mul_(0.25).add_(0.125)),
    "noise": each(lambda p: p.grad.add_(torch.ones_like(p))),
    "first row zeroed": each(lambda p: p.grad[0].zero_() if len(p) > 2 else None),
    "another tensor": each(assign_half),
    "a gradient of something else": lambda model: sum(
        p.square().sum() for p in model.parameters()
    ).backward(),
    "an evaluation": lambda model: model(torch.ones(3, 4, dtype=torch.float64)),
    "a gradient of the input": lambda model: torch.autograd.grad(
        model(x := torch.ones(3, 4, dtype=torch.float64, requires_grad=True)).sum(), x
    ),
}


def factors(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.clone()
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
        if key.split(".")[0] in ("A", "B", "K", "C")
    }


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("kind", EVERY_CURVATURE)
def test_statistics_stay_through_what_is_no_reset(kind: str, name: str) -> None:
    """Factors are those of all micro-batches, as if nobody had touched the gradients."""
    x, y = mlp_batch(0, 4, 2)
    found = []
    for change in (KEEPING[name], nothing):
        model = network()
        optimizer = EVERY_CURVATURE[kind](model, lr=0.0)
        for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
            squares(model(x[part]), y[part]).backward()
            change(model)
        optimizer.step()
        found.append(factors(model, optimizer))
    assert found[0].keys() == found[1].keys()
    assert found[0]
    for key, value in found[1].items():
        torch.testing.assert_close(found[0][key], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("change", [nothing, clip, unscale])
@pytest.mark.parametrize("kind", EVERY_CURVATURE)
def test_gradients_that_are_zero_by_themselves(
    kind: str, change: Callable[[nn.Module], None]
) -> None:
    """Before zero weights: micro-batches add up, and a change before the step is no reset."""
    x, y = mlp_batch(0, 4, 2)
    model, plain = network(last=0.0), network(last=0.0)
    optimizer, twin = EVERY_CURVATURE[kind](model, lr=0.0), EVERY_CURVATURE[kind](plain, lr=0.0)
    for part in (slice(0, 4), slice(4, 8)):
        squares(model(x[part]), y[part]).backward()
    assert not model[0].weight.grad.any()
    change(model)
    (squares(plain(x), y)).backward()
    optimizer.step()
    twin.step()
    assert all(row.last_update == 0 for row in optimizer.report() if row.approximation)
    for key, value in factors(plain, twin).items():
        if key.endswith(("A", "0.weight/K")):
            found = factors(model, optimizer)[key]
            torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-14)


def drawn(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    output = model(x)
    optimizer.sample_fisher(output, generator=torch.Generator().manual_seed(1))
    return nn.functional.cross_entropy(output, torch.arange(len(x)) % 2)


@pytest.mark.parametrize("way", [IN_PLACE["zero_"], TO_NONE["model.zero_grad"], None])
def test_drawn_targets_of_a_dropped_pass(way: Callable[[nn.Module], None] | None) -> None:
    runs = []
    for told in (False, True):
        model = network()
        optimizer = KFAC(model, lr=0.02, fisher_type="mc", inv_update_steps=1)
        for step in range(3):
            x, _ = mlp_batch(step, 4, 2)
            drawn(model, optimizer, 5 * x).backward()
            if way is not None and not told:
                way(model)
            elif way is not None:
                optimizer.zero_grad(set_to_none=way is not IN_PLACE["zero_"])
            losses = [drawn(model, optimizer, part) for part in (x[:3], x[3:])]
            for loss in losses:  # two forward passes, then two backward passes
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((model, optimizer))
    assert_same_weights(runs[0][0], runs[1][0])
    assert_same_state(*runs[0], *runs[1])


def test_a_gradient_at_the_address_of_the_last_one_is_another() -> None:
    """Freed memory is used again at once: neither ids nor addresses tell two gradients apart."""
    param = torch.nn.Parameter(torch.ones(3))
    reused = 0
    for _ in range(20):
        param.grad = torch.ones(3)
        resets = Resets([param])
        resets.mark()
        before = id(param.grad)
        assert not resets.changed
        param.grad = None
        param.grad = torch.ones(3)
        reused += id(param.grad) == before
        assert resets.changed
        assert resets.changed_before_pass
    assert reused
