"""Randomised backpropagation: unbiased over all masks, exact elsewhere, small in between.

The oracle is autograd through torch's convolution of a masked input and a masked cotangent. Its
masks are built here, from the same random numbers, in the order samples, channels, pixels of
every axis, output positions of every axis.
"""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, combinations, product
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tnkfac
from oracles.compare import assert_close, relative_error
from tnkfac.einsum import crs
from tnkfac.einsum.crs import sampled_convolution

FLOAT64 = torch.float64
TOLERANCE = 1e-12
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
KEEP = {"channels": 0.5, "space": 0.4, "batch": 0.7, "output": 0.6}


@dataclass
class Case:
    """Shapes and hyper-parameters of a small convolution."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and bias."""
        x = torch.randn(self.x, dtype=FLOAT64, requires_grad=True)
        weight = torch.randn(self.weight, dtype=FLOAT64, requires_grad=True)
        return x, weight, torch.randn(self.weight[0], dtype=FLOAT64, requires_grad=True)

    def stock(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Torch's convolution; pairs of paddings are put around the input before."""
        options = dict(self.options)
        padding = options.get("padding", 0)
        if isinstance(padding, tuple) and isinstance(padding[0], tuple):
            x = F.pad(x, [p for pair in reversed(padding) for p in pair])
            options["padding"] = 0
        y: Tensor = CONV[x.ndim - 2](x, weight, bias, **options)
        return y

    def legs(self, keep: dict[str, float]) -> list[tuple[str, int, int, float]]:
        """Operand, axis, size and kept fraction of every sampled leg, in the order of drawing."""
        out = self.stock(torch.zeros(self.x), torch.zeros(self.weight)).shape
        dims = len(self.x) - 2
        found = [
            ("x", 0, self.x[0], keep.get("batch", 1)),
            ("x", 1, self.x[1], keep.get("channels", 1)),
        ]
        for operand, shape, key in (("x", self.x, "space"), ("g", out, "output")):
            p = keep.get(key, 1) ** (1 / dims)
            found += [(operand, 2 + a, shape[2 + a], p) for a in range(dims)]
        return [leg for leg in found if leg[3] < 1]

    def probability(self, keep: dict[str, float], bits: Sequence[int]) -> float:
        """Of these masks."""
        fractions = [p for _, _, size, p in self.legs(keep) for _ in range(size)]
        return prod(p if bit else 1 - p for p, bit in zip(fractions, bits, strict=True))

    def masked(
        self, x: Tensor, weight: Tensor, g: Tensor, keep: dict[str, float], bits: Sequence[int]
    ) -> Tensor:
        """Weight gradient of the masked and scaled operands."""
        operands, start = {"x": x.detach(), "g": g}, 0
        for operand, axis, size, p in self.legs(keep):
            z = torch.tensor(bits[start : start + size], dtype=FLOAT64)
            start += size
            tensor = operands[operand]
            operands[operand] = tensor * (z / p).view(-1, *[1] * (tensor.ndim - axis - 1))
        assert start == len(bits)
        return torch.autograd.grad(self.stock(operands["x"], weight), weight, operands["g"])[0]


BASE = Case((2, 2, 3), (2, 2, 2))
SUBSETS = list(chain.from_iterable(combinations(KEEP, n) for n in (1, 2, 3, 4)))

SPACE, CHANNELS = ("space", "output"), ("channels", "space")
CASES: dict[str, tuple[Case, tuple[str, ...]]] = {
    "stride": (Case((1, 2, 4), (2, 2, 2), {"stride": 2}), SPACE),
    "padding": (Case((1, 2, 3), (3, 2, 3), {"padding": 1}), SPACE),
    "dilation": (Case((1, 2, 4), (2, 2, 2), {"dilation": 2}), SPACE),
    "everything": (
        Case((1, 2, 4), (2, 1, 2), {"stride": 2, "padding": 2, "dilation": 3, "groups": 2}),
        (*CHANNELS, "output"),
    ),
    "pixels unused": (Case((1, 1, 5), (2, 1, 2), {"stride": 3}), SPACE),
    "groups": (Case((1, 4, 2), (4, 2, 2), {"groups": 2, "padding": 1}), CHANNELS),
    "depthwise": (Case((1, 3, 3), (6, 1, 2), {"groups": 3}), CHANNELS),
    "one tap": (Case((2, 2, 3), (2, 2, 1)), SPACE),
    "one tap, all": (Case((2, 2, 2), (2, 2, 1)), tuple(KEEP)),
    "one tap, stride": (Case((1, 2, 5), (2, 2, 1), {"stride": 2}), SPACE),
    "one tap, padding": (Case((1, 2, 2), (2, 2, 1), {"padding": 1}), SPACE),
    "same": (Case((1, 2, 4), (2, 2, 3), {"padding": "same"}), SPACE),
    "valid": (Case((1, 2, 4), (2, 2, 2), {"padding": "valid"}), SPACE),
    "asymmetric": (Case((1, 2, 3), (2, 2, 3), {"padding": ((2, 1),)}), SPACE),
    "one tap, asymmetric": (
        Case((1, 1, 3), (2, 1, 1), {"padding": ((0, 2),), "stride": 2}),
        SPACE,
    ),
}
PLANE: dict[str, Case] = {
    "2d": Case((2, 2, 3, 2), (2, 2, 2, 2)),
    "one tap on one axis": Case((2, 2, 2, 3), (2, 2, 2, 1), {"stride": (1, 2)}),
    "groups": Case((1, 4, 2, 2), (2, 2, 2, 1), {"groups": 2}),
    "asymmetric": Case((1, 1, 2, 3), (2, 1, 2, 3), {"padding": ((0, 1), (1, 1)), "stride": (2, 1)}),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Thousands of tiny convolutions; more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def drawing(bits: Sequence[int]) -> Iterator[None]:
    """Random numbers that keep exactly the values with a 1."""
    numbers = 1.0 - torch.tensor(bits, dtype=torch.float32)

    def uniform(count: int, *_: Any) -> Tensor:
        assert count == len(numbers)
        return numbers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled_convolution, "uniform", uniform)
        yield


def check_all_masks(case: Case, keep: dict[str, float], every: int = 7) -> None:
    """The gradients of all masks, weighted by probability, are the exact one.

    Of ``every`` so many outcomes, each gradient is compared too.
    """
    x, weight, bias = case.tensors()
    y = case.stock(x, weight, bias)
    g = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), g)
    mean, total = torch.zeros_like(dw), 0.0
    size = sum(leg[2] for leg in case.legs(keep))
    assert size <= 9, "too many masks"
    for number, bits in enumerate(product((0, 1), repeat=size)):
        with drawing(bits):
            estimate = crs.conv(x, weight, bias, **case.options, keep=keep)
        grads = torch.autograd.grad(estimate, (x, weight, bias), g)
        probability = case.probability(keep, bits)
        mean, total = mean + probability * grads[1], total + probability
        if number % every == 0:
            assert_close(estimate, y, TOLERANCE)
            assert_close((grads[0], grads[2]), (dx, db), TOLERANCE)
            assert_close(grads[1], case.masked(x, weight, g, keep, bits), TOLERANCE)
    assert total == pytest.approx(1, abs=1e-12)
    assert_close(mean, dw, TOLERANCE)


@pytest.mark.parametrize("keys", SUBSETS, ids="+".join)
def test_unbiased_for_all_combinations(keys: tuple[str, ...]) -> None:
    check_all_masks(BASE, {key: KEEP[key] for key in keys})


@pytest.mark.parametrize("name", CASES)
def test_unbiased_for_all_geometries(name: str) -> None:
    case, keys = CASES[name]
    check_all_masks(case, {key: KEEP[key] for key in keys})


@pytest.mark.parametrize("keys", [k for k in SUBSETS if len(k) < 3], ids="+".join)
@pytest.mark.parametrize("name", PLANE)
def test_unbiased_in_two_dimensions(name: str, keys: tuple[str, ...]) -> None:
    check_all_masks(PLANE[name], {key: KEEP[key] for key in keys})


LARGE: dict[str, Case] = {
    "3d": Case((3, 4, 5, 6, 7), (6, 2, 2, 1, 3), {"stride": (2, 1, 1), "padding": 1, "groups": 2}),
    "dense": Case((3, 4, 8, 8), (5, 4, 4, 4), {"stride": 4}),
    "uneven groups": Case((3, 12, 5, 5), (8, 3, 3, 3), {"groups": 4, "dilation": 2, "padding": 2}),
    "mixed": Case((3, 6, 7, 9), (4, 6, 1, 7), {"padding": "same"}),
}


@pytest.mark.parametrize("keys", SUBSETS, ids="+".join)
@pytest.mark.parametrize("name", LARGE)
def test_masked_operands(name: str, keys: tuple[str, ...]) -> None:
    """Sizes that are too large for all masks, at random ones."""
    case, keep = LARGE[name], {key: KEEP[key] for key in keys}
    x, weight, bias = case.tensors()
    size = sum(leg[2] for leg in case.legs(keep))
    for bits in ((torch.rand(size) < 0.6).int().tolist(), [1] * size):
        with drawing(bits):
            y = crs.conv(x, weight, bias, **case.options, keep=keep)
        g = torch.randn_like(y)
        expected = case.masked(x, weight, g, keep, bits)
        dx, dw, db = torch.autograd.grad(y, (x, weight, bias), g)
        assert_close(dw, expected, TOLERANCE)
        exact = torch.autograd.grad(case.stock(x, weight, bias), (x, bias), g)
        assert_close((dx, db), exact, TOLERANCE)


def loop_weight_gradient(x: Tensor, g: Tensor, kernel: tuple[int, ...], stride: int) -> Tensor:
    """One tap at a time, of the padded input."""
    gradient = torch.zeros(g.shape[1], x.shape[1], *kernel, dtype=x.dtype)
    for tap in product(*map(range, kernel)):
        ends = [t + stride * (n - 1) + 1 for t, n in zip(tap, g.shape[2:], strict=True)]
        seen = x[(..., *(slice(t, e, stride) for t, e in zip(tap, ends, strict=True)))]
        gradient[(..., *tap)] = torch.einsum("ncp,ndp->dc", seen.flatten(2), g.flatten(2))
    return gradient


def test_four_dimensions() -> None:
    x = torch.randn(2, 3, 3, 4, 3, 2, dtype=FLOAT64, requires_grad=True)
    weight = torch.randn(4, 3, 2, 1, 2, 2, dtype=FLOAT64, requires_grad=True)
    bias = torch.randn(4, dtype=FLOAT64, requires_grad=True)
    options: dict[str, Any] = {"stride": 2, "padding": ((1, 1), (0, 0), (0, 1), (1, 0))}
    plain = crs.conv(x, weight, bias, **options, keep={})
    keep = {"space": 0.5, "channels": 0.5}
    bits = [int(bit) for bit in "101110100101110"]
    with drawing(bits):
        y = crs.conv(x, weight, bias, **options, keep=keep)
    g = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), g)
    exact = torch.autograd.grad(plain, (x, weight, bias), g)
    masked, start = x.detach(), 0
    for axis, size in enumerate(x.shape[1:], 1):
        z = torch.tensor(bits[start : start + size], dtype=FLOAT64)
        masked, start = masked * z.view(-1, *[1] * (x.ndim - axis - 1)), start + size
    pads = [1, 0, 0, 1, 0, 0, 1, 1]
    expected = loop_weight_gradient(F.pad(masked, pads), g, (2, 1, 2, 2), 2) / 0.25
    assert_close(y, plain, TOLERANCE)
    assert_close(dw, expected, TOLERANCE)
    assert_close((dx, db), (exact[0], exact[2]), TOLERANCE)
    loop = loop_weight_gradient(F.pad(x.detach(), pads), g, (2, 1, 2, 2), 2)
    assert_close(exact[1], loop, TOLERANCE)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["padding", "groups", "everything"])
def test_error_of_channel_sampling(name: str, p: float) -> None:
    """Channels are disjoint blocks of the gradient, so the error does not depend on the data."""
    case, keep = CASES[name][0], {"channels": p}
    x, weight, bias = case.tensors()
    y = case.stock(x, weight, bias)
    g = torch.randn_like(y)
    exact = torch.autograd.grad(y, weight, g)[0]
    error = 0.0
    for bits in product((0, 1), repeat=case.x[1]):
        with drawing(bits):
            y = crs.conv(x, weight, bias, **case.options, keep=keep)
        difference = torch.autograd.grad(y, weight, g)[0] - exact
        probability = prod(p if bit else 1 - p for bit in bits)
        error += probability * difference.square().sum().item()
    relative = (error / exact.square().sum().item()) ** 0.5
    assert relative == pytest.approx((1 / p - 1) ** 0.5, rel=1e-10)


EXACT: dict[str, Case] = {
    "1d": Case((2, 4, 9), (6, 2, 3), {"padding": 1, "groups": 2}),
    "2d": Case((2, 3, 9, 8), (5, 3, 3, 2), {"stride": 2, "dilation": (2, 1)}),
    "3d": Case((2, 3, 5, 4, 6), (5, 3, 3, 1, 2), {"padding": (1, 0, 1)}),
    "same": Case((2, 3, 9, 8), (5, 3, 3, 2), {"padding": "same", "dilation": 3}),
    "channels last": Case((2, 8, 9, 8), (8, 8, 3, 3), {"padding": 1}),
}


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
@pytest.mark.parametrize("keep", [{}, dict.fromkeys(KEEP, 1), {"space": 1.0}], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_keeping_everything_is_the_ordinary_backward(
    name: str, keep: dict[str, float], dtype: torch.dtype
) -> None:
    case = EXACT[name]
    x, weight, bias = (t.detach().to(dtype).requires_grad_() for t in case.tensors())
    if name == "channels last":
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    state = torch.get_rng_state()
    y, stock = crs.conv(x, weight, bias, **case.options, keep=keep), case.stock(x, weight, bias)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y, stock)
    g = torch.randn_like(y)
    ours, exact = (torch.autograd.grad(out, (x, weight, bias), g) for out in (y, stock))
    assert all(map(torch.equal, ours, exact))


@pytest.mark.parametrize("key", KEEP)
def test_nothing_kept(key: str) -> None:
    case = EXACT["2d"]
    x, weight, bias = case.tensors()
    keep = {key: 0.01}
    with drawing([0] * sum(leg[2] for leg in case.legs(keep))):
        y = crs.conv(x, weight, bias, **case.options, keep=keep)
    g = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), g)
    exact = torch.autograd.grad(case.stock(x, weight, bias), (x, bias), g)
    assert_close((dx, db), exact, TOLERANCE)
    assert torch.equal(dw, torch.zeros_like(weight))


def test_no_samples() -> None:
    x, weight = torch.randn(0, 3, 5, 5, requires_grad=True), torch.randn(2, 3, 3, 3)
    y = crs.conv(x, weight.requires_grad_(), keep=KEEP)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and not weight.grad.any()


def test_without_a_batch_axis() -> None:
    case = EXACT["2d"]
    x, weight, bias = case.tensors()
    g = torch.randn_like(case.stock(x, weight, bias))[0]
    torch.manual_seed(3)
    y = crs.conv(x[0], weight, bias, **case.options, keep={"space": 0.5})
    torch.manual_seed(3)
    batched = crs.conv(x[:1], weight, bias, **case.options, keep={"space": 0.5})
    assert_close(y, case.stock(x, weight, bias)[0], TOLERANCE)
    ours, expected = (
        torch.autograd.grad(*pair) for pair in ((y, weight, g), (batched, weight, g[None]))
    )
    assert_close(ours, expected, TOLERANCE)


def test_layouts() -> None:
    """Channels last, expanded and strided inputs, and a cotangent without strides."""
    weight = torch.randn(4, 6, 3, 3, dtype=FLOAT64, requires_grad=True)
    dense = torch.randn(3, 6, 8, 8, dtype=FLOAT64)
    for x in (
        dense.contiguous(memory_format=torch.channels_last),
        dense[:1].expand(3, -1, -1, -1),
        torch.randn(3, 6, 8, 16, dtype=FLOAT64)[..., ::2],
    ):
        grads = []
        for each in (x, x.contiguous()):
            torch.manual_seed(1)
            each = each.detach().requires_grad_()
            y = crs.conv(each, weight, keep={"space": 0.5, "channels": 0.5})
            grads.append(torch.autograd.grad(y.sum(), (each, weight)))
        assert_close(grads[0], grads[1], TOLERANCE)


# --- memory -------------------------------------------------------------------------------------


@contextmanager
def saving() -> Iterator[list[Tensor]]:
    """All tensors that are saved for the backward pass."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def saved_fraction(x: Tensor, weight: Tensor, call: Callable[[], Tensor]) -> float:
    """Bytes saved besides the weight, relative to those of the input, which is not among them."""
    with saving() as saved:
        y = call()
    assert y.requires_grad
    own = {x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()}
    others = [t for t in saved if t.data_ptr() != weight.data_ptr()]
    assert own.isdisjoint(t.untyped_storage().data_ptr() for t in others)
    return sum(t.untyped_storage().nbytes() for t in others) / x.untyped_storage().nbytes()


FRACTIONS: list[tuple[dict[str, float], dict[str, Any], int]] = [  # keep, options, kernel size
    ({"channels": 0.25}, {"padding": 1}, 3),
    ({"space": 0.25}, {"padding": 1}, 3),
    ({"batch": 0.25}, {"stride": 2}, 3),
    ({"space": 0.5, "channels": 0.5}, {"groups": 32}, 3),
    ({"space": 0.25}, {}, 1),
    ({"output": 0.25}, {}, 1),
    ({"output": 0.25}, {"stride": 2}, 2),
    ({"space": 0.25}, {"padding": ((1, 0), (0, 1))}, 2),
    ({"space": 0.25}, {"padding": "same"}, 4),
]


@pytest.mark.parametrize(("keep", "options", "kernel"), FRACTIONS, ids=str)
def test_saved_bytes_fall_to_the_kept_fraction(
    keep: dict[str, float], options: dict[str, Any], kernel: int
) -> None:
    x = torch.randn(32, 32, 32, 32)
    groups = options.get("groups", 1)
    weight = torch.randn(32, 32 // groups, kernel, kernel, requires_grad=True)
    fractions = [
        saved_fraction(x, weight, lambda: crs.conv(x, weight, keep=keep, **options))
        for _ in range(20)
    ]
    assert sum(fractions) / 20 == pytest.approx(0.25, abs=0.06)


def test_frozen_weight_saves_no_input() -> None:
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    weight = torch.randn(8, 8, 3, 3)
    with saving() as saved:
        y = crs.conv(x, weight, keep={"space": 0.9})
    y.sum().backward()
    assert sum(t.numel() for t in saved if t.is_floating_point()) == weight.numel()
    (expected,) = torch.autograd.grad(F.conv2d(x, weight).sum(), x)
    assert x.grad is not None
    assert_close(x.grad, expected, 1e-5)


def test_input_changed_in_place_behind_the_layer() -> None:
    """The kept slices are a copy."""
    x, weight = torch.randn(4, 8, 9, 9), torch.randn(8, 8, 3, 3, requires_grad=True)
    grads = []
    for change in (False, True):
        torch.manual_seed(0)
        y = crs.conv(x, weight, keep={"channels": 0.5})
        if change:
            x.zero_()
        grads.append(torch.autograd.grad(y.sum(), weight)[0])
    assert torch.equal(*grads)


# --- random numbers -----------------------------------------------------------------------------


class Net(nn.Module):
    """Three convolutions with dropout between them, perhaps under checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 6, 3, padding=1), nn.Tanh(), nn.Dropout(0.3))
            for c in (4, 6, 6)
        )

    def forward(self, x: Tensor, reentrant: bool | None = None) -> Tensor:
        """Each block, or the first two together, is a segment of its own."""
        if reentrant is None:
            for block in self.blocks:
                x = block(x)
            return x
        first, second, third = self.blocks
        x = checkpoint(lambda x: second(first(x)), x, use_reentrant=reentrant)
        y: Tensor = checkpoint(third, x, use_reentrant=reentrant)
        return y


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; they are reset."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit the same tensors."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_masks(reentrant: bool) -> None:
    model, x = Net(), torch.randn(5, 4, 8, 8, requires_grad=True)
    with crs.apply(model, KEEP):
        found = []
        for mode in (None, reentrant):
            torch.manual_seed(7)
            model(x, mode).square().sum().backward()
            found.append(gradients(model))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("passes", [1, 2])
def test_checkpointing_repeats_masks_of_a_generator(passes: int) -> None:
    """Also with several passes under way, whose backwards come in another order."""
    model, x = Net(), torch.randn(5, 4, 8, 8, requires_grad=True)
    generator = torch.Generator()
    with crs.apply(model, KEEP, generator=generator):
        found = []
        for mode in (None, False):
            torch.manual_seed(7)
            generator.manual_seed(8)
            losses = [model(x, mode).square().sum() for _ in range(passes)]
            state = generator.get_state()
            for loss in losses:
                loss.backward()
            assert torch.equal(generator.get_state(), state)
            found.append(gradients(model))
    assert_same(found[1], found[0])
    del losses, loss
    gc.collect()
    assert len(sampled_convolution._pending) == 0


def test_reentrant_checkpoint_with_a_generator() -> None:
    """Nothing is drawn before the recomputation, which therefore sees the first numbers."""
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(5, 4, 8, 8, requires_grad=True)
    generator = torch.Generator()
    with crs.apply(layer, KEEP, generator=generator):
        found = []
        for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=True)):
            generator.manual_seed(8)
            run(x).square().sum().backward()
            found.append(gradients(layer))
    assert_same(found[1], found[0])


def test_generators() -> None:
    x, weight = torch.randn(8, 8, 9, 9), torch.randn(4, 8, 3, 3, requires_grad=True)
    generator = torch.Generator()

    def run(**options: Any) -> Tensor:
        y = crs.conv(x, weight, keep={"channels": 0.5, "space": 0.5}, **options)
        return torch.autograd.grad(y.sum(), weight)[0]

    generator.manual_seed(1)
    first, second = run(generator=generator), run(generator=generator)
    torch.manual_seed(5)  # whatever the global generator does
    generator.manual_seed(1)
    assert torch.equal(run(generator=generator), first)
    assert torch.equal(run(generator=generator), second)
    assert not torch.equal(first, second)
    generator.manual_seed(2)
    assert not torch.equal(run(generator=generator), first)
    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(run(), first) and not torch.equal(first, second)


def test_a_reset_generator_does_not_repeat_an_earlier_call() -> None:
    """A call of the same number whose graph is still alive is no recomputation."""
    x, weight = torch.randn(8, 64, 9, 9), torch.randn(4, 64, 3, 3, requires_grad=True)
    generator = torch.Generator()
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(0)
        generator.manual_seed(seed)
        outputs.append(crs.conv(x, weight, keep={"channels": 0.5}, generator=generator))
    first, second = (torch.autograd.grad(y.sum(), weight)[0] for y in outputs)
    assert not torch.equal(first, second)


def test_layers_draw_independent_masks() -> None:
    """Kept channels of two layers and of two passes are uncorrelated."""
    model = nn.Sequential(nn.Conv1d(16, 16, 1, bias=False), nn.Conv1d(16, 16, 1, bias=False))
    x = torch.rand(2, 16, 3) + 0.1
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand_like(p))
    kept: list[list[Tensor]] = [[], []]
    with crs.apply(model, {"channels": 0.5}):
        for _ in range(400):
            model(x).sum().backward()
            for masks, grad in zip(kept, gradients(model).values(), strict=True):
                masks.append((grad[0, :, 0] != 0).to(FLOAT64))
    first, second = map(torch.stack, kept)
    for rows in (first, second):
        assert rows.mean().item() == pytest.approx(0.5, abs=0.03)
    joint = torch.cat([first, second, first.roll(1, 0)], dim=1)
    correlation = torch.corrcoef(joint.T) - torch.eye(48, dtype=FLOAT64)
    assert correlation.abs().max() < 0.25  # five standard deviations


# --- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(dtype: torch.dtype, inside: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 5, 1))
    twin = copy.deepcopy(model).double()
    x = torch.randn(4, 4, 8, 8)
    keep = {"channels": 0.5, "space": 0.5}
    with torch.autocast("cpu", dtype=dtype):
        expected = model(x)
    with crs.apply(model, keep), torch.autocast("cpu", dtype=dtype):
        torch.manual_seed(1)
        y = model(x)
        assert y.dtype == dtype and torch.equal(y, expected)
        loss = y.float().square().mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    with crs.apply(twin, keep):
        torch.manual_seed(1)
        twin(x.double()).square().mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and p.grad.dtype == torch.float32
        assert relative_error(p.grad, q.grad) < 0.03


def test_saved_bytes_under_autocast() -> None:
    x, weight = torch.randn(32, 32, 16, 16), torch.randn(32, 32, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), saving() as saved:
        crs.conv(x, weight, keep={"batch": 0.5})
    kept = [t for t in saved if t.ndim == 4 and t.shape[1:] == x.shape[1:]]
    assert [t.dtype for t in kept] == [torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 6, 8, 8, dtype=dtype), torch.randn(5, 6, 3, 3, dtype=dtype)
    x.requires_grad_()
    weight.requires_grad_()
    y = crs.conv(x, weight, keep=KEEP)
    grads = torch.autograd.grad(y.sum(), (x, weight))
    assert {t.dtype for t in (y, *grads)} == {dtype}


def test_second_derivatives_are_refused() -> None:
    x, weight = torch.randn(2, 3, 6, requires_grad=True), torch.randn(4, 3, 2, requires_grad=True)
    y = crs.conv(x, weight, keep={"space": 0.5})
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dx.sum().backward()


# --- models -------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, bias=False), (3, 4, 9, 8)),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (3, 2, 4, 5, 4)),
    "same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same"), (3, 4, 7, 8)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (3, 4, 7, 8)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), (3, 4, 7, 8)),
    "reflect": (
        lambda: nn.Conv2d(4, 6, (4, 3), padding="same", padding_mode="reflect"),
        (3, 4, 7, 8),
    ),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 8)),
    "lazy": (lambda: nn.LazyConv2d(6, 3), (3, 4, 7, 8)),
}


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, input gradient and parameter gradients of a sum of squares."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, gradients(model)


@pytest.mark.parametrize("name", LAYERS)
def test_apply_and_undo(name: str) -> None:
    build, shape = LAYERS[name]
    layer, x = build().double(), torch.randn(shape, dtype=FLOAT64)
    if name != "lazy":
        exact = run(layer, x)
    keep = {"channels": 0.5, "space": 0.5}
    handle = crs.apply(layer, keep)
    if name == "lazy":
        layer(x)
        layer.eval()
        exact = run(layer, x)
        layer.train()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    state = layer.state_dict().keys()
    mean = torch.zeros_like(exact[2]["weight"])
    for _ in range(20):
        y, dx, grads = run(layer, x)
        assert_close((y, dx), exact[:2], TOLERANCE)
        assert not torch.allclose(grads["weight"], exact[2]["weight"])
        if "bias" in grads:
            assert_close(grads["bias"], exact[2]["bias"], TOLERANCE)
        mean += grads["weight"] / 20
    assert relative_error(mean, exact[2]["weight"]) < 1.5
    assert layer.state_dict().keys() == state
    handle.undo()
    handle.undo()
    again = run(layer, x)
    assert torch.equal(again[0], exact[0]) and torch.equal(again[1], exact[1])
    assert_same(again[2], exact[2])
    assert_same(dict(layer.named_parameters()), before)
    assert vars(layer).keys() == vars(copy.deepcopy(layer)).keys()
    assert "_conv_forward" not in vars(layer)


def test_only_in_training_mode_with_gradients() -> None:
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(3, 4, 8, 8)
    exact = run(layer, x)
    with crs.apply(layer, {"space": 0.3}):
        layer.eval()
        assert_same(run(layer, x)[2], exact[2])
        layer.train()
        with torch.no_grad():
            y = layer(x)
        assert not y.requires_grad and torch.equal(y, exact[0])
        with torch.inference_mode():
            assert torch.equal(layer(x), exact[0])
        assert not torch.allclose(run(layer, x)[2]["weight"], exact[2]["weight"])


def test_keeping_everything_changes_nothing() -> None:
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(3, 4, 8, 8)
    exact = run(layer, x)
    with crs.apply(layer, {"space": 1}):
        assert_same(run(layer, x)[2], exact[2])


def test_undone_on_errors() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 1))
    with pytest.raises(KeyError), crs.apply(model, {"space": 0.3}) as handle:
        assert handle.layers == ("0", "1")
        raise KeyError
    assert all("_conv_forward" not in vars(module) for module in model)


class Scaled(nn.Conv2d):
    """Reads its weight in a way of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice the convolution."""
        return 2 * super().forward(x)


class Renamed(nn.Conv2d):
    """A subclass that changes nothing."""


def test_which_layers_are_switched() -> None:
    shared = Renamed(3, 3, 1)
    model = nn.Sequential(
        nn.Conv1d(2, 2, 1),
        Scaled(2, 2, 1),
        nn.ConvTranspose2d(2, 2, 1),
        shared,
        shared,
        nn.Linear(2, 2),
    )
    with crs.apply(model, {"space": 0.3}) as handle:
        assert handle.layers == ("0", "3")
        assert type(model[3]) is Renamed and type(model[3]).forward is nn.Conv2d.forward
        with pytest.raises(RuntimeError, match="'0' is randomised already"):
            crs.apply(model, {"space": 0.3})
    crs.apply(model, {"space": 0.3}).undo()


def test_hooks_and_parametrizations_go_on_working() -> None:
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(3, 4, 8, 8)
    torch.nn.utils.parametrizations.weight_norm(layer)
    seen: list[str] = []
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    exact = run(layer, x)
    with crs.apply(layer, {"space": 0.5}):
        y, dx, grads = run(layer, x)
    assert seen == ["forward", "backward"] * 2
    assert torch.equal(y, exact[0])
    assert_close(dx, exact[1], 1e-5)
    assert grads.keys() == exact[2].keys()
    for name, grad in grads.items():
        assert ("bias" in name) == torch.allclose(grad, exact[2][name], rtol=1e-4)


def pickled(model: nn.Module) -> nn.Module:
    """Through pickle."""
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def saved(model: nn.Module) -> nn.Module:
    """Through ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled, saved])
def test_copies_are_exact(clone: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Conv2d(6, 2, 3))
    x = torch.randn(3, 4, 8, 8)
    exact = run(model, x)
    with crs.apply(model, {"space": 0.3}):
        copied = clone(model)
        first = weakly(model)
        assert_same(run(copied, x)[2], exact[2])
        with torch.no_grad():
            for p in copied.parameters():
                p.zero_()
        assert not run(copied, x)[0].any()
        again = clone(copied)
        assert not run(again, x)[0].any()
        with crs.apply(again, {"space": 0.3}) as handle:
            assert len(handle.layers) == 2
        assert first == weakly(model)


def weakly(model: nn.Module) -> list[int]:
    """What is put in place of the layers' methods."""
    return [
        id(vars(module)["_conv_forward"])
        for module in model.modules()
        if vars(module).get("_conv_forward")
    ]


def test_the_model_is_freed_without_the_collector() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    crs.apply(model, {"space": 0.3})
    alive = weakref.ref(model[0])
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("order", ["optimizer first", "sampling first"])
def test_an_optimizer_still_captures_the_layers(order: str) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.ReLU(),
            nn.Conv2d(6, 4, 2, stride=2),
            nn.Flatten(),
            nn.Linear(36, 2),
        )

    model, exact = build(), build()
    x = torch.randn(4, 3, 8, 8)
    if order == "optimizer first":
        optimizer = tnkfac.SINGD(model.parameters())
        crs.apply(model, {"space": 0.5})
    else:
        crs.apply(model, {"space": 0.5})
        optimizer = tnkfac.SINGD(model.parameters())
    other = tnkfac.SINGD(exact.parameters())
    for net, opt in ((model, optimizer), (exact, other)):
        net(x).square().mean().backward()
        opt.step()
    assert [row.last_update for row in optimizer.report()] == [0] * 6
    assert [row.module for row in optimizer.report()] == [row.module for row in other.report()]
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        ours, theirs = optimizer.state[p], other.state[q]
        for key in theirs.keys() - {"momentum_buffer"}:
            if isinstance(theirs[key], Tensor):  # curvature is not randomised
                assert relative_error(ours[key], theirs[key]) < 1e-4, key


def test_compiled() -> None:
    """The layers run outside the compiled graphs."""
    model, x = (
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Conv2d(6, 2, 3)),
        torch.randn(3, 4, 8, 8),
    )
    with crs.apply(model, {"channels": 0.5}):
        torch.manual_seed(1)
        expected = run(model, x)
        compiled: Any = torch.compile(model, backend="eager")
        for _ in range(2):
            torch.manual_seed(1)
            compiled(x).square().sum().backward()
            assert_same(gradients(model), expected[2])
    torch._dynamo.reset()


# --- errors -------------------------------------------------------------------------------------

BAD_KEEP: list[tuple[Any, type[Exception], tuple[str, ...]]] = [
    ({"channel": 0.5}, ValueError, ("keep", "'channel'", *map(repr, KEEP))),
    ({0: 0.5}, ValueError, ("keep", "0", *map(repr, KEEP))),
    ({"space": 0}, ValueError, ("keep['space']", "0", "(0, 1]")),
    ({"space": -0.5}, ValueError, ("keep['space']", "-0.5", "(0, 1]")),
    ({"batch": 1.5}, ValueError, ("keep['batch']", "1.5", "(0, 1]")),
    ({"output": float("nan")}, ValueError, ("keep['output']", "nan", "(0, 1]")),
    ({"space": "half"}, TypeError, ("keep['space']", "'half'", "number")),
    ({"space": True}, TypeError, ("keep['space']", "True", "number")),
    ({"space": None}, TypeError, ("keep['space']", "None", "number")),
    (0.5, TypeError, ("keep", "0.5", "dict")),
    (None, TypeError, ("keep", "None", "dict")),
    ([("space", 0.5)], TypeError, ("keep", "dict")),
]


@pytest.mark.parametrize(("keep", "error", "words"), BAD_KEEP, ids=lambda value: str(value))
def test_bad_fractions(keep: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    x, layer = torch.randn(2, 3, 8, 8), nn.Conv2d(3, 4, 3)
    for call in (
        lambda: crs.conv(x, layer.weight, keep=keep),
        lambda: crs.apply(layer, keep),
    ):
        with pytest.raises(error) as caught:
            call()
        assert all(word in str(caught.value) for word in words), caught.value


def test_bad_arguments() -> None:
    x, layer = torch.randn(2, 3, 8, 8), nn.Conv2d(3, 4, 3)
    bad: Any = 3
    with pytest.raises(TypeError, match=r"generator: got a int. Supported: a torch.Generator"):
        crs.conv(x, layer.weight, keep={}, generator=bad)
    with pytest.raises(TypeError, match="generator"):
        crs.apply(layer, {}, generator=bad)
    with pytest.raises(TypeError, match=r"model: got a int. Supported: a torch.nn.Module"):
        crs.apply(bad, {})
    with pytest.raises(ValueError, match=r"model: Linear has no layer.*Conv1d, Conv2d, Conv3d"):
        crs.apply(nn.Linear(2, 2), {"space": 0.5})
    with pytest.raises(TypeError, match="complex64"):
        crs.conv(x.to(torch.complex64), layer.weight.to(torch.complex64), keep={"space": 0.5})
    with pytest.raises(ValueError, match=r"x: got shape \(2, 3\)"):
        crs.conv(x[..., 0, 0], layer.weight, keep={"space": 0.5})
    with pytest.raises(ValueError, match="padding"):
        crs.conv(x, layer.weight, keep={"space": 0.5}, padding="smae")
    for keep in ({}, KEEP):
        with pytest.raises((ValueError, RuntimeError)):
            crs.conv(x[:, :2], layer.weight, keep=keep)
        with pytest.raises((ValueError, RuntimeError)):
            crs.conv(x[..., :2], layer.weight, keep=keep)
