"""Convolutions and transposed convolutions of any number of spatial dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.curvature.layers.layer import Layer
from tnkfac.curvature.layers.stock_forward import Geometry, geometry, hashable
from tnkfac.curvature.moments.patches import Patches, TracedPatches
from tnkfac.curvature.moments.per_sample import convolution_gradients
from tnkfac.curvature.moments.rows import Pixels, Rows, TracedRows, Vectors
from tnkfac.curvature.moments.unfolding import TransposedUnfolding, Unfolding
from tnkfac.einsum.geometry import resolve_padding


@dataclass(frozen=True)
class Convolution(Layer):
    """``nn.Conv1d/2d/3d``: the rows are the windows of the input.

    Attributes:
        unfolding: Which pixels its taps meet.
        padding_mode: ``"zeros"``, or how :attr:`prepad` is filled before a padding-free layer.
        prepad: Argument of ``torch.nn.functional.pad``; empty for zeros.
    """

    unfolding: Unfolding
    padding_mode: str = "zeros"
    prepad: tuple[int, ...] = ()
    has_geometry: ClassVar[bool] = True

    @classmethod
    def of(cls, module: Any) -> Layer:
        """Describe a module."""
        channels = module.in_channels, module.out_channels, module.bias is not None
        return convolution(cls, channels, tuple(module.kernel_size), hashable(geometry(module)))

    def called(self, geometry: Geometry) -> Layer:
        """This convolution with another geometry."""
        channels = self.in_channels, self.out_channels, self.bias
        if not torch.compiler.is_compiling():
            return convolution(type(self), channels, self.kernel_size, geometry)
        name = traced_name(type(self), channels, self.kernel_size, geometry)
        layer: Layer = getattr(traced_layers, name)
        return layer

    def of_kept(self, x: Tensor, padding: Sequence[int], shape: torch.Size) -> tuple[Layer, Tensor]:
        """Padding modes are written out; the operation pads with zeros only."""
        unfolding = replace(self.unfolding, padding=tuple((p, p) for p in padding))
        return replace(self, unfolding=unfolding, padding_mode="zeros", prepad=()), x

    @classmethod
    def with_geometry(
        cls, channels: tuple[int, int, bool], kernel_size: tuple[int, ...], geometry: Geometry
    ) -> Layer:
        """Make a layer for :func:`convolution`, which keeps it."""
        groups, stride, padding, dilation, _, mode, pads = geometry
        each = partial(_per_dimension, dims=len(kernel_size))
        stride, dilation = each(stride), each(dilation)
        unfolding = partial(Unfolding, channels[0], groups, kernel_size, stride, dilation=dilation)
        if mode != "zeros":  # `forward` pads by what the constructor derived from `padding`
            none = unfolding(padding=((0, 0),) * len(kernel_size))
            return cls(*channels, groups, none, mode, pads if any(pads) else ())
        padding = padding if isinstance(padding, str) else each(padding)
        padding = resolve_padding(padding, kernel_size, stride, dilation)
        return cls(*channels, groups, unfolding(padding=padding))

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Taps per spatial dimension."""
        return self.unfolding.kernel_size

    def standard_input(self, x: Tensor) -> Tensor:
        """Bring an input to ``[N, C_in, I1, ..]``."""
        x = self._images(x, self.in_channels, "x")
        return F.pad(x, self.prepad, mode=self.padding_mode) if self.prepad else x

    def standard_output(self, y: Tensor) -> Tensor:
        """Bring an output or its gradient to ``[N, C_out, O1, ..]``."""
        return self._images(y, self.out_channels, "output")

    def _images(self, tensor: Tensor, channels: int, name: str) -> Tensor:
        axis = -self.dims - 1
        if not -axis <= tensor.ndim <= 1 - axis or tensor.shape[axis] != channels:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, but the layer with {self.dims} "
                f"spatial dimensions needs {channels} channels on axis {axis}."
            )
        return tensor if tensor.ndim == 1 - axis else tensor.unsqueeze(0)

    def input_rows(self, x: Tensor, output_shape: Sequence[int] | None, dtype: torch.dtype) -> Rows:
        """Windows, which nothing forms as a whole unless it is traced."""
        given = None if output_shape is None else tuple(output_shape[-self.dims :])
        sizes = self.unfolding.output_size(x.shape[2:], given)
        if torch.compiler.is_compiling():
            return TracedPatches(x.to(dtype), self.unfolding, sizes)
        if not x.numel():
            return Vectors(x.new_zeros(0, self.groups, self.features), dtype)
        return Patches(x, dtype, self.unfolding, sizes)

    def output_rows(self, g: Tensor, dtype: torch.dtype) -> Rows:
        """Pixels."""
        if torch.compiler.is_compiling():
            pixels = g.to(dtype).flatten(2)
            shape = (g.shape[0], self.groups, self.out_dim, pixels.shape[2])
            return TracedRows(pixels.reshape(shape).permute(1, 0, 3, 2))
        return Pixels(g, dtype, self.groups)

    def sample_gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Gradients of all samples, by a convolution or by unfolding."""
        return convolution_gradients(self.unfolding, x, g, self.weight_shape)

    def sample_bias_gradients(self, g: Tensor) -> Tensor:
        """Sum over pixels."""
        return g.flatten(2).sum(2)

    def output_slice(self, g: Tensor, first: int, last: int) -> tuple[Layer, Tensor]:
        """Rows of some output channels."""
        return replace(self, out_channels=last - first), g[:, first:last]


@lru_cache(maxsize=4096)
def convolution(
    cls: type[Convolution],
    channels: tuple[int, int, bool],
    kernel_size: tuple[int, ...],
    geometry: Geometry,
) -> Layer:
    """A convolution as its ``forward`` computes it.

    Args:
        cls: Which kind.
        channels: ``C_in``, ``C_out``, and whether there is a bias.
        kernel_size: Taps per spatial dimension.
        geometry: Its :func:`~tnkfac.curvature.layers.stock_forward.geometry`.
    """
    return cls.with_geometry(channels, kernel_size, geometry)


class _Traced:
    """Layers that compiled graphs refer to, as attributes."""


traced_layers = _Traced()


def traced_name(
    cls: type[Convolution],
    channels: tuple[int, int, bool],
    kernel_size: tuple[int, ...],
    geometry: Geometry,
) -> str:
    """Name of a :func:`convolution` among the :data:`traced_layers`."""
    layer = convolution(cls, channels, kernel_size, geometry)
    known = vars(traced_layers)
    for name, known_layer in known.items():
        if known_layer == layer:
            return name
    known[f"layer{len(known)}"] = layer
    return f"layer{len(known) - 1}"


# What `torch.compiler.assume_constant_result` sets; the decorator itself would import the compiler.
traced_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _per_dimension(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """One number stands for all dimensions, as in torch's functionals."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers


class TransposedConvolution(Convolution):
    """``nn.ConvTranspose1d/2d/3d``: taps of which only some meet a position."""

    inputs_first: ClassVar[bool] = True

    def of_kept(self, x: Tensor, padding: Sequence[int], shape: torch.Size) -> tuple[Layer, Tensor]:
        """The input itself."""
        return self, x

    @classmethod
    def with_geometry(
        cls, channels: tuple[int, int, bool], kernel_size: tuple[int, ...], geometry: Geometry
    ) -> Layer:
        """Make a layer for :func:`convolution`, which keeps it."""
        groups, stride, padding, dilation, output_padding, *_ = geometry
        each = partial(_per_dimension, dims=len(kernel_size))
        zeros = tuple((p, p) for p in each(padding))
        unfolding = TransposedUnfolding(
            channels[0], groups, kernel_size, each(stride), zeros, each(dilation),
            each(output_padding),
        )  # fmt: skip
        return cls(*channels, groups, unfolding)
