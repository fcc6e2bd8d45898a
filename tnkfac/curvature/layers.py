"""The layer table: what depends on the type of a module, and nothing else.

Every supported layer is a linear map with weight sharing, ``y_n = W U_n`` with the *unfolded
input* ``U_n`` of shape ``[D, S]``: ``D`` features per row of ``W``, ``S`` positions that share the
weight. A :class:`Layer` says how its input becomes ``U`` (as a tensor network, its *rows*), and
how its parameters become the matrix ``[W | b]``. Everything else is the same for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tnkfac.einsum import Network
from tnkfac.einsum.geometry import Axis, conv_axes, conv_transpose_axes, resolve_padding
from tnkfac.einsum.networks import input_rows, input_rows_transpose, linear_rows

Kind = Literal["linear", "conv", "conv_transpose"]


@dataclass(frozen=True)
class Layer:
    """Hyper-parameters of one supported module, as plain values.

    Attributes:
        kind: Which of the three maps it is.
        in_channels: Features or channels ``C_in``.
        out_channels: Features or channels ``C_out``.
        bias: Whether the joint matrix has a bias column.
        groups: Channel groups ``G``; each has a matrix of its own.
        kernel_size: Taps per spatial dimension; empty for a linear layer.
        stride: Stride per spatial dimension.
        padding: Zeros ``(left, right)`` per spatial dimension.
        dilation: Dilation per spatial dimension.
        output_padding: Of a transposed convolution.
        padding_mode: ``"zeros"``, or how :attr:`prepad` is filled before a padding-free layer.
        prepad: Argument of ``torch.nn.functional.pad``; empty for zeros.
    """

    kind: Kind
    in_channels: int
    out_channels: int
    bias: bool
    groups: int = 1
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    prepad: tuple[int, ...] = ()

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel_size)

    @property
    def in_dim(self) -> int:
        """Rows of the input factor of one group: ``C_in / G * K``, plus one with a bias."""
        return self.in_channels // self.groups * prod(self.kernel_size) + self.bias

    @property
    def out_dim(self) -> int:
        """Rows of the output factor of one group: ``C_out / G``."""
        return self.out_channels // self.groups

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight in the module's layout."""
        if self.kind == "conv_transpose":
            return (self.in_channels, self.out_dim, *self.kernel_size)
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def standard_input(self, x: Tensor) -> Tensor:
        """Bring an input to ``[N, C_in, I1, ..]``, or ``[N, S, C_in]`` for a linear layer.

        Batch axes are added or flattened, and padding other than zeros is written out.

        Args:
            x: Input as the module receives it.

        Raises:
            ValueError: If the shape does not fit the layer.
        """
        x = self._batched(x, self.in_channels, "x")
        return F.pad(x, self.prepad, mode=self.padding_mode) if self.prepad else x

    def standard_output(self, y: Tensor) -> Tensor:
        """Bring an output or its gradient to ``[N, C_out, O1, ..]`` or ``[N, S, C_out]``.

        Args:
            y: Output as the module returns it.

        Raises:
            ValueError: If the shape does not fit the layer.
        """
        return self._batched(y, self.out_channels, "output")

    def _batched(self, tensor: Tensor, channels: int, name: str) -> Tensor:
        linear = self.kind == "linear"
        at = -1 if linear else -self.dims - 1
        least = 1 if linear else self.dims + 1
        fits = tensor.ndim >= least and (linear or tensor.ndim <= least + 1)
        if not fits or tensor.shape[at] != channels:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, but {self.kind} with {self.dims} "
                f"spatial dimensions needs {channels} channels on axis {at}."
            )
        if not linear:
            return tensor if tensor.ndim == least + 1 else tensor.unsqueeze(0)
        batch = tensor.shape[0] if tensor.ndim > 1 else 1
        return tensor.reshape(batch, prod(tensor.shape[1:-1]), channels)

    def axes(
        self, input_size: Sequence[int], output_size: Sequence[int] | None
    ) -> tuple[Axis, ...]:
        """Axes of the convolution, or of the one that a transposed convolution transposes.

        Args:
            input_size: Spatial shape of the standard input.
            output_size: Spatial shape of the output; by default what the layer would return.
        """
        if self.kind == "conv":
            return conv_axes(input_size, self.kernel_size, self.stride, self.padding, self.dilation)
        if output_size is None:
            return conv_transpose_axes(
                input_size,
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                self.output_padding,
            )
        return tuple(
            Axis(large, k, s, left, right, d, positions=small)
            for small, large, k, s, (left, right), d in zip(
                input_size,
                output_size,
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                strict=True,
            )
        )

    def input_rows(self, shape: Sequence[int], output_size: Sequence[int] | None) -> Network:
        """Network of ``U``: legs ``n g``, features ``ci k1 ..``, and the positions.

        Args:
            shape: Shape of the standard input.
            output_size: Spatial shape of the output, if known.
        """
        if self.kind == "linear":
            return linear_rows(shape[0], shape[1], shape[2], self.groups)
        rows = input_rows if self.kind == "conv" else input_rows_transpose
        return rows(shape[0], shape[1], self.groups, self.axes(shape[2:], output_size))

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The joint matrix ``[G, C_out / G, D]``, bias last.

        Args:
            weight: Weight or its gradient, in the module's layout.
            bias: ``[C_out]``, or None for a matrix without bias column.
        """
        if self.kind == "conv_transpose":
            matrix = rearrange(weight, "(g ci) co ... -> g co (ci ...)", g=self.groups)
        else:
            rows = weight.shape[0] // self.groups
            matrix = weight.reshape(self.groups, rows, prod(weight.shape[1:]))
        if bias is None:
            return matrix
        return torch.cat([matrix, bias.reshape(self.groups, matrix.shape[1], 1)], 2)

    def from_matrix(self, matrix: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Inverse of :meth:`to_matrix`.

        Args:
            matrix: ``[G, C_out / G, D]``.
            shape: Shape of the weight.

        Returns:
            Weight of this shape, and ``[C_out]`` if the matrix has a bias column.
        """
        features = self.in_channels // self.groups * prod(self.kernel_size)
        bias = None if matrix.shape[2] == features else matrix[:, :, features].reshape(-1)
        weight = matrix[:, :, :features]
        if self.kind == "conv_transpose":
            channels = self.in_channels // self.groups
            weight = rearrange(weight, "g co (ci k) -> g ci co k", ci=channels)
        return weight.reshape(tuple(shape)), bias


def _linear(module: Any) -> Layer:
    return Layer("linear", module.in_features, module.out_features, module.bias is not None)


def _conv(module: Any) -> Layer:
    padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
    return _conv_layer(
        (module.in_channels, module.out_channels, module.bias is not None, module.groups),
        tuple(module.kernel_size),
        tuple(module.stride),
        padding,
        tuple(module.dilation),
        module.padding_mode,
    )


@lru_cache(maxsize=4096)
def _conv_layer(
    channels: tuple[int, int, bool, int],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    mode: str,
) -> Layer:
    pads = resolve_padding(padding, kernel_size, stride, dilation)
    prepad: tuple[int, ...] = ()
    if mode != "zeros":
        prepad = tuple(p for pair in reversed(pads) for p in pair)
        pads = ((0, 0),) * len(pads)
    return Layer(
        "conv",
        *channels,
        kernel_size,
        stride,
        pads,
        dilation,
        padding_mode=mode,
        prepad=prepad if any(prepad) else (),
    )


def _conv_transpose(module: Any) -> Layer:
    return Layer(
        "conv_transpose",
        module.in_channels,
        module.out_channels,
        module.bias is not None,
        module.groups,
        tuple(module.kernel_size),
        tuple(module.stride),
        tuple((p, p) for p in module.padding),
        tuple(module.dilation),
        tuple(module.output_padding),
    )


LAYERS: dict[type[nn.Module], Callable[[Any], Layer]] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.ConvTranspose1d: _conv_transpose,
    nn.ConvTranspose2d: _conv_transpose,
    nn.ConvTranspose3d: _conv_transpose,
}
"""Module type -> how to describe it. A new layer type is one function and one row."""


def layer_type(module: nn.Module) -> type[nn.Module] | None:
    """The row of :data:`LAYERS` whose ``forward`` the module runs, or None.

    Subclasses count while they keep the stock ``forward``; with another one, what multiplies the
    weight is unknown.
    """
    for kind in type(module).__mro__:
        if kind in LAYERS:
            return kind if type(module).forward is kind.forward else None
    return None


def describe(module: nn.Module) -> Layer:
    """The :class:`Layer` of a module.

    Raises:
        TypeError: If the module is not one of the supported types with their own ``forward``.
    """
    kind = layer_type(module)
    if kind is None:
        names = ", ".join(supported.__name__ for supported in LAYERS)
        raise TypeError(f"module: got {type(module).__name__}. Supported: {names}.")
    return LAYERS[kind](module)
