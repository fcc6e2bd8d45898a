"""Both diagonals with few operations, against the routes that they stand for."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tnkfac.curvature.layers import describe
from tnkfac.curvature.moments import position_sums

CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear, positions": (lambda: nn.Linear(5, 3), (4, 7, 2, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 3, bias=False), (1, 5)),
    "conv1d, groups": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, padding=1), (5, 3, 9, 7)),
    "conv2d, one sample without batch": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 9, 7)),
    "conv2d, many pixels": (lambda: nn.Conv2d(3, 5, 3, dilation=2, padding=1), (2, 3, 30, 28)),
    "conv2d, many numbers": (lambda: nn.Conv2d(4, 2, 5, stride=2), (6, 4, 64, 60)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (3, 4, 6, 5)),
    "pointwise, stride": (lambda: nn.Conv2d(4, 6, 1, stride=2), (3, 4, 6, 5)),
    "circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 2, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 21, 22)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 5, 6, 4)),
    "conv3d, many pixels": (lambda: nn.Conv3d(2, 3, 3), (2, 2, 9, 8, 9)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 4, 3, 2), (3, 4, 7)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), (3, 4, 5, 6)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 4, 2, 2), (2, 2, 3, 4, 2)),
}


@pytest.mark.parametrize("layout", ["as is", "channels last"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_routes(name: str, approx: Any, layout: str) -> None:
    build, shape = CASES[name]
    module = build().double()
    x = torch.randn(shape, dtype=torch.float64)
    g = torch.randn_like(module(x))
    if layout == "channels last" and x.ndim >= 4:
        order = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        if x.ndim == len(module.weight.shape):
            x, g = x.to(memory_format=order), g.to(memory_format=order)
    layer = describe(module)
    for moment in layer.moments(x, g, approx):
        dense = moment.dense()  # takes other routes
        found = moment.diagonal()
        expected = dense.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
        rows = replace(moment, has_one=False).rows.unfolded()
        squares = rows.square().sum((1, 2))
        torch.testing.assert_close(found[:, : rows.shape[3]], squares, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("small", [0, 10**9], ids=["axis by axis", "all axes at once"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 6])  # 9 and 25 taps are padded in float32
def test_ways_to_sum_over_positions(
    kernel: int,
    dtype: torch.dtype,
    small: int,
    channels_last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(position_sums, "SMALL", small)
    layer = describe(nn.Conv2d(3, 5, kernel, stride=2, padding=1))
    x = torch.randn(4, 3, 8, 9, dtype=dtype)
    expected = torch.nn.functional.unfold(x.double(), kernel, stride=2, padding=1)
    expected = expected.mean(2).square().sum(0)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    found = layer.input_moment(x, "reduce").diagonal()
    torch.testing.assert_close(found[0, :-1], expected.to(dtype), rtol=1e-5, atol=1e-7)


def test_low_precision_is_summed_in_float32() -> None:
    layer = describe(nn.Linear(3, 3))
    x = torch.full((4096, 1, 3), 1.0, dtype=torch.bfloat16)
    found = layer.input_moment(x, "expand", dtype=torch.float32).diagonal()
    assert found.dtype == torch.float32
    assert found.tolist() == [[4096.0] * 4]
