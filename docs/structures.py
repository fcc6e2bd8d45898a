"""Draw which entries of a matrix the structures keep.

    python docs/structures.py

Writes ``docs/images/structures.png``. Entries of one part have one colour; in Toeplitz matrices
all entries of a diagonal are one number and have one shade.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from tnkfac.curvature.structures import resolve_structure

ROWS = 12
NAMES = (
    "dense",
    "block5diagonal",
    "hierarchical3_2",
    "diagonal",
    "triltoeplitz",
    "triutoeplitz",
    "triltopleftdiag",
    "trilbottomrightdiag",
    "triutopleftdiag",
    "triubottomrightdiag",
)


def pattern(name: str) -> np.ndarray:
    """Number of the part that an entry belongs to, NaN outside of the structure."""
    structure = resolve_structure(name, ROWS)
    shade = "toeplitz" in name
    parts = []
    for index, shape in enumerate(structure.part_shapes, start=1):
        part = torch.full((1, *shape), float(index))
        parts.append(torch.arange(1.0, ROWS + 1).unsqueeze(0) if shade else part)
    dense = structure.to_dense(tuple(parts))[0].numpy()
    return np.where(dense == 0, np.nan, dense)


def main() -> None:
    """One panel per structure."""
    figure, panels = plt.subplots(2, 5, figsize=(11, 5), layout="constrained")
    for name, panel in zip(NAMES, panels.flat, strict=True):
        shade = "toeplitz" in name
        colors = plt.get_cmap("viridis" if shade else "tab10")
        panel.imshow(pattern(name), cmap=colors, vmin=1, vmax=ROWS if shade else 10)
        panel.set_title(name, fontsize=10)
        panel.set_xticks(np.arange(-0.5, ROWS), [])
        panel.set_yticks(np.arange(-0.5, ROWS), [])
        panel.grid(color="0.85", linewidth=0.5)
        panel.tick_params(length=0)
    path = Path(__file__).parent / "images" / "structures.png"
    figure.savefig(path, dpi=110)
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
