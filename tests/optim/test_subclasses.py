"""Batches of subclasses of Tensor, and passes that name their inputs."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.twins import OPTIMIZERS, assert_same_training, train
from oracles.zoo import Everyday, everyday_batch
from tnkfac import KFAC, SINGD, curvature


class Propagating(Tensor):
    """What torch's default gives: results are of the subclass."""


class Described(Tensor):
    """Results carry a description, as those of image libraries do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Copy the description of the first argument that has one."""
        found = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(found, Described) and "note" not in found.__dict__:
            given = [a for a in args if isinstance(a, Described) and "note" in a.__dict__]
            found.__dict__["note"] = given[0].__dict__["note"] if given else "none"
        return found


class Unwrapping(Tensor):
    """Results are plain, except those of a few functions."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep the subclass where only the place of the numbers changes."""
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if func in (Tensor.detach, Tensor.clone, Tensor.to):
            return found.as_subclass(cls)
        return found


class Strict(Tensor):
    """Refuses whatever a model does not need."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A few functions work."""
        if getattr(func, "__name__", "") in ("detach", "outer", "view", "numel", "_base"):
            raise TypeError(f"{func} is not for you")
        return super().__torch_function__(func, types, args, kwargs or {})


SUBCLASSES = (Propagating, Described, Unwrapping, Strict)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("subclass", SUBCLASSES)
def test_the_numbers_of_plain_tensors(subclass: type[Tensor], kind: str) -> None:
    torch.manual_seed(0)
    model, twin = Everyday().double(), Everyday().double()
    twin.load_state_dict(model.state_dict())
    x, y = everyday_batch(0)
    optimizer, other = (OPTIMIZERS[kind](net.parameters()) for net in (model, twin))
    loss = nn.CrossEntropyLoss()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, lambda: loss(model(x.as_subclass(subclass)), y))
    train(other, lambda: loss(twin(x), y))
    assert_same_training(model, optimizer, twin, other)
    assert {row.last_update for row in optimizer.report() if row.approximation} == {2}


BUILD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear 3-d": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "linear 1-d": (lambda: nn.Linear(4, 3), (4,)),
    "conv": (lambda: nn.Conv2d(4, 3, 2), (2, 4, 3, 3)),
    "conv unbatched": (lambda: nn.Conv1d(4, 3, 2), (4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 2), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("where", ["input", "gradient", "in place", "checked"])
def test_the_output_stays_what_it_is(name: str, where: str) -> None:
    """The user sees the subclass and its attributes; statistics are the plain ones."""
    build, shape = BUILD[name]
    torch.manual_seed(0)
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    sums = []
    for subclass in (None, Described):
        optimizer = SINGD(layer.parameters(), structures="dense", T=1)
        given = x.clone()
        if subclass is not None:
            given = given.as_subclass(subclass)
            given.__dict__["note"] = "of the batch"
        out = layer(given)
        if subclass is not None:
            assert type(out) is Described
            assert out.__dict__["note"] == "of the batch"
        if where == "in place":
            out = out.mul_(2.0)
        gradient = torch.ones_like(out) if where == "gradient" else None
        (out if where == "gradient" else out.square().sum()).backward(gradient)
        sums.append([t.clone() for t in optimizer._registry.layers[0].statistics.sums()])
        optimizer.close()
    assert len(sums[0]) == 3
    assert all(type(t) is Tensor for t in sums[1])
    for a, b in zip(*sums, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_images_of_torchvision() -> None:
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    torch.manual_seed(0)
    model, twin = Everyday().double(), Everyday().double()
    twin.load_state_dict(model.state_dict())
    x, y = everyday_batch(0)
    optimizer, other = (SINGD(net.parameters(), T=1) for net in (model, twin))
    loss = nn.CrossEntropyLoss()
    with tv_tensors.set_return_type("TVTensor"):
        train(optimizer, lambda: loss(model(tv_tensors.Image(x)), y))
    train(other, lambda: loss(twin(x), y))
    assert_same_training(model, optimizer, twin, other)


@pytest.mark.parametrize("subclass", SUBCLASSES[:3])
def test_estimators_read_subclasses(subclass: type[Tensor]) -> None:
    torch.manual_seed(0)
    model, (x, y) = Everyday().double(), everyday_batch(0)
    loss = nn.CrossEntropyLoss()
    found, expected = (
        curvature.kfac(model, loss, [(given, y)]) for given in (x.as_subclass(subclass), x)
    )
    for name, factor in expected.items():
        torch.testing.assert_close(found[name].A.as_subclass(Tensor), factor.A)
        torch.testing.assert_close(found[name].B.as_subclass(Tensor), factor.B)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("batch", ["jagged", "strided"])
def test_nested_tensors_are_named(batch: str, kind: str) -> None:
    """Training goes on without curvature, and the warning says which tensor it is."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = OPTIMIZERS[kind](layer.parameters())
    layout = torch.jagged if batch == "jagged" else torch.strided

    def loss() -> Tensor:
        parts = [torch.ones(2, 3), torch.ones(1, 3)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.nested.nested_tensor(parts, layout=layout)
        return torch.cat([part.square() for part in layer(x).unbind()]).sum()

    before = layer.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"weight \(called, but the output is a nested tensor"):
        train(optimizer, loss, 2)
    assert not torch.equal(before, layer.weight)
    assert all("nested tensor" in row.reason for row in optimizer.report())


@pytest.mark.parametrize("Optimizer", [SINGD, KFAC])
def test_sparse_inputs(Optimizer: Any) -> None:
    torch.manual_seed(0)
    layer, twin, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(5, 3)
    twin.load_state_dict(layer.state_dict())
    x[x < 0] = 0
    pair = Optimizer(layer.parameters(), 1e-2), Optimizer(twin.parameters(), 1e-2)
    train(pair[0], lambda: layer(x.to_sparse()).square().sum())
    train(pair[1], lambda: twin(x).square().sum())
    assert_same_training(layer, pair[0], twin, pair[1], 1e-5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("passes", [1, 2])
def test_backward_with_named_inputs(passes: int, kind: str) -> None:
    """``backward(inputs=...)`` counts for the weights among these, as ``.grad`` does."""
    torch.manual_seed(0)
    model, twin = Everyday().double(), Everyday().double()
    twin.load_state_dict(model.state_dict())
    x, y = everyday_batch(0)
    optimizer, other = (OPTIMIZERS[kind](net.parameters()) for net in (model, twin))
    for _ in range(3):
        for net, one in ((model, optimizer), (twin, other)):
            one.zero_grad()
            for part in range(passes):
                loss = nn.functional.cross_entropy(net(x[part::passes]), y[part::passes])
                loss.backward(inputs=list(net.parameters()) if net is model else None)
            one.step()
    assert_same_training(model, optimizer, twin, other)


@pytest.mark.parametrize("kind", ["SINGD diagonal", "SINGD dense", "KFAC eigen"])
def test_weights_that_are_no_inputs_get_nothing(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = OPTIMIZERS[kind](model.parameters())
    x = torch.randn(4, 3, requires_grad=True)
    for inputs in ([x], [model[2].weight], [model[2].bias, x]):
        optimizer.zero_grad()
        model(x).square().sum().backward(inputs=inputs)
        first, last = (layer.statistics.pending for layer in optimizer._registry.layers)
        assert not first
        assert last == (len(inputs) == 1 and inputs[0] is model[2].weight)
