"""The route through a tensor network: the contraction of two copies of a layer's rows."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from tnkfac.curvature.layers import Layer
from tnkfac.einsum import Plan, plan

HELD = 2**20
"""Numbers that a plan holds at one time, unless a single group needs more."""


def fill_planned_gram(
    out: Tensor, layer: Layer, x: Tensor, output_size: tuple[int, ...], scale: float
) -> None:
    """Fill ``out`` with the scaled Gram matrix, a few channel groups at a time.

    Args:
        out: ``[G, D, D]``, overwritten.
        layer: A convolution or transposed convolution.
        x: Its standard input.
        output_size: Spatial shape of its output.
        scale: Number that multiplies the result.
    """
    shape = tuple(x.shape)
    each = shape[1] // layer.groups
    step = groups_together(layer, shape, output_size)
    for first in range(0, layer.groups, step):
        last = min(first + step, layer.groups)
        part = x[:, first * each : last * each]
        small = replace(layer, groups=last - first, in_channels=(last - first) * each)
        planned = planned_gram(small, tuple(part.shape), output_size)
        torch.mul(planned(x=part), scale, out=out[first:last])


def groups_together(layer: Layer, shape: tuple[int, ...], output_size: tuple[int, ...]) -> int:
    """Channel groups whose plan holds at most :data:`HELD` numbers."""
    whole = planned_gram(layer, shape, output_size).peak_memory
    return max(1, min(layer.groups, layer.groups * HELD // max(1, whole)))


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
