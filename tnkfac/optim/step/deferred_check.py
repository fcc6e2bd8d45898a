"""Gradients that are not read to see that they are finite: their norms, needed anyway, will tell.

That is known only after factors were updated, so these are put back where a batch turns out to be
skipped.
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
Groups = dict[int, dict[str, Any]]


class Unread:
    """The large layers of one step whose weights' gradients are left to their norms."""

    def __init__(self, layers: Sequence[CapturedLayer] = ()) -> None:
        """These layers."""
        self._layers = list(layers)
        self._before: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def among(
        cls,
        layers: Sequence[CapturedLayer],
        pending: Iterable[CapturedLayer],
        state: State,
        scales: Callable[[CapturedLayer], bool],
    ) -> Unread:
        """Those of some layers that can be left.

        Args:
            layers: All layers.
            pending: Those whose factors are to be updated.
            state: State of the optimizer.
            scales: Whether a layer has diagonal factors, of which copies are cheap.
        """
        large = [
            layer
            for layer in layers
            if row_chunks.suits(layer) and scales(layer) and layer.group["grafting"]
        ]
        if not large or not fast() or not all(scales(layer) for layer in pending):
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

    def remember(self, pending: Iterable[CapturedLayer], state: State) -> None:
        """Keep copies of what an update of factors is about to change."""
        if self._layers:
            for layer in pending:
                kept = (value for key, value in state[layer.weight].items() if key in _FACTORS)
                self._before += [(value, value.clone()) for value in kept]

    def norms(
        self, scalings: Callable[[list[CapturedLayer]], list[Scaling | None]]
    ) -> dict[int, float] | None:
        """Norms of the preconditioned gradients, by ``id`` of the layer.

        None, with all factors as they were, if a gradient is not finite.
        """
        found: dict[int, float] = {}
        for layer, scaling in zip(self._layers, scalings(self._layers), strict=True):
            assert scaling is not None
            assert layer.weight.grad is not None
            found[id(layer)] = row_chunks.norm(layer, scaling)
            if apply.in_range(found[id(layer)]) or finite_on_host([layer.weight.grad]):
                continue
            for value, before in self._before:
                value.copy_(before)
            return None
        return found


_FACTORS = ("K", "C", "m_K", "m_C")
