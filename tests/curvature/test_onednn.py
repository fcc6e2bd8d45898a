"""Sums over positions by one product of oneDNN, against the other ways."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tnkfac.curvature import describe
from tnkfac.curvature.moments import onednn
from tnkfac.curvature.moments.position_sums import box_sums
from tnkfac.curvature.moments.squares import input_squares, output_size
from tnkfac.curvature.moments.tap_classes import TapClasses, tap_classes

CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 2, 5, stride=2), (4, 4, 30)),
    "conv2d": (lambda: nn.Conv2d(8, 2, 3, padding=1), (6, 8, 9, 7)),
    "more taps than are taken at a time": (lambda: nn.Conv2d(4, 2, 5, padding=2), (4, 4, 8, 9)),
    "as many taps": (lambda: nn.Conv2d(4, 2, 4, stride=4), (4, 4, 8, 12)),
    "stride and dilation": (lambda: nn.Conv2d(16, 2, 3, 2, 1, 2), (1, 16, 13, 12)),
    "groups": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 11, 10)),
    "circular": (lambda: nn.Conv2d(8, 2, 3, padding=1, padding_mode="circular"), (2, 8, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 2, 3, padding=1), (4, 4, 5, 6, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 2, 3, 2, 1, 1), (2, 8, 6, 5)),
}


def classes_of(module: nn.Module, x: torch.Tensor) -> TapClasses:
    layer = describe(module)
    return tap_classes(layer, tuple(x.shape[2:]), output_size(layer, x, module(x)))


@pytest.fixture
def small_images(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small images are taken as well."""
    monkeypatch.setattr(onednn, "ENOUGH", 0)
    monkeypatch.setattr(onednn, "PIXELS", 0)
    onednn._weight.cache_clear()
    yield
    onednn._weight.cache_clear()


@pytest.mark.usefixtures("small_images")
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str, approx: Any) -> None:
    build, shape = CASES[name]
    module, x = build(), torch.randn(shape)
    layer, size = describe(module), output_size(describe(module), x, module(x))
    X = layer.standard_input(x)
    if approx == "reduce":
        assert onednn.sums(X.flatten(0, 1), tap_classes(layer, X.shape[2:], size)) is not None
    found = input_squares(layer, X, size, approx, torch.float32)
    expected = input_squares(layer, X.double(), size, approx, torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


# Sizes of real layers, at which oneDNN may take other kernels than for small ones.
LAYERS = {
    "ResNet18, 14 pixels": (nn.Conv2d(1, 1, 3, padding=1), (4096, 14, 14)),
    "ResNet18, 56 pixels, stride": (nn.Conv2d(1, 1, 3, 2, 1), (256, 56, 56)),
    "ConvNeXt, 14 pixels": (nn.Conv2d(1, 1, 7, padding=3), (4096, 14, 14)),
    "3d": (nn.Conv3d(1, 1, 3, padding=1), (1024, 10, 10, 10)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_other_ways_at_sizes_of_real_layers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, shape = LAYERS[name]
    x = torch.randn(shape)
    classes = classes_of(module, x.unsqueeze(1)[:1])
    found = onednn.sums(x, classes)
    assert found is not None
    assert torch.equal(box_sums(x, classes), found)
    monkeypatch.setattr(onednn, "ENOUGH", x.numel() + 1)
    torch.testing.assert_close(found, box_sums(x, classes), rtol=1e-5, atol=1e-4)


def disabled(x: torch.Tensor, classes: TapClasses) -> Any:
    with torch.backends.mkldnn.flags(enabled=False):
        return onednn.sums(x, classes)


LEFT_ALONE: dict[str, Any] = {
    "float64": lambda x, classes: onednn.sums(x.double(), classes),
    "rows that are no multiple of 16": lambda x, classes: onednn.sums(x[:-1], classes),
    "few numbers": lambda x, classes: onednn.sums(x[:1024], classes),
    "oneDNN is turned off": disabled,
}


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's, on turning oneDNN off
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_to_other_ways(name: str) -> None:
    x = torch.randn(4096, 14, 14)
    classes = classes_of(nn.Conv2d(1, 1, 3, padding=1), x.unsqueeze(1)[:1])
    assert onednn.sums(x, classes) is not None
    assert LEFT_ALONE[name](x, classes) is None


@pytest.mark.parametrize("pixels", [9, 70], ids=["few pixels", "a large matrix"])
def test_left_to_other_ways_at_sizes(pixels: int) -> None:
    x = torch.zeros(16 * (1 + (1 << 20) // (16 * pixels**2)), pixels, pixels)
    classes = classes_of(nn.Conv2d(1, 1, 3, padding=1), x.unsqueeze(1)[:1])
    assert onednn.sums(x, classes) is None
