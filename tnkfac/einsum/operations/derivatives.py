"""First derivatives of (transposed) convolutions (arXiv 2307.02275, table B2, derivatives).

``v`` is a cotangent, shaped like the output, with any number of additional leading axes; they
become leading axes of the result. The same holds for the tangents of the forward-mode rows.
"""

from __future__ import annotations

from typing_extensions import Unpack

from tnkfac.einsum.network import Network, parse
from tnkfac.einsum.operands import Variable
from tnkfac.einsum.operations.space import (
    Hyper,
    Ints,
    Shape,
    Space,
    TransposedHyper,
    leading,
    spatial,
)


def weight_vjp(x: Shape, v: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]) -> Network:
    """Vector-Jacobian product with the weight ``[.., C_out, C_in / groups, K1, ...]``.

    Args:
        x: Input ``[N, C_in, I1, ...]``.
        v: Cotangent ``[.., N, C_out, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    return _weight_vjp(Space.conv("weight_vjp", x[2:], kernel_size, **hyper), x, v)


def weight_vjp_transpose(
    x: Shape, v: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]
) -> Network:
    """Vector-Jacobian product ``[.., C_in, C_out / groups, K1, ...]`` of a transposed convolution.

    Args:
        x: Input ``[N, C_in, O1, ...]``.
        v: Cotangent ``[.., N, C_out, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    space = Space.conv_transpose("weight_vjp_transpose", x[2:], kernel_size, **hyper)
    return _weight_vjp(space, x, v)


def _weight_vjp(space: Space, x: Shape, v: Shape) -> Network:
    _, lead = leading(len(v) - len(x))
    return space.network(f"n (g ci) {{x}}, {{p}}, {lead}n (g co) {{y}} -> {lead}{{w}}", x=x, v=v)


def per_sample_weight_vjp(x: Shape, v: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]) -> Network:
    """One weight gradient per sample: ``[.., N, C_out, C_in / groups, K1, ...]``.

    Args:
        x: Input ``[N, C_in, I1, ...]``.
        v: Cotangent ``[.., N, C_out, O1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    space = Space.conv("per_sample_weight_vjp", x[2:], kernel_size, **hyper)
    return _per_sample_weight_vjp(space, x, v)


def per_sample_weight_vjp_transpose(
    x: Shape, v: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]
) -> Network:
    """One weight gradient per sample: ``[.., N, C_in, C_out / groups, K1, ...]``.

    Args:
        x: Input ``[N, C_in, O1, ...]``.
        v: Cotangent ``[.., N, C_out, I1, ...]``.
        kernel_size: Taps, one number or one per dimension.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    space = Space.conv_transpose("per_sample_weight_vjp_transpose", x[2:], kernel_size, **hyper)
    return _per_sample_weight_vjp(space, x, v)


def _per_sample_weight_vjp(space: Space, x: Shape, v: Shape) -> Network:
    _, lead = leading(len(v) - len(x))
    equation = f"n (g ci) {{x}}, {{p}}, {lead}n (g co) {{y}} -> {lead}n {{w}}"
    return space.network(equation, x=x, v=v)


def input_vjp(weight: Shape, v: Shape, input_size: Shape, **hyper: Unpack[Hyper]) -> Network:
    """Vector-Jacobian product with the input ``[.., N, C_in, I1, ...]``.

    Args:
        weight: Kernel ``[C_out, C_in / groups, K1, ...]``.
        v: Cotangent ``[.., N, C_out, O1, ...]``.
        input_size: Spatial shape of the input.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    space = Space.conv("input_vjp", input_size, weight[2:], **hyper)
    return _input_vjp(space, weight, v)


def input_vjp_transpose(
    weight: Shape, v: Shape, input_size: Shape, **hyper: Unpack[TransposedHyper]
) -> Network:
    """Vector-Jacobian product ``[.., N, C_in, O1, ...]`` of a transposed convolution.

    Args:
        weight: Kernel ``[C_in, C_out / groups, K1, ...]``.
        v: Cotangent ``[.., N, C_out, I1, ...]``.
        input_size: Spatial shape of the input.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    name = "input_vjp_transpose"
    space = Space.conv_transpose(name, input_size, weight[2:], **hyper)
    return _input_vjp(space, weight, v)


def _input_vjp(space: Space, weight: Shape, v: Shape) -> Network:
    _, lead = leading(len(v) - len(weight))
    equation = f"{{w}}, {{p}}, {lead}n (g co) {{y}} -> {lead}n (g ci) {{x}}"
    return space.network(equation, weight=weight, v=v)


def weight_jvp(x: Shape, dw: Shape, **hyper: Unpack[Hyper]) -> Network:
    """Jacobian-vector product with the weight ``[.., N, C_out, O1, ...]``.

    Args:
        x: Input ``[N, C_in, I1, ...]``.
        dw: Tangent ``[.., C_out, C_in / groups, K1, ...]``.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    kernel_size = dw[len(dw) - len(x) + 2 :]
    return _weight_jvp(Space.conv("weight_jvp", x[2:], kernel_size, **hyper), x, dw)


def weight_jvp_transpose(x: Shape, dw: Shape, **hyper: Unpack[TransposedHyper]) -> Network:
    """Jacobian-vector product ``[.., N, C_out, I1, ...]`` of a transposed convolution.

    Args:
        x: Input ``[N, C_in, O1, ...]``.
        dw: Tangent ``[.., C_in, C_out / groups, K1, ...]``.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    kernel_size = dw[len(dw) - len(x) + 2 :]
    space = Space.conv_transpose("weight_jvp_transpose", x[2:], kernel_size, **hyper)
    return _weight_jvp(space, x, dw)


def _weight_jvp(space: Space, x: Shape, dw: Shape) -> Network:
    _, lead = leading(len(dw) - len(x))
    equation = f"n (g ci) {{x}}, {{p}}, {lead}{{w}} -> {lead}n (g co) {{y}}"
    return space.network(equation, x=x, dw=dw)


def input_jvp(dx: Shape, weight: Shape, **hyper: Unpack[Hyper]) -> Network:
    """Jacobian-vector product with the input ``[.., N, C_out, O1, ...]``.

    Args:
        dx: Tangent ``[.., N, C_in, I1, ...]``.
        weight: Kernel ``[C_out, C_in / groups, K1, ...]``.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    size = dx[len(dx) - len(weight) + 2 :]
    return _input_jvp(Space.conv("input_jvp", size, weight[2:], **hyper), dx, weight)


def input_jvp_transpose(dx: Shape, weight: Shape, **hyper: Unpack[TransposedHyper]) -> Network:
    """Jacobian-vector product ``[.., N, C_out, I1, ...]`` of a transposed convolution.

    Args:
        dx: Tangent ``[.., N, C_in, O1, ...]``.
        weight: Kernel ``[C_in, C_out / groups, K1, ...]``.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    size = dx[len(dx) - len(weight) + 2 :]
    space = Space.conv_transpose("input_jvp_transpose", size, weight[2:], **hyper)
    return _input_jvp(space, dx, weight)


def _input_jvp(space: Space, dx: Shape, weight: Shape) -> Network:
    _, lead = leading(len(dx) - len(weight))
    equation = f"{lead}n (g ci) {{x}}, {{p}}, {{w}} -> {lead}n (g co) {{y}}"
    return space.network(equation, dx=dx, weight=weight)


def weight_jacobian(x: Shape, weight_shape: Shape, **hyper: Unpack[Hyper]) -> Network:
    """Jacobian with respect to the weight ``[N, C_out, O1, .., C_out, C_in / groups, K1, ..]``.

    Args:
        x: Input ``[N, C_in, I1, ...]``.
        weight_shape: ``(C_out, C_in / groups, K1, ...)``.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    _same_axes("weight_jacobian", x, weight_shape)
    space = Space.conv("weight_jacobian", x[2:], weight_shape[2:], **hyper)
    equation = "n (g ci) {x}, {p}, delta g g', delta co co' -> n (g co) {y} (g' co') ci {k}"
    return _jacobian(space, equation, x, weight_shape[0] // space.groups, weight_shape)


def weight_jacobian_transpose(
    x: Shape, weight_shape: Shape, **hyper: Unpack[TransposedHyper]
) -> Network:
    """Jacobian ``[N, C_out, I1, .., C_in, C_out / groups, K1, ..]`` of a transposed convolution.

    Args:
        x: Input ``[N, C_in, O1, ...]``.
        weight_shape: ``(C_in, C_out / groups, K1, ...)``.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    name = "weight_jacobian_transpose"
    _same_axes(name, x, weight_shape)
    space = Space.conv_transpose(name, x[2:], weight_shape[2:], **hyper)
    equation = "n (g ci) {x}, {p}, delta g g', delta co co' -> n (g co) {y} (g' ci) co' {k}"
    return _jacobian(space, equation, x, weight_shape[1], weight_shape)


def _same_axes(operation: str, x: Shape, weight_shape: Shape) -> None:
    spatial(operation, "weight_shape", weight_shape)
    if len(weight_shape) != len(x):
        raise ValueError(
            f"{operation}: weight_shape: got {tuple(weight_shape)}, but an input of shape "
            f"{tuple(x)} needs {len(x)} axes."
        )


def _jacobian(space: Space, equation: str, x: Shape, channels: int, weight_shape: Shape) -> Network:
    network = space.network(equation, sizes={"co": channels}, x=x)
    if network.shape[len(x) :] != tuple(weight_shape):
        raise ValueError(
            f"{space.operation}: weight_shape: got {tuple(weight_shape)}, but an input of shape "
            f"{tuple(x)} with {space.groups} groups needs {network.shape[len(x) :]}."
        )
    return network


def input_jacobian(weight: Shape, input_shape: Shape, **hyper: Unpack[Hyper]) -> Network:
    """Jacobian with respect to the input ``[N, C_out, O1, .., N, C_in, I1, ..]``.

    Args:
        weight: Kernel ``[C_out, C_in / groups, K1, ...]``.
        input_shape: ``(N, C_in, I1, ...)``.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    space = Space.conv(
        "input_jacobian", spatial("input_jacobian", "input_shape", input_shape), weight[2:], **hyper
    )
    return _input_jacobian(space, weight, input_shape)


def input_jacobian_transpose(
    weight: Shape, input_shape: Shape, **hyper: Unpack[TransposedHyper]
) -> Network:
    """Jacobian ``[N, C_out, I1, .., N, C_in, O1, ..]`` of a transposed convolution.

    Args:
        weight: Kernel ``[C_in, C_out / groups, K1, ...]``.
        input_shape: ``(N, C_in, O1, ...)``.
        **hyper: ``stride``, ``padding``, ``dilation``, ``groups``, ``output_padding``.
    """
    name = "input_jacobian_transpose"
    space = Space.conv_transpose(
        name, spatial(name, "input_shape", input_shape), weight[2:], **hyper
    )
    return _input_jacobian(space, weight, input_shape)


def _input_jacobian(space: Space, weight: Shape, input_shape: Shape) -> Network:
    equation = "{p}, {w}, delta g g', delta n n' -> n (g co) {y} n' (g' ci) {x}"
    network = space.network(equation, sizes={"n": input_shape[0]}, weight=weight)
    if network.sizes["g"] * network.sizes["ci"] != input_shape[1]:
        raise ValueError(
            f"{space.operation}: input_shape: got {tuple(input_shape)}, but the weight of shape "
            f"{tuple(weight)} takes {network.sizes['g'] * network.sizes['ci']} channels."
        )
    return network


def bias_vjp(v: Shape) -> Network:
    """Vector-Jacobian product with the bias ``[C_out]``: the sum over samples and positions.

    Args:
        v: Cotangent ``[N, C_out, O1, ...]``.
    """
    return over_positions("bias_vjp", "c", v=v)


def per_sample_bias_vjp(v: Shape) -> Network:
    """One bias gradient per sample: ``[N, C_out]``.

    Args:
        v: Cotangent ``[N, C_out, O1, ...]``.
    """
    return over_positions("per_sample_bias_vjp", "n c", v=v)


def over_positions(operation: str, result: str, **tensor: Shape) -> Network:
    """Sum of a tensor ``[N, C_out, O1, ...]`` over positions, and over samples without ``n``."""
    ((name, v),) = tensor.items()
    if len(v) < 2:
        raise ValueError(
            f"{operation}: {name}: got shape {tuple(v)}. Supported: [N, C_out, O1, ...]."
        )
    positions = [f"o{d}" for d in range(1, len(v) - 1)]
    sizes = dict(zip(["n", "c", *positions], v, strict=True))
    return parse(f"n c {' '.join(positions)} -> {result}", [Variable(name)], sizes)
