"""Kronecker factors of KFC / KFAC-expand and KFAC-reduce, and curvature diagonals of inputs.

Normalised as the factors of a layer: input factors are means over samples (and positions for
expand), output-gradient factors are means over samples of what was back-propagated per sample.
Sources: arXiv 1602.01407 (KFC), arXiv 2311.00636 (expand and reduce), arXiv 2307.02275.
"""

from __future__ import annotations

from math import prod

from typing_extensions import Unpack

from tnkfac.einsum.network import Network
from tnkfac.einsum.operations.forward import rows
from tnkfac.einsum.operations.space import Hyper, Ints, Shape, Space, TransposedHyper


def kfc_factor(x: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]) -> Network:
    """Input factor of KFC, also called KFAC-expand: ``[G, D, D]`` with ``D = C / G * K``.

    Mean over samples and positions of the outer products of the unfolded input.

    Args:
        x: Input ``[N, C, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    return _expand(Space.conv("kfc_factor", x[2:], kernel_size, **hyper), x)


def kfc_factor_transpose(x: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]) -> Network:
    """Input factor of KFAC-expand for a transposed convolution: ``[G, D, D]``.

    Args:
        x: Input ``[N, C, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    return _expand(Space.conv_transpose("kfc_factor_transpose", x[2:], kernel_size, **hyper), x)


def kfac_reduce_factor(x: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]) -> Network:
    """Input factor of KFAC-reduce: ``[G, D, D]`` with ``D = C / G * K``.

    Mean over samples of the outer products of the position-averaged unfolded input.

    Args:
        x: Input ``[N, C, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    return _reduce(Space.conv("kfac_reduce_factor", x[2:], kernel_size, **hyper), x)


def kfac_reduce_factor_transpose(
    x: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]
) -> Network:
    """Input factor of KFAC-reduce for a transposed convolution: ``[G, D, D]``.

    Args:
        x: Input ``[N, C, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    name = "kfac_reduce_factor_transpose"
    return _reduce(Space.conv_transpose(name, x[2:], kernel_size, **hyper), x)


def kfc_diagonal(x: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]) -> Network:
    """Diagonal of :func:`kfc_factor`: ``[G, D]``.

    Args:
        x: Input ``[N, C, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    return _diagonal(Space.conv("kfc_diagonal", x[2:], kernel_size, **hyper), x)


def kfc_diagonal_transpose(
    x: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]
) -> Network:
    """Diagonal of :func:`kfc_factor_transpose`: ``[G, D]``.

    Args:
        x: Input ``[N, C, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    return _diagonal(Space.conv_transpose("kfc_diagonal_transpose", x[2:], kernel_size, **hyper), x)


def _legs(space: Space) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Legs of the features and of the positions of the rows."""
    dims = range(1, len(space.axes) + 1)
    y = "i" if space.transposed else "o"
    return ("ci", *(f"k{d}" for d in dims)), tuple(f"{y}{d}" for d in dims)


def _expand(space: Space, x: Shape) -> Network:
    features, positions = _legs(space)
    gram = rows(space, x).gram({"n", "g", *positions}, rows=[features], keep=[("g",)])
    return gram.scaled(1 / (max(x[0], 1) * prod(space.output_size)))


def _reduce(space: Space, x: Shape) -> Network:
    features, _ = _legs(space)
    means = rows(space, x).arranged(("n",), ("g",), features).scaled(1 / prod(space.output_size))
    return means.gram({"n", "g"}, rows=[features], keep=[("g",)]).scaled(1 / max(x[0], 1))


def _diagonal(space: Space, x: Shape) -> Network:
    features, positions = _legs(space)
    gram = rows(space, x).gram({"n", "g", *positions, *features}, keep=[("g",), features])
    return gram.scaled(1 / (max(x[0], 1) * prod(space.output_size)))


def kfc_grad_factor(v: Shape, *, groups: int = 1) -> Network:
    """Output-gradient factor of KFAC-expand: ``[G, C_out / G, C_out / G]``.

    Mean over samples of the sum over positions of the outer products.

    Args:
        v: Per-sample output gradients ``[N, C_out, O1, ...]``.
        groups: Channel groups ``G``, one factor each.
    """
    outputs, positions = _outputs("kfc_grad_factor", v, groups)
    open_rows = outputs.arranged(("n",), ("g",), ("ci",), *((p,) for p in positions))
    gram = open_rows.gram({"n", "g", *positions}, rows=[("ci",)], keep=[("g",)])
    return gram.scaled(1 / max(v[0], 1))


def kfac_reduce_grad_factor(v: Shape, *, groups: int = 1) -> Network:
    """Output-gradient factor of KFAC-reduce: ``[G, C_out / G, C_out / G]``.

    Mean over samples of the outer products of the sum over positions.

    Args:
        v: Per-sample output gradients ``[N, C_out, O1, ...]``.
        groups: Channel groups ``G``, one factor each.
    """
    outputs, _ = _outputs("kfac_reduce_grad_factor", v, groups)
    sums = outputs.arranged(("n",), ("g",), ("ci",))
    return sums.gram({"n", "g"}, rows=[("ci",)], keep=[("g",)]).scaled(1 / max(v[0], 1))


def _outputs(operation: str, v: Shape, groups: int) -> tuple[Network, tuple[str, ...]]:
    """Outputs are their own rows: those of a convolution with kernels of one tap."""
    if len(v) < 3:
        raise ValueError(f"{operation}: v: got shape {tuple(v)}. Supported: [N, C_out, O1, ...].")
    space = Space.conv(operation, v[2:], 1, groups=groups)
    outputs = space.network("n (g ci) {x}, {p} -> n g ci {k} {y}", v=v)
    return outputs, _legs(space)[1]
