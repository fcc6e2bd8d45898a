"""Where views start in the memory of what they are views of, told by the calls that make them.

A compiler that traces a model knows shapes and strides of views, but not their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Starts = Callable[[Tensor, Any, Any, Any], Iterator[int | None]]
"""Of a source, other arguments, named ones, and results: how far each starts from the source."""


def _same(source: Tensor, args: Any, kwargs: Any, made: Any) -> Iterator[int | None]:
    yield 0


def _pieces(source: Tensor, args: Any, kwargs: Any, made: Any) -> Iterator[int | None]:
    """Of ``split`` and ``chunk``."""
    axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    start = 0
    for piece in made:
        yield start
        start += piece.shape[axis] * source.stride(axis)


def _entries(source: Tensor, args: Any, kwargs: Any, made: Any) -> Iterator[int | None]:
    """Of ``unbind``."""
    axis = kwargs.get("dim", args[0] if args else 0)
    for index in range(len(made)):
        yield index * source.stride(axis)


def _narrowed(source: Tensor, args: Any, kwargs: Any, made: Any) -> Iterator[int | None]:
    """Of ``narrow`` and ``select``."""
    axis = kwargs.get("dim", args[0] if args else 0)
    start = args[1] if len(args) > 1 else kwargs.get("start", kwargs.get("index"))
    if not isinstance(start, int):
        yield None
        return
    yield start % source.shape[axis] * source.stride(axis)


def _indexed(source: Tensor, args: Any, kwargs: Any, made: Any) -> Iterator[int | None]:
    """Of numbers and slices; None for other indices."""
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    taken = sum(each is not None and each is not Ellipsis for each in index)
    start, axis = 0, 0
    for each in index:
        if each is None:
            continue
        if each is Ellipsis:
            axis += source.ndim - taken
            continue
        if isinstance(each, slice) and all(_is_number(n) for n in (each.start, each.step)):
            first = min(max(_from_end(each.start or 0, source.shape[axis]), 0), source.shape[axis])
        elif isinstance(each, int) and not isinstance(each, bool):
            first = each % source.shape[axis]
        else:
            yield None
            return
        start += first * source.stride(axis)
        axis += 1
    yield start


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int)


def _from_end(index: int, size: int) -> int:
    return index + size if index < 0 else index


def _table() -> dict[Any, Starts]:
    table: dict[Any, Starts] = {Tensor.__getitem__: _indexed}
    kinds: tuple[tuple[Starts, tuple[str, ...]], ...] = (
        (_pieces, ("split", "split_with_sizes", "chunk")),
        (_entries, ("unbind",)),
        (_narrowed, ("narrow", "select")),
        (_same, ("t", "transpose", "swapaxes", "permute", "movedim", "moveaxis")),
        (_same, ("view", "reshape", "flatten", "squeeze", "unsqueeze", "expand")),
    )
    for starts, names in kinds:
        for name in names:
            for room in (Tensor, torch):
                if hasattr(room, name):
                    table[getattr(room, name)] = starts
    for name in ("T", "mT"):
        table[getattr(Tensor, name).__get__] = _same
    for name in ("numpy_T", "mT"):  # what compilers make of these
        table[getattr(torch.ops.aten, name)] = _same
    return table


STARTS = _table()
"""Function -> where its results start."""
