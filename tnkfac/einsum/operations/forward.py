"""Convolutions, (un)folded tensors and Toeplitz matrices (arXiv 2307.02275, table B2, forward)."""

from __future__ import annotations

from typing_extensions import Unpack

from tnkfac.einsum.geometry import Axis
from tnkfac.einsum.network import Network, parse
from tnkfac.einsum.operands import Variable
from tnkfac.einsum.operations.space import Hyper, Ints, Shape, Space, TransposedHyper


def conv(x: Shape, weight: Shape, **hyper: Unpack[Hyper]) -> Network:
    """Convolution ``[N, C_out, O1, ...]``, as ``torch.nn.functional.conv{1,2,3}d``.

    Args:
        x: Input ``[N, C_in, I1, ...]``.
        weight: Kernel ``[C_out, C_in / groups, K1, ...]``.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    return _conv(Space.conv("conv", x[2:], weight[2:], **hyper), x, weight)


def conv_transpose(x: Shape, weight: Shape, **hyper: Unpack[TransposedHyper]) -> Network:
    """Transposed convolution ``[N, C_out, I1, ...]``, as ``F.conv_transpose{1,2,3}d``.

    Args:
        x: Input ``[N, C_in, O1, ...]``.
        weight: Kernel ``[C_in, C_out / groups, K1, ...]``.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    return _conv(Space.conv_transpose("conv_transpose", x[2:], weight[2:], **hyper), x, weight)


def _conv(space: Space, x: Shape, weight: Shape) -> Network:
    return space.network("n (g ci) {x}, {p}, {w} -> n (g co) {y}", x=x, weight=weight)


def avg_pool(x: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]) -> Network:
    """Average pooling ``[N, C, O1, ...]``, zeros of the padding included in the mean.

    Args:
        x: Input ``[N, C, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride`` (default 1), ``padding``, ``dilation``.
    """
    space = Space.conv("avg_pool", x[2:], kernel_size, **hyper)
    scale = 1.0
    for axis in space.axes:
        scale /= axis.kernel_size
    return space.network("n (g ci) {x}, {p} -> n (g ci) {y}", scale, x=x)


def unfold(x: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]) -> Network:
    """Unfolded input (im2col) ``[N, C * K, O]``, as ``F.unfold`` in any dimension.

    Args:
        x: Input ``[N, C, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``; ``groups`` do not change the result.
    """
    return _unfold(Space.conv("unfold", x[2:], kernel_size, **hyper), x)


def unfold_transpose(x: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]) -> Network:
    """Unfolded input of a transposed convolution ``[N, C * K, I]``.

    Args:
        x: Input ``[N, C, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``output_padding``.
    """
    return _unfold(Space.conv_transpose("unfold_transpose", x[2:], kernel_size, **hyper), x)


def _unfold(space: Space, x: Shape) -> Network:
    return space.network("n (g ci) {x}, {p} -> n (g ci {k}) ({y})", x=x)


def fold(z: Shape, output_size: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]) -> Network:
    """Folded tensor (col2im) ``[N, C, I1, ...]``, as ``F.fold``: the adjoint of :func:`unfold`.

    Args:
        z: Columns ``[N, C * K, O]``.
        output_size: Spatial shape ``(I1, ...)`` of the result.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``; ``groups`` do not change the result.
    """
    return _fold(Space.conv("fold", output_size, kernel_size, **hyper), z)


def fold_transpose(
    z: Shape, output_size: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]
) -> Network:
    """Adjoint of :func:`unfold_transpose`: ``[N, C, O1, ...]``.

    Args:
        z: Columns ``[N, C * K, I]``.
        output_size: Spatial shape ``(O1, ...)`` of the result.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``output_padding``.
    """
    space = Space.conv_transpose("fold_transpose", output_size, kernel_size, **hyper)
    return _fold(space, z)


def _fold(space: Space, z: Shape) -> Network:
    return space.network("n (g ci {k}) ({y}), {p} -> n (g ci) {x}", z=z)


def unfold_kernel(weight: Shape, input_size: Shape, **hyper: Unpack[Hyper]) -> Network:
    """Toeplitz matrix of a convolution ``[C_out * O, C_in * I]``.

    Args:
        weight: Kernel ``[C_out, C_in / groups, K1, ...]``.
        input_size: Spatial shape of the input.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    space = Space.conv("unfold_kernel", input_size, weight[2:], **hyper)
    return _unfold_kernel(space, weight)


def unfold_kernel_transpose(
    weight: Shape, input_size: Shape, **hyper: Unpack[TransposedHyper]
) -> Network:
    """Matrix of a transposed convolution ``[C_out * I, C_in * O]``.

    Args:
        weight: Kernel ``[C_in, C_out / groups, K1, ...]``.
        input_size: Spatial shape of the input.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    name = "unfold_kernel_transpose"
    space = Space.conv_transpose(name, input_size, weight[2:], **hyper)
    return _unfold_kernel(space, weight)


def _unfold_kernel(space: Space, weight: Shape) -> Network:
    return space.network("{p}, {w}, delta g g' -> (g co {y}) (g' ci {x})", weight=weight)


def linear_rows(batch: int, positions: int, channels: int, groups: int = 1) -> Network:
    """Rows that multiply the weight of a linear layer, with every leg open.

    Args:
        batch: Number of samples ``N``.
        positions: Weight-sharing positions ``S``.
        channels: Features ``C``.
        groups: Channel groups ``G``.

    Returns:
        Network of ``x [N, S, C]`` with axes ``n g ci s``.
    """
    sizes = {"n": batch, "s": positions, "g": groups, "ci": channels // groups}
    return parse("n s (g ci) -> n g ci s", [Variable("x")], sizes)


def input_rows(batch: int, channels: int, groups: int, axes: tuple[Axis, ...]) -> Network:
    """Rows that multiply the weight of a convolution: unfolded inputs with every leg open.

    Args:
        batch: Number of samples ``N``.
        channels: Input channels ``C``.
        groups: Channel groups ``G``.
        axes: One axis per spatial dimension.

    Returns:
        Network of ``x [N, C, I1, ...]`` with axes ``n g ci k1 .. o1 ..``.
    """
    shape = (batch, channels, *(axis.input_size for axis in axes))
    return rows(Space(axes, groups, False, "input_rows"), shape)


def input_rows_transpose(batch: int, channels: int, groups: int, axes: tuple[Axis, ...]) -> Network:
    """Rows that multiply the weight of a transposed convolution, with every leg open.

    Args:
        batch: Number of samples ``N``.
        channels: Input channels ``C``.
        groups: Channel groups ``G``.
        axes: Axes of the convolution that is transposed: its output is this layer's input.

    Returns:
        Network of ``x [N, C, O1, ...]`` with axes ``n g ci k1 .. i1 ..``.
    """
    shape = (batch, channels, *(axis.output_size for axis in axes))
    return rows(Space(axes, groups, True, "input_rows_transpose"), shape)


def rows(space: Space, x: Shape) -> Network:
    """Unfolded input with every leg open: batch, group, channel, taps, positions."""
    return space.network("n (g ci) {x}, {p} -> n g ci {k} {y}", x=x)
