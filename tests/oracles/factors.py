"""Brute-force Kronecker factors in float64, from explicit index formulas.

Every supported layer is a linear map with weight sharing: for sample ``n`` and channel group ``g``

    y[n, g] = W[g] @ U[n, g]        U: [N, G, D, S],  W: [G, Co/G, D],  y: [N, G, Co/G, S]

with ``S`` positions that share the weight. ``D`` runs over (channel, tap_1, ..., tap_d) in
row-major order and ends, if the layer has a bias, with a row of ones. All factors below are read
off ``U`` and off the gradient in the layout of ``y``; `canonical_weight` and `canonical_output`
exist so that a test can verify the identity above against the layer itself.
"""

import re
from collections.abc import Callable, Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = [
    "Factor",
    "Layer",
    "canonical_output",
    "canonical_weight",
    "grad_factor",
    "input_factor",
    "pad_pairs",
    "restrict",
    "unfold",
    "unfold_transpose",
    "unfolded_input",
]

Layer = nn.Linear | _ConvNd
Factor = Tensor | tuple[Tensor, Tensor]
Pairs = Sequence[tuple[int, int]]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


# --- index formulas -----------------------------------------------------------------------------


def _outside_zero(position: int, size: int) -> int:
    """Zero padding: a position outside the input reads nothing (-1)."""
    return position if 0 <= position < size else -1


def _outside_reflect(position: int, size: int) -> int:
    if position < 0:
        return -position
    return position if position < size else 2 * (size - 1) - position


def _outside_replicate(position: int, size: int) -> int:
    return min(max(position, 0), size - 1)


def _outside_circular(position: int, size: int) -> int:
    return position % size


OUTSIDE: dict[str, Callable[[int, int], int]] = {
    "zeros": _outside_zero,
    "reflect": _outside_reflect,
    "replicate": _outside_replicate,
    "circular": _outside_circular,
}


def pad_pairs(
    padding: int | str | Sequence[int] | Pairs, kernel_size: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Padding in any accepted form as one (left, right) pair per axis."""
    if padding == "valid":
        return [(0, 0) for _ in kernel_size]
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    if isinstance(padding, int):
        return [(padding, padding) for _ in kernel_size]
    assert not isinstance(padding, str), padding
    pairs = [(p, p) if isinstance(p, int) else (p[0], p[1]) for p in padding]
    assert len(pairs) == len(kernel_size), (padding, kernel_size)
    return pairs


def _conv_indices(
    size: int, kernel: int, stride: int, pair: tuple[int, int], dilation: int, mode: str
) -> list[list[int]]:
    """``table[k][o]``: the input position that tap ``k`` reads for output ``o``, or -1."""
    outputs = (size + pair[0] + pair[1] - dilation * (kernel - 1) - 1) // stride + 1
    return [
        [OUTSIDE[mode](stride * o + dilation * k - pair[0], size) for o in range(outputs)]
        for k in range(kernel)
    ]


def _transposed_indices(
    size: int,
    kernel: int,
    stride: int,
    pair: tuple[int, int],
    dilation: int,
    output_padding: int,
) -> list[list[int]]:
    """``table[k][o]``: the input position that tap ``k`` brings to output ``o``, or -1."""
    outputs = (size - 1) * stride - sum(pair) + dilation * (kernel - 1) + output_padding + 1
    table = [[-1] * outputs for _ in range(kernel)]
    for k in range(kernel):
        for o in range(outputs):
            position, remainder = divmod(o + pair[0] - dilation * k, stride)
            if remainder == 0 and 0 <= position < size:
                table[k][o] = position
    return table


def _gather(x: Tensor, tables: Sequence[list[list[int]]], groups: int) -> Tensor:
    """Read ``x`` [N, C, *I] through one table per axis: ``U`` [N, G, C/G * K, O]."""
    dims = len(tables)
    batch, channels = x.shape[:2]
    if prod(len(table[0]) for table in tables) == 0 or channels % groups:
        raise ValueError(f"no such layer: input {tuple(x.shape)}, groups {groups}")
    # One slice of zeros behind the end of every axis: the index -1 of the tables reads it.
    padded = x.new_zeros(batch, channels, *(size + 1 for size in x.shape[2:]))
    inside: list[slice] = [slice(size) for size in x.shape]
    padded[tuple(inside)] = x
    index: list[slice | Tensor] = [slice(None), slice(None)]
    for axis, table in enumerate(tables):
        shape = [1] * (2 * dims)
        shape[axis], shape[dims + axis] = len(table), len(table[0])
        index.append(torch.tensor(table).reshape(shape))
    gathered = padded[tuple(index)]  # [N, C, *K, *O]
    taps = prod(len(table) for table in tables)
    return gathered.reshape(batch, groups, channels // groups * taps, -1)


def unfold(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Pairs,
    dilation: Sequence[int],
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Unfolded input of a convolution with any number of axes, ``[N, G, C/G * K, O]``."""
    axes = zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    return _gather(x, [_conv_indices(*axis, padding_mode) for axis in axes], groups)


def unfold_transpose(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Pairs,
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Unfolded input of a transposed convolution, ``[N, G, C/G * K, O]``."""
    axes = zip(x.shape[2:], kernel_size, stride, padding, dilation, output_padding, strict=True)
    return _gather(x, [_transposed_indices(*axis) for axis in axes], groups)


# --- layers as matrices -------------------------------------------------------------------------


def _groups(module: Layer) -> int:
    return 1 if isinstance(module, nn.Linear) else int(module.groups)


def _batched(module: Layer, x: Tensor) -> Tensor:
    """Add the batch axis that an unbatched input lacks."""
    least = 2 if isinstance(module, nn.Linear) else len(module.kernel_size) + 2
    return x.unsqueeze(0) if x.ndim == least - 1 else x


def _unfolded_without_bias(
    module: Layer, x: Tensor, output_padding: Sequence[int] | None
) -> Tensor:
    if isinstance(module, nn.Linear):
        rows = x.reshape(x.shape[0], -1, x.shape[-1])  # [N, S, D]
        return rows.transpose(1, 2).unsqueeze(1)
    geometry = module.kernel_size, module.stride
    pairs = pad_pairs(module.padding, module.kernel_size, module.dilation)
    if isinstance(module, CONVOLUTIONS):
        mode = module.padding_mode
        return unfold(x, *geometry, pairs, module.dilation, module.groups, mode)
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        extra = module.output_padding if output_padding is None else output_padding
        return unfold_transpose(x, *geometry, pairs, module.dilation, extra, module.groups)
    raise TypeError(f"no oracle for {type(module).__name__}")


def unfolded_input(module: Layer, x: Tensor, output_padding: Sequence[int] | None = None) -> Tensor:
    """Unfolded input of a layer, with a last row of ones if the layer has a bias.

    Args:
        module: A linear layer, convolution or transposed convolution.
        x: The input as the layer receives it, batched or not.
        output_padding: Replaces the layer's own, for a transposed convolution that is called
            with ``output_size``.

    Returns:
        ``U``, float64, of shape ``[N, G, D, S]``.
    """
    x = _batched(module, x.detach().to(torch.float64))
    unfolded = _unfolded_without_bias(module, x, output_padding)
    if module.bias is None:
        return unfolded
    return torch.cat([unfolded, torch.ones_like(unfolded[:, :, :1])], dim=2)


def canonical_output(module: Layer, y: Tensor) -> Tensor:
    """Output, or gradient with respect to it, of a layer as ``[N, G, Co/G, S]`` in float64."""
    y = _batched(module, y.detach().to(torch.float64))
    if isinstance(module, nn.Linear):
        return y.reshape(y.shape[0], -1, y.shape[-1]).transpose(1, 2).unsqueeze(1)
    groups = _groups(module)
    return y.reshape(y.shape[0], groups, y.shape[1] // groups, -1)


def canonical_weight(module: Layer) -> Tensor:
    """Weight of a layer, with the bias as last column if there is one, as ``[G, Co/G, D]``."""
    weight, groups = module.weight.detach().to(torch.float64), _groups(module)
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        inputs, outputs = weight.shape[0] // groups, weight.shape[1]
        matrix = weight.new_empty(groups, outputs, inputs * weight[0, 0].numel())
        for group, co in product(range(groups), range(outputs)):
            rows = weight[group * inputs : (group + 1) * inputs]  # [Ci/G, Co/G, *K]
            matrix[group, co] = rows[:, co].flatten()
    else:
        matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    if module.bias is None:
        return matrix
    bias = module.bias.detach().to(torch.float64).reshape(groups, -1, 1)
    return torch.cat([matrix, bias], dim=2)


# --- factors ------------------------------------------------------------------------------------


def restrict(matrix: Tensor, structure: str) -> Factor:
    """What a structure keeps of a stack of dense matrices ``[G, D, D]``.

    Returns:
        ``[G, D, D]`` for ``"dense"``, ``[G, D]`` for ``"diagonal"``, and for
        ``"block{k}diagonal"`` the pair ``[G, n, k, k]``, ``[G, r, r]`` where
        ``n, r = divmod(D, k)``.
    """
    groups, dim = matrix.shape[:2]
    if structure == "dense":
        return matrix
    if structure == "diagonal":
        return torch.stack([matrix[:, i, i] for i in range(dim)], dim=1)
    match = re.fullmatch(r"block([1-9]\d*)diagonal", structure)
    assert match is not None, structure
    size = int(match[1])
    number, rest = divmod(dim, size)
    blocks = matrix.new_zeros(groups, number, size, size)
    for b in range(number):
        blocks[:, b] = matrix[:, b * size : (b + 1) * size, b * size : (b + 1) * size]
    return blocks, matrix[:, dim - rest :, dim - rest :]


def _dense_factor(rows: Tensor, approx: str, reduce: str) -> Tensor:
    """Sum of outer products of ``rows`` [N, G, D, S] over samples (and positions), ``[G, D, D]``.

    Args:
        rows: Unfolded inputs or output gradients.
        approx: ``"expand"`` or ``"reduce"``.
        reduce: For ``"reduce"``, how positions are joined: ``"mean"`` or ``"sum"``.
    """
    samples, groups, dim, _ = rows.shape
    if approx == "reduce":
        rows = rows.mean(3, keepdim=True) if reduce == "mean" else rows.sum(3, keepdim=True)
    else:
        assert approx == "expand", approx
    factor = rows.new_zeros(groups, dim, dim)
    for n, g in product(range(samples), range(groups)):
        factor[g] += rows[n, g] @ rows[n, g].T
    return factor


def input_factor(
    module: Layer,
    x: Tensor,
    approx: str = "expand",
    structure: str = "dense",
    output_padding: Sequence[int] | None = None,
) -> Factor:
    """``A``: mean over samples (expand: and positions) of outer products of the unfolded input."""
    unfolded = unfolded_input(module, x, output_padding)
    samples, _, _, positions = unfolded.shape
    terms = samples * positions if approx == "expand" else samples
    return restrict(_dense_factor(unfolded, approx, "mean") / terms, structure)


def grad_factor(
    module: Layer,
    g: Tensor,
    approx: str = "expand",
    structure: str = "dense",
    loss_terms: float | None = None,
) -> Factor:
    """``B``: ``R`` times the sum over samples of outer products of the output gradient.

    ``loss_terms`` is ``R``, the number of terms that the loss averages; ``None`` takes the number
    of samples.
    """
    gradient = canonical_output(module, g)
    terms = gradient.shape[0] if loss_terms is None else loss_terms
    return restrict(terms * _dense_factor(gradient, approx, "sum"), structure)
