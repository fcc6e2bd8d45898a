"""Tensor-facing twins of :mod:`tnkfac.einsum.networks`.

Every function here is made from the network function of the same name: it takes tensors where
that one takes shapes, and looks the plan up by the shapes. Nothing is derived twice for a shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from tnkfac.einsum import networks
from tnkfac.einsum.geometry import Axis, resolve_padding
from tnkfac.einsum.network import Network
from tnkfac.einsum.operands import Pattern
from tnkfac.einsum.plans import Plan, constant, plan

Operation = Callable[..., Tensor]


def _frozen(value: Any) -> Any:
    """A hashable form of a hyper-parameter."""
    if isinstance(value, Tensor):
        return tuple(value.tolist())
    if isinstance(value, list | tuple):
        return tuple(_frozen(entry) for entry in value)
    return value


def _twin(network: Callable[..., Network], *tensors: str) -> Operation:
    """The tensor-facing form of a network function whose arguments ``tensors`` are shapes."""
    signature = inspect.signature(network)
    leading = tuple(signature.parameters)[: len(tensors)]
    assert leading == tensors, (leading, tensors)

    @lru_cache(maxsize=1024)
    def planned(shapes: tuple[tuple[int, ...], ...], args: Any, options: Any) -> Plan:
        return plan(network(*shapes, *args, **dict(options)))

    @wraps(network)
    def operation(*args: Any, **options: Any) -> Tensor:
        given = args[: len(tensors)]
        if len(given) < len(tensors):
            bound = signature.bind(*args, **options).arguments
            given = tuple(bound[name] for name in tensors)
            options = {k: v for k, v in options.items() if k not in tensors}
        shapes = tuple(tensor.shape for tensor in given)
        positional = args[len(tensors) :]
        if type(options.get("groups", 1)) is not int:  # True and 1.0 are equal to a cached 1
            network(*shapes, *positional, **options)
        try:
            ready = planned(shapes, positional, tuple(options.items()))
        except TypeError:  # a list or a tensor among the hyper-parameters
            frozen = tuple((name, _frozen(value)) for name, value in options.items())
            ready = planned(shapes, _frozen(positional), frozen)
        return ready(**dict(zip(tensors, given, strict=True)))

    operation.__annotations__ = dict.fromkeys(tensors, Tensor) | {"return": Tensor}
    operation.cache_info = planned.cache_info  # type: ignore[attr-defined]
    return operation


_conv = _twin(networks.conv, "x", "weight")
_conv_transpose = _twin(networks.conv_transpose, "x", "weight")
unfold = _twin(networks.unfold, "x")
unfold_transpose = _twin(networks.unfold_transpose, "x")
avg_pool = _twin(networks.avg_pool, "x")
fold = _twin(networks.fold, "z")
fold_transpose = _twin(networks.fold_transpose, "z")
unfold_kernel = _twin(networks.unfold_kernel, "weight")
unfold_kernel_transpose = _twin(networks.unfold_kernel_transpose, "weight")
input_jacobian = _twin(networks.input_jacobian, "weight")
input_jacobian_transpose = _twin(networks.input_jacobian_transpose, "weight")
weight_vjp = _twin(networks.weight_vjp, "x", "v")
weight_vjp_transpose = _twin(networks.weight_vjp_transpose, "x", "v")
per_sample_weight_vjp = _twin(networks.per_sample_weight_vjp, "x", "v")
per_sample_weight_vjp_transpose = _twin(networks.per_sample_weight_vjp_transpose, "x", "v")
input_vjp = _twin(networks.input_vjp, "weight", "v")
input_vjp_transpose = _twin(networks.input_vjp_transpose, "weight", "v")
weight_jvp = _twin(networks.weight_jvp, "x", "dw")
weight_jvp_transpose = _twin(networks.weight_jvp_transpose, "x", "dw")
input_jvp = _twin(networks.input_jvp, "dx", "weight")
input_jvp_transpose = _twin(networks.input_jvp_transpose, "dx", "weight")
weight_jacobian = _twin(networks.weight_jacobian, "x")
weight_jacobian_transpose = _twin(networks.weight_jacobian_transpose, "x")
bias_vjp = _twin(networks.bias_vjp, "v")
per_sample_bias_vjp = _twin(networks.per_sample_bias_vjp, "v")
kfc_factor = _twin(networks.kfc_factor, "x")
kfc_factor_transpose = _twin(networks.kfc_factor_transpose, "x")
kfac_reduce_factor = _twin(networks.kfac_reduce_factor, "x")
kfac_reduce_factor_transpose = _twin(networks.kfac_reduce_factor_transpose, "x")
kfc_diagonal = _twin(networks.kfc_diagonal, "x")
kfc_diagonal_transpose = _twin(networks.kfc_diagonal_transpose, "x")
kfc_grad_factor = _twin(networks.kfc_grad_factor, "v")
kfac_reduce_grad_factor = _twin(networks.kfac_reduce_grad_factor, "v")
sqrt_ggn = _twin(networks.sqrt_ggn, "x", "s")
sqrt_ggn_transpose = _twin(networks.sqrt_ggn_transpose, "x", "s")
ggn_diagonal = _twin(networks.ggn_diagonal, "x", "s")
ggn_diagonal_transpose = _twin(networks.ggn_diagonal_transpose, "x", "s")
per_sample_ggn_diagonal = _twin(networks.per_sample_ggn_diagonal, "x", "s")
per_sample_ggn_diagonal_transpose = _twin(networks.per_sample_ggn_diagonal_transpose, "x", "s")
ggn_gram = _twin(networks.ggn_gram, "x", "s")
ggn_gram_transpose = _twin(networks.ggn_gram_transpose, "x", "s")
ggn_block = _twin(networks.ggn_block, "x", "s")
ggn_block_transpose = _twin(networks.ggn_block_transpose, "x", "s")
ggn_block_diagonal = _twin(networks.ggn_block_diagonal, "x", "s")
ggn_block_diagonal_transpose = _twin(networks.ggn_block_diagonal_transpose, "x", "s")
ggn_vector_product = _twin(networks.ggn_vector_product, "x", "s", "vector")
ggn_vector_product_transpose = _twin(networks.ggn_vector_product_transpose, "x", "s", "vector")
bias_ggn_diagonal = _twin(networks.bias_ggn_diagonal, "s")
bias_ggn_gram = _twin(networks.bias_ggn_gram, "s")
hessian_diagonal_input = _twin(networks.hessian_diagonal_input, "h", "weight")
hessian_diagonal_input_transpose = _twin(networks.hessian_diagonal_input_transpose, "h", "weight")
hessian_diagonal_weight = _twin(networks.hessian_diagonal_weight, "h", "x")
hessian_diagonal_weight_transpose = _twin(networks.hessian_diagonal_weight_transpose, "h", "x")
hessian_diagonal_bias = _twin(networks.hessian_diagonal_bias, "h")
kfra = _twin(networks.kfra, "g", "weight")
kfra_transpose = _twin(networks.kfra_transpose, "g", "weight")
kfra_output_factor = _twin(networks.kfra_output_factor, "g")


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Convolution of any dimension, as ``torch.nn.functional.conv{1,2,3}d``.

    Args:
        x: Input ``[N, C_in, I1, ...]``.
        weight: Kernel ``[C_out, C_in / groups, K1, ...]``.
        bias: ``[C_out]`` or None.
        **options: ``stride``, ``padding``, ``dilation``, ``groups`` of
            :func:`tnkfac.einsum.networks.conv`.

    Returns:
        ``[N, C_out, O1, ...]``.

    Example:
        >>> x, weight = torch.rand(2, 3, 8), torch.rand(4, 3, 5)
        >>> bool(torch.allclose(conv(x, weight), torch.conv1d(x, weight), atol=1e-5))
        True
    """
    return _add_bias(_conv(x, weight, **options), bias)


def conv_transpose(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Transposed convolution of any dimension, as ``F.conv_transpose{1,2,3}d``.

    Args:
        x: Input ``[N, C_in, O1, ...]``.
        weight: Kernel ``[C_in, C_out / groups, K1, ...]``.
        bias: ``[C_out]`` or None.
        **options: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding`` of
            :func:`tnkfac.einsum.networks.conv_transpose`.

    Returns:
        ``[N, C_out, I1, ...]``.
    """
    return _add_bias(_conv_transpose(x, weight, **options), bias)


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.reshape(-1, *[1] * (y.ndim - 2))


def index_pattern(
    input_size: int,
    kernel_size: int,
    stride: int = 1,
    padding: int | str | tuple[int, int] = 0,
    dilation: int = 1,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Index pattern ``P[k, o, i]`` of one spatial dimension (arXiv 2307.02275, eq. 3).

    Args:
        input_size: Number of input pixels ``I``.
        kernel_size: Number of taps ``K``.
        stride: Pixels between output positions.
        padding: Zeros on both sides: an int, a pair ``(left, right)``, ``'same'`` or ``'valid'``.
        dilation: Pixels between taps.
        dtype: Of the result; the default dtype if None.
        device: Of the result; the CPU if None.

    Returns:
        Ones and zeros ``[K, O, I]``: one where ``i = stride * o + dilation * k - left``.

    Raises:
        ValueError: If a size is not positive or no output fits.

    Example:
        >>> index_pattern(3, 2)[1]
        tensor([[0., 1., 0.],
                [0., 0., 1.]])
    """
    entries: Sequence[int | tuple[int, int]] | str
    entries = padding if isinstance(padding, str) else (padding,)
    ((left, right),) = resolve_padding(entries, (kernel_size,), (stride,), (dilation,))
    axis = Axis(input_size, kernel_size, stride, left, right, dilation)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    return constant(Pattern(axis), dtype, torch.device(device or "cpu"))
