"""Layers that become something else after the optimizer was built."""

import copy
import functools
import re
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracles.twins import OPTIMIZERS, assert_same_training, train
from tnkfac import KFAC, SINGD, curvature

# --- geometry -----------------------------------------------------------------------------------

GEOMETRIES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "stride": (lambda: nn.Conv2d(2, 3, 3, padding=1), {"stride": (2, 1)}),
    "stride, one number": (lambda: nn.Conv2d(2, 3, 3), {"stride": 2}),
    "padding": (lambda: nn.Conv2d(2, 3, 3), {"padding": (1, 0)}),
    "padding, one number in a list": (lambda: nn.Conv2d(2, 3, 3), {"padding": [1]}),
    "padding, same": (lambda: nn.Conv2d(2, 3, (2, 3)), {"padding": "same"}),
    "dilation": (lambda: nn.Conv2d(2, 3, 2, padding=1), {"dilation": (2, 2)}),
    "mode": (lambda: nn.Conv2d(2, 3, 3, padding=1), {"padding_mode": "circular"}),
    "mode, back to zeros": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        {"padding_mode": "zeros"},
    ),
    "padding that the mode does not read": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        {"padding": (2, 2)},
    ),
    "what the mode does read": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"),
        {"_reversed_padding_repeated_twice": [2, 0, 1, 1]},
    ),
    "several": (lambda: nn.Conv2d(2, 3, 2), {"stride": (2, 2), "padding": (1, 1), "dilation": 2}),
    "transposed, stride": (lambda: nn.ConvTranspose2d(2, 3, 3), {"stride": (2, 2)}),
    "transposed, padding": (lambda: nn.ConvTranspose2d(2, 3, 3), {"padding": (1, 0)}),
    "transposed, output padding": (
        lambda: nn.ConvTranspose2d(2, 3, 3, stride=2),
        {"output_padding": (1, 1)},
    ),
    "transposed, dilation": (lambda: nn.ConvTranspose2d(2, 3, 2), {"dilation": 2}),
    "grouped": (lambda: nn.Conv2d(2, 4, 3, groups=2, padding=1), {"stride": (2, 2)}),
    "lazy": (lambda: nn.LazyConv2d(3, 3), {"padding": (1, 1)}),
}


class Layered(nn.Module):
    """A convolution ``[N, 2, 6, 5]`` and a linear layer behind it."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = build(), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Whatever comes out of the convolution is averaged."""
        y: Tensor = self.last(torch.tanh(self.layer(x)).mean((1, 2, 3))[:, None])
        return y


def images(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 2, 6, 5, generator=generator, dtype=torch.float64)


def change(module: Any, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        setattr(module, name, value)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_geometry_of_the_call(name: str, kind: str) -> None:
    """Set after the optimizer was built, and between steps, it is as if it had always been so."""
    build, changes = GEOMETRIES[name]
    x = images()
    model, twin = Layered(build).double(), Layered(build).double()
    change(twin.layer, changes)
    for _ in range(2 if name == "lazy" else 1):
        other = OPTIMIZERS[kind](twin.parameters())
        optimizer = OPTIMIZERS[kind](model.parameters())
    if name == "lazy":
        torch.manual_seed(1)
        model(x)
        torch.manual_seed(1)
        twin(x)
    change(model.layer, changes)
    train(optimizer, lambda: model(x).square().mean())
    train(other, lambda: twin(x).square().mean())
    assert_same_training(model, optimizer, twin, other)


class Dilations(nn.Module):
    """One weight at several dilations; of its own layers or of one that is changed."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(2, 3, 2, dilation=d) for d in (1, 2, 3))
        self.shared = shared
        for layer in self.layers:
            layer.weight, layer.bias = self.layers[0].weight, self.layers[0].bias

    def forward(self, x: Tensor) -> Tensor:
        """Sum over the dilations."""
        total = x.new_zeros(())
        for dilation, layer in zip((1, 2, 3), self.layers, strict=True):
            if self.shared:
                layer = self.layers[0]
                layer.dilation = (dilation, dilation)
            total = total + torch.tanh(layer(x)).square().mean()
        return total


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_several_geometries_in_one_pass(kind: str) -> None:
    x = images()
    model, twin = Dilations(True).double(), Dilations(False).double()
    pair = [OPTIMIZERS[kind](net.parameters()) for net in (model, twin)]
    for net, optimizer in zip((model, twin), pair, strict=True):
        train(optimizer, lambda net=net: net(x))
    assert_same_training(model, pair[0], twin, pair[1])


@pytest.mark.parametrize(
    ("name", "structures"),
    [
        ("stride", "dense"),
        ("mode", "diagonal"),
        ("padding, same", "dense"),
        ("transposed, padding", "diagonal"),
    ],
)
def test_the_geometry_of_a_compiled_call(name: str, structures: str) -> None:
    torch._dynamo.reset()
    build, changes = GEOMETRIES[name]
    model, twin, x = Layered(build).double(), Layered(build).double(), images()
    pair = [SINGD(net.parameters(), 1e-2, structures=structures, T=1) for net in (model, twin)]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        train(pair[0], lambda: compiled(x).square().mean(), 2)
        train(pair[1], lambda: twin(x).square().mean(), 2)
        change(model.layer, changes)
        change(twin.layer, changes)
    assert_same_training(model, pair[0], twin, pair[1])


ESTIMATES: dict[str, Callable[[Any, Any], list[Tensor]]] = {
    "kfac": lambda m, d: [
        t for f in curvature.kfac(m, nn.MSELoss(), d).values() for t in (f.A, f.B)
    ],
    "diagonal": lambda m, d: [*curvature.diagonal(m, nn.MSELoss(), d).values()],
    "per sample": lambda m, d: [*curvature.per_sample_gradients(m, nn.MSELoss(), d).values()],
    "ntk": lambda m, d: [curvature.ntk(m, d[0][0])],
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_estimators_take_the_geometry_of_each_call(name: str) -> None:
    x = images()

    class Mean(Dilations):
        def forward(self, x: Tensor) -> Tensor:
            parts = []
            for dilation, layer in zip((1, 2, 3), self.layers, strict=True):
                if self.shared:
                    layer = self.layers[0]
                    layer.dilation = (dilation, dilation)
                parts.append(torch.tanh(layer(x)).mean((2, 3)))
            return torch.stack(parts).sum(0)

    data = [(x, torch.zeros(4, 3, dtype=torch.float64))]
    model, twin = Mean(True).double(), Mean(False).double()
    found, expected = (ESTIMATES[name](net, data) for net in (model, twin))
    if name == "kfac":  # the twin has three modules, whose sums the one module adds up
        weights = [1.0 * (5 - d + 1) * (6 - d + 1) for d in (2, 3, 4)]
        A = sum(w * expected[2 * i] for i, w in enumerate(weights)) / sum(weights)
        expected = [A, expected[1] + expected[3] + expected[5]]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def shrunk(model: Any) -> None:
    model[0].weight = nn.Parameter(model[0].weight[:, :2].detach().clone())


def regrouped(model: Any) -> None:
    model[1].groups = 2


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("then", [regrouped, shrunk])
def test_factors_of_another_shape_are_left_to_the_fallback(
    then: Callable[[Any], None], kind: str
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 1, 1)).double()
    x = images()
    model[0], x4 = nn.Conv2d(4, 2, 1).double(), torch.cat([x, x], 1)
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(optimizer, lambda: model(x4).square().mean(), 1)
    then(model)
    if then is regrouped:  # a grouped layer of this weight takes four channels
        model[0] = nn.Conv2d(4, 4, 1).double()
        x = x4
    with pytest.warns(UserWarning, match="fallback"):
        train(optimizer, lambda: model(x).square().mean(), 2)
    index = 0 if then is shrunk else 1
    row = next(row for row in optimizer.report() if row.name == f"{index}.weight")
    assert "groups became 2" in row.reason or "took its place" in row.reason
    assert row.approximation == ""


# --- another forward ----------------------------------------------------------------------------


def scaled(layer: Any) -> Any:
    return lambda x: F.linear(x, 2 * layer.weight, layer.bias)


def bound(layer: Any) -> Any:
    return types.MethodType(lambda self, x: F.linear(x.sin(), self.weight, self.bias), layer)


def borrowed(layer: Any) -> Any:
    return copy.deepcopy(layer).forward


def wrapped(layer: Any, change: Callable[[Any, Tensor], Tensor]) -> Any:
    stock = layer.forward

    @functools.wraps(stock)
    def forward(x: Tensor) -> Tensor:
        return change(stock, x)

    return forward


def with_other_bias(layer: Any) -> Any:
    """The stock ``forward`` of a layer that shares the weight only."""
    other = nn.Linear(3, 3).double()
    other.weight = layer.weight
    return other.forward


OTHERS: dict[str, Callable[[Any], Any]] = {
    "lambda": scaled,
    "method": bound,
    "partial": lambda layer: functools.partial(lambda la, x: F.linear(x, la.weight.sin()), layer),
    "of another layer": with_other_bias,
    "wraps, scaled behind": lambda la: wrapped(la, lambda f, x: 2 * f(x)),
    "wraps, added behind": lambda la: wrapped(la, lambda f, x: f(x) + x[..., :1]),
    "wraps, relu behind": lambda la: wrapped(la, lambda f, x: f(x).relu()),
    "wraps, scaled before": lambda la: wrapped(la, lambda f, x: f(2 * x)),
    "wraps, twice": lambda la: wrapped(la, lambda f, x: f(f(x))),
}
SAME: dict[str, Callable[[Any], Any]] = {
    "stock": lambda layer: layer.forward,
    "partial": lambda layer: functools.partial(nn.Linear.forward, layer),
    "wraps": lambda la: wrapped(la, lambda f, x: f(x)),
    "wraps, twice": lambda la: functools.wraps(la.forward)(wrapped(la, lambda f, x: f(x))),
    "autocast": lambda la: torch.autocast("cpu", enabled=False)(la.forward),
    "compiled": lambda la: torch.compile(la.forward, backend="aot_eager"),
    "method": lambda la: types.MethodType(type(la).forward, la),
}


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2)).double()


def rows(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", OTHERS)
def test_another_forward_of_data(name: str) -> None:
    """Where the input requires no gradient, and the graph does not show it."""
    model, x = net(), rows()
    optimizer = SINGD(model.parameters(), T=1)
    model[0].forward = OTHERS[name](model[0])
    with pytest.warns(UserWarning, match=r"0\.weight: its forward was replaced"):
        train(optimizer, lambda: model(x).square().mean(), 1)


PRODUCTS = {"method": {"2.weight", "2.bias"}, "of another layer": {"2.weight"}}
"""Forwards that multiply with the weight as it is, and what is captured at their calls."""


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_another_forward_from_the_start_is_captured_at_its_calls(name: str, kind: str) -> None:
    """The factors are those of the product, whatever is before and behind it."""
    model, x = net(), rows()
    model[2].forward = OTHERS[name](model[2])
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(optimizer, lambda: model(x).square().mean(), 2)
    found = {row.name: row.last_update for row in optimizer.report()}
    assert {key for key in found if key[0] == "2" and found[key] == 1} == PRODUCTS[name]


@pytest.mark.parametrize("when", ["before", "after", "between steps"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", OTHERS)
def test_another_forward_is_left_to_the_fallback(name: str, kind: str, when: str) -> None:
    """With its reason, and nothing measured of the other map."""
    if when == "before" and name in PRODUCTS:
        return
    model, x = net(), rows()
    if when == "before":
        model[2].forward = OTHERS[name](model[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = OPTIMIZERS[kind](model.parameters())
        if when == "between steps":
            train(optimizer, lambda: model(x).square().mean(), 2)
            assert optimizer.report()[2].last_update == 1
        if when != "before":
            model[2].forward = OTHERS[name](model[2])
        before = model[2].weight.detach().clone()
        train(optimizer, lambda: model(x).square().mean(), 2)
    found = {row.name: row for row in optimizer.report()}
    for param in ("2.weight", "2.bias"):
        assert re.search("forward was replaced|no product takes it", found[param].reason)
        assert found[param].approximation == ""
        assert found[param].last_update is None
    assert found["0.weight"].last_update is not None
    assert not torch.equal(before, model[2].weight)
    assert set(optimizer.state[model[2].weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_replaced_forward_is_told_once() -> None:
    model, x = net(), rows()
    optimizer = SINGD(model.parameters(), T=1)
    model[0].forward = scaled(model[0])
    with pytest.warns(UserWarning, match=r"0\.weight: its forward was replaced") as caught:
        train(optimizer, lambda: model(x).square().mean(), 3)
    assert len(caught) == 1
    assert caught[0].filename.endswith("twins.py")


@pytest.mark.parametrize("Optimizer", [SINGD, KFAC])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_replaced_forward_where_a_fallback_is_an_error(Optimizer: Any, when: str) -> None:
    model, x = net(), rows()
    if when == "before":
        model[2].forward = scaled(model[2])
        optimizer = Optimizer(model.parameters(), fallback="error")
        with pytest.raises(ValueError, match=r"2\.weight.*no product takes it, but mul"):
            train(optimizer, lambda: model(x).square().mean(), 1)
        return
    optimizer = Optimizer(model.parameters(), fallback="error")
    model[2].forward = scaled(model[2])
    with pytest.raises(ValueError, match=r"2\.weight.*forward was replaced"):
        train(optimizer, lambda: model(x).square().mean(), 1)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", SAME)
def test_wrappers_that_call_the_original_stay_captured(name: str, kind: str, when: str) -> None:
    torch._dynamo.reset()
    model, twin, x = net(), net(), rows()
    if when == "before":
        model[2].forward = SAME[name](model[2])
    optimizer, other = (OPTIMIZERS[kind](m.parameters()) for m in (model, twin))
    if when == "after":
        model[2].forward = SAME[name](model[2])
    train(optimizer, lambda: model(x).square().mean())
    train(other, lambda: twin(x).square().mean())
    assert_same_training(model, optimizer, twin, other)


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("lambda", "before"),
        ("lambda", "after"),
        ("method", "after"),
        ("wraps, scaled behind", "before"),
        ("wraps, scaled behind", "after"),
        ("wraps, scaled before", "after"),
    ],
)
def test_another_forward_inside_of_a_compiled_model(name: str, when: str) -> None:
    """Nothing is measured, and a warning or the report says why."""
    torch._dynamo.reset()
    model, x = net(), rows()
    if when == "before":
        model[2].forward = OTHERS[name](model[2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = SINGD(model.parameters(), T=1, structures="dense")
        if when == "after":
            model[2].forward = OTHERS[name](model[2])
        compiled = torch.compile(model, backend="aot_eager")
        train(optimizer, lambda: compiled(x).square().mean(), 2)
    rows_of = {row.name: row for row in optimizer.report()}
    row, first = rows_of["2.weight"], rows_of["0.weight"]
    assert row.last_update is None
    assert first.last_update == 1
    said = [str(w.message) for w in caught if "2.weight (run compiled" in str(w.message)]
    unseen = "cannot look into" in row.reason and said
    assert re.search("forward was replaced|no product takes it", row.reason) or unseen


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["SINGD dense", "KFAC ekfac"])
def test_the_hooks_of_accelerate_stay_captured(kind: str, when: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, twin, x = net(), net(), rows()
    hooked = nn.Sequential(*model)

    def add() -> None:
        for layer in hooked:
            hooks.add_hook_to_module(layer, hooks.ModelHook())
            hooks.add_hook_to_module(layer, hooks.ModelHook(), append=True)

    if when == "before":
        add()
    optimizer, other = (OPTIMIZERS[kind](m.parameters()) for m in (model, twin))
    if when == "after":
        add()
    train(optimizer, lambda: model(x).square().mean())
    train(other, lambda: twin(x).square().mean())
    assert_same_training(model, optimizer, twin, other)


@pytest.mark.parametrize("kind", ["SINGD diagonal", "KFAC eigen"])
def test_a_class_whose_forward_is_replaced(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all of its modules at once; a wrapper that calls the original stays captured."""
    model, x, stock = net(), rows(), nn.Linear.forward
    optimizer = OPTIMIZERS[kind](model.parameters())
    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(stock)(lambda m, x: stock(m, x)))
    train(optimizer, lambda: model(x).square().mean(), 2)
    assert {row.last_update for row in optimizer.report()} == {1}
    monkeypatch.setattr(nn.Linear, "forward", lambda m, x: F.linear(x.sin(), m.weight, m.bias))
    with pytest.warns(UserWarning, match="forward was replaced"):
        train(optimizer, lambda: model(x).square().mean(), 2)
    assert all("forward was replaced" in row.reason for row in optimizer.report())


@pytest.mark.parametrize("name", OTHERS)
def test_estimators_leave_another_forward_out(name: str) -> None:
    """Kronecker factors there are none; what needs no layer is right all the same."""
    model, x = net(), rows()
    model[2].forward = OTHERS[name](model[2])
    data = [(x, torch.zeros(5, 2, dtype=torch.float64))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert set(curvature.kfac(model, nn.MSELoss(), data)) == {"0", "3"}
    found = curvature.per_sample_gradients(model, nn.MSELoss(reduction="sum"), data)
    loss = nn.MSELoss(reduction="sum")
    for n in range(5):
        each = torch.autograd.grad(
            loss(model(x[n : n + 1]), data[0][1][n : n + 1]),
            [*model.parameters()],
            allow_unused=True,
        )
        for (param, _), g in zip(model.named_parameters(), each, strict=True):
            if g is not None:
                torch.testing.assert_close(found[param][n], g, rtol=1e-10, atol=1e-12)
