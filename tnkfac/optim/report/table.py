"""Rows as text, for people."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(titles: Sequence[str], *parts: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, with a rule below the titles and between its parts."""
    every = [titles, *(line for part in parts for line in part)]
    widths = [max(len(line[i]) for line in every) for i in range(len(titles))]
    rule = "  ".join("-" * width for width in widths)

    def text(line: Sequence[str]) -> str:
        return "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()

    lines = [text(titles)]
    for part in parts:
        lines += [rule, *map(text, part)]
    return lines
