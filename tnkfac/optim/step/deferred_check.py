"""Large gradients of the CPU whose norms tell whether they are finite.

The norm of a preconditioned gradient is needed for grafting anyway; to look at the gradient before
would read it once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from tnkfac.curvature import fast
from tnkfac.optim.finite import finite_on_host
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.scaling import Scaling
from tnkfac.optim.step import apply, row_chunks

State = Any


class DeferredCheck:
    """The large layers of one step whose weights' gradients are left to their norms."""

    def __init__(self, layers: Sequence[CapturedLayer] = ()) -> None:
        """These layers."""
        self._layers = list(layers)

    @classmethod
    def among(
        cls,
        layers: Sequence[CapturedLayer],
        state: State,
        scales: Callable[[CapturedLayer], bool],
    ) -> DeferredCheck:
        """Those of some layers that can be left.

        Args:
            layers: All layers.
            state: State of the optimizer.
            scales: Whether a layer has diagonal factors.
        """
        large = [
            layer
            for layer in layers
            if row_chunks.suits(layer) and scales(layer) and layer.group["grafting"]
        ]
        if not large or not fast():
            return cls()
        if any(layer.group["kl_clip"] is not None for layer in layers):
            return cls()  # that asks for all products with gradients before any step
        if any(p.device.type != "cpu" for layer in layers for p in layer.params()):
            return cls()
        return cls([layer for layer in large if apply.suits(layer, state)])

    def others(self, gradients: Iterable[Tensor]) -> list[Tensor]:
        """All other gradients."""
        own = {id(layer.weight.grad) for layer in self._layers}
        return [gradient for gradient in gradients if id(gradient) not in own]

    def norms(
        self, scalings: Callable[[list[CapturedLayer]], list[Scaling | None]]
    ) -> dict[int, float] | None:
        """Norms of the preconditioned gradients, by ``id`` of the layer.

        None if a gradient is not finite; an update of the factors, whose statistics are all
        finite, stands.
        """
        found: dict[int, float] = {}
        for layer, scaling in zip(self._layers, scalings(self._layers), strict=True):
            assert scaling is not None
            assert layer.weight.grad is not None
            found[id(layer)] = row_chunks.norm(layer, scaling)
            if not apply.in_range(found[id(layer)]) and not finite_on_host([layer.weight.grad]):
                return None
        return found
