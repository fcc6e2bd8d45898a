"""Interface of layer types: rows of inputs and outputs, and weight as a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import vmap

from tnkfac.curvature.layers.stock_forward import Geometry
from tnkfac.curvature.moments.matrices import to_matrix, to_weight
from tnkfac.curvature.moments.rows import Rows
from tnkfac.curvature.moments.second_moment import Approx, SecondMoment

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

    def called(self, geometry: Geometry) -> Layer:
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
        """Properties that layers must have in common to share a weight."""
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
        """Rows of the input, which are multiplied with the weight.

        Args:
            x: Standard input.
            output_shape: Shape of the output, if known.
            dtype: In which to read.
        """

    @abstractmethod
    def output_rows(self, g: Tensor, dtype: torch.dtype) -> Rows:
        """Rows of a standard output ``g``, or of its gradient."""

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
        """Second moments of input and output of one call; ``g`` is shaped like its output."""
        return self.input_moment(x, approx, g.shape, dtype), self.output_moment(g, approx, dtype)

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The joint matrix ``[G, C_out / G, D]``, bias last.

        Args:
            weight: Weight or its gradient, in the module's layout.
            bias: ``[C_out]``, or None for a matrix without bias column.
        """
        groups, columns = self.groups, prod(weight.shape[1:])
        if self.inputs_first:
            matrix = to_matrix(weight, groups, True)
        else:
            matrix = weight.reshape(groups, weight.shape[0] // groups, columns)
        if bias is None:
            return matrix
        return torch.cat([matrix, bias.reshape(groups, matrix.shape[1], 1)], 2)

    def from_matrix(self, matrix: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Inverse of :meth:`to_matrix`.

        Args:
            matrix: ``[G, C_out / G, D]``.
            shape: Shape of the weight.

        Returns:
            Weight of this shape, and ``[C_out]`` if the matrix has a bias column.
        """
        features = prod(shape) // (self.out_channels or 1)
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
