"""Which route a factor takes, and what the others would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from tnkfac.curvature.factors import check_approx
from tnkfac.curvature.layers import Layer, describe
from tnkfac.curvature.moments.algorithms import Algorithm
from tnkfac.curvature.moments.second_moment import Approx
from tnkfac.curvature.structures import check_factor_structure, resolve_structure
from tnkfac.curvature.structures.block_diagonal import BlockDiagonal
from tnkfac.curvature.structures.diagonal import Diagonal


@dataclass(frozen=True)
class Explanation:
    """Candidates for one factor; printing it gives a table.

    Attributes:
        title: What was asked for.
        routes: The candidates, the chosen one first.
    """

    title: str
    routes: tuple[Algorithm, ...]

    @property
    def chosen(self) -> str:
        """Name of the route that is taken."""
        return self.routes[0].name

    def __str__(self) -> str:
        """A table: memory in float32, and the cost, of operations and memory traffic together."""
        lines = [self.title]
        lines += [f"  {'route':<16}{'multiply-adds':>18}{'extra memory':>15}{'cost':>10}"]
        for index, route in enumerate(self.routes):
            memory, times = route.numbers * 4 / 2**20, route.cost / max(self.routes[0].cost, 1.0)
            marker = "  <- chosen" if index == 0 else ""
            numbers = f"{route.operations:>18,}{memory:>11.2f} MiB{times:>9.1f}x"
            lines.append(f"  {route.name:<16}{numbers}{marker}")
        return "\n".join(lines)


def explain(
    module: nn.Module,
    x_shape: Sequence[int],
    approx: str = "expand",
    structure: str = "dense",
) -> Explanation:
    """Print by which exact route the input factor of a layer is computed, and why.

    Args:
        module: ``Linear``, ``Conv1d/2d/3d`` or ``ConvTranspose1d/2d/3d``.
        x_shape: Shape of its input, as the module receives it.
        approx: ``"expand"`` or ``"reduce"``.
        structure: ``"dense"``, ``"diagonal"`` or ``"block{k}diagonal"``.

    Returns:
        The candidates with their multiply-adds, their memory besides input and result, and the
        estimated time on one core, by which they are chosen.

    Raises:
        TypeError: If the module is not supported.
        ValueError: For an unknown approximation or structure, or a shape that does not fit.

    Example:
        >>> explanation = explain(torch.nn.Conv2d(64, 64, 3, padding=1), (8, 64, 56, 56))
        Conv2d, input (8, 64, 56, 56), expand, dense
          route                multiply-adds   extra memory      cost
          lags                 1,564,426,240       7.73 MiB      1.0x  <- chosen
          im2col               8,323,596,288       7.05 MiB      3.0x
        >>> explanation.chosen
        'lags'
    """
    title = f"{type(module).__name__}, input {tuple(x_shape)}, {check_approx(approx)}, {structure}"
    routes = _routes(describe(module), x_shape, check_approx(approx), structure)
    explanation = Explanation(title, routes)
    print(explanation)
    return explanation


def _routes(
    layer: Layer, shape: Sequence[int], approx: Approx, structure: str
) -> tuple[Algorithm, ...]:
    dtype = torch.int64 if layer.reads_indices else None
    x = torch.empty(tuple(shape), dtype=dtype, device="meta")
    rows = replace(layer, bias=False).input_moment(x, approx).rows
    asked = resolve_structure(check_factor_structure(structure), layer.in_dim)
    width = 1 if isinstance(asked, Diagonal) else rows.dim
    return rows.algorithms(asked.size if isinstance(asked, BlockDiagonal) else width)
