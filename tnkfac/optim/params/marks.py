"""Numbers of the state that the host reads at every step, such as when a layer was updated.

The state has the only copy, a tensor on the CPU. What was read of it is remembered as long as it
is the same tensor and nobody has written to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tnkfac.optim.params.captured import CapturedLayer

State = Mapping[Tensor, dict[str, Any]]


def mark(state: State, layer: CapturedLayer, name: str) -> int:
    """A number that the state has of a layer, or -1.

    Args:
        state: State of the optimizer.
        layer: The layer.
        name: ``"first_update"``, ``"last_update"`` or ``"last_inverse"``.
    """
    own = state.get(layer.weight)
    kept: Tensor | None = own.get(name) if own else None
    if kept is None:
        return -1
    seen = layer.seen.get(name)
    if seen is not None and seen[0] is kept and seen[1] == kept._version:
        return seen[2]
    value = int(kept)
    _remember(layer, name, kept, value)
    return value


def set_mark(state: State, layer: CapturedLayer, name: str, value: int) -> None:
    """Write a number that the state has of a layer."""
    kept: Tensor = state[layer.weight][name]
    kept.fill_(value)
    _remember(layer, name, kept, value)


def _remember(layer: CapturedLayer, name: str, kept: Tensor, value: int) -> None:
    if not kept.is_inference():  # these do not tell that they were written to
        layer.seen[name] = (kept, kept._version, value)
