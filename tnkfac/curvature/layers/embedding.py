"""Embeddings: linear layers of one-hot vectors that nobody forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from tnkfac.curvature.layers.layer import Layer
from tnkfac.curvature.layers.linear import ByPosition
from tnkfac.curvature.moments.one_hot import OneHot, equal_positions
from tnkfac.curvature.moments.rows import Rows


@dataclass(frozen=True)
class Embedding(ByPosition):
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
