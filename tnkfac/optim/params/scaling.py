"""Preconditioning with diagonal factors, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Diagonals = dict[int, tuple[Tensor, Tensor]]
"""``K [G, D]`` and ``C [G, C_out / G]`` of layers with diagonal factors, by ``id`` of the layer."""


@dataclass(eq=False)
class ElementwisePreconditioner:
    """``C C^T G K K^T`` of diagonal factors.

    Attributes:
        K: Input factor ``[G, D]`` in the state.
        C: Output factor ``[G, C_out / G]`` in the state.
        versions: Which versions of the two were read.
        squares: Squares of the two, once they were needed.
    """

    K: Tensor
    C: Tensor
    versions: tuple[int, int]
    squares: Squares | None = None

    def holds(self, K: Tensor, C: Tensor) -> bool:
        """Whether these factors are still those that were read."""
        return self.K is K and self.C is C and self.versions == (K._version, C._version)

    @property
    def groups(self) -> int:
        """Channel groups; with more than one, the first axis of a weight is split."""
        return len(self.C)


class Squares(NamedTuple):
    """Squares of factors that broadcast.

    Attributes:
        inputs: Of ``K`` in the shape of the weight, size one along its outputs.
        outputs: Of ``C``, size one along the rest.
        bias: What the bias is scaled by, ``[C_out]``, or None.
    """

    inputs: Tensor
    outputs: Tensor
    bias: Tensor | None
