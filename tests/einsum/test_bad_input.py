"""Arguments that fit no layer: the error names the operation, what was given, and why."""

import re

import pytest
import torch
from torch import Tensor

from tnkfac.einsum import functional

ones = torch.ones
X, W = ones(2, 4, 7), ones(6, 4, 3)  # output [2, 6, 5]
V, S = ones(2, 6, 5), ones(3, 2, 6, 5)
WT = ones(4, 6, 3)  # output of the transposed convolution [2, 6, 9]
VT, ST = ones(2, 6, 9), ones(3, 2, 6, 9)

# Arguments that fit, for every operation with hyper-parameters.
CALLS: dict[str, tuple[object, ...]] = {
    "conv": (X, W),
    "conv_transpose": (X, WT),
    "avg_pool": (X, 3),
    "unfold": (X, 3),
    "unfold_transpose": (X, 3),
    "fold": (ones(2, 12, 5), (7,), 3),
    "fold_transpose": (ones(2, 12, 9), (7,), 3),
    "unfold_kernel": (W, (7,)),
    "unfold_kernel_transpose": (WT, (7,)),
    "weight_vjp": (X, V, 3),
    "weight_vjp_transpose": (X, VT, 3),
    "per_sample_weight_vjp": (X, V, 3),
    "per_sample_weight_vjp_transpose": (X, VT, 3),
    "input_vjp": (W, V, (7,)),
    "input_vjp_transpose": (WT, VT, (7,)),
    "weight_jvp": (X, W),
    "weight_jvp_transpose": (X, WT),
    "input_jvp": (X, W),
    "input_jvp_transpose": (X, WT),
    "weight_jacobian": (X, (6, 4, 3)),
    "weight_jacobian_transpose": (X, (4, 6, 3)),
    "input_jacobian": (W, (2, 4, 7)),
    "input_jacobian_transpose": (WT, (2, 4, 7)),
    "kfc_factor": (X, 3),
    "kfc_factor_transpose": (X, 3),
    "kfac_reduce_factor": (X, 3),
    "kfac_reduce_factor_transpose": (X, 3),
    "kfc_diagonal": (X, 3),
    "kfc_diagonal_transpose": (X, 3),
    "sqrt_ggn": (X, S, 3),
    "sqrt_ggn_transpose": (X, ST, 3),
    "ggn_diagonal": (X, S, 3),
    "ggn_diagonal_transpose": (X, ST, 3),
    "per_sample_ggn_diagonal": (X, S, 3),
    "per_sample_ggn_diagonal_transpose": (X, ST, 3),
    "ggn_gram": (X, S, 3),
    "ggn_gram_transpose": (X, ST, 3),
    "ggn_block": (X, S, 3),
    "ggn_block_transpose": (X, ST, 3),
    "ggn_block_diagonal": (X, S, 3),
    "ggn_block_diagonal_transpose": (X, ST, 3),
    "ggn_vector_product": (X, S, W),
    "ggn_vector_product_transpose": (X, ST, WT),
    "hessian_diagonal_input": (V, W, (7,)),
    "hessian_diagonal_input_transpose": (VT, WT, (7,)),
    "hessian_diagonal_weight": (V, X, 3),
    "hessian_diagonal_weight_transpose": (VT, X, 3),
    "kfra": (ones(30, 30), W, (7,)),
    "kfra_transpose": (ones(54, 54), WT, (7,)),
}
GROUPED = tuple(name for name in CALLS if "fold" not in name or "kernel" in name)
each_call = pytest.mark.parametrize("operation", CALLS)


def refused(operation: str, *args: object, words: tuple[str, ...] = (), **options: object) -> None:
    """The call fails with an error that contains the operation's name and all words."""
    with pytest.raises((ValueError, TypeError)) as error:
        getattr(functional, operation)(*args, **options)
        pytest.fail(f"{operation} took {options}")
    assert re.search(rf"\b{operation}\b", str(error.value)), error.value
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in {error.value}"


@each_call
def test_the_calls_fit(operation: str) -> None:
    assert isinstance(getattr(functional, operation)(*CALLS[operation]), Tensor)


# --- hyper-parameters ---------------------------------------------------------------------------

# What no operation takes, and words of the message.
BAD: list[tuple[dict[str, object], tuple[str, ...]]] = [
    *(({"groups": groups}, ("groups", repr(groups))) for groups in (0, -2, 1.5, None)),
    ({"padding": -1}, ("padding", "negative", "-1")),
    ({"padding": ((0, -2),)}, ("padding", "negative", "-2")),
    ({"padding": "full"}, ("padding", "'full'", "same", "valid")),
    ({"padding": (1, 1)}, ("padding", "1", "(1, 1)")),
    ({"padding": ((1, 1, 1),)}, ("padding", "(1, 1, 1)")),
    ({"padding": None}, ("padding", "None")),
    ({"stride": 0}, ("stride", "0")),
    ({"stride": (1, 2)}, ("stride", "(1, 2)")),
    ({"stride": 1.5}, ("stride", "1.5")),
    ({"dilation": 0}, ("dilation", "0")),
    ({"dilation": (1, 1, 1)}, ("dilation", "(1, 1, 1)")),
    ({"dilation": (1.5,)}, ("dilation", "1.5")),
    ({"strides": 2}, ("strides",)),
]


@each_call
def test_hyper_parameters(operation: str) -> None:
    extra: list[object] = [0]
    if "transpose" in operation:  # at stride one there is none
        extra = [1, -1, (0, 0)]
    bad = [*BAD, *(({"output_padding": e}, ("output_padding", str(e))) for e in extra)]
    if operation in GROUPED:
        bad.append(({"groups": 5}, ("'g': 5",)))  # divides no channels
    for options, words in bad:
        refused(operation, *CALLS[operation], words=words, **options)


@each_call
def test_groups_that_only_equal_one(operation: str) -> None:
    """Refused whether or not the call with ``groups=1`` has been made before."""
    getattr(functional, operation)(*CALLS[operation], groups=1)
    for groups in (True, 1.0):
        refused(operation, *CALLS[operation], groups=groups, words=("groups", repr(groups)))


@pytest.mark.parametrize("block", ["row", "", None], ids=repr)
def test_unknown_blocks(block: object) -> None:
    words = ("block", repr(block), "filter", "output_channel", "group")
    refused("ggn_block_diagonal", X, S, 3, block=block, words=words)
    refused("ggn_block_diagonal_transpose", X, ST, 3, block=block, words=words)


# --- shapes -------------------------------------------------------------------------------------


FLAT, DEEP = ones(4, 7), ones(2, 4, 7, 7)  # an axis too few or too many
SMALL, LARGE = ones(2, 6, 4), ones(2, 6, 9)  # cotangents of other layers
OTHER = ones(6, 5, 3)  # a kernel for five input channels
LONG = ones(6, 4, 9)  # a kernel larger than the input

# Operation, what is wrong, arguments, and words of the message.
SHAPES: list[tuple[str, str, tuple[object, ...], tuple[str, ...]]] = [
    # Kernels larger than the padded input.
    ("conv", "long-kernel", (X, LONG), ("(7,)", "9", "larger")),
    ("unfold", "long-kernel", (X, 8), ("(7,)", "8", "larger")),
    ("avg_pool", "long-kernel", (X, 8), ("(7,)", "8", "larger")),
    ("kfc_diagonal", "long-kernel", (X, 8), ("(7,)", "8", "larger")),
    ("weight_vjp", "long-kernel", (X, V, 8), ("(7,)", "8", "larger")),
    ("input_vjp", "long-kernel", (LONG, V, (7,)), ("(7,)", "9", "larger")),
    ("weight_jvp", "long-kernel", (X, LONG), ("(7,)", "9", "larger")),
    ("weight_jacobian", "long-kernel", (X, (6, 4, 9)), ("(7,)", "9", "larger")),
    ("ggn_block", "long-kernel", (X, S, 8), ("(7,)", "8", "larger")),
    ("kfra", "long-kernel", (ones(30, 30), LONG, (7,)), ("(7,)", "9", "larger")),
    ("unfold", "no-taps", (X, 0), ("kernel_size", "0")),
    ("unfold", "kernel-entries", (X, (3, 3)), ("(3, 3)", "1")),
    ("kfc_factor", "kernel-entries", (DEEP, (3, 3, 3)), ("(3, 3, 3)", "2")),
    # Channels.
    ("conv", "channels", (X, OTHER), ("(6, 5, 3)", "'ci'", "4")),
    ("conv_transpose", "channels", (X, ones(5, 6, 3)), ("(5, 6, 3)", "4")),
    ("weight_jvp", "channels", (X, OTHER), ("dw", "(6, 5, 3)", "4")),
    ("input_jvp", "channels", (X, OTHER), ("(6, 5, 3)", "4")),
    ("input_vjp", "channels", (ones(5, 4, 3), V, (7,)), ("(2, 6, 5)", "5")),
    ("weight_jacobian", "channels", (X, (6, 5, 3)), ("(6, 5, 3)", "4")),
    ("weight_jacobian_transpose", "channels", (X, (5, 6, 3)), ("(5, 6, 3)", "4")),
    ("input_jacobian", "channels", (W, (2, 5, 7)), ("(2, 5, 7)", "4")),
    ("input_jacobian_transpose", "channels", (WT, (2, 5, 7)), ("(2, 5, 7)", "4")),
    ("ggn_vector_product", "channels", (X, S, OTHER), ("vector", "(6, 5, 3)", "4")),
    ("ggn_vector_product", "outputs", (X, S, ones(5, 4, 3)), ("vector", "(5, 4, 3)", "6")),
    ("hessian_diagonal_input", "channels", (V, ones(5, 4, 3), (7,)), ("(2, 6, 5)", "5")),
    ("fold", "channels", (ones(2, 13, 5), (7,), 3), ("z", "(2, 13, 5)", "13", "3")),
    ("kfra", "channels", (ones(31, 31), W, (7,)), ("g", "(31, 31)", "5")),
    # Positions.
    ("weight_vjp", "positions", (X, SMALL, 3), ("v", "(2, 6, 4)", "5")),
    ("weight_vjp_transpose", "positions", (X, SMALL, 3), ("v", "(2, 6, 4)", "9")),
    ("per_sample_weight_vjp", "positions", (X, LARGE, 3), ("v", "(2, 6, 9)", "5")),
    ("input_vjp", "positions", (W, SMALL, (7,)), ("v", "(2, 6, 4)", "5")),
    ("input_vjp_transpose", "positions", (WT, SMALL, (7,)), ("v", "(2, 6, 4)", "9")),
    ("sqrt_ggn", "positions", (X, ST, 3), ("s", "(3, 2, 6, 9)", "5")),
    ("ggn_gram_transpose", "positions", (X, S, 3), ("s", "(3, 2, 6, 5)", "9")),
    ("hessian_diagonal_input", "positions", (SMALL, W, (7,)), ("h", "(2, 6, 4)", "5")),
    ("hessian_diagonal_weight", "positions", (SMALL, X, 3), ("h", "(2, 6, 4)", "5")),
    ("fold", "positions", (ones(2, 12, 6), (7,), 3), ("z", "(2, 12, 6)", "5")),
    ("kfra", "not-square", (ones(30, 31), W, (7,)), ("g", "(30, 31)")),
    # Samples.
    ("weight_vjp", "samples", (X, ones(3, 6, 5), 3), ("v", "(3, 6, 5)", "2")),
    ("ggn_diagonal", "samples", (X, ones(3, 4, 6, 5), 3), ("s", "(3, 4, 6, 5)", "2")),
    ("hessian_diagonal_weight", "samples", (ones(3, 6, 5), X, 3), ("2", "3")),
    # Number of axes.
    ("conv", "no-space", (FLAT, W), ("spatial",)),
    ("conv", "input-axes", (DEEP, W), ("weight", "(6, 4, 3)", "4 axes")),
    ("conv", "kernel-axes", (X, ones(6, 4, 3, 3)), ("(7,)", "[3, 3]")),
    ("unfold", "no-space", (FLAT, 3), ("spatial",)),
    ("kfc_factor", "no-space", (FLAT, 3), ("spatial",)),
    ("weight_vjp", "axes", (X, ones(6, 5), 3), ("v", "(6, 5)", "3 axes")),
    ("input_vjp", "axes", (W, ones(6, 5), (7,)), ("v", "(6, 5)", "3 axes")),
    ("input_vjp", "size-axes", (W, V, (7, 7)), ("weight", "(6, 4, 3)", "4 axes")),
    ("unfold_kernel", "size-axes", (W, (7, 7)), ("weight", "(6, 4, 3)", "4 axes")),
    ("unfold_kernel", "kernel-axes", (ones(6, 4, 3, 3), (7,)), ("(7,)", "[3, 3]")),
    ("weight_jacobian", "axes", (DEEP, (6, 4, 3)), ("(6, 4, 3)", "4 axes")),
    ("input_jacobian", "axes", (W, (2, 4, 7, 7)), ("(6, 4, 3)", "4 axes")),
    ("sqrt_ggn", "axes", (X, V, 3), ("s", "(2, 6, 5)", "4 axes")),
    ("hessian_diagonal_weight", "axes", (S, X, 3), ("h", "(3, 2, 6, 5)", "3 axes")),
    ("kfra", "axes", (ones(6, 5, 6, 5), W, (7,)), ("g", "(6, 5, 6, 5)", "2 axes")),
    ("fold", "axes", (ones(2, 4, 3, 5), (7,), 3), ("z", "(2, 4, 3, 5)", "3 axes")),
    # Operations without hyper-parameters of a convolution.
    ("bias_vjp", "axes", (ones(6),), ("v", "(6,)")),
    ("per_sample_bias_vjp", "axes", (ones(6),), ("v", "(6,)")),
    ("hessian_diagonal_bias", "axes", (ones(6),), ("h", "(6,)")),
    ("bias_ggn_diagonal", "axes", (ones(2, 6),), ("s", "(2, 6)")),
    ("bias_ggn_gram", "axes", (ones(2, 6),), ("s", "(2, 6)")),
    ("kfra_output_factor", "positions", (ones(30, 30), (4,)), ("g", "(30, 30)", "(4,)")),
    ("kfra_output_factor", "not-square", (ones(30, 25), (5,)), ("g", "(30, 25)", "(5,)")),
]


@pytest.mark.parametrize(
    ("operation", "args", "words"),
    [pytest.param(op, args, words, id=f"{op}-{why}") for op, why, args, words in SHAPES],
)
def test_shapes_that_do_not_fit(
    operation: str, args: tuple[object, ...], words: tuple[str, ...]
) -> None:
    refused(operation, *args, words=words)


@pytest.mark.parametrize("operation", ["kfc_grad_factor", "kfac_reduce_grad_factor"])
def test_output_gradients(operation: str) -> None:
    assert isinstance(getattr(functional, operation)(V, groups=2), Tensor)
    refused(operation, V, groups=4, words=("v:", "(2, 6, 5)", "'g': 4"))
    refused(operation, V, groups=0, words=("groups", "0"))
    refused(operation, ones(6), words=("(6,)",))
    refused(operation, V, group=2, words=("group",))


@pytest.mark.parametrize("first", [(6, 4, 3), (5, 4, 3)], ids=str)
def test_output_channels_of_a_jacobian_are_divisible(first: tuple[int, ...]) -> None:
    """Rounding down would give the Jacobian of another layer."""
    words = (str((first[0], 2, 3)), "4")
    refused("weight_jacobian", ones(2, 8, 7), (first[0], 2, 3), groups=4, words=words)


@pytest.mark.parametrize(
    ("operation", "args", "argument"),
    [
        ("input_vjp", (W, V, 10), "input size"),
        ("unfold_kernel", (W, 10), "input size"),
        ("fold", (ones(2, 12, 5), 10, 3), "input size"),
        ("kfra", (ones(6, 5, 6, 5), W, 7), "input size"),
        ("input_jacobian", (W, 8), "input_shape"),
        ("weight_jacobian", (X, 3), "weight_shape"),
    ],
)
def test_a_number_for_a_shape(operation: str, args: tuple[object, ...], argument: str) -> None:
    """Which dimension would it be? The message says what to pass."""
    with pytest.raises(TypeError, match=f"{operation}: {argument}: got {args[-1]}|got 10"):
        getattr(functional, operation)(*args)
