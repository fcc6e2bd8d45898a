"""Cost of training a network with an optimizer, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tnkfac.curvature.capture.recording import output_sizes
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


def rows_of_layers(optimizer: Any, model: nn.Module, run: Callable[[], Any]) -> dict[int, int]:
    """Samples times positions of the layers that a pass on the meta device goes through.

    Args:
        optimizer: :class:`~tnkfac.SINGD` of the parameters of the network.
        model: The network, on the meta device.
        run: Calls it.

    Returns:
        Rows by ``id`` of the statistics of a layer; those that are not there were not called.
    """
    layers = optimizer._registry.layers
    own = {id(layer.weight) for layer in layers if layer.removers}
    called = [module for module in model.modules() if id(module._parameters.get("weight")) in own]
    with torch.device("meta"):
        sizes = output_sizes(called, run)
    found = {id(slot.statistics): slot.rows for slot in optimizer._registry.slots() if slot.rows}
    for layer in layers:
        if layer.removers and id(layer.weight) in sizes:
            outputs = layer.statistics.layer.out_channels
            found[id(layer.statistics)] = sizes[id(layer.weight)] // outputs
    return found


def estimated(optimizer: Any, rows: dict[int, int], every: int) -> Estimate:
    """Estimate the cost of a step.

    Args:
        optimizer: :class:`~tnkfac.SINGD` of the parameters of the network.
        rows: What :func:`rows_of_layers` has found.
        every: Steps between updates of the factors.
    """
    layers = optimizer._registry.layers
    work = base = 0.0
    for layer in layers:
        statistics = layer.statistics
        count = rows.get(id(statistics), 0)
        if count:
            described = statistics.layer
            names = statistics.k.name, statistics.c.name
            pair = StructurePair(names, statistics.k, statistics.c, described.groups)
            base += base_work(described, count)
            work += pair.work(count, every)
    size = 0
    for layer in layers:
        size += states.size(optimizer._runner.fresh(layer))
        size += sum(param.numel() * param.element_size() for param in layer.params())
    params = [uncaptured.param for uncaptured in optimizer._registry.others]
    size += sum(2 * param.numel() * param.element_size() for param in params)
    return Estimate(size, 1 + work / base if base else 1.0)
