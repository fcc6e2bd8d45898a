"""Kernels that do not work where they are to run are not used, and that is said."""

import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from tnkfac.curvature import triton_check
from tnkfac.curvature.layers import describe
from tnkfac.curvature.moments import position_sums

CPU = torch.device("cpu")


def no_compiler(device: torch.device) -> None:
    raise RuntimeError("Failed to find C compiler.")


def other_numbers(device: torch.device) -> None:
    torch.testing.assert_close(torch.ones(3, device=device), torch.zeros(3))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of kernels that work, or what a test makes of it."""
    module: Any = ModuleType("kernels")
    module.calls, module.grad = 0, None

    def check(device: torch.device) -> None:
        module.calls += 1
        module.grad = torch.is_grad_enabled()

    module.check = check
    module.load = lambda: module
    monkeypatch.setattr(triton_check, "find_spec", lambda name: object())
    triton_check.trusted.cache_clear()
    yield module
    triton_check.trusted.cache_clear()


def test_working_kernels_are_tried_once(kernels: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert triton_check.trusted(kernels.load, CPU) is kernels
        assert triton_check.trusted(kernels.load, CPU) is kernels
    assert kernels.calls == 1
    assert kernels.grad is False  # a trial is no part of anyone's graph
    assert triton_check.trusted(kernels.load, torch.device("cpu", 0)) is kernels
    assert kernels.calls == 2


@pytest.mark.parametrize("failure", [no_compiler, other_numbers])
def test_others_are_named_once_and_left_alone(failure: Any, kernels: Any) -> None:
    kernels.check = failure
    with pytest.warns(RuntimeWarning, match="do not work on cpu") as found:
        assert triton_check.trusted(kernels.load, CPU) is None
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert triton_check.trusted(kernels.load, CPU) is None


def test_kernels_that_cannot_be_imported(kernels: Any) -> None:
    def broken() -> ModuleType:
        raise ImportError("libcuda.so.1: cannot open shared object file")

    with pytest.warns(RuntimeWarning, match="libcuda"):
        assert triton_check.trusted(broken, CPU) is None


def test_without_triton_nothing_is_said(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_check, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert triton_check.trusted(kernels.load, CPU) is None
    assert kernels.calls == 0


def test_statistics_where_kernels_fail(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is summed by torch instead is the same."""
    layer = describe(nn.Conv2d(2, 3, 3, padding=1))
    x = torch.randn(2, 2, 5, 6)
    expected = layer.input_moment(x, "reduce").diagonal()
    kernels.check = no_compiler
    tried = lambda tensor: triton_check.trusted(lambda: kernels, tensor.device)  # noqa: E731
    monkeypatch.setattr(position_sums, "triton_kernels", tried)
    with pytest.warns(RuntimeWarning, match="C compiler"):
        found = layer.input_moment(x, "reduce").diagonal()
    torch.testing.assert_close(found, expected)
