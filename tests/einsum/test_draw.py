"""Diagrams: complete, deterministic, and nothing on top of anything else."""

import html
import inspect
import re
import sys
from functools import cache
from itertools import combinations, pairwise, product
from math import prod
from pathlib import Path
from typing import Any

import pytest

from tnkfac.einsum import networks, simplify
from tnkfac.einsum.drawing.draw import draw_network
from tnkfac.einsum.geometry import conv_axes
from tnkfac.einsum.network import Network, parse
from tnkfac.einsum.operands import Delta, Ones, Pattern, Variable

pytest.importorskip("matplotlib")
from matplotlib.text import Text

GROUPS, KERNEL, LARGE, SMALL = 2, (3, 4), (7, 10), (4, 5)


def build(name: str, dims: int) -> Network:
    """An operation with stride, padding and groups, if it has them."""
    kernel, large, small = KERNEL[:dims], LARGE[:dims], SMALL[:dims]
    transposed = name.endswith("_transpose")
    inputs, outputs = (small, large) if transposed else (large, small)
    x, y = (2, 6, *inputs), (2, 4, *outputs)
    weight = ((6, 2) if transposed else (4, 3)) + kernel
    arguments: dict[str, Any] = {
        **dict.fromkeys(("x", "dx", "input_shape"), x),
        **dict.fromkeys(("weight", "dw", "vector", "weight_shape"), weight),
        **dict.fromkeys(("v", "h"), y),
        "s": (3, *y),
        "z": (2, 6 * prod(kernel), prod(outputs)),
        "g": (4 * prod(outputs),) * 2,
        "kernel_size": kernel,
        "input_size": inputs,
        "output_size": inputs if name.startswith("fold") else outputs,
        "batch": 2,
        "channels": 6,
        "groups": GROUPS,
        "positions": 5,
        "axes": conv_axes(large, kernel, stride=2, padding=1),
    }
    parameters = inspect.signature(getattr(networks, name)).parameters.values()
    given = {p.name: arguments[p.name] for p in parameters if p.name in arguments}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        given |= {"stride": 2, "padding": 1, "groups": GROUPS}
        if transposed:
            sizes = zip(large, small, kernel, strict=True)
            given["output_padding"] = tuple(i - 2 * (o - 1) - k + 2 for i, o, k in sizes)
    return getattr(networks, name)(**given)


def svg_texts(path: Path) -> list[str]:
    found = re.findall(r"<text[^>]*>(.*?)</text>", path.read_text(encoding="utf-8"), re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]*>", "", text)) for text in found]


def patches(figure: Any, name: str) -> list[Any]:
    return [patch for patch in figure.axes[0].patches if type(patch).__name__ == name]


def extents(artists: list[Any], figure: Any) -> list[Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    return [artist.get_window_extent(renderer) for artist in artists]


def overlap(a: Any, b: Any) -> bool:
    slack = 1.0  # pixels
    return min(a.x1, b.x1) - max(a.x0, b.x0) > slack and min(a.y1, b.y1) - max(a.y0, b.y0) > slack


@pytest.mark.parametrize("name", networks.__all__)
def test_every_name_is_in_the_picture(name: str, tmp_path: Path) -> None:
    network = build(name, dims=1)
    path = tmp_path / "network.svg"
    draw_network(network, str(path), title="a title")
    texts = svg_texts(path)
    words = {word for text in texts for word in text.strip("()").split()}
    assert {*network.sizes, *network.names} <= words
    assert "a title" in texts
    for name in network.names:
        copies = sum(op.source == Variable(name) for op in network.operands)
        assert texts.count(name) >= copies
    assert any(text.startswith("× ") for text in texts) == (network.scale != 1)


@pytest.mark.parametrize("name", ["conv", "kfc_factor", "ggn_vector_product", "input_jacobian"])
def test_one_node_per_operand(name: str) -> None:
    from matplotlib.colors import to_hex

    network = build(name, dims=2)
    figure = draw_network(network)
    sources = [op.source for op in network.operands]
    boxes = patches(figure, "FancyBboxPatch")
    assert len(boxes) == sum(isinstance(s, Variable | Pattern) for s in sources)
    shades = [to_hex(box.get_facecolor()) for box in boxes]
    assert shades.count("#ffffff") == sum(isinstance(s, Variable) for s in sources)
    assert len({*shades} - {"#ffffff"}) == len({s for s in sources if isinstance(s, Pattern)})
    legs = [leg for op in (*network.operands, network.output) for leg in op.legs]
    dots = sum(legs.count(leg) != 2 for leg in network.sizes)
    deltas = sum(isinstance(s, Delta) for s in sources)
    assert len(patches(figure, "Circle")) == dots + deltas


def test_equal_patterns_have_equal_shades() -> None:
    figure = draw_network(networks.conv((1, 1, 5, 5), (1, 1, 3, 3)))
    shades = [box.get_facecolor() for box in patches(figure, "FancyBboxPatch")]
    assert len({*shades}) == 2  # white, and one shade


def test_ones_are_open_and_deltas_filled_circles() -> None:
    sources = [Variable("x"), Ones(3), Delta(2)]
    figure = draw_network(parse("a, b, a c -> b c", sources, {"a": 2, "b": 3, "c": 2}))
    faces = [circle.get_facecolor()[:3] for circle in patches(figure, "Circle")]
    assert sorted(faces) == [(0, 0, 0), (1, 1, 1)]


@pytest.mark.parametrize(
    ("equation", "sources", "lines"),
    [  # lines and the strokes of bars
        ("a b, a b -> ", "xy", 2),  # side by side
        ("a a -> ", "x", 2),  # a trace: both meet in a dot
        ("a b -> a", "x", 2),  # b ends in a dot
        (" -> ", "x", 0),
        ("a, a, a -> a", "xxx", 4),
        ("a b -> (a b)", "x", 4),  # two legs, a bar, and the line outwards
    ],
)
def test_unusual_networks(equation: str, sources: str, lines: int) -> None:
    network = parse(equation, [Variable(name) for name in sources], {"a": 2, "b": 3})
    drawn = draw_network(network).axes[0].lines
    assert len(drawn) == lines
    paths = {line.get_path().vertices.round(6).tobytes() for line in drawn}
    assert len(paths) == lines  # none lies on another


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    network = build("kfac_reduce_factor", dims=2)
    for suffix in ("svg", "png"):
        first, second = tmp_path / f"1.{suffix}", tmp_path / f"2.{suffix}"
        draw_network(network, str(first))
        draw_network(network, str(second))
        assert first.read_bytes() == second.read_bytes()
        assert len(first.read_bytes()) > 1000


@pytest.mark.parametrize("name", ["kfc_factor", "ggn_gram", "kfac_reduce_factor", "kfra"])
def test_both_factors_of_a_gram_product_mirror_each_other(name: str) -> None:
    network = build(name, dims=2)
    boxes = patches(draw_network(network), "FancyBboxPatch")
    sources = [op.source for op in network.operands]
    places = [(round(b.get_x() + b.get_width() / 2, 3), round(b.get_y(), 3)) for b in boxes]
    images = {((-x, y), source) for (x, y), source in zip(places, sources, strict=True)}
    assert images == {*zip(places, sources, strict=True)}


DENSE = networks.ggn_diagonal((2, 4, 6, 6), (3, 2, 4, 3, 3), kernel_size=2, stride=2)
CROWDED = {
    **{
        name: build(name, dims=2)
        for name in ("conv", "kfc_factor", "kfra", "weight_jacobian", "unfold", "input_rows")
    },
    "ggn_block": build("ggn_block", dims=1),
    "ggn_gram": build("ggn_gram", dims=2),
    "dense ggn_diagonal": simplify(DENSE),
    "3-d": networks.conv((1, 1, 5, 6, 7), (1, 1, 3, 3, 3)),
}


@cache
def crowded(name: str) -> Any:
    return draw_network(CROWDED[name], title=name)


@pytest.mark.parametrize("name", CROWDED)
def test_nothing_overlaps_or_is_clipped(name: str) -> None:
    figure = crowded(name)
    axes = figure.axes[0]
    nodes = patches(figure, "FancyBboxPatch")
    centers = [(b.get_x() + b.get_width() / 2, b.get_y() + b.get_height() / 2) for b in nodes]
    labels = [text for text in axes.texts if text.get_position() not in centers]
    assert len(labels) == len(axes.texts) - len(nodes)
    boxes = extents([*nodes, *patches(figure, "Circle"), *labels], figure)
    hits = [(a, b) for a, b in combinations(range(len(boxes)), 2) if overlap(boxes[a], boxes[b])]
    assert hits == []
    width, height = figure.bbox.size
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


def distance(point: tuple[float, float], line: Any) -> float:
    """From a point to the nearest segment of a line."""
    x, y = line.get_data()
    points = [complex(*xy) - complex(*point) for xy in zip(x, y, strict=True)]
    found = []
    for a, b in pairwise(points):
        t = -(a * (b - a).conjugate()).real / abs(b - a) ** 2
        found.append(abs(a + min(1, max(0, t)) * (b - a)))
    return min(found)


@pytest.mark.parametrize("name", CROWDED)
def test_no_line_runs_through_a_node_where_it_does_not_end(name: str) -> None:
    figure = crowded(name)
    boxes = patches(figure, "FancyBboxPatch")
    nodes = [(b.get_x() + b.get_width() / 2, b.get_y() + b.get_height() / 2) for b in boxes]
    nodes += [circle.center for circle in patches(figure, "Circle")]
    for line, node in product(figure.axes[0].lines, nodes):
        ends = [complex(x, y) for x, y in line.get_xydata()[[0, -1]]]
        assert min(abs(end - complex(*node)) for end in ends) < 1e-6 or distance(node, line) > 0.1


@pytest.mark.parametrize("path", ["network.pdf", "network", "svg"])
def test_other_suffixes_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"\.svg, \.png"):
        draw_network(DENSE, path)


def test_the_message_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"tnkfac\[examples\]"):
        draw_network(DENSE)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_network_draws_itself(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"network{suffix}"
    figure = DENSE.draw(str(path), title="dense")
    assert "dense" in [text.get_text() for text in figure.findobj(Text)]
    assert path.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")
