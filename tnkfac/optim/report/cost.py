"""Cost of training a network with an optimizer, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from tnkfac.curvature.capture.recording import output_shapes
from tnkfac.optim.params import state as states
from tnkfac.optim.params.auto_structure import StructurePair, base_work


@dataclass(frozen=True)
class Estimate:
    """The cost of a step.

    Attributes:
        state_bytes: Bytes of the state of all parameters.
        ratio: Multiply-adds of a step over those of a first-order optimizer.
    """

    state_bytes: int
    ratio: float


def estimated(optimizer: Any, model: nn.Module, shape: tuple[int, ...], every: int) -> Estimate:
    """Estimate the cost of a step.

    Args:
        optimizer: :class:`~tnkfac.SINGD` of the parameters of the network.
        model: The network, on the meta device.
        shape: Shape of its input.
        every: Steps between updates of the factors.
    """
    layers = optimizer._registry.layers
    with torch.device("meta"):
        known = output_shapes(model, torch.empty(shape, device="meta"))
    outputs = {id(m.weight): dims for m, dims in known.items() if hasattr(m, "weight")}
    work = base = 0.0
    for layer in layers:
        output = outputs.get(id(layer.weight))
        if output is None:
            continue
        statistics = layer.statistics
        described = statistics.layer
        rows = prod(output) // (described.groups * described.out_dim)
        names = statistics.k.name, statistics.c.name
        base += base_work(described, rows)
        work += StructurePair(names, statistics.k, statistics.c, described.groups).work(rows, every)
    size = 0
    for layer in layers:
        size += states.size(optimizer._runner.fresh(layer))
        size += sum(param.numel() * param.element_size() for param in layer.params())
    params = [uncaptured.param for uncaptured in optimizer._registry.others]
    size += sum(2 * param.numel() * param.element_size() for param in params)
    return Estimate(size, 1 + work / base if base else 1.0)
