"""Structured matrices in the state of a parameter: one tensor per part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tnkfac.curvature import Parts
from tnkfac.optim.finite import finite
from tnkfac.optim.params.captured import CapturedLayer


def keys(name: str, count: int) -> list[str]:
    """Keys of the parts of a matrix: its name alone if there is one part."""
    return [name] if count == 1 else [f"{name}.{index}" for index in range(count)]


def store(state: dict[str, Tensor], name: str, parts: Parts) -> None:
    """Put the parts of a matrix into a state."""
    state.update(zip(keys(name, len(parts)), parts, strict=True))


def read(state: dict[str, Any], name: str, count: int, dtype: Any = None) -> Parts:
    """The parts of a matrix, cast if a dtype is given."""
    parts = (state[key] for key in keys(name, count))
    return tuple(part if dtype is None else part.to(dtype) for part in parts)


def load(
    layer: CapturedLayer, state: dict[str, Any], names: Sequence[str], dtype: Any = None
) -> list[Parts]:
    """Parts of an input-side and an output-side matrix, cast if a dtype is given."""
    pair = zip(names, (layer.statistics.k, layer.statistics.c), strict=True)
    return [read(state, name, len(s.shapes), dtype) for name, s in pair]


def overwrite(state: dict[str, Any], new: dict[str, Parts], keep: Tensor | None) -> None:
    """Write new parts into the state, unless one is not finite or ``keep`` is zero."""
    pairs = [
        (state[key], part.to(state[key].dtype))
        for name, parts in new.items()
        for key, part in zip(keys(name, len(parts)), parts, strict=True)
    ]
    good = finite([part for _, part in pairs])
    if keep is not None:
        good = good & (keep.to(good.device) > 0)
    for old, part in pairs:
        old.copy_(torch.where(good, part, old))
