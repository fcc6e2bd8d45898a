"""Names of legs."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def fresh_names(legs: Iterable[str], mark: str, taken: Collection[str]) -> dict[str, str]:
    """New names for legs, marked until nobody bears them.

    Args:
        legs: Legs to rename.
        mark: Appended to a name, as often as needed.
        taken: Names in use.

    Example:
        >>> fresh_names(["i", "i'"], "'", {"i", "i'"})
        {'i': "i''", "i'": "i'''"}
    """
    used = {*taken}
    names = {}
    for leg in legs:
        new = leg + mark
        while new in used:
            new += mark
        used.add(new)
        names[leg] = new
    return names
