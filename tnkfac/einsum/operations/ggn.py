"""GGN and Fisher quantities of a layer from a backpropagated square root of the loss Hessian.

``s`` is ``[C, N, C_out, O1, ...]``: ``C`` vectors per sample (classes, Monte-Carlo draws, or one,
the gradient, for the empirical Fisher). Factors such as ``1 / N`` are whatever ``s`` carries.
Source: arXiv 2307.02275, table B2, second-order rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import Unpack

from tnkfac.einsum.network import Network, parse
from tnkfac.einsum.operands import Variable
from tnkfac.einsum.operations.space import Hyper, Ints, Shape, Space, TransposedHyper

BLOCKS = ("filter", "output_channel", "group")


def sqrt_ggn(x: Shape, s: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]) -> Network:
    """Square root of the GGN with respect to the weight ``[C, N, C_out, C_in / groups, K1, ..]``.

    Args:
        x: Input ``[N, C_in, I1, ...]``.
        s: ``[C, N, C_out, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    return _sqrt(Space.conv("sqrt_ggn", x[2:], kernel_size, **hyper), x, s)


def sqrt_ggn_transpose(
    x: Shape, s: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]
) -> Network:
    """:func:`sqrt_ggn` of a transposed convolution ``[C, N, C_in, C_out / groups, K1, ..]``.

    Args:
        x: Input ``[N, C_in, O1, ...]``.
        s: ``[C, N, C_out, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    return _sqrt(_transposed("sqrt_ggn", x, kernel_size, **hyper), x, s)


def ggn_diagonal(x: Shape, s: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]) -> Network:
    """Diagonal of the GGN, shaped like the weight.

    Args:
        x: Input ``[N, C_in, I1, ...]``.
        s: ``[C, N, C_out, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    return _diagonal(Space.conv("ggn_diagonal", x[2:], kernel_size, **hyper), x, s)


def ggn_diagonal_transpose(
    x: Shape, s: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]
) -> Network:
    """:func:`ggn_diagonal` of a transposed convolution.

    Args:
        x: Input ``[N, C_in, O1, ...]``.
        s: ``[C, N, C_out, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    return _diagonal(_transposed("ggn_diagonal", x, kernel_size, **hyper), x, s)


def per_sample_ggn_diagonal(
    x: Shape, s: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]
) -> Network:
    """One diagonal per sample: ``[N, C_out, C_in / groups, K1, ...]``.

    Args:
        x: Input ``[N, C_in, I1, ...]``.
        s: ``[C, N, C_out, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    space = Space.conv("per_sample_ggn_diagonal", x[2:], kernel_size, **hyper)
    return _diagonal(space, x, s, per_sample=True)


def per_sample_ggn_diagonal_transpose(
    x: Shape, s: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]
) -> Network:
    """:func:`per_sample_ggn_diagonal` of a transposed convolution.

    Args:
        x: Input ``[N, C_in, O1, ...]``.
        s: ``[C, N, C_out, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    space = _transposed("per_sample_ggn_diagonal", x, kernel_size, **hyper)
    return _diagonal(space, x, s, per_sample=True)


def ggn_gram(x: Shape, s: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]) -> Network:
    """GGN Gram matrix ``[C * N, C * N]``; with the network Jacobian for ``s``, the empirical NTK.

    Args:
        x: Input ``[N, C_in, I1, ...]``.
        s: ``[C, N, C_out, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    return _gram(Space.conv("ggn_gram", x[2:], kernel_size, **hyper), x, s)


def ggn_gram_transpose(
    x: Shape, s: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]
) -> Network:
    """:func:`ggn_gram` of a transposed convolution.

    Args:
        x: Input ``[N, C_in, O1, ...]``.
        s: ``[C, N, C_out, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    return _gram(_transposed("ggn_gram", x, kernel_size, **hyper), x, s)


def ggn_block(x: Shape, s: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]) -> Network:
    """GGN of all weights of the layer ``[P, P]``, in the order of ``weight.flatten()``.

    Args:
        x: Input ``[N, C_in, I1, ...]``.
        s: ``[C, N, C_out, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    return _block(Space.conv("ggn_block", x[2:], kernel_size, **hyper), x, s)


def ggn_block_transpose(
    x: Shape, s: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]
) -> Network:
    """:func:`ggn_block` of a transposed convolution.

    Args:
        x: Input ``[N, C_in, O1, ...]``.
        s: ``[C, N, C_out, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    return _block(_transposed("ggn_block", x, kernel_size, **hyper), x, s)


def ggn_block_diagonal(
    x: Shape, s: Shape, kernel_size: Ints, *, block: str = "filter", **hyper: Unpack[Hyper]
) -> Network:
    """Blocks of :func:`ggn_block` along its diagonal.

    Args:
        x: Input ``[N, C_in, I1, ...]``.
        s: ``[C, N, C_out, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        block: ``"filter"``: ``[C_out, C_in / groups, K, K]``; ``"output_channel"``:
            ``[C_out, D, D]`` with ``D = C_in / groups * K``; ``"group"``: ``[G, P / G, P / G]``.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.

    Raises:
        ValueError: For an unknown block, or shapes that do not fit.
    """
    return _blocks(Space.conv("ggn_block_diagonal", x[2:], kernel_size, **hyper), x, s, block)


def ggn_block_diagonal_transpose(
    x: Shape,
    s: Shape,
    kernel_size: Ints,
    *,
    block: str = "filter",
    **hyper: Unpack[TransposedHyper],
) -> Network:
    """:func:`ggn_block_diagonal` of a transposed convolution.

    Args:
        x: Input ``[N, C_in, O1, ...]``.
        s: ``[C, N, C_out, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        block: ``"filter"``: ``[C_in, C_out / groups, K, K]``; ``"output_channel"``:
            ``[C_out, D, D]``; ``"group"``: ``[G, P / G, P / G]``.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.

    Raises:
        ValueError: For an unknown block, or shapes that do not fit.
    """
    return _blocks(_transposed("ggn_block_diagonal", x, kernel_size, **hyper), x, s, block)


def ggn_vector_product(x: Shape, s: Shape, vector: Shape, **hyper: Unpack[Hyper]) -> Network:
    """GGN of the layer times a vector, shaped like the weight.

    Args:
        x: Input ``[N, C_in, I1, ...]``.
        s: ``[C, N, C_out, O1, ...]``.
        vector: ``[C_out, C_in / groups, K1, ...]``.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    return _product(Space.conv("ggn_vector_product", x[2:], vector[2:], **hyper), x, s, vector)


def ggn_vector_product_transpose(
    x: Shape, s: Shape, vector: Shape, **hyper: Unpack[TransposedHyper]
) -> Network:
    """:func:`ggn_vector_product` of a transposed convolution.

    Args:
        x: Input ``[N, C_in, O1, ...]``.
        s: ``[C, N, C_out, I1, ...]``.
        vector: ``[C_in, C_out / groups, K1, ...]``.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    return _product(_transposed("ggn_vector_product", x, vector[2:], **hyper), x, s, vector)


def _transposed(
    operation: str, x: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]
) -> Space:
    return Space.conv_transpose(f"{operation}_transpose", x[2:], kernel_size, **hyper)


def _weight(space: Space) -> tuple[list[str], list[str], list[str]]:
    """Legs of both channels of the weight in its layout, and of the taps."""
    first, second = ["g", "co"], ["ci"]
    if space.transposed:
        first, second = ["g", "ci"], ["co"]
    return first, second, [f"k{d}" for d in range(1, len(space.axes) + 1)]


def _sqrt(space: Space, x: Shape, s: Shape) -> Network:
    return space.network("n (g ci) {x}, {p}, c n (g co) {y} -> c n {w}", x=x, s=s)


def _diagonal(space: Space, x: Shape, s: Shape, per_sample: bool = False) -> Network:
    first, second, taps = _weight(space)
    keep: list[Sequence[str]] = [first, second, *([k] for k in taps)]
    if per_sample:
        keep.insert(0, ["n"])
    root = _sqrt(space, x, s)
    return root.gram(root.output.legs, keep=keep)


def _gram(space: Space, x: Shape, s: Shape) -> Network:
    first, second, taps = _weight(space)
    return _sqrt(space, x, s).gram({*first, *second, *taps}, rows=[("c", "n")])


def _block(space: Space, x: Shape, s: Shape) -> Network:
    first, second, taps = _weight(space)
    return _sqrt(space, x, s).gram({"c", "n"}, rows=[(*first, *second, *taps)])


def _blocks(space: Space, x: Shape, s: Shape, block: str) -> Network:
    first, second, taps = _weight(space)
    root = _sqrt(space, x, s)
    if block == "filter":
        return root.gram({"c", "n", *first, *second}, rows=[taps], keep=[first, second])
    if block == "output_channel":
        return root.gram({"c", "n", "g", "co"}, rows=[("ci", *taps)], keep=[("g", "co")])
    if block == "group":
        legs = (*first[1:], *second, *taps)
        return root.gram({"c", "n", "g"}, rows=[legs], keep=[("g",)])
    raise ValueError(f"{space.operation}: block: got {block!r}. Supported: {', '.join(BLOCKS)}.")


def _product(space: Space, x: Shape, s: Shape, vector: Shape) -> Network:
    first, second, taps = _weight(space)
    root = _sqrt(space, x, s).doubled({"c", "n"})
    operands = " ".join(f"{leg}'" for leg in (*second, *taps))
    group = " ".join(f"{leg}'" for leg in first)
    return space.times(root, f"({group}) {operands}", "{w}", vector=vector)


def bias_ggn_diagonal(s: Shape) -> Network:
    """Diagonal of the GGN with respect to the bias ``[C_out]``.

    Args:
        s: ``[C, N, C_out, O1, ...]``.
    """
    return _bias("bias_ggn_diagonal", s).gram({"c", "n", "co"}, keep=[("co",)])


def bias_ggn_gram(s: Shape) -> Network:
    """Gram matrix of the bias ``[C * N, C * N]``.

    Args:
        s: ``[C, N, C_out, O1, ...]``.
    """
    return _bias("bias_ggn_gram", s).gram({"co"}, rows=[("c", "n")])


def _bias(operation: str, s: Shape) -> Network:
    if len(s) < 3:
        raise ValueError(
            f"{operation}: s: got shape {tuple(s)}. Supported: [C, N, C_out, O1, ...]."
        )
    positions = [f"o{d}" for d in range(1, len(s) - 2)]
    sizes = dict(zip(["c", "n", "co", *positions], s, strict=True))
    return parse(f"c n co {' '.join(positions)} -> c n co", [Variable("s")], sizes)
