"""Structures that ``structures="auto"`` may choose from, and what they cost.

Every factor has a ladder of structures, from what ``"auto"`` takes without a bound down to
diagonal. Costs are counted, in bytes and in multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from tnkfac.curvature import Layer, Structure, resolve_structure

BLOCKS = (128, 32, 8)
"""Rows of the blocks between dense and diagonal."""
Names = tuple[str, str]


def ladder(name: str, dim: int, output: bool) -> list[str]:
    """Structures of a factor in order of their size; a name other than ``"auto"`` stands alone.

    Args:
        name: What the user asked for.
        dim: Rows of the factor.
        output: Whether it is an output factor.
    """
    if name != "auto":
        return [name]
    first = resolve_structure("auto", dim, output=output)
    steps = [first.name]
    for rows in BLOCKS:
        block = resolve_structure(f"block{rows}diagonal", dim)
        if rows < dim and block.numel < first.numel:
            steps.append(block.name)
    return [*steps, "diagonal"]


@dataclass(frozen=True)
class Choice:
    """Both factors of a layer in some structures.

    Attributes:
        names: Of the structures.
        k: That of the input factor.
        c: That of the output factor.
        groups: Channel groups.
    """

    names: Names
    k: Structure
    c: Structure
    groups: int

    @property
    def numel(self) -> int:
        """How many numbers ``K`` and ``C`` are kept in."""
        return self.groups * (self.k.numel + self.c.numel)

    def state_bytes(self, sizes: tuple[int, int], copies: int) -> int:
        """State of both factors, each kept so many times with so many bytes a number."""
        k, c = sizes
        return copies * self.groups * (k * self.k.numel + c * self.c.numel)

    def work(self, rows: int, every: float) -> float:
        """Multiply-adds of a step beyond those of a first-order optimizer.

        Args:
            rows: Samples times positions.
            every: Steps between updates.
        """
        total = 0.0
        for structure, other in ((self.k, self.c), (self.c, self.k)):
            numbers = structure.numel
            total += 2 * numbers * other.dim  # K K^T times a gradient matrix
            total += (rows * numbers + 4 * numbers * numbers / structure.dim) / every
        return self.groups * total


def candidates(layer: Layer, names: Names) -> list[Choice]:
    """All pairs from the ladders of both factors, the largest first."""
    k, c = ladder(names[0], layer.in_dim, False), ladder(names[1], layer.out_dim, True)
    found = [
        Choice(
            pair,
            resolve_structure(pair[0], layer.in_dim),
            resolve_structure(pair[1], layer.out_dim, output=True),
            layer.groups,
        )
        for pair in product(k, c)
    ]
    return sorted(found, key=lambda choice: -choice.numel)


def fitting(
    ladders: Sequence[Sequence[Choice]], cost: Callable[[int, Choice], float], left: float
) -> list[Choice]:
    """Structures of all layers whose costs together are within a bound.

    While they are not, the layer that gains most takes its next smaller pair; without anything to
    gain, all have their smallest.

    Args:
        ladders: For each layer, what it may have, the largest first.
        cost: Of a choice for the layer at some index.
        left: The bound.
    """
    costs = [[cost(i, choice) for choice in choices] for i, choices in enumerate(ladders)]
    at = [0] * len(costs)
    total = sum(steps[0] for steps in costs)
    while total > left:
        gains = {
            i: steps[at[i]] - steps[at[i] + 1]
            for i, steps in enumerate(costs)
            if at[i] + 1 < len(steps)
        }
        if not gains:
            break
        most = max(gains, key=lambda i: gains[i])
        total -= gains[most]
        at[most] += 1
    return [choices[index] for choices, index in zip(ladders, at, strict=True)]


def base_work(layer: Layer, rows: int) -> float:
    """Multiply-adds of the forward and the backward pass of a layer."""
    return 3.0 * rows * layer.groups * layer.in_dim * layer.out_dim


def matching(layer: Layer, names: Names, shapes: Iterable[tuple[int, ...]]) -> Names | None:
    """The pair of structures whose parts have these shapes, of which a saved state tells.

    Args:
        layer: The layer.
        names: What the user asked for.
        shapes: Shapes of the parts of ``K``, then of those of ``C``.
    """
    wanted = list(shapes)
    for choice in candidates(layer, names):
        parts = [(choice.groups, *shape) for s in (choice.k, choice.c) for shape in s.part_shapes]
        if [p for p in parts if math.prod(p)] == [w for w in wanted if math.prod(w)]:
            return choice.names
    return None
