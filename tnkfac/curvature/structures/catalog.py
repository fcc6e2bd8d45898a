"""Structures by the names that users write."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache, partial

from tnkfac.curvature.structures.arrow import Arrow
from tnkfac.curvature.structures.block_diagonal import BlockDiagonal
from tnkfac.curvature.structures.dense import Dense
from tnkfac.curvature.structures.diagonal import Diagonal
from tnkfac.curvature.structures.hierarchical import Hierarchical
from tnkfac.curvature.structures.structure import Structure
from tnkfac.curvature.structures.toeplitz import Toeplitz

LARGEST_DENSE = 1024
"""Above this many rows ``"auto"`` keeps blocks instead of the whole matrix."""
LARGEST_DENSE_OUTPUT = 128
"""Such a bound for output factors: their blocks train as well (``benchmarks/auto.py``)."""
AUTO_BLOCK = 128
"""Rows of a block of ``"auto"``."""


def auto(dim: int, largest: int = LARGEST_DENSE) -> Structure:
    """Dense up to some number of rows, block-diagonal above."""
    return Dense(dim) if dim <= largest else BlockDiagonal(dim, AUTO_BLOCK)


STRUCTURES: dict[str, Callable[..., Structure]] = {
    "auto": auto,
    "dense": Dense,
    "diagonal": Diagonal,
    "block{k}diagonal": BlockDiagonal,
    "hierarchical{k1}_{k2}": Hierarchical,
    "triltoeplitz": partial(Toeplitz, lower=True),
    "triutoeplitz": partial(Toeplitz, lower=False),
    "triltopleftdiag": partial(Arrow, last=True, row=True),
    "trilbottomrightdiag": partial(Arrow, last=False, row=False),
    "triutopleftdiag": partial(Arrow, last=True, row=False),
    "triubottomrightdiag": partial(Arrow, last=False, row=True),
}
"""Name -> how to make the structure of ``dim`` rows and the positive numbers in braces."""
FACTORS = ("auto", "dense", "diagonal", "block{k}diagonal")
"""Structures whose statistic is the factor itself, restricted to their support."""


@lru_cache(maxsize=64)
def _pattern(row: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{\w+\}", r"([1-9][0-9]{0,8})", row))


def _found(
    name: str, supported: Iterable[str] | None = None
) -> tuple[Callable[..., Structure], list[int]]:
    """The row of :data:`STRUCTURES` that a name belongs to, and the numbers in it."""
    supported = tuple(STRUCTURES if supported is None else supported)
    message = f"structure: got {name!r}. Supported: {', '.join(supported)}."
    if not isinstance(name, str):
        raise TypeError(message)
    for row in supported:
        match = _pattern(row).fullmatch(name)
        if match:
            return STRUCTURES[row], [int(number) for number in match.groups()]
    raise ValueError(message)


def check_structure(name: str) -> str:
    """Return the name if it is known.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it is unknown.
    """
    _found(name)
    return name


def check_factor_structure(name: str) -> str:
    """Return the name if a factor can be had in it.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it is unknown, or only meant for preconditioners.
    """
    _found(name, FACTORS)
    return name


def resolve_structure(name: str, dim: int, output: bool = False) -> Structure:
    """The structure of that name for matrices with ``dim`` rows.

    Args:
        name: A name of a structure.
        dim: Number of rows.
        output: Whether it is meant for an output factor, which matters to ``"auto"``.

    Raises:
        TypeError: If the name is not a string.
        ValueError: If it is unknown.
    """
    if output and name == "auto":
        return auto(dim, LARGEST_DENSE_OUTPUT)
    make, numbers = _found(name)
    return make(dim, *numbers)
