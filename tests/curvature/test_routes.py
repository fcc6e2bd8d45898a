"""Routes of a Gram matrix: all of them exact, each taken where it should be, little memory."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from memory import peak_bytes
from oracles.layer_cases import SPECIAL, random_layer, special_layer
from tnkfac.curvature import describe, explain, input_factor
from tnkfac.curvature.moments import contraction, readings
from tnkfac.curvature.moments.lags.autocorrelation import symmetric_lags
from tnkfac.curvature.moments.lags.borders import Lags
from tnkfac.curvature.moments.lags.gather import fill_correlation_gram
from tnkfac.curvature.moments.second_moment import Gram, gram_pair
from tnkfac.curvature.moments.syrk import FEW, fill_gram
from tnkfac.curvature.moments.tap_classes import tap_classes
from tnkfac.curvature.moments.unfold import output_size, unfolded
from tnkfac.curvature.moments.windows import fill_windows_gram

Case = tuple[nn.Module, tuple[int, ...]]


@pytest.mark.parametrize("route", ["lags", "windows", "network", "network, group by group"])
@pytest.mark.parametrize("case", [*range(120), *SPECIAL], ids=str)
def test_every_route_is_exact(case: int | str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lags are also those of phases and of tap classes: whatever the layer asks for."""
    module, x, *_ = random_layer(case) if isinstance(case, int) else special_layer(case)
    layer = replace(describe(module), bias=False)
    if layer.kind == "linear":
        pytest.skip("Linear layers have a single route.")
    x = layer.standard_input(x)
    sizes = tuple(output_size(layer, x.shape, None))
    rows = unfolded(layer, x, True, sizes).flatten(1, 2)
    expected = 0.5 * rows.mT @ rows
    out = torch.full_like(expected, float("nan"))
    if route == "network, group by group":
        monkeypatch.setattr(contraction, "HELD", 1)
    if route.startswith("network"):
        contraction.fill_planned_gram(out, layer, x, sizes, 0.5)
    else:
        classes = tap_classes(layer, tuple(x.shape[2:]), sizes)
        fill = fill_correlation_gram if route == "lags" else fill_windows_gram
        fill(out, x, classes, 0.5)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    if route == "lags":
        assert torch.equal(out, out.mT)


NAMED: dict[str, tuple[nn.Module, tuple[int, ...], str, str, str]] = {
    "3x3": (nn.Conv2d(64, 64, 3, padding=1), (8, 64, 56, 56), "expand", "dense", "lags"),
    "5x5": (nn.Conv2d(48, 64, 5, padding=2), (8, 48, 35, 35), "expand", "dense", "lags"),
    "3x3 without padding": (nn.Conv2d(32, 32, 3), (8, 32, 149, 149), "expand", "dense", "lags"),
    "3x3 of 32 groups": (
        nn.Conv2d(256, 256, 3, padding=1, groups=32),
        (8, 256, 64, 64),
        "expand",
        "dense",
        "lags",
    ),
    "7x7 depthwise": (
        nn.Conv2d(128, 128, 7, padding=3, groups=128),
        (8, 128, 64, 64),
        "expand",
        "dense",
        "lags",
    ),
    "3x3x3": (nn.Conv3d(16, 16, 3, padding=1), (8, 16, 24, 24, 24), "expand", "dense", "lags"),
    "7x7 with stride": (
        nn.Conv2d(3, 64, 7, 2, 3),
        (8, 3, 256, 256),
        "expand",
        "dense",
        "polyphase lags",
    ),
    "3x3 with stride": (nn.Conv2d(64, 64, 3, 2, 1), (8, 64, 64, 64), "expand", "dense", "im2col"),
    "3x3 on few pixels": (nn.Conv2d(192, 192, 3), (8, 192, 8, 8), "expand", "dense", "im2col"),
    "1x1": (nn.Conv2d(64, 64, 1), (8, 64, 56, 56), "expand", "dense", "view"),
    "1x1 with stride": (nn.Conv2d(64, 64, 1, 2), (8, 64, 56, 56), "expand", "dense", "view"),
    "patches": (nn.Conv2d(3, 96, 4, 4), (8, 3, 256, 256), "expand", "dense", "view"),
    "linear": (nn.Linear(64, 64), (8, 64), "expand", "dense", "view"),
    "4x4 transposed": (
        nn.ConvTranspose2d(64, 32, 4, 2, 1),
        (8, 64, 32, 32),
        "expand",
        "dense",
        "tap classes",
    ),
    "2x2 transposed": (
        nn.ConvTranspose2d(256, 128, 2, 2),
        (8, 256, 32, 32),
        "expand",
        "dense",
        "tap classes",
    ),
    "mostly padding": (
        nn.Conv2d(32, 32, 7, padding=3),
        (64, 32, 3, 3),
        "expand",
        "dense",
        "network",
    ),
    "reduce": (nn.Conv2d(64, 64, 3, padding=1), (8, 64, 56, 56), "reduce", "dense", "average"),
    "diagonal": (
        nn.Conv2d(64, 64, 3, padding=1),
        (8, 64, 56, 56),
        "expand",
        "diagonal",
        "box sums",
    ),
    "large blocks": (
        nn.Conv2d(64, 64, 3, padding=1),
        (8, 64, 56, 56),
        "expand",
        "block256diagonal",
        "slabs",
    ),
    "small blocks": (
        nn.Conv2d(96, 96, 3, 2, 1),
        (8, 96, 28, 28),
        "expand",
        "block6diagonal",
        "im2col",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_route_of_a_shape(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, shape, approx, structure, route = NAMED[name]
    explanation = explain(module, shape, approx, structure)
    assert explanation.chosen == route
    printed = capsys.readouterr().out
    assert "<- chosen" in next(line for line in printed.splitlines() if f"  {route} " in line)
    assert all(r.operations >= 0 and r.numbers >= 0 and r.cost > 0 for r in explanation.routes)


def test_every_route_is_named() -> None:
    routes = {row[-1] for row in NAMED.values()}
    assert routes == {
        "lags", "polyphase lags", "tap classes", "view", "network", "im2col", "average",
        "box sums", "slabs",
    }  # fmt: skip


WITHOUT_UNFOLDING = ["3x3", "5x5", "3x3 without padding", "3x3 of 32 groups", "7x7 depthwise"]


def small(name: str, batch: int = 2) -> Gram:
    """The Gram of a named layer, on a smaller batch."""
    module, shape, approx, *_ = NAMED[name]
    x = torch.randn(batch, *shape[1:])
    layer = replace(describe(module), bias=False)
    return Gram(layer, x, "reduce" if approx == "reduce" else "expand", True)


@pytest.mark.parametrize("name", [*WITHOUT_UNFOLDING, "reduce"])
def test_layers_that_are_never_unfolded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("unfolded")

    monkeypatch.setattr(readings, "fill_windows_gram", refuse)
    monkeypatch.setattr(readings, "fill_planned_gram", refuse)
    monkeypatch.setattr(nn.functional, "unfold", refuse)
    small(name, batch=8).dense()


@pytest.mark.parametrize("name", [*WITHOUT_UNFOLDING, "7x7 with stride", "3x3 with stride"])
def test_memory_beyond_the_result_is_a_quarter_of_im2col(name: str) -> None:
    gram = small(name, batch=8)
    positions, groups = gram.positions, gram.layer.groups
    unfolded_bytes = 4 * gram.samples * groups * gram.dim * positions
    extra = peak_bytes(gram.dense) - 4 * groups * gram.dim**2
    assert extra <= unfolded_bytes / 4


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("name", ["3x3", "5x5", "3x3 of 32 groups", "3x3 with stride"])
def test_reduce_needs_no_more_than_one_padded_input(name: str, structure: str) -> None:
    module, shape, *_ = NAMED[name]
    x = torch.randn(shape)
    result = input_factor(module, x, "reduce", structure)
    assert isinstance(result, Tensor)
    extra = peak_bytes(lambda: input_factor(module, x, "reduce", structure)) - 4 * result.numel()
    assert extra <= 4 * x.numel()


@pytest.mark.parametrize(
    "name",
    [
        "3x3",
        "3x3 of 32 groups",
        "7x7 depthwise",
        "7x7 with stride",
        "4x4 transposed",
        "3x3 with stride",
        "mostly padding",
    ],
)
def test_accuracy_in_float32(name: str) -> None:
    """Against float64, symmetric, and positive semi-definite to round-off."""
    gram = small(name)
    found, exact = gram.dense(), replace(gram, tensor=gram.tensor.double()).dense()
    error = (found - exact).norm() / exact.norm()
    assert error <= 2e-5
    torch.testing.assert_close(found, found.mT, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    values = torch.linalg.eigvalsh(found[:4].double())
    assert values.min() >= -1e-5 * values.max()


@pytest.mark.parametrize(
    "name",
    [
        "3x3",
        "3x3 with stride",
        "7x7 with stride",
        "4x4 transposed",
        "7x7 depthwise",
        "mostly padding",
        "patches",
    ],
)
@pytest.mark.parametrize("layout", ["channels_last", "expanded", "transposed", "strided"])
def test_layouts(name: str, layout: str) -> None:
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "expanded": lambda x: x[:1].expand_as(x),
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": lambda x: torch.stack([x, -x], -1)[..., 0],
    }
    module, shape, *_ = NAMED[name]
    channels = describe(module).in_channels // describe(module).groups * min(4, shape[1])
    layer = replace(describe(module), bias=False)
    if layer.groups > 1:
        layer = replace(layer, groups=4, in_channels=channels)
    x = layouts[layout](
        torch.randn(3, layer.in_channels, *(min(s, 20) for s in shape[2:])).double()
    )
    gram = Gram(layer, x, "expand", True)
    rows = unfolded(layer, x, True, None).flatten(1, 2)
    torch.testing.assert_close(gram.dense(), rows.mT @ rows, rtol=1e-10, atol=1e-9)
    means = Gram(layer, x, "reduce", True).dense()
    plain = unfolded(layer, x, True, None).mean(2)
    torch.testing.assert_close(means, plain.mT @ plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("structure", ["dense", "diagonal", "block16diagonal"])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype, structure: str) -> None:
    module, x = nn.Conv2d(4, 4, 3, padding=1), 30 * torch.rand(16, 4, 20, 20)
    found = input_factor(module, x.to(dtype), "expand", structure)
    exact = input_factor(module, x.to(dtype).double(), "expand", structure)
    for part, true in zip(
        found if isinstance(found, tuple) else (found,),
        exact if isinstance(exact, tuple) else (exact,),
        strict=True,
    ):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.double(), true, rtol=1e-5, atol=1e-4)


def test_autocast_does_not_reach_factors() -> None:
    module, x = nn.Conv2d(3, 4, 3), torch.rand(2, 3, 9, 9)
    expected = input_factor(module, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(input_factor(module, x), expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("step", [1, 2])
def test_lags_of_single_channels_equal_those_of_a_convolution(dims: int, step: int) -> None:
    """Blocks of neighbours against the library, which takes every channel for a group."""
    x = torch.randn(3, 4, *(7, 9, 6)[:dims], dtype=torch.float64)
    lags = [Lags(1, step, most) for most in (2, 3, 1)[:dims]]
    found = symmetric_lags(x, 4, lags)
    plane = torch.cat([x[:, :, None], torch.zeros_like(x)[:, :, None]], 2).flatten(1, 2)
    per_group = symmetric_lags(plane, 4, lags)[::2, :1]
    torch.testing.assert_close(found, per_group, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [FEW - 1, FEW])
@pytest.mark.parametrize("dim", [100, 512, 1301])
def test_products_in_halves(dim: int, columns: int) -> None:
    rows = torch.randn(1, dim, columns, dtype=torch.float64)
    out = torch.full((1, dim, dim), float("nan"), dtype=torch.float64)
    fill_gram(out, rows, 2.0)
    torch.testing.assert_close(out, 2 * rows @ rows.mT, rtol=1e-12, atol=1e-12)


def test_the_whole_factor_through_the_public_function() -> None:
    """Bias, scale and route together, on layers large enough for every fast route."""
    for name in ("3x3", "4x4 transposed", "7x7 with stride"):
        module, shape, *_ = NAMED[name]
        x = torch.randn(2, *shape[1:])
        layer = describe(module)
        size = tuple(output_size(layer, x.shape, None))
        rows = nn.functional.pad(unfolded(layer, x, True, size).flatten(1, 2), (0, 1), value=1.0)
        rows = rows.double()
        expected = rows.mT @ rows / rows.shape[1]
        found = input_factor(module, x)
        assert isinstance(found, Tensor)
        assert (found.double() - expected).norm() <= 2e-6 * expected.norm()


def test_blocks_in_slabs_equal_the_dense_matrix() -> None:
    module, x = nn.Conv2d(24, 4, 3, padding=1), torch.randn(4, 24, 28, 28, dtype=torch.float64)
    for size in (40, 54, 217, 300):
        gram = gram_pair(describe(module), x, torch.zeros(4, 4, 28, 28), "expand")[0]
        blocks, last = gram.blocks(size)
        dense = gram.dense()
        for at, first in enumerate(range(0, gram.dim - size + 1, size)):
            end = first + size
            torch.testing.assert_close(blocks[:, at], dense[:, first:end, first:end])
        rest = dense[:, gram.dim - gram.dim % size :, gram.dim - gram.dim % size :]
        torch.testing.assert_close(last, rest)
