"""Routes of a second moment: all of them exact, each taken where it should be, little memory."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memory import peak_bytes
from oracles.layer_cases import SPECIAL, random_layer, special_layer
from tnkfac.curvature import explain, input_factor
from tnkfac.curvature.layers import Convolution, describe
from tnkfac.curvature.moments import contraction, patches
from tnkfac.curvature.moments.algorithms import LEAST_MEMORY, MEMORY, dense_algorithms
from tnkfac.curvature.moments.contraction import fill_from_network
from tnkfac.curvature.moments.lags.autocorrelation import symmetric_lags
from tnkfac.curvature.moments.lags.borders import Lags
from tnkfac.curvature.moments.lags.gather import fill_from_lags
from tnkfac.curvature.moments.products.syrk import FEW, fill_product
from tnkfac.curvature.moments.second_moment import SecondMoment
from tnkfac.curvature.moments.unfolding import Unfolding, tap_classes
from tnkfac.curvature.moments.windows import fill_from_windows

Case = tuple[nn.Module, tuple[int, ...]]


@pytest.mark.parametrize("case", [*range(120), *SPECIAL], ids=str)
def test_every_route_is_exact(case: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lags are also those of phases and of tap classes: whatever the layer asks for."""
    module, x, *_ = random_layer(case) if isinstance(case, int) else special_layer(case)
    layer = describe(module)
    if not isinstance(layer, Convolution):
        return  # linear layers have a single route
    x, unfolding = layer.standard_input(x), layer.unfolding
    sizes = tuple(unfolding.output_size(x.shape[2:]))
    rows = unfolding.unfolded(x, sizes).flatten(1, 2)
    expected = rows.mT @ rows
    classes = tap_classes(unfolding, tuple(x.shape[2:]), sizes)
    for route in ("lags", "windows", "network", "network, group by group"):
        out = torch.full_like(expected, float("nan"))
        if route == "network, group by group":
            monkeypatch.setattr(contraction, "HELD", 1)
        if route.startswith("network"):
            fill_from_network(out, unfolding, x, sizes)
        else:
            fill = fill_from_lags if route == "lags" else fill_from_windows
            fill(out, x, classes)
        torch.testing.assert_close(
            out, expected, rtol=1e-11, atol=1e-11, msg=lambda m, r=route: f"{r}: {m}"
        )
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


def without_bias(name: str) -> nn.Module:
    """A named module, as if it had no bias."""
    module = copy.deepcopy(NAMED[name][0])
    module.bias = None
    return module


def small(name: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> SecondMoment:
    """The input moment of a named layer, on a smaller batch, read in some precision."""
    _, shape, approx, *_ = NAMED[name]
    x = torch.randn(batch, *shape[1:], generator=torch.Generator().manual_seed(0))
    kind = "reduce" if approx == "reduce" else "expand"
    return describe(without_bias(name)).input_moment(x, kind, dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*WITHOUT_UNFOLDING, "reduce"])
def test_layers_that_are_never_unfolded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("unfolded")

    for unfolding in ("im2col", "view", "network"):
        monkeypatch.setitem(patches.FILL, unfolding, refuse)
    monkeypatch.setattr(nn.functional, "unfold", refuse)
    small(name, batch=8).dense()


@pytest.mark.parametrize("name", [*WITHOUT_UNFOLDING, "7x7 with stride", "3x3 with stride"])
def test_memory_beyond_the_result_is_a_quarter_of_im2col(name: str) -> None:
    moment = small(name, batch=8)
    groups, positions = moment.groups, moment.positions
    unfolded_bytes = 4 * moment.samples * groups * moment.dim * positions
    extra = peak_bytes(moment.dense) - 4 * groups * moment.dim**2
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
    found, exact = small(name).dense(), small(name, dtype=torch.float64).dense()
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
    module, shape = without_bias(name), NAMED[name][1]
    groups = module.groups
    if groups > 1:
        channels = module.in_channels // groups * 4
        module.groups, module.in_channels = 4, channels
    layer = describe(module)
    assert isinstance(layer, Convolution)
    x = layouts[layout](
        torch.randn(3, layer.in_channels, *(min(s, 20) for s in shape[2:])).double()
    )
    rows = layer.unfolding.unfolded(x, layer.unfolding.output_size(x.shape[2:]))
    found = layer.input_moment(x, "expand").dense()
    each = rows.flatten(1, 2)
    torch.testing.assert_close(found, each.mT @ each, rtol=1e-10, atol=1e-9)
    means = layer.input_moment(x, "reduce").dense()
    plain = rows.mean(2)
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
    fill_product(out, (rows,), columns)
    torch.testing.assert_close(out, rows @ rows.mT, rtol=1e-12, atol=1e-12)


def test_the_whole_factor_through_the_public_function() -> None:
    """Bias, scale and route together, on layers large enough for every fast route."""
    for name in ("3x3", "4x4 transposed", "7x7 with stride"):
        module, shape, *_ = NAMED[name]
        x = torch.randn(2, *shape[1:])
        layer = describe(module)
        assert isinstance(layer, Convolution)
        rows = layer.unfolding.unfolded(x, layer.unfolding.output_size(x.shape[2:]))
        rows = nn.functional.pad(rows.flatten(1, 2), (0, 1), value=1.0).double()
        expected = rows.mT @ rows / rows.shape[1]
        found = input_factor(module, x)
        assert isinstance(found, Tensor)
        assert (found.double() - expected).norm() <= 2e-6 * expected.norm()


def test_blocks_in_slabs_equal_the_dense_matrix() -> None:
    module, x = nn.Conv2d(24, 4, 3, padding=1), torch.randn(4, 24, 28, 28, dtype=torch.float64)
    for size in (40, 54, 217, 300):
        moment = describe(module).input_moment(x, "expand")
        blocks, last = moment.blocks(size)
        dense = moment.dense()
        for at, first in enumerate(range(0, moment.dim - size + 1, size)):
            end = first + size
            torch.testing.assert_close(blocks[:, at], dense[:, first:end, first:end])
        start = moment.dim - moment.dim % size
        rest = dense[:, start:, start:]
        torch.testing.assert_close(last, rest)


def test_lags_are_not_chosen_where_they_hold_too_much() -> None:
    """Few samples of many channels: the cheaper way stands behind one that needs less memory."""
    unfolding = Unfolding(192, 1, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    few, many = (dense_algorithms(unfolding, (n, 192, 16, 16), (16, 16)) for n in (8, 512))
    lags = next(a for a in few if a.name == "lags")
    unfolded = 2 * 8 * 192 * 9 * 16 * 16 + (192 * 9) ** 2
    assert lags.cost == min(a.cost for a in few)
    assert lags.numbers > MEMORY * unfolded >= LEAST_MEMORY
    assert few[0].name != "lags"
    assert many[0].name == "lags"
