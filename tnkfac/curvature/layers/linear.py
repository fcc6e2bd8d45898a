"""Linear layers, and what they share with all whose features come last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from tnkfac.curvature.layers.layer import Layer
from tnkfac.curvature.moments.rows import Rows, TracedRows, Vectors


def positions(tensor: Tensor, channels: int, name: str) -> Tensor:
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


class ByPosition(Layer):
    """A layer whose outputs have their features last."""

    def standard_output(self, y: Tensor) -> Tensor:
        """Bring an output or its gradient to ``[N, S, C_out]``."""
        return positions(y, self.out_channels, "output")

    def output_rows(self, g: Tensor, dtype: torch.dtype) -> Rows:
        """Every position."""
        return vectors(g, dtype)

    def sample_bias_gradients(self, g: Tensor) -> Tensor:
        """Sum over positions."""
        return g.sum(1)

    def output_slice(self, g: Tensor, first: int, last: int) -> tuple[Layer, Tensor]:
        """Rows of some output features."""
        return replace(self, out_channels=last - first), g[..., first:last]


def vectors(x: Tensor, dtype: torch.dtype) -> Rows:
    """Rows ``[N, S, C]``."""
    if torch.compiler.is_compiling():
        return TracedRows(x.to(dtype).unsqueeze(0))
    return Vectors(x.reshape(-1, 1, x.shape[2]), dtype, x.shape[1])


class Linear(ByPosition):
    """``nn.Linear``: the rows are the input itself."""

    @classmethod
    def of(cls, module: Any) -> Layer:
        """Describe a module."""
        return cls(module.in_features, module.out_features, module.bias is not None, 1)

    def standard_input(self, x: Tensor) -> Tensor:
        """Bring an input to ``[N, S, C_in]``."""
        return positions(x, self.in_channels, "x")

    def of_kept(self, x: Tensor, padding: Sequence[int], shape: torch.Size) -> tuple[Layer, Tensor]:
        """In the shape of the output."""
        return self, x.reshape(*shape[:-1], self.in_channels)

    def input_rows(self, x: Tensor, output_shape: Sequence[int] | None, dtype: torch.dtype) -> Rows:
        """Every position."""
        return vectors(x, dtype)

    def sample_gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """A product for every sample."""
        return torch.bmm(g.mT, x)

    def sample_squares(self, x: Tensor, g: Tensor) -> Tensor | None:
        """A product of squares, for one position."""
        if x.shape[1] == 1:
            return g[:, 0].square().T @ x[:, 0].square()
        return None


class InputsFirstLinear(Linear):
    """A linear layer whose weight is ``[C_in, C_out]``, as in ``x @ weight``."""

    inputs_first: ClassVar[bool] = True
