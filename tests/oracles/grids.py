"""Which combinations of parameters are tried where all of them would be too many."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

__all__ = ["all_pairs"]


def all_pairs(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows of which some have any two values of any two factors together.

    Most mistakes need one value, or two of them; three factors of as many values take about the
    square of their number then, and not the cube. Equal factors give equal rows.
    """
    left = list(product(*map(list, factors)))
    pairs = [{(a, b, row[a], row[b]) for a, b in combinations(range(len(row)), 2)} for row in left]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(left)), key=lambda at: len(pairs[at] & missing))
        chosen.append(left[best])
        missing -= pairs[best]
    return chosen
