"""Norms of scaled gradients in one pass, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tnkfac.optim.step.norms import MOST, scaled_norm

CASES: dict[str, tuple[tuple[int, ...], torch.memory_format]] = {
    "linear": ((7, 5), torch.contiguous_format),
    "one row": ((1, 9), torch.contiguous_format),
    "one column": ((9, 1), torch.contiguous_format),
    "conv1d": ((4, 3, 5), torch.contiguous_format),
    "conv2d": ((4, 3, 5, 2), torch.contiguous_format),
    "conv2d, channels last": ((4, 3, 5, 2), torch.channels_last),
    "conv3d": ((4, 3, 2, 3, 2), torch.contiguous_format),
    "conv3d, channels last": ((4, 3, 2, 3, 2), torch.channels_last_3d),
    "large": ((512, 64, 3, 3), torch.contiguous_format),
}


def factors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Positive numbers over four orders of magnitude, of the inputs and of the outputs."""
    right = torch.rand(1, *shape[1:], dtype=torch.float64).mul(4).sub(2)
    left = torch.rand(shape[0], *[1] * (len(shape) - 1), dtype=torch.float64).mul(4).sub(2)
    return (10**right).to(dtype), (10**left).to(dtype)


def exact(gradient: Tensor, right: Tensor, left: Tensor) -> float:
    norm: float = (gradient.double() * right.double() * left.double()).norm().item()
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_norm(name: str, dtype: torch.dtype) -> None:
    shape, order = CASES[name]
    gradient = torch.randn(shape, dtype=dtype).contiguous(memory_format=order)
    right, left = factors(shape, dtype)
    found = scaled_norm(gradient, right, left)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert found == pytest.approx(exact(gradient, right, left), rel=tolerance)


@pytest.mark.parametrize("size", [1e-9, 1e-4, 1e4, 1e11])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_sizes_whose_squares_leave_float32(size: float, scale: float) -> None:
    """Right, or left to a slower way."""
    gradient, (right, left) = size * torch.randn(6, 8), factors((6, 8))
    for right_, left_ in ((right * scale, left), (right, left * scale), (right * scale, left)):
        found = scaled_norm(gradient, right_, left_)
        expected = exact(gradient, right_, left_)
        assert found == (pytest.approx(expected, rel=1e-6) if expected < MOST else None)


def spread(values: list[float]) -> Tensor:
    return torch.tensor([values])


UNFIT: dict[str, tuple[Any, Any, Any]] = {
    "squares vanish": (torch.full((2, 2), 1e-15), spread([1.0, 1.0]), spread([1.0, 1.0]).T),
    "squares overflow": (torch.full((2, 2), 1e18), spread([1.0, 1.0]), spread([1.0, 1.0]).T),
    "inputs too far apart": (torch.tensor([[1e-9, 1e9]]), spread([1.0, 1e-18]), spread([1.0])),
    "outputs too far apart": (
        torch.tensor([[1e-9], [1e9]]),
        spread([1.0]),
        spread([1.0, 1e-18]).T,
    ),
    "outputs are not finite": (torch.ones(2, 1), spread([1.0]), spread([1.0, float("inf")]).T),
    "nothing but zeros": (torch.zeros(2, 2), spread([1.0, 1.0]), spread([1.0, 1.0]).T),
    "infinity": (torch.tensor([[1.0, float("inf")]]), spread([1.0, 1.0]), spread([1.0])),
    "not a number": (torch.tensor([[1.0, float("nan")]]), spread([1.0, 1.0]), spread([1.0])),
    "one number for every column": (torch.ones(2, 3), torch.ones(2, 1), torch.ones(1, 3)),
    "rows do not lie one after the other": (torch.ones(3, 2).T, torch.ones(1, 3), torch.ones(2, 1)),
}


@pytest.mark.parametrize("name", UNFIT)
def test_says_so_where_it_cannot_tell(name: str) -> None:
    gradient, right, left = UNFIT[name]
    assert scaled_norm(gradient, right, left) is None


def test_other_precisions_are_left_alone() -> None:
    weight = nn.Linear(3, 2).to(torch.bfloat16).weight.detach()
    assert scaled_norm(weight, torch.ones(1, 3), torch.ones(2, 1)) is None
