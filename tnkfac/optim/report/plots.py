"""The report of an optimizer as a picture; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnkfac.optim.report.diagnostics import Diagnostics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NAMES = 40
"""Layers whose names fit beside their bars."""


def draw_report(rows: Sequence[Any], diagnostics: Diagnostics, path: str | Path) -> Path:
    """Spectra of the factors, sizes of the updates and bytes of the state, layer by layer.

    Args:
        rows: Rows of a report.
        diagnostics: What is known of the layers.
        path: The file; its ending says which format.

    Returns:
        The file.

    Raises:
        ImportError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib: pip install matplotlib.") from error
    layers = list(diagnostics)
    height = max(4.0, 0.22 * min(len(layers), MOST_NAMES) + 1.5)
    figure = Figure(figsize=(16, height), layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, side in zip(axes, (0, 1), strict=False):
        _spectra(axis, diagnostics, side)
    sizes = [row.update_rms or 0.0 for row in layers]
    _bars(axes[2], [row.name for row in layers], sizes, "last update, root mean square")
    weights = {row.name.removesuffix(".weight"): row.state_bytes / 2**20 for row in rows}
    mebibytes = [weights.get(row.name, 0.0) for row in layers]
    _bars(axes[3], [], mebibytes, "state, MiB")
    figure.savefig(Path(path), dpi=110)
    return Path(path)


def _spectra(axis: Axes, diagnostics: Diagnostics, side: int) -> None:
    """Eigenvalues over the largest of their layer, the first layer dark and the last one bright."""
    import matplotlib

    colors = matplotlib.colormaps["viridis"]
    known = list(diagnostics.spectra.items())
    for place, (_, spectra) in enumerate(known):
        values = (spectra[side] / spectra[side][0]).tolist()
        ranks = [(i + 1) / len(values) for i in range(len(values))]
        color = colors(place / max(1, len(known) - 1))
        axis.plot(ranks, values, color=color, marker="." if len(values) < 2 else "", lw=1)
    axis.set(title=f"{('input', 'output')[side]} factors", ylabel="eigenvalues over the largest")
    axis.set(xlabel="rank over dimension\nfirst layer dark, last one bright")
    if known:
        axis.set_yscale("log")
    else:
        axis.text(0.5, 0.5, "not known", ha="center", transform=axis.transAxes)
    axis.grid(alpha=0.3)


def _bars(axis: Axes, names: list[str], values: list[float], title: str) -> None:
    """One bar for each layer, the first on top."""
    axis.barh(range(len(values)), values, color="tab:blue")
    axis.invert_yaxis()
    axis.set(title=title)
    if len(names) > MOST_NAMES:
        names = []
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.margins(y=0.01)
    axis.grid(alpha=0.3, axis="x")
