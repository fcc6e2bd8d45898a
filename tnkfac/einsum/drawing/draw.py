"""Diagrams of tensor networks in the usual graphical notation.

A tensor that the caller supplies is a white box, an index pattern a shaded one (equal patterns
have the same shade), a Kronecker delta a black disc, and a vector of ones an open circle. A line
is a leg. Where three or more meet, or where one just ends in a sum, the leg has a small dot. Open
legs are blue; those that form one axis of the result end at a bar.

The same network always gives the same picture. Needs matplotlib, which is imported only when
drawing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import cos, hypot, pi, sin
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tnkfac.einsum.drawing.layout import (
    FONT,
    SMALL,
    Diagram,
    Edge,
    Node,
    Point,
    place_nodes,
    text_size,
)
from tnkfac.einsum.operands import Delta, Operand, Pattern, Variable
from tnkfac.einsum.views import Merge

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SUFFIXES = (".svg", ".png")
_SHADES = ("#f8d9a8", "#c5dff2", "#cbe6c3", "#e9cbe4", "#f5c6bd", "#d9d5f0")
_LINE, _OPEN = "#444444", "#1558b0"
_BAR, _BEND, _CLEAR = 0.13, 0.42, 0.035  # inches between legs at a bar, bends, and labels

_Box = tuple[float, float, float, float]


class Drawable(Protocol):
    """The part of a :class:`~tnkfac.einsum.network.Network` that is drawn."""

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The factors of the product."""

    @property
    def output(self) -> Operand:
        """Legs of the result, and the view whose adjoint shapes it."""

    @property
    def scale(self) -> float:
        """Number that multiplies the result."""

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every leg."""


def draw_network(network: Drawable, path: str | None = None, title: str | None = None) -> Figure:
    """Draw a network.

    Args:
        network: Any network.
        path: Where to write it, ``.svg`` or ``.png``; None to return the figure only.
        title: Above the diagram.

    Returns:
        The ``matplotlib`` figure; a unit of its axes is an inch.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If the path ends in another suffix.
    """
    suffix = None if path is None else Path(path).suffix.lower()
    if suffix not in (None, *_SUFFIXES):
        raise ValueError(f"draw: path: got {path!r}. Supported suffixes: {', '.join(_SUFFIXES)}.")
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ImportError("Drawing needs matplotlib: pip install 'tnkfac[examples]'.") from None
    with rc_context({"svg.hashsalt": "tnkfac", "svg.fonttype": "none", "text.parse_math": False}):
        diagram = _diagram(network)
        figure = _render(diagram, place_nodes(diagram), title, network.scale)
        if path is not None:
            unset = {"Date": None, "Creator": None} if suffix == ".svg" else {"Software": None}
            figure.savefig(path, metadata=unset, dpi=150)
    return figure


# --- the graph ----------------------------------------------------------------------------------


def _diagram(network: Drawable) -> Diagram:
    """Nodes of operands, of output axes and of dots, in this order; lines; and the symmetry."""
    axes = _axes(network.output)
    ports = {leg: len(network.operands) + i for i, legs in enumerate(axes) for leg in legs}
    diagram = Diagram(_tensors(network.operands))
    for legs in axes:
        text = " ".join(legs)
        diagram.nodes.append(Node("open", f"({text})" if len(legs) > 1 else text, legs=legs))
    for leg in network.sizes:
        ends = [i for i, op in enumerate(network.operands) for name in op.legs if name == leg]
        ends += [ports[leg]] if leg in ports else []
        text = "" if leg in ports and diagram.nodes[ports[leg]].text == leg else leg
        if len(ends) == 2 and ends[0] != ends[1]:
            diagram.edges.append(Edge(ends[0], ends[1], text, leg in ports))
            continue
        dot = len(diagram.nodes)
        diagram.nodes.append(Node("dot", text, _OPEN if leg in ports else _LINE, (leg,)))
        diagram.edges += [Edge(end, dot, open=end == ports.get(leg)) for end in ends]
    diagram.mirror = _mirror(network.operands, diagram.nodes)
    return diagram


def _tensors(operands: Sequence[Operand]) -> list[Node]:
    shades: dict[Pattern, str] = {}
    nodes = []
    for op in operands:
        if isinstance(op.source, Variable):
            nodes.append(Node("variable", op.source.name))
        elif isinstance(op.source, Pattern):
            shade = shades.setdefault(op.source, _SHADES[len(shades) % len(_SHADES)])
            dimension = re.search(r"\d", " ".join(op.legs))
            below = chr(0x2080 + int(dimension.group())) if dimension else ""
            nodes.append(Node("pattern", f"Π{below}", shade))
        else:
            nodes.append(Node("delta" if isinstance(op.source, Delta) else "ones"))
    return nodes


def _axes(output: Operand) -> list[tuple[str, ...]]:
    """Output legs, grouped by the axes of the result that they come from."""
    owners: list[frozenset[int]] = [frozenset({axis}) for axis in range(len(output.shape))]
    shape = output.shape
    for step in output.view:
        after, end = step.shape(shape), step.axis + (step.count if isinstance(step, Merge) else 1)
        fresh = len(after) - len(shape) + end - step.axis
        owners[step.axis : end] = [frozenset().union(*owners[step.axis : end])] * fresh
        shape = after
    groups: dict[frozenset[int], list[str]] = {}
    for owner, leg in zip(owners, output.legs, strict=True):
        groups.setdefault(owner, []).append(leg)
    return [tuple(legs) for legs in groups.values()]


def _mirror(operands: Sequence[Operand], nodes: Sequence[Node]) -> list[int]:
    """Find two copies of the same factors, and which leg of one is which of the other."""
    partner: dict[int, int] = {}
    legs: dict[str, str] = {}
    for kind in (Variable, Pattern):
        for a, b in combinations(range(len(operands)), 2):
            first, second = operands[a], operands[b]
            pairs = list(zip(first.legs, second.legs, strict=False))
            same = isinstance(first.source, kind) and first.source == second.source
            meet = kind is Variable or any(legs.get(p) == q for p, q in pairs)
            fits = all(legs.get(p, q) == q and legs.get(q, p) == p for p, q in pairs)
            if same and meet and fits and not {a, b} & partner.keys():
                legs |= dict(pairs) | {q: p for p, q in pairs}
                partner |= {a: b, b: a}
    if not partner:
        return [-1] * len(nodes)
    held = [*(op.legs for op in operands), *(node.legs for node in nodes[len(operands) :])]
    for a, node in enumerate(nodes):
        image = {legs.get(leg, leg) for leg in held[a]}
        for b in [a] if node.kind not in ("open", "dot") else range(len(operands), len(nodes)):
            if image == {*held[b]} and nodes[b].kind == node.kind and not {a, b} & partner.keys():
                partner |= {a: b, b: a}
    return [partner.get(a, -1) for a in range(len(nodes))]


# --- the picture --------------------------------------------------------------------------------


def _render(diagram: Diagram, points: Sequence[Point], title: str | None, scale: float) -> Figure:
    """Lines first, nodes over them, then labels where there is room; cut out what is drawn."""
    from matplotlib.figure import Figure

    figure = Figure()
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    sides = _sides(diagram, points)
    curves = _curves(diagram, points, sides)
    for edge, curve in zip(diagram.edges, curves, strict=True):
        is_straight = abs(curve[0] + curve[-1] - 2 * curve[30]).sum() < 1e-9
        ax.plot(
            *curve[:: 60 if is_straight else 1].T,
            color=_OPEN if edge.open else _LINE,
            lw=1.2,
            zorder=1,
        )
    boxes = [_draw_node(ax, node, points[v], sides.get(v)) for v, node in enumerate(diagram.nodes)]
    _draw_labels(ax, diagram, points, curves, boxes)
    boxes += [(*curve.min(0), *curve.max(0)) for curve in curves]
    _caption(ax, boxes, title or "", above=True)
    inverse = round(1 / scale) if scale else 0
    factor = f"1/{inverse}" if abs(scale * inverse - 1) < 1e-9 else f"{scale:.4g}"
    _caption(ax, boxes, "" if scale == 1 else f"× {factor}", above=False)
    left, bottom, right, top = _extent(boxes, pad=0.12)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    figure.set_size_inches(right - left, top - bottom)
    return figure


def _extent(boxes: Sequence[_Box], pad: float) -> _Box:
    left, bottom, right, top = zip(*boxes, strict=True)
    return min(left) - pad, min(bottom) - pad, max(right) + pad, max(top) + pad


def _caption(ax: Axes, boxes: list[_Box], text: str, above: bool) -> None:
    if text:
        left, bottom, right, top = _extent(boxes, pad=0.2)
        x, y = (left + right) / 2, top if above else bottom
        w, h = text_size(text, FONT)
        ax.text(x, y, text, size=FONT, ha="center", va="center")
        boxes.append((x - w, y - h, x + w, y + h))


def _sides(diagram: Diagram, points: Sequence[Point]) -> dict[int, Point]:
    """For every group of open legs, the direction out of the picture, away from the legs."""
    (left, right), (bottom, top) = ((min(along), max(along)) for along in zip(*points, strict=True))
    sides: dict[int, Point] = {}
    for v, (x, y) in enumerate(points):
        if len(diagram.nodes[v].legs) > 1:
            ends = [e.start + e.stop - v for e in diagram.edges if v in (e.start, e.stop)]
            away = [sum(here - points[u][i] for u in ends) for i, here in enumerate((x, y))]
            outward = {
                (-1, 0): x == left,
                (1, 0): x == right,
                (0, -1): y == bottom,
                (0, 1): y == top,
            }
            options = [side for side, is_outward in outward.items() if is_outward] or [*outward]
            sides[v] = max(options, key=lambda side: side[0] * away[0] + side[1] * away[1])
    return sides


def _curves(diagram: Diagram, points: Sequence[Point], sides: Mapping[int, Point]) -> list[Any]:
    """Lines as arrays of points; those that run side by side are bent away from each other."""
    import numpy as np

    edges, xy = diagram.edges, np.array(points)
    ends = [[xy[edge.start], xy[edge.stop]] for edge in edges]
    for v, (x, y) in sides.items():
        along = np.array([abs(y), abs(x)])
        arriving = [i for i, edge in enumerate(edges) if v in (edge.start, edge.stop)]
        arriving.sort(key=lambda i: float((xy[edges[i].start] + xy[edges[i].stop]) @ along))
        for rank, i in enumerate(arriving):
            end = int(edges[i].stop == v)
            ends[i][end] = ends[i][end] + along * _BAR * (rank - (len(arriving) - 1) / 2)
    t = np.linspace(0, 1, 61)[:, None]
    curves = []
    for i, edge in enumerate(edges):
        same = [j for j, e in enumerate(edges) if (e.start, e.stop) == (edge.start, edge.stop)]
        dx, dy = xy[edge.stop] - xy[edge.start]
        normal = np.array([-dy, dx]) * (1 if dx > 0 or dx == 0 > dy else -1) / hypot(dx, dy)
        start, stop = ends[i]
        bend = (start + stop) / 2 + normal * _BEND * (same.index(i) - (len(same) - 1) / 2)
        curves.append((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * stop)
    return curves


def _draw_node(ax: Axes, node: Node, point: Point, side: Point | None) -> _Box:
    """Draw a node over its lines, and tell the space that it takes."""
    from matplotlib.patches import Circle, FancyBboxPatch

    (x, y), (w, h) = point, node.half
    if side is not None:
        return _draw_bar(ax, node, point, side)
    if node.kind in ("variable", "pattern"):
        style = "round,pad=0,rounding_size=0.07"
        shape = FancyBboxPatch((x - w, y - h), 2 * w, 2 * h, style, fc=node.color, zorder=3)
        ax.add_patch(shape)
        ax.text(x, y, node.text, size=FONT, ha="center", va="center_baseline", zorder=4)
    elif node.kind == "open":
        _label(ax, point, node.text, _OPEN)
    else:
        fill = {"delta": "black", "ones": "white", "dot": node.color}[node.kind]
        ax.add_patch(Circle(point, w, fc=fill, ec=node.color if w < 0.05 else "black", zorder=3))
    return x - w, y - h, x + w, y + h


def _draw_bar(ax: Axes, node: Node, point: Point, side: Point) -> _Box:
    """Draw where legs join to one axis: a bar, a thick line outwards, and their names."""
    (x, y), (w, h), (dx, dy) = point, node.half, side
    half = _BAR * (len(node.legs) - 1) / 2 + 0.05
    a, b = abs(dy) * half, abs(dx) * half
    style: dict[str, Any] = {"color": _OPEN, "lw": 2.4, "zorder": 3}
    ax.plot([x - a, x + a], [y - b, y + b], **style)
    ax.plot([x, x + 0.14 * dx], [y, y + 0.14 * dy], **style)
    u, v = x + (0.18 + w) * dx, y + (0.18 + h) * dy
    _label(ax, (u, v), node.text, _OPEN)
    return min(u - w, x - a), min(v - h, y - b), max(u + w, x + a), max(v + h, y + b)


def _label(ax: Axes, point: Point, text: str, color: str) -> None:
    back = {"boxstyle": "square,pad=0.08", "fc": "white", "ec": "none"}
    style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "bbox": back, "zorder": 2}
    ax.text(*point, text, size=SMALL, color=color, **style)


def _draw_labels(
    ax: Axes, diagram: Diagram, points: Sequence[Point], curves: list[Any], boxes: list[_Box]
) -> None:
    """Name the dots beside them and the lines on them, clear of all boxes; adds to these."""
    import numpy as np

    turns = sorted(range(16), key=lambda turn: (turn % 4 != 2, turn % 2, turn))
    around = [
        (1.15 * r * cos(a * pi / 8), r * sin(a * pi / 8)) for r in (0.15, 0.19, 0.24) for a in turns
    ]
    places: list[tuple[str, str, int, Any]] = []
    for node, point in zip(diagram.nodes, points, strict=True):
        if node.kind == "dot" and node.text:
            places.append((node.text, node.color, -1, np.array(point) + around))
    middle = sorted(range(9, 52), key=lambda i: abs(i - 30))
    for i, edge in enumerate(diagram.edges):
        if edge.text:
            places.append((edge.text, _OPEN if edge.open else _LINE, i, curves[i][middle]))
    for text, color, line, spots in places:
        half = np.array(text_size(text, SMALL)) + 0.03
        others = np.array([curve for i, curve in enumerate(curves) if i != line]).reshape(-1, 61, 2)
        covered = _covered(spots, half, others, boxes) + _covered(
            spots, half + _CLEAR, others, boxes
        )
        spot = spots[int(covered.argmin())]
        _label(ax, (spot[0], spot[1]), text, color)
        boxes.append((*(spot - half), *(spot + half)))


def _covered(spots: Any, half: Any, curves: Any, boxes: Sequence[_Box]) -> Any:
    """How much a label would cover at each of the spots: a box counts like ten lines."""
    import numpy as np

    lines = (abs(curves - spots[:, None, None]) < half).all(-1).any(-1).sum(-1)
    low, high = np.array(boxes).reshape(-1, 2, 2).transpose(1, 0, 2)
    beside = (spots[:, None] + half <= low) | (spots[:, None] - half >= high)
    return lines + 10 * (~beside.any(-1)).sum(-1)
