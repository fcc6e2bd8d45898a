"""Write the gallery of all operations: ``docs/gallery.md`` and ``docs/images/gallery/*.svg``.

python docs/gallery.py            # write
python docs/gallery.py --check    # exit with 1 if what is there differs
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import tempfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from tnkfac.einsum import Network, Plan, networks, simplify
from tnkfac.einsum.drawing.draw import draw_network
from tnkfac.einsum.geometry import conv_axes

DOCS = Path(__file__).parent
IMAGES = Path("images/gallery")

BATCH, GROUPS, C_IN, C_OUT, VECTORS = 2, 2, 6, 4, 3
KERNEL, LARGE, SMALL = (3, 4), (7, 10), (4, 5)
HYPER: dict[str, Any] = {"stride": 2, "padding": 1, "groups": GROUPS}

THEMES = {  # modules of `tnkfac.einsum.operations`, in the order of the page
    "forward": "Forward operations",
    "derivatives": "Derivatives",
    "kronecker_factors": "Kronecker factors",
    "ggn": "GGN and Fisher",
    "hessian": "Backpropagated curvature",
}

X = (8, 16, 32, 32)
PAIRS: list[tuple[str, str, dict[str, Any]]] = [  # title, operation, arguments
    (
        "A general convolution keeps its patterns",
        "conv",
        {"x": X, "weight": (32, 16, 3, 3), "padding": 1},
    ),
    (
        "A dense convolution (kernel = stride) is a matrix product",
        "conv",
        {"x": X, "weight": (32, 16, 4, 4), "stride": 4},
    ),
    (
        "Down-sampling (1x1, stride 2) skips pixels",
        "conv",
        {"x": X, "weight": (32, 16, 1, 1), "stride": 2},
    ),
    (
        "A dense transposed convolution",
        "conv_transpose",
        {"x": X, "weight": (16, 32, 2, 2), "stride": 2},
    ),
    ("KFC factor of a patch embedding", "kfc_factor", {"x": X, "kernel_size": 4, "stride": 4}),
    (
        "KFAC-reduce factor of a patch embedding",
        "kfac_reduce_factor",
        {"x": X, "kernel_size": 4, "stride": 4},
    ),
    (
        "KFC factor of a dense transposed convolution",
        "kfc_factor_transpose",
        {"x": X, "kernel_size": 2, "stride": 2},
    ),
    (
        "GGN diagonal of a dense convolution",
        "ggn_diagonal",
        {"x": X, "s": (10, 8, 32, 16, 16), "kernel_size": 2, "stride": 2},
    ),
]

INTRO = """\
# Gallery

<!-- Written by docs/gallery.py; do not edit. -->

Every operation of `tnkfac.einsum.networks`, in two dimensions, as drawn by
`tnkfac.einsum.Network.draw`. White boxes are the tensors that the caller supplies, shaded
ones the index patterns Π of the spatial dimensions (equal patterns have the same shade), black
discs Kronecker deltas. Every line is a leg. Small dots are legs on three or more tensors, or legs
that are only summed. Open legs are blue; those that form one axis of the result end at a bar. A
number below multiplies the result.
"""

BEFORE_AFTER = """\
## Before and after `simplify`

`simplify` rewrites a network without changing its result. Flops are the multiply-adds of
`Plan(network, simplified=False)` and of `plan(network)`.
"""


def arguments(name: str) -> dict[str, Any]:
    """Small arguments of an operation, by the names of its parameters."""
    transposed = name.endswith("_transpose")
    inputs, outputs = (SMALL, LARGE) if transposed else (LARGE, SMALL)
    channels = (C_IN, C_OUT // GROUPS) if transposed else (C_OUT, C_IN // GROUPS)
    x, y, weight = (BATCH, C_IN, *inputs), (BATCH, C_OUT, *outputs), (*channels, *KERNEL)
    is_fold = name.startswith("fold")
    known: dict[str, Any] = {
        **dict.fromkeys(("x", "dx", "input_shape"), x),
        **dict.fromkeys(("weight", "dw", "vector", "weight_shape"), weight),
        **dict.fromkeys(("v", "h"), y),
        "s": (VECTORS, *y),
        "z": (BATCH, C_IN * prod(KERNEL), prod(outputs)),
        "g": (C_OUT * prod(outputs),) * 2,
        "kernel_size": KERNEL,
        "input_size": inputs,
        "output_size": inputs if is_fold else outputs,  # `fold` makes what `unfold` takes
        "batch": BATCH,
        "channels": C_IN,
        "groups": GROUPS,
        "positions": 5,
        "axes": conv_axes(LARGE, KERNEL, stride=2, padding=1),
    }
    parameters = inspect.signature(getattr(networks, name)).parameters.values()
    given = {p.name: known[p.name] for p in parameters if p.name in known}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        given |= HYPER
        if transposed:
            given["output_padding"] = tuple(
                large - (2 * (small - 1) + kernel - 2)
                for large, small, kernel in zip(LARGE, SMALL, KERNEL, strict=True)
            )
    return given


def description(operation: Callable[..., Network]) -> str:
    """First line of the docstring, in Markdown."""
    line = (operation.__doc__ or "").splitlines()[0]
    return re.sub(r":\w+:`(.*?)`", r"`\1`", line).replace("``", "`")


def operation_section(name: str, images: Path) -> str:
    """Heading, description, equation and picture of one operation."""
    operation = getattr(networks, name)
    network = operation(**arguments(name))
    draw_network(network, str(images / f"{name}.svg"))
    equation = f"```\n{network.equation}\n```"
    picture = f"![{name}]({IMAGES.as_posix()}/{name}.svg)"
    return f"### {name}\n\n{description(operation)}\n\n{equation}\n\n{picture}\n"


def pair_section(number: int, images: Path) -> str:
    """A network as it is written and as it is computed."""
    title, name, given = PAIRS[number]
    before = getattr(networks, name)(**given)
    after = simplify(before)
    rows, pictures = [], []
    for when, network, simplified in (("before", before, False), ("after", after, True)):
        file = f"simplify_{number + 1}_{when}.svg"
        draw_network(network, str(images / file), title=when)
        operands, flops = len(network.operands), Plan(before, simplified=simplified).flops
        rows.append(f"| {when} | {operands} | {flops:,} | `{network.equation}` |\n")
        pictures.append(f"![{name}, {when}]({IMAGES.as_posix()}/{file})\n")
    call = ", ".join(f"{key}={value}" for key, value in given.items())
    head = "| | operands | flops | equation |\n|---|---|---|---|\n"
    table = f"{head}{''.join(rows)}"
    return "\n".join([f"### {title}\n", f"`networks.{name}({call})`\n", table, *pictures])


def write(docs: Path) -> None:
    """Write the page and its images under a directory."""
    images = docs / IMAGES
    images.mkdir(parents=True, exist_ok=True)
    sections = [INTRO]
    for theme, title in THEMES.items():
        sections.append(f"## {title}\n")
        for name in networks.__all__:
            if getattr(networks, name).__module__.endswith(f".{theme}"):
                sections.append(operation_section(name, images))
    sections.append(BEFORE_AFTER)
    sections += [pair_section(number, images) for number in range(len(PAIRS))]
    (docs / "gallery.md").write_text("\n".join(sections), encoding="utf-8")


def contents(docs: Path) -> dict[str, bytes]:
    """The page and its images, by path."""
    files = [docs / "gallery.md", *(docs / IMAGES).glob("*.svg")]
    return {f.relative_to(docs).as_posix(): f.read_bytes() for f in files if f.exists()}


def main() -> int:
    """Write the gallery, or compare it with what is there."""
    parser = argparse.ArgumentParser(description="Write docs/gallery.md and its images.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if different")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory))
        new, old = contents(Path(directory)), contents(DOCS)
    different = sorted(path for path in new.keys() | old.keys() if new.get(path) != old.get(path))
    if not check:
        (DOCS / IMAGES).mkdir(parents=True, exist_ok=True)
        for path in different:
            if path in new:
                (DOCS / path).write_bytes(new[path])
            else:
                (DOCS / path).unlink()
    for path in different:
        print(f"{'differs' if check else 'written'}: docs/{path}")
    return int(check and bool(different))


if __name__ == "__main__":
    sys.exit(main())
