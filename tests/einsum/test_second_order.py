"""Factors, GGN quantities and backpropagated Hessians against explicit Jacobians."""

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import Tensor

from oracles.compare import assert_close
from oracles.convolutions import CONV, TRANSPOSED, Case, case
from tnkfac.einsum import functional

TOLERANCE = 1e-12
FLOAT64 = torch.float64

each_case = pytest.mark.parametrize("name", CONV + TRANSPOSED)
each_transposed = pytest.mark.parametrize("name", TRANSPOSED)


def operation(name: str, example: Case) -> Callable[..., Tensor]:
    """The operation for the layer type of a case."""
    return getattr(functional, f"{name}_transpose" if example.transposed else name)


def of_weight(name: str, c: Case, **more: object) -> Tensor:
    """An operation of input, backpropagated vectors and kernel size."""
    return operation(name, c)(c.x, c.s, c.kernel_size, **c.options, **more)


# --- Kronecker factors --------------------------------------------------------------------------


@each_transposed
def test_kfc_diagonal_transpose(name: str) -> None:
    c = case(name)
    squares = c.unfolded(c.x, c.groups).square()
    result = functional.kfc_diagonal_transpose(c.x, c.kernel_size, **c.options)
    assert_close(result, squares.mean((0, 3)), TOLERANCE)


def grad_factors(v: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Expand and reduce, as loops over samples, groups and positions."""
    columns = v.reshape(v.shape[0], groups, v.shape[1] // groups, -1)
    size = columns.shape[2]
    expand, reduce = torch.zeros(2, groups, size, size, dtype=FLOAT64)
    for sample in columns:
        for g, matrix in enumerate(sample):
            expand[g] += sum(torch.outer(column, column) for column in matrix.T) / len(v)
            reduce[g] += torch.outer(matrix.sum(1), matrix.sum(1)) / len(v)
    return expand, reduce


@each_case
def test_grad_factors(name: str) -> None:
    c = case(name)
    v = c.cotangent()
    expand, reduce = grad_factors(v, c.groups)
    assert_close(functional.kfc_grad_factor(v, groups=c.groups), expand, TOLERANCE)
    assert_close(functional.kfac_reduce_grad_factor(v, groups=c.groups), reduce, TOLERANCE)
    expand, reduce = grad_factors(v, 1)
    assert_close(functional.kfc_grad_factor(v), expand, TOLERANCE)
    assert_close(functional.kfac_reduce_grad_factor(v), reduce, TOLERANCE)


# --- GGN of the weight --------------------------------------------------------------------------


@each_case
def test_sqrt_ggn(name: str) -> None:
    c = case(name)
    expected = c.root.reshape(*c.root.shape[:2], *c.weight_shape)
    assert_close(of_weight("sqrt_ggn", c), expected, TOLERANCE)


@each_case
def test_ggn_diagonal(name: str) -> None:
    c = case(name)
    per_sample = c.root.square().sum(0).reshape(c.batch, *c.weight_shape)
    assert_close(of_weight("ggn_diagonal", c), per_sample.sum(0), TOLERANCE)
    assert_close(of_weight("per_sample_ggn_diagonal", c), per_sample, TOLERANCE)


@each_case
def test_ggn_gram(name: str) -> None:
    """Class-major, sample-minor."""
    c = case(name)
    rows = c.root.reshape(-1, c.root.shape[-1])
    assert_close(of_weight("ggn_gram", c), rows @ rows.T, TOLERANCE)


@each_case
def test_ggn_block(name: str) -> None:
    c = case(name)
    assert_close(of_weight("ggn_block", c), c.block, TOLERANCE)


@pytest.mark.parametrize("name", [CONV[1], TRANSPOSED[1]])
def test_gram_and_block_have_the_same_eigenvalues(name: str) -> None:
    c = case(name)
    gram = torch.linalg.eigvalsh(of_weight("ggn_gram", c)).flip(0)
    block = torch.linalg.eigvalsh(of_weight("ggn_block", c)).flip(0)
    shared = min(len(gram), len(block))
    assert_close(gram[:shared], block[:shared], 1e-10)


def blocks(c: Case, block: str) -> Tensor:
    """Blocks along the diagonal of the written-out GGN, one at a time."""
    first, second = c.weight_shape[:2]
    taps, groups = prod(c.kernel_size), c.groups
    index = torch.arange(len(c.block)).reshape(groups, first // groups, second, taps)
    if block == "filter":
        lists = index.reshape(first, second, taps)
    elif block == "group":
        lists = index.flatten(1)
    else:  # the output channels are on the second axis of a transposed weight
        lists = (index.transpose(1, 2) if c.transposed else index).reshape(c.channels[1], -1)
    flat = lists.reshape(-1, lists.shape[-1])
    found = torch.stack([c.block[rows][:, rows] for rows in flat])
    return found.reshape(*lists.shape, lists.shape[-1])


@each_case
def test_ggn_block_diagonal(name: str) -> None:
    c = case(name)
    for block in ("filter", "output_channel", "group"):
        result = of_weight("ggn_block_diagonal", c, block=block)
        assert_close(result, blocks(c, block), TOLERANCE)


@pytest.mark.parametrize("name", [CONV[2], TRANSPOSED[2]])
def test_blocks_are_filters_by_default(name: str) -> None:
    c = case(name)
    assert_close(of_weight("ggn_block_diagonal", c), blocks(c, "filter"), TOLERANCE)


@each_case
def test_ggn_vector_product(name: str) -> None:
    c = case(name)
    vector = c.tensor("vector", *c.weight_shape)
    result = operation("ggn_vector_product", c)(c.x, c.s, vector, **c.options)
    expected = (c.block @ vector.flatten()).reshape(c.weight_shape)
    assert_close(result, expected, TOLERANCE)


# --- GGN of the bias ----------------------------------------------------------------------------


def bias_jacobian(c: Case) -> Tensor:
    """``[C_out * O, C_out]`` by autograd; the same for every sample."""
    bias = torch.zeros(c.channels[1], dtype=FLOAT64)
    shape = c.output_shape[1:]
    jacobian = torch.func.jacrev(lambda b: b.reshape(-1, *[1] * (len(shape) - 1)).expand(shape))
    return jacobian(bias).reshape(-1, len(bias))


@each_case
def test_bias_ggn(name: str) -> None:
    c = case(name)
    root = c.s.flatten(2) @ bias_jacobian(c)
    assert_close(functional.bias_ggn_diagonal(c.s), root.square().sum((0, 1)), TOLERANCE)
    rows = root.flatten(0, 1)
    assert_close(functional.bias_ggn_gram(c.s), rows @ rows.T, TOLERANCE)


# --- Hessian diagonals --------------------------------------------------------------------------


@each_case
def test_hessian_diagonal_input(name: str) -> None:
    """``sum_{co, o} h (dy / dx)^2``; ``h`` may have any sign."""
    c = case(name)
    h = c.cotangent()
    result = operation("hessian_diagonal_input", c)(h, c.weight, c.input_size, **c.options)
    expected = (h.flatten(1) @ c.matrix.square()).reshape(c.input_shape)
    assert_close(result, expected, TOLERANCE)


@each_case
def test_hessian_diagonal_weight(name: str) -> None:
    c = case(name)
    h = c.cotangent()
    result = operation("hessian_diagonal_weight", c)(h, c.x, c.kernel_size, **c.options)
    expected = torch.einsum("nf,nfp->p", h.flatten(1), c.jacobians.square())
    assert_close(result, expected.reshape(c.weight_shape), TOLERANCE)


@each_case
def test_hessian_diagonal_bias(name: str) -> None:
    c = case(name)
    h = c.cotangent()
    expected = (h.flatten(1) @ bias_jacobian(c).square()).sum(0)
    assert_close(functional.hessian_diagonal_bias(h), expected, TOLERANCE)


@pytest.mark.parametrize("name", [CONV[0], CONV[1], TRANSPOSED[0], TRANSPOSED[1]])
def test_hessian_diagonals_are_exact_for_elementwise_losses(name: str) -> None:
    """Second derivatives of ``sum(y ** 4) / 12`` by autograd: its Hessian is ``diag(y ** 2)``."""
    c = case(name)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return c.layer(x, weight).pow(4).sum() / 12

    h = c.layer(c.x, c.weight).square()
    sizes = c.x.numel(), c.weight.numel()
    of_x, of_weight = (
        torch.func.hessian(loss, argnums=at)(c.x, c.weight).reshape(sizes[at], -1).diagonal()
        for at in (0, 1)
    )
    result = operation("hessian_diagonal_input", c)(h, c.weight, c.input_size, **c.options)
    assert_close(result, of_x.reshape(c.input_shape), 1e-11)
    result = operation("hessian_diagonal_weight", c)(h, c.x, c.kernel_size, **c.options)
    assert_close(result, of_weight.reshape(c.weight_shape), 1e-11)


# --- KFRA ---------------------------------------------------------------------------------------


@each_case
def test_kfra(name: str) -> None:
    """``J^T G J`` with a matrix that is not symmetric, so that sides cannot be exchanged."""
    c = case(name)
    g = c.tensor("g", len(c.matrix), len(c.matrix))
    result = operation("kfra", c)(g, c.weight, c.input_size, **c.options)
    assert_close(result, c.matrix.T @ g @ c.matrix, TOLERANCE)


@each_case
def test_kfra_output_factor(name: str) -> None:
    c = case(name)
    g = c.tensor("g", len(c.matrix), len(c.matrix))
    positions = prod(c.output_size)
    expected = g.reshape(c.channels[1], positions, c.channels[1], positions).sum((1, 3))
    assert_close(functional.kfra_output_factor(g, c.output_size), expected, TOLERANCE)
