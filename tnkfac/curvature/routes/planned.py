"""The route through a tensor network: the contraction of two copies of a layer's rows."""

from __future__ import annotations

from functools import lru_cache

from tnkfac.curvature.layers import Layer
from tnkfac.einsum import Plan, plan


@lru_cache(maxsize=4096)
def planned_gram(layer: Layer, shape: tuple[int, ...], output_size: tuple[int, ...]) -> Plan:
    """Plan of the un-normalised input Gram ``[G, D, D]`` of KFAC-expand, without bias.

    Both copies share the samples, the channel groups and the positions.

    Args:
        layer: A convolution or transposed convolution.
        shape: Shape of its standard input, the ``x`` of the plan.
        output_size: Spatial shape of its output.
    """
    rows = layer.input_rows(shape, output_size)
    features = tuple(leg for leg in rows.output.legs if leg[0] in "ck")
    shared = {leg for leg in rows.output.legs if leg not in features}
    return plan(rows.gram(shared, rows=[features], keep=[("g",)]))
