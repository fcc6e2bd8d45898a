"""The operation table: every quantity around a convolution as a tensor network.

One function per operation. Each takes shapes where its twin in
:mod:`tnkfac.einsum.functional` takes tensors, under the same argument names, and returns the
:class:`~tnkfac.einsum.network.Network`. The number of spatial dimensions is that of the shapes.

Legs: ``n`` batch, ``g`` channel group, ``ci``/``co`` channels of a group, ``i`` pixels, ``o``
output positions, ``k`` kernel taps; one of the last three per spatial dimension (``i1 i2 ...``).
Of a transposed convolution ``o`` are the positions of its (small) input and ``i`` those of its
output, as in the convolution that it transposes. Source: arXiv 2307.02275, tables 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tnkfac.einsum.geometry import Axis, Padding, conv_axes, conv_transpose_axes
from tnkfac.einsum.network import Network, Pattern, Source, Variable, parse

Ints = int | Sequence[int]
Shape = tuple[int, ...]


def _legs(letter: str, axes: Sequence[Axis]) -> str:
    return " ".join(f"{letter}{d}" for d in range(1, len(axes) + 1))


def _patterns(axes: Sequence[Axis]) -> tuple[str, list[Source]]:
    names = ", ".join(f"k{d} o{d} i{d}" for d in range(1, len(axes) + 1))
    return names, [Pattern(axis) for axis in axes]


def _sizes(axes: Sequence[Axis], **others: int) -> dict[str, int]:
    sizes = dict(others)
    for d, axis in enumerate(axes, start=1):
        sizes |= {
            f"i{d}": axis.input_size,
            f"o{d}": axis.output_size,
            f"k{d}": axis.kernel_size,
        }
    return sizes


def _channels(channels: int, groups: int, name: str) -> int:
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the channels of {name}: got {groups} of {channels}.")
    return channels // groups


def input_rows(batch: int, channels: int, groups: int, axes: Sequence[Axis]) -> Network:
    """What multiplies the weight of a convolution: unfolded inputs with every leg open.

    Args:
        batch: Number of samples ``N``.
        channels: Input channels ``C``.
        groups: Channel groups ``G``.
        axes: One axis per spatial dimension.

    Returns:
        Network of ``x [N, C, I1, ...]`` with axes ``n g ci k1 .. o1 ..``.
    """
    names, patterns = _patterns(axes)
    k, o, i = (_legs(letter, axes) for letter in "koi")
    sizes = _sizes(axes, n=batch, g=groups, ci=_channels(channels, groups, "x"))
    equation = f"n (g ci) {i}, {names} -> n g ci {k} {o}"
    return parse(equation, [Variable("x"), *patterns], sizes)


def input_rows_transpose(batch: int, channels: int, groups: int, axes: Sequence[Axis]) -> Network:
    """What multiplies the weight of a transposed convolution, with every leg open.

    Args:
        batch: Number of samples ``N``.
        channels: Input channels ``C``.
        groups: Channel groups ``G``.
        axes: Axes of the convolution that is transposed: its output is this layer's input.

    Returns:
        Network of ``x [N, C, O1, ...]`` with axes ``n g ci k1 .. i1 ..``.
    """
    names, patterns = _patterns(axes)
    k, o, i = (_legs(letter, axes) for letter in "koi")
    sizes = _sizes(axes, n=batch, g=groups, ci=_channels(channels, groups, "x"))
    equation = f"n (g ci) {o}, {names} -> n g ci {k} {i}"
    return parse(equation, [Variable("x"), *patterns], sizes)


def linear_rows(batch: int, positions: int, channels: int, groups: int = 1) -> Network:
    """What multiplies the weight of a linear layer, with every leg open.

    Args:
        batch: Number of samples ``N``.
        positions: Weight-sharing positions ``S``.
        channels: Features ``C``.
        groups: Channel groups ``G``.

    Returns:
        Network of ``x [N, S, C]`` with axes ``n g ci s``.
    """
    sizes = {"n": batch, "s": positions, "g": groups, "ci": _channels(channels, groups, "x")}
    return parse("n s (g ci) -> n g ci s", [Variable("x")], sizes)


def conv(
    x: Shape,
    weight: Shape,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Network:
    """Convolution ``[N, C_out, O1, ...]``, as ``torch.nn.functional.conv{1,2,3}d``.

    Args:
        x: Input ``[N, C_in, I1, ...]``.
        weight: Kernel ``[C_out, C_in / groups, K1, ...]``.
        stride: Pixels between output positions, one or one per dimension.
        padding: Zeros on each side: int, ``'same'``, ``'valid'``, or an int or pair per dimension.
        dilation: Pixels between taps, one or one per dimension.
        groups: Channel groups ``G``.
    """
    axes = conv_axes(x[2:], weight[2:], stride, padding, dilation)
    names, patterns = _patterns(axes)
    k, o, i = (_legs(letter, axes) for letter in "koi")
    ci = _channels(x[1], groups, "x")
    if weight[1] != ci:
        raise ValueError(f"weight needs {ci} input channels per group: got shape {weight}.")
    sizes = _sizes(axes, n=x[0], g=groups, ci=ci, co=_channels(weight[0], groups, "weight"))
    equation = f"n (g ci) {i}, {names}, (g co) ci {k} -> n (g co) {o}"
    return parse(equation, [Variable("x"), *patterns, Variable("weight")], sizes)


def conv_transpose(
    x: Shape,
    weight: Shape,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    output_padding: Ints = 0,
) -> Network:
    """Transposed convolution ``[N, C_out, I1, ...]``, as ``F.conv_transpose{1,2,3}d``.

    Args:
        x: Input ``[N, C_in, O1, ...]``.
        weight: Kernel ``[C_in, C_out / groups, K1, ...]``.
        stride: Stride of the convolution that is transposed.
        padding: Pixels cut off each side of the output.
        dilation: Pixels between taps.
        groups: Channel groups ``G``.
        output_padding: Rows added to one side of the output.
    """
    axes = conv_transpose_axes(x[2:], weight[2:], stride, padding, dilation, output_padding)
    names, patterns = _patterns(axes)
    k, o, i = (_legs(letter, axes) for letter in "koi")
    if weight[0] != x[1]:
        raise ValueError(f"weight needs {x[1]} input channels: got shape {weight}.")
    sizes = _sizes(axes, n=x[0], g=groups, ci=_channels(x[1], groups, "x"), co=weight[1])
    equation = f"n (g ci) {o}, {names}, (g ci) co {k} -> n (g co) {i}"
    return parse(equation, [Variable("x"), *patterns, Variable("weight")], sizes)


def unfold(
    x: Shape,
    kernel_size: Ints,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Network:
    """Unfolded input (im2col) ``[N, C * K, O]``, as ``F.unfold`` in any dimension.

    Args:
        x: Input ``[N, C, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        stride: Pixels between output positions.
        padding: Zeros on each side.
        dilation: Pixels between taps.
        groups: Channel groups; they do not change the result.
    """
    axes = conv_axes(x[2:], kernel_size, stride, padding, dilation)
    return _unfolded(input_rows(x[0], x[1], groups, axes), _legs("k", axes), _legs("o", axes))


def unfold_transpose(
    x: Shape,
    kernel_size: Ints,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    output_padding: Ints = 0,
) -> Network:
    """Unfolded input of a transposed convolution ``[N, C * K, I]``.

    Args:
        x: Input ``[N, C, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        stride: Stride of the convolution that is transposed.
        padding: Pixels cut off each side of the output.
        dilation: Pixels between taps.
        groups: Channel groups; they do not change the result.
        output_padding: Rows added to one side of the output.
    """
    axes = conv_transpose_axes(x[2:], kernel_size, stride, padding, dilation, output_padding)
    rows = input_rows_transpose(x[0], x[1], groups, axes)
    return _unfolded(rows, _legs("k", axes), _legs("i", axes))


def _unfolded(rows: Network, taps: str, positions: str) -> Network:
    return rows.arranged(("n",), ("g", "ci", *taps.split()), positions.split())


def kfc_factor(
    x: Shape,
    kernel_size: Ints,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Network:
    """Input factor of KFC, also called KFAC-expand: ``[G, D, D]`` with ``D = C / G * K``.

    Mean over samples and positions of the outer products of the unfolded input (arXiv 1602.01407,
    theorem 1, without its bias row and divided by the number of positions).

    Args:
        x: Input ``[N, C, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        stride: Pixels between output positions.
        padding: Zeros on each side.
        dilation: Pixels between taps.
        groups: Channel groups ``G``, one factor each.
    """
    axes = conv_axes(x[2:], kernel_size, stride, padding, dilation)
    return _expand(input_rows(x[0], x[1], groups, axes), _legs("o", axes), x[0])


def kfac_reduce_factor(
    x: Shape,
    kernel_size: Ints,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Network:
    """Input factor of KFAC-reduce: ``[G, D, D]`` with ``D = C / G * K`` (arXiv 2311.00636).

    Mean over samples of the outer products of the position-averaged unfolded input.

    Args:
        x: Input ``[N, C, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        stride: Pixels between output positions.
        padding: Zeros on each side.
        dilation: Pixels between taps.
        groups: Channel groups ``G``, one factor each.
    """
    axes = conv_axes(x[2:], kernel_size, stride, padding, dilation)
    return _reduce(input_rows(x[0], x[1], groups, axes), _legs("o", axes), x[0])


def kfc_factor_transpose(
    x: Shape,
    kernel_size: Ints,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    output_padding: Ints = 0,
) -> Network:
    """Input factor of KFAC-expand for a transposed convolution: ``[G, D, D]``.

    Args:
        x: Input ``[N, C, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        stride: Stride of the convolution that is transposed.
        padding: Pixels cut off each side of the output.
        dilation: Pixels between taps.
        groups: Channel groups ``G``, one factor each.
        output_padding: Rows added to one side of the output.
    """
    axes = conv_transpose_axes(x[2:], kernel_size, stride, padding, dilation, output_padding)
    return _expand(input_rows_transpose(x[0], x[1], groups, axes), _legs("i", axes), x[0])


def kfac_reduce_factor_transpose(
    x: Shape,
    kernel_size: Ints,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    output_padding: Ints = 0,
) -> Network:
    """Input factor of KFAC-reduce for a transposed convolution: ``[G, D, D]``.

    Args:
        x: Input ``[N, C, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        stride: Stride of the convolution that is transposed.
        padding: Pixels cut off each side of the output.
        dilation: Pixels between taps.
        groups: Channel groups ``G``, one factor each.
        output_padding: Rows added to one side of the output.
    """
    axes = conv_transpose_axes(x[2:], kernel_size, stride, padding, dilation, output_padding)
    return _reduce(input_rows_transpose(x[0], x[1], groups, axes), _legs("i", axes), x[0])


def kfc_diagonal(
    x: Shape,
    kernel_size: Ints,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Network:
    """Diagonal of :func:`kfc_factor`: ``[G, D]``.

    Args:
        x: Input ``[N, C, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        stride: Pixels between output positions.
        padding: Zeros on each side.
        dilation: Pixels between taps.
        groups: Channel groups ``G``, one diagonal each.
    """
    axes = conv_axes(x[2:], kernel_size, stride, padding, dilation)
    rows = input_rows(x[0], x[1], groups, axes)
    positions = _legs("o", axes).split()
    features = ("ci", *_legs("k", axes).split())
    network = rows.gram({"n", "g", *positions, *features}, keep=[("g",), features])
    return network.scaled(1 / (x[0] * prod(rows.sizes[leg] for leg in positions)))


def _features(rows: Network) -> tuple[str, ...]:
    return tuple(leg for leg in rows.output.legs if leg == "ci" or leg.startswith("k"))


def _expand(rows: Network, positions: str, batch: int) -> Network:
    shared = positions.split()
    terms = batch * prod(rows.sizes[leg] for leg in shared)
    network = rows.gram({"n", "g", *shared}, rows=[_features(rows)], keep=[("g",)])
    return network.scaled(1 / terms)


def _reduce(rows: Network, positions: str, batch: int) -> Network:
    summed = positions.split()
    features = _features(rows)
    means = rows.arranged(("n",), ("g",), *((leg,) for leg in features))
    means = means.scaled(1 / prod(rows.sizes[leg] for leg in summed))
    return means.gram({"n", "g"}, rows=[features], keep=[("g",)]).scaled(1 / batch)
