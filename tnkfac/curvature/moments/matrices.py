"""How a weight with channel groups becomes a matrix for each of them, and back."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from einops import rearrange
from torch import Tensor


def to_matrix(weight: Tensor, groups: int, inputs_first: bool) -> Tensor:
    """The matrix ``[G, C_out / G, D]`` of a weight or its gradient.

    Args:
        weight: ``[C_out, C_in / G, K1, ..]``, or ``[C_in, C_out / G, K1, ..]``.
        groups: Channel groups ``G``.
        inputs_first: Which of both.
    """
    if inputs_first:
        matrix: Tensor = rearrange(weight, "(g ci) co ... -> g co (ci ...)", g=groups)
        return matrix
    return weight.reshape(groups, weight.shape[0] // groups, prod(weight.shape[1:]))


def to_weight(matrix: Tensor, kernel_size: Sequence[int], inputs_first: bool) -> Tensor:
    """Inverse of :func:`to_matrix`.

    Args:
        matrix: ``[G, C_out / G, D]``.
        kernel_size: Taps per spatial dimension.
        inputs_first: As in :func:`to_matrix`.
    """
    groups, outputs, features = matrix.shape
    inputs = features // prod(kernel_size)
    weight = matrix.reshape(groups, outputs, inputs, *kernel_size)
    return (weight.transpose(1, 2) if inputs_first else weight).flatten(0, 1)
