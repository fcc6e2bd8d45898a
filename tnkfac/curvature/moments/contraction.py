"""The route through a tensor network: the contraction of two copies of an unfolded input."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from tnkfac.curvature.moments.unfolding import Unfolding
from tnkfac.einsum import Plan, plan

HELD = 2**20
"""Numbers that a plan holds at one time, unless a single group needs more."""


def fill_from_network(
    out: Tensor, unfolding: Unfolding, x: Tensor, output_size: tuple[int, ...]
) -> None:
    """Fill ``out`` with the second moment of an unfolded input, a few channel groups at a time.

    Args:
        out: ``[G, D, D]``, overwritten.
        unfolding: That of a convolution or transposed convolution.
        x: Its input.
        output_size: Spatial shape of its output.
    """
    shape = tuple(x.shape)
    each = shape[1] // unfolding.groups
    step = groups_together(unfolding, shape, output_size)
    for first in range(0, unfolding.groups, step):
        last = min(first + step, unfolding.groups)
        part = x[:, first * each : last * each]
        small = replace(unfolding, groups=last - first, channels=(last - first) * each)
        planned = planned_moment(small, tuple(part.shape), output_size)
        out[first:last] = planned(x=part)


def groups_together(
    unfolding: Unfolding, shape: tuple[int, ...], output_size: tuple[int, ...]
) -> int:
    """Channel groups whose plan holds at most :data:`HELD` numbers."""
    whole = planned_moment(unfolding, shape, output_size).peak_memory
    return max(1, min(unfolding.groups, unfolding.groups * HELD // max(1, whole)))


@lru_cache(maxsize=4096)
def planned_moment(
    unfolding: Unfolding, shape: tuple[int, ...], output_size: tuple[int, ...]
) -> Plan:
    """Plan of the second moment ``[G, D, D]`` of an unfolded input.

    Both copies share the samples, the channel groups and the positions.

    Args:
        unfolding: That of a convolution or transposed convolution.
        shape: Shape of its input, the ``x`` of the plan.
        output_size: Spatial shape of its output.
    """
    rows = unfolding.network(shape, output_size)
    features = tuple(leg for leg in rows.output.legs if leg[0] in "ck")
    shared = {leg for leg in rows.output.legs if leg not in features}
    return plan(rows.gram(shared, rows=[features], keep=[("g",)]))
