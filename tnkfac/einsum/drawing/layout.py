"""Where the nodes of a diagram stand: a search on a grid against crossings and long lines.

A network that is a product of something with itself is laid out as its own mirror image.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, sqrt
from typing import Any

FONT, SMALL = 11.0, 8.5
"""Sizes of the text in nodes and of labels, in points."""

_DX, _DY = 1.1, 0.78  # inches between columns and between rows
_STARTS = 14

Point = tuple[float, float]
_Cell = tuple[int, int]


@lru_cache(maxsize=4096)
def text_size(text: str, points: float) -> Point:
    """Half the width and half the height of a text, in inches."""
    from matplotlib.textpath import TextPath

    width = TextPath((0, 0), text, size=points).get_extents().width if text.strip() else 0.0
    return width / 144, points * 0.4 / 72


@dataclass(frozen=True)
class Node:
    """A tensor, the dot of a hyper-edge, or where open legs end."""

    kind: str
    text: str = ""
    color: str = "white"
    legs: tuple[str, ...] = ()

    @property
    def half(self) -> Point:
        """Half the width and half the height, in inches."""
        radius = {"delta": 0.07, "ones": 0.06, "dot": 0.035}.get(self.kind)
        if radius:
            return radius, radius
        is_box = self.kind != "open"
        width, height = text_size(self.text, FONT if is_box else SMALL)
        return (max(0.15, width + 0.08), 0.15) if is_box else (width + 0.03, height + 0.03)


@dataclass(frozen=True)
class Edge:
    """A line between two nodes; without text if a node names its leg."""

    start: int
    stop: int
    text: str = ""
    open: bool = False


@dataclass
class Diagram:
    """Nodes, lines, and the mirror image of each node: itself on the axis, -1 if it has none."""

    nodes: list[Node]
    edges: list[Edge] = field(default_factory=list)
    mirror: list[int] = field(default_factory=list)


def place_nodes(diagram: Diagram) -> list[Point]:
    """Improve random starts on a grid; drop what the best leaves empty, and improve it again."""
    search = _Search(diagram, *_grid(diagram))
    rough = sorted((search.improved(search.start(s), 2) for s in range(_STARTS)), key=search.price)
    cells = min((search.improved(cells) for cells in rough[:3]), key=search.price)
    for _ in range(2):
        cells = _compressed(cells, mirrored=max(diagram.mirror) >= 0)
        columns, rows = zip(*cells, strict=True)
        span = range(min(columns), max(columns) + 1)
        cells = _Search(diagram, span, range(max(rows) + 1), margin=False).improved(cells)
    flip = -1 if 2 * cells[0][0] > min(columns) + max(columns) else 1  # the first tensor is left
    return [(x * _DX * flip, y * _DY) for x, y in cells]


def _grid(diagram: Diagram) -> tuple[range, range]:
    """Columns, symmetric around zero if there is a mirror, and rows; the outermost are a border."""
    inner = sum(node.kind != "open" for node in diagram.nodes)
    side = ceil(sqrt(inner)) + 3
    if max(diagram.mirror) < 0:
        return range(side), range(max(side, (len(diagram.nodes) - inner) // 3 + 3))
    fixed = sum(m == v for v, m in enumerate(diagram.mirror))
    half = 4 if inner - fixed > 9 else 3
    return range(-half, half + 1), range(max(side + 2, fixed + 3))


def _compressed(cells: Sequence[_Cell], mirrored: bool) -> list[_Cell]:
    """Drop empty rows and columns."""
    rows = sorted({y for _, y in cells})
    columns = sorted({0, *(abs(x) for x, _ in cells)} if mirrored else {x for x, _ in cells})
    return [(columns.index(abs(x)) * (1 if x >= 0 else -1), rows.index(y)) for x, y in cells]


class _Search:
    """Moves and swaps on a grid, one node (and its mirror image) at a time.

    Groups of open legs end at the border; if it is a margin, tensors and dots stay off it.
    """

    def __init__(self, diagram: Diagram, columns: range, rows: range, margin: bool = True) -> None:
        self.mirror = diagram.mirror
        self.movers = [v for v, m in enumerate(self.mirror) if m == -1 or m >= v]
        self.cost = _Cost(diagram, (columns[0], columns[-1], rows[0], rows[-1]))
        cells = [(x, y) for y in rows for x in columns]
        inner = [(x, y) for y in rows[1:-1] for x in columns[1:-1]]
        self.cells: list[list[_Cell]] = []
        for node, m in zip(diagram.nodes, self.mirror, strict=True):
            is_end, is_free = node.kind == "open", m == -1 < max(self.mirror)
            here = inner if margin and not is_end and not is_free else cells
            if is_end and len(node.legs) > 1:
                here = [cell for cell in cells if cell not in inner]
            paired = m not in (len(self.cells), -1)
            self.cells.append([cell for cell in here if cell[0] or not paired])

    def start(self, seed: int) -> list[_Cell]:
        """Random cells, the same in every run."""
        rng = random.Random(seed)
        cells: dict[int, _Cell] = {}
        for v in sorted(self.movers, key=lambda v: (self.mirror[v] in (v, -1), v)):
            free = [c for c in self.cells[v] if c not in cells.values()]
            if self.mirror[v] > v:
                free = [(x, y) for x, y in free if x < 0]
            self._put(cells, v, free[int(rng.random() * len(free))])
        return [cells[v] for v in range(len(cells))]

    def improved(self, cells: list[_Cell], rounds: int = 9) -> list[_Cell]:
        """Give one node after the other its best cell, until none gains."""
        for _ in range(rounds):
            before = cells
            for v in self.movers:
                moved = (self._moved(cells, v, cell) for cell in self.cells[v])
                options = [cells, *(option for option in moved if option)]
                cells = options[int(self.cost(options).round(6).argmin())]
            if cells == before:
                break
        return cells

    def price(self, cells: list[_Cell]) -> float:
        """Cost of one layout."""
        return float(self.cost([cells]).round(6)[0])

    def _moved(self, cells: list[_Cell], v: int, cell: _Cell) -> list[_Cell] | None:
        """Put a node on a cell, and who is there on the old one."""
        new = dict(enumerate(cells))
        swapped = cells.index(cell) if cell in cells else v
        if swapped not in (v, self.mirror[v]):
            if cells[v] not in self.cells[swapped]:
                return None
            self._put(new, swapped, cells[v])
        self._put(new, v, cell)
        return list(new.values()) if len({*new.values()}) == len(new) else None

    def _put(self, cells: dict[int, _Cell], v: int, cell: _Cell) -> None:
        cells[v] = cell
        if self.mirror[v] not in (v, -1):
            cells[self.mirror[v]] = (-cell[0], cell[1])


class _Cost:
    """Cost of layouts: of many at a time, in numpy, with points as complex numbers."""

    def __init__(self, diagram: Diagram, border: tuple[int, int, int, int]) -> None:
        import numpy as np

        self.np, self.border = np, border
        nodes, ends = diagram.nodes, sorted({(e.start, e.stop) for e in diagram.edges})
        edges = np.array(ends, dtype=int).reshape(-1, 2)
        self.edges = edges
        self.radii = np.array([0.12 if n.kind == "open" else max(n.half) for n in nodes])
        self.ports = np.array([node.kind == "open" for node in nodes])
        fixed = np.array([m == v for v, m in enumerate(diagram.mirror)])
        self.centered = fixed & ~self.ports
        a, b = np.triu_indices(len(edges), 1)
        touch = (edges[a][:, :, None] == edges[b][:, None, :]).any((1, 2))
        self.apart = a[~touch], b[~touch]
        pairs = [({*edges[i]}, {*edges[j]}) for i, j in zip(a[touch], b[touch], strict=True)]
        forks = [(v, *(p - {v}), *(q - {v})) for p, q in pairs for v in p & q]
        self.forks = np.array(forks, dtype=int).reshape(-1, 3).T
        self.passing = np.nonzero((edges[:, :, None] != np.arange(len(nodes))).all(1))

    def __call__(self, options: list[list[_Cell]]) -> Any:
        """Weighted sum of lengths, crossings, tight spots, sharp forks and enclosed ends."""
        maximum = self.np.maximum
        x, y = self.np.array(options).transpose(2, 0, 1)
        points = _DX * x + 1j * _DY * y
        start, stop = points[:, self.edges[:, 0]], points[:, self.edges[:, 1]]
        length = abs(stop - start)
        room = self.radii[self.edges].sum(1) + 0.5
        cost = (0.5 * length + 4 * maximum(0, room - length)).sum(1)
        cost += 3.0 * self._crossings(start, stop).sum(1)
        cost += 9.0 * self._passing(points, start, stop - start, length).sum(1)
        cost += 1.5 * self._forks(points).sum(1)
        cost += 4.0 * (x[:, self.centered] != 0).sum(1)
        left, right, bottom, top = self.border
        inside = (x > left) & (x < right) & (y > bottom) & (y < top)
        return cost + 2.0 * (inside & self.ports).sum(1)

    def _crossings(self, start: Any, stop: Any) -> Any:
        a, b = self.apart
        p, q, r, s = start[:, a], stop[:, a], start[:, b], stop[:, b]
        d, e = (q - p).conj(), (s - r).conj()
        apart = (d * (r - p)).imag * (d * (s - p)).imag < 0
        return apart & ((e * (p - r)).imag * (e * (q - r)).imag < 0)

    def _passing(self, points: Any, start: Any, way: Any, length: Any) -> Any:
        """How far lines come into the space around nodes that they pass by."""
        edge, node = self.passing
        offset = (points[:, node] - start[:, edge]) * (way / length).conj()[:, edge]
        past = self.np.maximum(0, self.np.maximum(-offset.real, offset.real - length[:, edge]))
        distance = self.np.sqrt(past**2 + offset.imag**2)
        near = self.np.maximum(0, 1 - distance / (self.radii[node] + 0.2))
        return near + 5 * near**8  # on top of a node: it would seem to end there

    def _forks(self, points: Any) -> Any:
        """How close to one another lines leave a node: one if on top of each other."""
        v, a, b = self.forks
        p, q = points[:, a] - points[:, v], points[:, b] - points[:, v]
        return self.np.maximum(0, (p * q.conj()).real / abs(p * q) - 0.85) / 0.15
