"""Bounds on what ``structures="auto"`` costs: ``max_state_ratio`` and ``max_step_ratio``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from tnkfac.curvature import warn
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer, Uncaptured, update_dtype
from tnkfac.optim.params.ladders import Choice, Names, base_work, candidates, fitting


def limit_state(
    layers: Iterable[CapturedLayer],
    others: Iterable[Uncaptured],
    groups: list[Group],
    state: Mapping[Tensor, Any],
) -> None:
    """Choose structures of new layers within the ``max_state_ratio`` of their groups.

    Lazy layers, whose size is not known yet, become diagonal.

    Args:
        layers: Layers without a state.
        others: Parameters that the fallback trains.
        groups: Parameter groups.
        state: State of the optimizer; layers that have one keep their structures.
    """
    for group in groups:
        if group["max_state_ratio"] is None:
            continue
        mine = [layer for layer in layers if _belongs(layer.weight, group)]
        mine = [layer for layer in mine if not state.get(layer.weight)]
        for layer in mine:
            if not layer.statistics.bound:
                layer.statistics.set_structures(_smallest(group["structures"]))
        mine = [layer for layer in mine if layer.statistics.bound]
        adamw, left = 0.0, 0.0
        for param in group["params"]:
            if not is_lazy(param):
                adamw += 2 * param.numel() * param.element_size()
        left = group["max_state_ratio"] * adamw
        for other in others:
            if _belongs(other.param, group) and not is_lazy(other.param):
                copies = 2 if group["fallback"] == "adamw" else 1
                left -= copies * other.param.numel() * max(other.param.element_size(), 4)
        for layer in mine:
            copies = 2 if group["grafting"] == "adam" else 1
            left -= sum(copies * p.numel() * p.element_size() for p in layer.params())
        copies = 2 if group["alpha1"] != 0 and not group["kfac_like"] else 1
        ladders = [candidates(la.statistics.layer, group["structures"]) for la in mine]
        sizes = [_number_bytes(layer, group) for layer in mine]

        def cost(index: int, choice: Choice, sizes: Any = sizes, copies: int = copies) -> float:
            return choice.state_bytes(sizes[index], copies)

        chosen = fitting(ladders, cost, left)
        taken = sum(cost(index, choice) for index, choice in enumerate(chosen))
        if mine and taken > left:
            least = (group["max_state_ratio"] * adamw - left + taken) / adamw
            warn(
                f"max_state_ratio: got {group['max_state_ratio']}. With the smallest structures "
                f"it is {least:.3g}.",
            )
        _take(mine, chosen)


def limit_time(
    layers: Iterable[CapturedLayer], groups: list[Group], state: Mapping[Tensor, Any]
) -> bool:
    """Choose structures within the ``max_step_ratio`` of the groups, once batches were seen.

    Layers that change lose the statistics of this batch, and start with the next one; returns
    whether there are any.

    Args:
        layers: All layers.
        groups: Parameter groups.
        state: State of the optimizer; layers that have one keep their structures.
    """
    changed = False
    for group in groups:
        if group["max_step_ratio"] is None:
            continue
        mine = [layer for layer in layers if _belongs(layer.weight, group)]
        mine = [la for la in mine if la.statistics.pending and not state.get(la.weight)]
        if not mine:
            continue
        rows = [int(layer.statistics.sums()[-1][1]) for layer in mine]
        shapes = [layer.statistics.layer for layer in mine]
        T = group["T"]
        every = float(T(group["step"]) if callable(T) else T)
        base = sum(base_work(shape, n) for shape, n in zip(shapes, rows, strict=True))
        ladders = [
            _not_above(candidates(shape, group["structures"]), layer)
            for shape, layer in zip(shapes, mine, strict=True)
        ]

        def work(index: int, choice: Choice, rows: Any = rows, every: float = every) -> float:
            return choice.work(rows[index], every)

        chosen = fitting(ladders, work, (group["max_step_ratio"] - 1) * base)
        changed |= _take(mine, chosen)
    return changed


def _belongs(param: Tensor, group: Group) -> bool:
    return any(param is other for other in group["params"])


def _smallest(names: Names) -> Names:
    k, c = ("diagonal" if name == "auto" else name for name in names)
    return k, c


def _number_bytes(layer: CapturedLayer, group: Group) -> tuple[int, int]:
    """Bytes of a number of ``K`` and of ``C``."""
    kept = update_dtype(layer.weight.dtype)
    k, c = (
        (kept if name is None else getattr(torch, name)).itemsize
        for name in group["preconditioner_dtype"]
    )
    return k, c


def _not_above(choices: list[Choice], layer: CapturedLayer) -> list[Choice]:
    """Choices from the present one on: a bound on the state may have been met already."""
    k, c = layer.statistics.k, layer.statistics.c
    return [choice for choice in choices if choice.k.numel <= k.numel and choice.c.numel <= c.numel]


def _take(layers: list[CapturedLayer], chosen: list[Choice]) -> bool:
    """Change structures where others were chosen; tell whether there were any."""
    changed = False
    for layer, choice in zip(layers, chosen, strict=True):
        statistics = layer.statistics
        if choice.names != (statistics.k.name, statistics.c.name):
            statistics.restructure(choice.names, layer.weight)
            changed = True
    return changed
