"""Foldings, Toeplitz matrices and first derivatives against torch, autograd and unit vectors."""

from collections.abc import Callable
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oracles.compare import assert_close
from oracles.convolutions import CONV, TRANSPOSED, Case, case, gradients
from tnkfac.einsum import functional

TOLERANCE = 1e-12
FLOAT64 = torch.float64
LEADING: tuple[tuple[int, ...], ...] = ((), (2,), (2, 3))

each_case = pytest.mark.parametrize("name", CONV + TRANSPOSED)
each_conv = pytest.mark.parametrize("name", CONV)


def operation(name: str, example: Case) -> Callable[..., Tensor]:
    """The operation for the layer type of a case."""
    return getattr(functional, f"{name}_transpose" if example.transposed else name)


# --- the oracles themselves ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CONV + TRANSPOSED if not n.startswith("4d")][::4])
def test_jacobians_of_the_oracle_are_those_of_autograd(name: str) -> None:
    c = case(name)
    x, weight = torch.func.jacrev(c.layer, argnums=(0, 1))(c.x, c.weight)
    assert_close(x, c.input_jacobian, 1e-14)
    assert_close(weight, c.weight_jacobian, 1e-14)


@pytest.mark.parametrize("name", [n for n in CONV + TRANSPOSED if not n.startswith("4d")][::2])
def test_loops_of_the_oracle_are_the_layer_of_torch(name: str) -> None:
    c = case(name)
    y = c.layer(c.x, c.weight)
    assert y.shape == c.output_shape
    assert_close(c._loops(c.x, c.weight), y, 1e-13)


# --- pooling, folding, Toeplitz matrices --------------------------------------------------------


@each_conv
def test_avg_pool(name: str) -> None:
    c = case(name)
    taps = c.unfolded(c.x)[:, 0].unflatten(1, (-1, prod(c.kernel_size)))
    expected = taps.mean(2).reshape(*c.input_shape[:2], *c.output_size)
    for options in (c.ungrouped, c.options):  # channel groups make no difference
        assert_close(functional.avg_pool(c.x, c.kernel_size, **options), expected, TOLERANCE)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (3, 1)], ids=str)
def test_avg_pool_is_that_of_torch(dims: int, stride: int, padding: int) -> None:
    """Zeros of the padding count, as is torch's default."""
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
    x = torch.randn(2, 3, *(7, 5, 4)[:dims], dtype=FLOAT64)
    expected = pool(x, 3, stride, padding)
    result = functional.avg_pool(x, 3, stride=stride, padding=padding)
    assert_close(result, expected, TOLERANCE)


@each_case
def test_fold(name: str) -> None:
    """The adjoint of unfolding, with the matrix of which the oracle multiplies."""
    c = case(name)
    z = c.tensor("z", c.batch, c.channels[0] * prod(c.kernel_size), prod(c.output_size))
    result = operation("fold", c)(z, c.input_size, c.kernel_size, **c.ungrouped)
    assert_close(result, (z.flatten(1) @ c.unfolding).reshape(c.input_shape), TOLERANCE)


@pytest.mark.parametrize("stride", [1, 2, (3, 1)], ids=str)
@pytest.mark.parametrize("padding", [0, 1, (2, 1)], ids=str)
@pytest.mark.parametrize("dilation", [1, (1, 2)], ids=str)
def test_fold_is_that_of_torch(stride: object, padding: object, dilation: object) -> None:
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    columns = F.unfold(torch.randn(2, 3, 6, 7, dtype=FLOAT64), (3, 2), **options)
    z = torch.randn_like(columns)
    result = functional.fold(z, (6, 7), (3, 2), **options)
    assert_close(result, F.fold(z, (6, 7), (3, 2), **options), TOLERANCE)


@each_case
def test_unfold_kernel(name: str) -> None:
    c = case(name)
    result = operation("unfold_kernel", c)(c.weight, c.input_size, **c.options)
    assert_close(result, c.matrix, TOLERANCE)
    y = (result @ c.x.flatten(1).T).T.reshape(c.output_shape)
    assert_close(y, c.layer(c.x, c.weight), TOLERANCE)


# --- reverse mode -------------------------------------------------------------------------------


@each_case
def test_weight_vjp(name: str) -> None:
    c = case(name)
    for lead in LEADING:
        v = c.cotangent(*lead)
        result = operation("weight_vjp", c)(c.x, v, c.kernel_size, **c.options)
        assert_close(result, gradients(c, v)[1], TOLERANCE)


@each_case
def test_per_sample_weight_vjp(name: str) -> None:
    c = case(name)
    for lead in LEADING:
        v = c.cotangent(*lead)
        result = operation("per_sample_weight_vjp", c)(c.x, v, c.kernel_size, **c.options)
        expected = v.flatten(len(lead) + 1).unsqueeze(-2) @ c.jacobians
        assert_close(result, expected.reshape(*lead, c.batch, *c.weight_shape), TOLERANCE)
        single = gradients(c, v)[1]
        assert_close(result.sum(len(lead)), single, TOLERANCE)


@each_case
def test_input_vjp(name: str) -> None:
    c = case(name)
    for lead in LEADING:
        v = c.cotangent(*lead)
        result = operation("input_vjp", c)(c.weight, v, c.input_size, **c.options)
        assert_close(result, gradients(c, v)[0], TOLERANCE)


@pytest.mark.parametrize("dims", [0, 1, 2, 3, 4])
def test_bias_vjp(dims: int) -> None:
    """Also of linear layers, which have no position."""
    v = torch.randn(3, 2, *(2, 3, 1, 2)[:dims], dtype=FLOAT64)
    bias = torch.zeros(2, dtype=FLOAT64)
    _, vjp = torch.func.vjp(lambda b: b.reshape(-1, *[1] * dims).expand(v.shape), bias)
    assert_close(functional.bias_vjp(v), vjp(v)[0], TOLERANCE)
    per_sample = torch.stack([vjp(torch.zeros_like(v).index_copy(0, n, v[n]))[0] for n in rows(v)])
    assert_close(functional.per_sample_bias_vjp(v), per_sample, TOLERANCE)


def rows(v: Tensor) -> list[Tensor]:
    """Index of every sample."""
    return [torch.tensor([n]) for n in range(len(v))]


# --- forward mode -------------------------------------------------------------------------------


def pushed(function: Callable[[Tensor], Tensor], at: Tensor, tangents: Tensor) -> Tensor:
    """Jacobian-vector products over the leading axes of the tangents."""
    flat = tangents.reshape(-1, *at.shape)
    images = torch.stack([torch.func.jvp(function, (at,), (each,))[1] for each in flat])
    return images.reshape(*tangents.shape[: tangents.ndim - at.ndim], *images.shape[1:])


@each_case
def test_weight_jvp(name: str) -> None:
    c = case(name)
    for lead in LEADING:
        dw = c.tensor("dw", *lead, *c.weight_shape)
        result = operation("weight_jvp", c)(c.x, dw, **c.options)
        expected = pushed(lambda weight: c.layer(c.x, weight), c.weight, dw)
        assert_close(result, expected, TOLERANCE)


@each_case
def test_input_jvp(name: str) -> None:
    c = case(name)
    for lead in LEADING:
        dx = c.tensor("dx", *lead, *c.input_shape)
        result = operation("input_jvp", c)(dx, c.weight, **c.options)
        columns = dx.flatten(len(lead) + 1).unsqueeze(-2) @ c.matrix.T
        assert_close(result, columns.reshape(*lead, *c.output_shape), TOLERANCE)
        if len(c.kernel_size) < 4:
            expected = pushed(lambda x: c.layer(x, c.weight), c.x, dx)
            assert_close(result, expected, TOLERANCE)


# --- Jacobians ----------------------------------------------------------------------------------


@each_case
def test_weight_jacobian(name: str) -> None:
    c = case(name)
    result = operation("weight_jacobian", c)(c.x, c.weight_shape, **c.options)
    assert_close(result, c.weight_jacobian, TOLERANCE)


@each_case
def test_input_jacobian(name: str) -> None:
    c = case(name)
    result = operation("input_jacobian", c)(c.weight, c.input_shape, **c.options)
    assert_close(result, c.input_jacobian, TOLERANCE)
