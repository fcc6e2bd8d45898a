"""The layer table: what depends on the type of a module, and nothing else.

Every supported layer is a linear map with weight sharing, ``y_n = W U_n`` with ``U_n`` of shape
``[D, S]``: ``D`` features per row of ``W``, ``S`` positions that share the weight. A :class:`Layer`
says what the rows of its inputs and outputs are, how its parameters become the matrix ``[W | b]``,
and what the gradients of samples are. Everything else is the same for all layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from tnkfac.curvature.forward import forward_of, geometry, hashable, leads_to
from tnkfac.curvature.moments.matrices import to_matrix, to_weight
from tnkfac.curvature.moments.one_hot import OneHot, equal_positions
from tnkfac.curvature.moments.patches import Patches, TracedPatches
from tnkfac.curvature.moments.per_sample import convolution_gradients
from tnkfac.curvature.moments.rows import Pixels, Rows, TracedRows, Vectors
from tnkfac.curvature.moments.second_moment import Approx, SecondMoment
from tnkfac.curvature.moments.unfolding import TransposedUnfolding, Unfolding
from tnkfac.einsum.geometry import resolve_padding

Shape = Sequence[int]


@dataclass(frozen=True)
class Layer(ABC):
    """One supported module, as plain values.

    Attributes:
        in_channels: Features or channels ``C_in``.
        out_channels: Features or channels ``C_out``.
        bias: Whether the joint matrix has a bias column.
        groups: Channel groups ``G``; each has a matrix of its own.
        inputs_first: Whether the first axis of the weight counts inputs.
        reads_indices: Whether inputs are integers.
        has_geometry: Whether its ``forward`` reads stride, padding and the like of its module.
    """

    in_channels: int
    out_channels: int
    bias: bool
    groups: int
    inputs_first: ClassVar[bool] = False
    reads_indices: ClassVar[bool] = False
    has_geometry: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def of(cls, module: Any) -> Layer:
        """Describe a module."""

    @classmethod
    def accepts(cls, module: Any) -> bool:
        """Whether a module of its type is the linear map that is described."""
        return True

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Taps per spatial dimension."""
        return ()

    def called(self, found: tuple[Any, ...]) -> Layer:
        """This layer with another :func:`~tnkfac.curvature.forward.geometry`."""
        return self

    def of_kept(self, x: Tensor, padding: Sequence[int], shape: torch.Size) -> tuple[Layer, Tensor]:
        """The layer that takes the input that an operation of torch has kept, and this.

        Args:
            x: What the operation keeps for its backward pass.
            padding: By how much it pads, per spatial dimension.
            shape: Shape of the output.
        """
        return self, x

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel_size)

    @property
    def features(self) -> int:
        """Numbers of a row of ``W`` of one group: ``C_in / G * K``."""
        return self.in_channels // self.groups * prod(self.kernel_size)

    @property
    def in_dim(self) -> int:
        """Rows of the input factor of one group: the features, plus one with a bias."""
        return self.features + self.bias

    @property
    def out_dim(self) -> int:
        """Rows of the output factor of one group: ``C_out / G``."""
        return self.out_channels // self.groups

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight in the module's layout."""
        if self.inputs_first:
            return (self.in_channels, self.out_dim, *self.kernel_size)
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def weight_layout(self) -> tuple[bool, int, tuple[int, ...]]:
        """What layers that share a weight have to have in common."""
        return self.inputs_first, self.groups, self.weight_shape

    @abstractmethod
    def standard_input(self, x: Tensor) -> Tensor:
        """Bring an input to ``[N, C_in, I1, ..]``, ``[N, S, C_in]`` or indices ``[N, S]``.

        Batch axes are added or flattened, and padding other than zeros is written out.

        Args:
            x: Input as the module receives it.

        Raises:
            ValueError: If the shape does not fit the layer.
        """

    @abstractmethod
    def standard_output(self, y: Tensor) -> Tensor:
        """Bring an output or its gradient to ``[N, C_out, O1, ..]`` or ``[N, S, C_out]``.

        Args:
            y: Output as the module returns it.

        Raises:
            ValueError: If the shape does not fit the layer.
        """

    @abstractmethod
    def input_rows(self, x: Tensor, output_shape: Sequence[int] | None, dtype: torch.dtype) -> Rows:
        """What is multiplied with the weight.

        Args:
            x: Standard input.
            output_shape: Shape of the output, if known.
            dtype: In which to read.
        """

    @abstractmethod
    def output_rows(self, g: Tensor, dtype: torch.dtype) -> Rows:
        """What comes out of it, from a standard output ``g`` or its gradient."""

    @abstractmethod
    def sample_gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Gradients with respect to the weight, one per sample, ``[N, *weight.shape]``.

        Args:
            x: Standard input.
            g: Standard gradient with respect to the output.
        """

    def sample_squares(self, x: Tensor, g: Tensor) -> Tensor | None:
        """Sum over samples of their squares, where it needs none of them; else None."""
        return None

    @abstractmethod
    def sample_bias_gradients(self, g: Tensor) -> Tensor:
        """Gradients with respect to the bias, ``[N, C_out]``."""

    @abstractmethod
    def output_slice(self, g: Tensor, first: int, last: int) -> tuple[Layer, Tensor]:
        """A layer without groups that only has some output channels, and their ``g``."""

    def input_moment(
        self,
        x: Tensor,
        approx: Approx,
        output_shape: Shape | None = None,
        dtype: torch.dtype | None = None,
    ) -> SecondMoment:
        """Second moment of what one call multiplied with ``[W | b]``.

        Args:
            x: Input as the module received it.
            approx: ``"expand"`` or ``"reduce"``.
            output_shape: Shape of what it returned.
            dtype: In which to read, by default that of ``x``.
        """
        if dtype is None:
            dtype = x.dtype if x.is_floating_point() else torch.float32
        rows = self.input_rows(self.standard_input(x), output_shape, dtype)
        return SecondMoment.of(rows, approx, True, self.bias)

    def output_moment(
        self, g: Tensor, approx: Approx, dtype: torch.dtype | None = None
    ) -> SecondMoment:
        """Second moment of the gradient ``g`` with respect to what one call returned."""
        rows = self.output_rows(self.standard_output(g), dtype or g.dtype)
        return SecondMoment.of(rows, approx, False, self.bias)

    def moments(
        self, x: Tensor, g: Tensor, approx: Approx, dtype: torch.dtype | None = None
    ) -> tuple[SecondMoment, SecondMoment]:
        """Both of one call; ``g`` is shaped like its output."""
        return self.input_moment(x, approx, g.shape, dtype), self.output_moment(g, approx, dtype)

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The joint matrix ``[G, C_out / G, D]``, bias last.

        Args:
            weight: Weight or its gradient, in the module's layout.
            bias: ``[C_out]``, or None for a matrix without bias column.
        """
        matrix = to_matrix(weight, self.groups, self.inputs_first)
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
        features = self.features
        bias = None if matrix.shape[2] == features else matrix[:, :, features].reshape(-1)
        weight = matrix[:, :, :features]
        if self.inputs_first:
            weight = to_weight(weight, self.kernel_size, True)
        return weight.reshape(tuple(shape)), bias

    def sample_matrices(self, x: Tensor, g: Tensor) -> Tensor:
        """Gradients with respect to ``[W | b]``, one per sample, ``[G, N, C_out / G, D]``.

        Args:
            x: Standard input.
            g: Standard gradient with respect to the output.
        """
        weights = self.sample_gradients(x, g)
        bias = self.sample_bias_gradients(g) if self.bias else None
        matrices: Tensor = vmap(self.to_matrix, (0, 0 if self.bias else None))(weights, bias)
        return matrices.transpose(0, 1)

    def broadcast(self, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Shape one number per feature and one per output so that both multiply the weight.

        Args:
            inputs: ``[G, C_in / G * K]``.
            outputs: ``[G, C_out / G]``.

        Returns:
            Both with as many axes as the weight; with several groups one more, as its first axis
            is then split into groups.
        """
        groups, ones = self.groups, [1] * self.dims
        if self.inputs_first:
            right = inputs.reshape(groups, self.in_channels // groups, 1, *self.kernel_size)
            left = outputs.reshape(groups, 1, self.out_dim, *ones)
        else:
            right = inputs.reshape(groups, 1, *self.weight_shape[1:])
            left = outputs.reshape(groups, self.out_dim, 1, *ones)
        return (right[0], left[0]) if groups == 1 else (right, left)


def _positions(tensor: Tensor, channels: int, name: str) -> Tensor:
    """Features last to ``[N, S, C]``.

    Raises:
        ValueError: If there are not so many.
    """
    if tensor.ndim < 1 or tensor.shape[-1] != channels:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, but the layer needs {channels} channels "
            "on axis -1."
        )
    batch = tensor.shape[0] if tensor.ndim > 1 else 1
    return tensor.reshape(batch, prod(tensor.shape[1:-1]), channels)


class _ByPosition(Layer):
    """A layer whose outputs have their features last."""

    def standard_output(self, y: Tensor) -> Tensor:
        """Bring an output or its gradient to ``[N, S, C_out]``."""
        return _positions(y, self.out_channels, "output")

    def output_rows(self, g: Tensor, dtype: torch.dtype) -> Rows:
        """Every position."""
        return _vectors(g, dtype)

    def sample_bias_gradients(self, g: Tensor) -> Tensor:
        """Sum over positions."""
        return g.sum(1)

    def output_slice(self, g: Tensor, first: int, last: int) -> tuple[Layer, Tensor]:
        """Some features."""
        return replace(self, out_channels=last - first), g[..., first:last]


def _vectors(x: Tensor, dtype: torch.dtype) -> Rows:
    """Rows ``[N, S, C]``."""
    if torch.compiler.is_compiling():
        return TracedRows(x.to(dtype).unsqueeze(0))
    return Vectors(x.reshape(-1, 1, x.shape[2]), dtype, x.shape[1])


class Linear(_ByPosition):
    """``nn.Linear``: the rows are the input itself."""

    @classmethod
    def of(cls, module: Any) -> Layer:
        """Describe a module."""
        return cls(module.in_features, module.out_features, module.bias is not None, 1)

    def standard_input(self, x: Tensor) -> Tensor:
        """Bring an input to ``[N, S, C_in]``."""
        return _positions(x, self.in_channels, "x")

    def of_kept(self, x: Tensor, padding: Sequence[int], shape: torch.Size) -> tuple[Layer, Tensor]:
        """In the shape of the output."""
        return self, x.reshape(*shape[:-1], self.in_channels)

    def input_rows(self, x: Tensor, output_shape: Sequence[int] | None, dtype: torch.dtype) -> Rows:
        """Every position."""
        return _vectors(x, dtype)

    def sample_gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """A product for every sample."""
        return torch.bmm(g.mT, x)

    def sample_squares(self, x: Tensor, g: Tensor) -> Tensor | None:
        """A product of squares, for one position."""
        if x.shape[1] == 1:
            return g[:, 0].square().T @ x[:, 0].square()
        return None


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

    def called(self, found: tuple[Any, ...]) -> Layer:
        """This convolution with another geometry."""
        channels = self.in_channels, self.out_channels, self.bias
        if not torch.compiler.is_compiling():
            return convolution(type(self), channels, self.kernel_size, found)
        name = traced_name(type(self), channels, self.kernel_size, found)
        layer: Layer = getattr(traced_layers, name)
        return layer

    def of_kept(self, x: Tensor, padding: Sequence[int], shape: torch.Size) -> tuple[Layer, Tensor]:
        """Padding modes are written out; the operation pads with zeros only."""
        unfolding = replace(self.unfolding, padding=tuple((p, p) for p in padding))
        return replace(self, unfolding=unfolding, padding_mode="zeros", prepad=()), x

    @classmethod
    def with_geometry(
        cls, channels: tuple[int, int, bool], kernel_size: tuple[int, ...], found: tuple[Any, ...]
    ) -> Layer:
        """As :func:`convolution`, which keeps what this returns."""
        groups, stride, padding, dilation, _, mode, pads = found
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
        at = -self.dims - 1
        if not -at <= tensor.ndim <= 1 - at or tensor.shape[at] != channels:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, but the layer with {self.dims} "
                f"spatial dimensions needs {channels} channels on axis {at}."
            )
        return tensor if tensor.ndim == 1 - at else tensor.unsqueeze(0)

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
        """By a convolution, or by unfolding."""
        return convolution_gradients(self.unfolding, x, g, self.weight_shape)

    def sample_bias_gradients(self, g: Tensor) -> Tensor:
        """Sum over pixels."""
        return g.flatten(2).sum(2)

    def output_slice(self, g: Tensor, first: int, last: int) -> tuple[Layer, Tensor]:
        """Some channels."""
        return replace(self, out_channels=last - first), g[:, first:last]


@lru_cache(maxsize=4096)
def convolution(
    cls: type[Convolution],
    channels: tuple[int, int, bool],
    kernel_size: tuple[int, ...],
    found: tuple[Any, ...],
) -> Layer:
    """A convolution as its ``forward`` computes it.

    Args:
        cls: Which kind.
        channels: ``C_in``, ``C_out``, and whether there is a bias.
        kernel_size: Taps per spatial dimension.
        found: Its :func:`~tnkfac.curvature.forward.geometry`.
    """
    return cls.with_geometry(channels, kernel_size, found)


class _Traced:
    """Layers that compiled graphs refer to, as attributes."""


traced_layers = _Traced()


def traced_name(
    cls: type[Convolution],
    channels: tuple[int, int, bool],
    kernel_size: tuple[int, ...],
    found: tuple[Any, ...],
) -> str:
    """Name of a :func:`convolution` among the :data:`traced_layers`."""
    layer = convolution(cls, channels, kernel_size, found)
    known = vars(traced_layers)
    for name, other in known.items():
        if other == layer:
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
        cls, channels: tuple[int, int, bool], kernel_size: tuple[int, ...], found: tuple[Any, ...]
    ) -> Layer:
        """As :func:`convolution`, which keeps what this returns."""
        groups, stride, padding, dilation, output_padding, *_ = found
        each = partial(_per_dimension, dims=len(kernel_size))
        zeros = tuple((p, p) for p in each(padding))
        unfolding = TransposedUnfolding(
            channels[0], groups, kernel_size, each(stride), zeros, each(dilation),
            each(output_padding),
        )  # fmt: skip
        return cls(*channels, groups, unfolding)


@dataclass(frozen=True)
class Embedding(_ByPosition):
    """``nn.Embedding``: the rows are one-hot vectors, which are counted.

    Attributes:
        padding_idx: Index whose row gets no gradient.
    """

    padding_idx: int | None = None
    inputs_first: ClassVar[bool] = True
    reads_indices: ClassVar[bool] = True

    @classmethod
    def of(cls, module: Any) -> Layer:
        """Describe a module."""
        return cls(module.num_embeddings, module.embedding_dim, False, 1, module.padding_idx)

    @classmethod
    def accepts(cls, module: Any) -> bool:
        """Rows that are rescaled, or whose gradients are, come from no linear map."""
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse

    def standard_input(self, x: Tensor) -> Tensor:
        """Bring indices to ``[N, S]``."""
        if x.is_floating_point() or x.is_complex():
            raise TypeError(f"x: got {x.dtype}. Supported: integers, for an Embedding.")
        batch = x.shape[0] if x.ndim else 1
        return x.reshape(batch, prod(x.shape[1:])).long()

    def input_rows(self, x: Tensor, output_shape: Sequence[int] | None, dtype: torch.dtype) -> Rows:
        """Every index."""
        return OneHot(x, dtype, self.in_channels, self.padding_idx)

    def sample_gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Gradients of positions, added to the rows that they read."""
        total = g.new_zeros(len(x), self.in_channels, self.out_channels)
        index = x.unsqueeze(2).expand(-1, -1, self.out_channels)
        return total.scatter_add_(1, index, self._without_padding(x, g))

    def sample_squares(self, x: Tensor, g: Tensor) -> Tensor | None:
        """Positions of one sample that read the same row are added before they are squared."""
        g = self._without_padding(x, g)
        if x.shape[1] > 1:
            same = (x.unsqueeze(1) == x.unsqueeze(2)).to(g.dtype)
            g = (same @ g).square() / equal_positions(x, g.dtype).unsqueeze(2)
        else:
            g = g.square()
        total = g.new_zeros(self.in_channels, self.out_channels)
        return total.index_add_(0, x.flatten(), g.flatten(0, 1))

    def _without_padding(self, x: Tensor, g: Tensor) -> Tensor:
        if self.padding_idx is None:
            return g
        return g * (x != self.padding_idx).unsqueeze(2)


LAYERS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: Linear,
    nn.Conv1d: Convolution,
    nn.Conv2d: Convolution,
    nn.Conv3d: Convolution,
    nn.ConvTranspose1d: TransposedConvolution,
    nn.ConvTranspose2d: TransposedConvolution,
    nn.ConvTranspose3d: TransposedConvolution,
    nn.Embedding: Embedding,
}
"""Module type -> what is known of it. A new layer type is one class and one row."""


STOCK = {kind: kind.forward for kind in LAYERS}
"""The ``forward`` of the supported types as torch defines it, whoever replaces it later."""


def layer_type(module: nn.Module, indices: bool = False) -> type[nn.Module] | None:
    """The row of :data:`LAYERS` whose ``forward`` the module runs, or None.

    Subclasses count while they keep the stock ``forward``, and so do modules and classes whose
    ``forward`` is a wrapper that names it (``__wrapped__``); with another one, what multiplies the
    weight is unknown.

    Args:
        module: Any module.
        indices: Whether layers that read integers count.
    """
    for kind in type(module).__mro__:
        if kind in LAYERS:
            layer = LAYERS[kind]
            known = leads_to(forward_of(module), module, STOCK[kind]) and layer.accepts(module)
            return kind if known and (indices or not layer.reads_indices) else None
    return None


def is_wrapped(module: nn.Module) -> bool:
    """Whether a supported module runs its stock ``forward`` through somebody's wrapper."""
    kind = layer_type(module, indices=True)
    return kind is not None and forward_of(module) is not STOCK[kind]


def describe(module: nn.Module) -> Layer:
    """The :class:`Layer` of a module.

    Raises:
        TypeError: If the module is not one of the supported types with their own ``forward``.
    """
    kind = layer_type(module, indices=True)
    if kind is None:
        names = ", ".join(supported.__name__ for supported in LAYERS)
        raise TypeError(f"module: got {type(module).__name__}. Supported: {names}.")
    return LAYERS[kind].of(module)
