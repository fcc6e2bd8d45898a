"""Backpropagated curvature: Hessian diagonals (BL89, HesScale) and KFRA.

Exact where the Hessian with respect to the layer's output is diagonal. Sources: Becker and LeCun
1989, arXiv 2210.11639 (HesScale), arXiv 1706.03662 (KFRA), arXiv 2307.02275.
"""

from __future__ import annotations

from math import prod

from typing_extensions import Unpack

from tnkfac.einsum.network import Network, parse
from tnkfac.einsum.operands import Variable
from tnkfac.einsum.operations.derivatives import over_positions
from tnkfac.einsum.operations.forward import rows
from tnkfac.einsum.operations.space import Hyper, Ints, Shape, Space, TransposedHyper


def hessian_diagonal_input(
    h: Shape, weight: Shape, input_size: Shape, **hyper: Unpack[Hyper]
) -> Network:
    """Hessian diagonal with respect to the input ``[N, C_in, I1, ...]``.

    Args:
        h: Hessian diagonal with respect to the output ``[N, C_out, O1, ...]``.
        weight: Kernel ``[C_out, C_in / groups, K1, ...]``.
        input_size: Spatial shape of the input.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    space = Space.conv("hessian_diagonal_input", input_size, weight[2:], **hyper)
    return _input(space, h, weight)


def hessian_diagonal_input_transpose(
    h: Shape, weight: Shape, input_size: Shape, **hyper: Unpack[TransposedHyper]
) -> Network:
    """:func:`hessian_diagonal_input` of a transposed convolution ``[N, C_in, O1, ...]``.

    Args:
        h: Hessian diagonal with respect to the output ``[N, C_out, I1, ...]``.
        weight: Kernel ``[C_in, C_out / groups, K1, ...]``.
        input_size: Spatial shape of the input.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    name = "hessian_diagonal_input_transpose"
    space = Space.conv_transpose(name, input_size, weight[2:], **hyper)
    return _input(space, h, weight)


def _input(space: Space, h: Shape, weight: Shape) -> Network:
    matrix = space.network("{p}, {w} -> g co ci {y} {x}", weight=weight)
    squared = matrix.doubled(matrix.output.legs)
    return space.times(squared, "n (g co) {y}", "n (g ci) {x}", h=h)


def hessian_diagonal_weight(
    h: Shape, x: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]
) -> Network:
    """Hessian diagonal with respect to the weight ``[C_out, C_in / groups, K1, ...]``.

    Args:
        h: Hessian diagonal with respect to the output ``[N, C_out, O1, ...]``.
        x: Input ``[N, C_in, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    return _weight(Space.conv("hessian_diagonal_weight", x[2:], kernel_size, **hyper), h, x)


def hessian_diagonal_weight_transpose(
    h: Shape, x: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]
) -> Network:
    """:func:`hessian_diagonal_weight` of a transposed convolution ``[C_in, C_out / groups, ..]``.

    Args:
        h: Hessian diagonal with respect to the output ``[N, C_out, I1, ...]``.
        x: Input ``[N, C_in, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    name = "hessian_diagonal_weight_transpose"
    return _weight(Space.conv_transpose(name, x[2:], kernel_size, **hyper), h, x)


def _weight(space: Space, h: Shape, x: Shape) -> Network:
    unfolded = rows(space, x)
    squared = unfolded.doubled(unfolded.output.legs)
    return space.times(squared, "n (g co) {y}", "{w}", h=h)


def hessian_diagonal_bias(h: Shape) -> Network:
    """Hessian diagonal with respect to the bias ``[C_out]``.

    Args:
        h: Hessian diagonal with respect to the output ``[N, C_out, O1, ...]``.
    """
    return over_positions("hessian_diagonal_bias", "c", h=h)


def kfra(g: Shape, weight: Shape, input_size: Shape, **hyper: Unpack[Hyper]) -> Network:
    """Batch-averaged GGN through a convolution: ``[C_in * I, C_in * I]``.

    Args:
        g: The same with respect to the output ``[C_out * O, C_out * O]``.
        weight: Kernel ``[C_out, C_in / groups, K1, ...]``.
        input_size: Spatial shape of the input.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    return _kfra(Space.conv("kfra", input_size, weight[2:], **hyper), g, weight)


def kfra_transpose(
    g: Shape, weight: Shape, input_size: Shape, **hyper: Unpack[TransposedHyper]
) -> Network:
    """Batch-averaged GGN through a transposed convolution: ``[C_in * O, C_in * O]``.

    Args:
        g: The same with respect to the output ``[C_out * I, C_out * I]``.
        weight: Kernel ``[C_in, C_out / groups, K1, ...]``.
        input_size: Spatial shape of the input.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    space = Space.conv_transpose("kfra_transpose", input_size, weight[2:], **hyper)
    return _kfra(space, g, weight)


def _kfra(space: Space, g: Shape, weight: Shape) -> Network:
    pair = space.network("{p}, {w} -> g co ci {y} {x}", weight=weight).doubled(())
    sides = []
    for template in ("g co {y}", "g ci {x}"):
        legs = space.fill(template)
        sides.append(f"({legs}) ({' '.join(leg + chr(39) for leg in legs.split())})")
    return space.times(pair, sides[0], sides[1], g=g)


def kfra_output_factor(g: Shape, output_size: Shape) -> Network:
    """Output-side factor of KFRA ``[C_out, C_out]``: the sum over all pairs of positions.

    Args:
        g: Batch-averaged GGN with respect to the output ``[C_out * O, C_out * O]``.
        output_size: Spatial shape of the output.
    """
    legs = [f"o{d}" for d in range(1, len(output_size) + 1)]
    positions = prod(output_size)
    if len(g) != 2 or g[0] != g[1] or g[0] % positions:
        raise ValueError(
            f"kfra_output_factor: g: got shape {tuple(g)}, but with output size "
            f"{tuple(output_size)} it needs two equal axes that {positions} divides."
        )
    sizes = dict(zip(legs, output_size, strict=True)) | {"co": g[0] // positions}
    sizes |= {f"{leg}'": size for leg, size in sizes.items()}
    first, second = " ".join(["co", *legs]), " ".join(f"{leg}'" for leg in ["co", *legs])
    return parse(f"({first}) ({second}) -> co co'", [Variable("g")], sizes)
