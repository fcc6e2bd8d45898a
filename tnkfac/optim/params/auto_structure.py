"""Structures that ``structures="auto"`` chooses, within ``max_state_ratio`` and ``max_step_ratio``.

Every factor has a ladder of structures, from what ``"auto"`` takes without a bound down to
diagonal. Costs are counted, in bytes and in multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from tnkfac.curvature.callers import warn
from tnkfac.curvature.layers import Layer
from tnkfac.curvature.structures import Structure, resolve_structure
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer, Uncaptured, update_dtype

BLOCKS = (128, 32, 8)
"""Rows of the blocks between dense and diagonal."""
Names = tuple[str, str]


def ladder(name: str, dim: int, output: bool) -> list[str]:
    """Structures of a factor in order of their size; a name other than ``"auto"`` stands alone.

    Args:
        name: What the user asked for.
        dim: Rows of the factor.
        output: Whether it is an output factor.
    """
    if name != "auto":
        return [name]
    first = resolve_structure("auto", dim, output=output)
    steps = [first.name]
    for rows in BLOCKS:
        block = resolve_structure(f"block{rows}diagonal", dim)
        if rows < dim and block.numel < first.numel:
            steps.append(block.name)
    return [*steps, "diagonal"]


@dataclass(frozen=True)
class StructurePair:
    """Both factors of a layer in some structures.

    Attributes:
        names: Of the structures.
        k: That of the input factor.
        c: That of the output factor.
        groups: Channel groups.
    """

    names: Names
    k: Structure
    c: Structure
    groups: int

    @property
    def numel(self) -> int:
        """How many numbers ``K`` and ``C`` are kept in."""
        return self.groups * (self.k.numel + self.c.numel)

    def state_bytes(self, sizes: tuple[int, int], copies: int) -> int:
        """State of both factors, each kept so many times with so many bytes a number."""
        k, c = sizes
        return copies * self.groups * (k * self.k.numel + c * self.c.numel)

    def work(self, rows: int, every: float) -> float:
        """Multiply-adds of a step beyond those of a first-order optimizer.

        Args:
            rows: Samples times positions.
            every: Steps between updates.
        """
        total = 0.0
        for structure, opposite in ((self.k, self.c), (self.c, self.k)):
            numel = structure.numel
            total += 2 * numel * opposite.dim  # K K^T times a gradient matrix
            total += (rows * numel + 4 * numel * numel / structure.dim) / every
        return self.groups * total


def candidates(layer: Layer, names: Names) -> list[StructurePair]:
    """All pairs from the ladders of both factors, the largest first."""
    k, c = ladder(names[0], layer.in_dim, False), ladder(names[1], layer.out_dim, True)
    pairs = [
        StructurePair(
            (k_name, c_name),
            resolve_structure(k_name, layer.in_dim),
            resolve_structure(c_name, layer.out_dim, output=True),
            layer.groups,
        )
        for k_name, c_name in product(k, c)
    ]
    return sorted(pairs, key=lambda pair: -pair.numel)


def greedy_fit(
    ladders: Sequence[Sequence[StructurePair]],
    cost: Callable[[int, StructurePair], float],
    bound: float,
) -> list[StructurePair]:
    """Structures of all layers whose costs together are within a bound.

    While they are not, the layer that gains most takes its next smaller pair; without anything to
    gain, all have their smallest.

    Args:
        ladders: For each layer, what it may have, the largest first.
        cost: Of a pair for the layer at some index.
        bound: Bound on the sum of the costs.
    """
    costs = [[cost(i, pair) for pair in pairs] for i, pairs in enumerate(ladders)]
    rungs = [0] * len(costs)
    total = sum(steps[0] for steps in costs)
    while total > bound:
        gains = {
            i: steps[rungs[i]] - steps[rungs[i] + 1]
            for i, steps in enumerate(costs)
            if rungs[i] + 1 < len(steps)
        }
        if not gains:
            break
        most = max(gains, key=lambda i: gains[i])
        total -= gains[most]
        rungs[most] += 1
    return [pairs[rung] for pairs, rung in zip(ladders, rungs, strict=True)]


def base_work(layer: Layer, rows: int) -> float:
    """Multiply-adds of the forward and the backward pass of a layer."""
    return 3.0 * rows * layer.groups * layer.in_dim * layer.out_dim


def matching(layer: Layer, names: Names, shapes: Iterable[tuple[int, ...]]) -> Names | None:
    """The pair of structures whose parts have these shapes, of which a saved state tells.

    Args:
        layer: The layer.
        names: What the user asked for.
        shapes: Shapes of the parts of ``K``, then of those of ``C``.
    """
    wanted = list(shapes)
    for pair in candidates(layer, names):
        parts = [(pair.groups, *shape) for s in (pair.k, pair.c) for shape in s.part_shapes]
        if [p for p in parts if math.prod(p)] == [w for w in wanted if math.prod(w)]:
            return pair.names
    return None


def limit_state(
    layers: Iterable[CapturedLayer],
    others: Iterable[Uncaptured],
    groups: list[Group],
    state: Mapping[Tensor, Mapping[str, Tensor]],
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
        new = [layer for layer in _of_group(layers, group) if not state.get(layer.weight)]
        for layer in new:
            if not layer.statistics.bound:
                layer.statistics.set_structures(_smallest(group["structures"]))
        new = [layer for layer in new if layer.statistics.bound]
        adamw = _adamw_bytes(group)
        bound = group["max_state_ratio"] * adamw - _fixed_bytes(new, others, group)
        copies = 2 if group["alpha1"] != 0 and not group["kfac_like"] else 1
        ladders = [candidates(layer.statistics.layer, group["structures"]) for layer in new]
        sizes = [_itemsizes(layer, group) for layer in new]

        def cost(
            i: int, pair: StructurePair, sizes: list[tuple[int, int]] = sizes, copies: int = copies
        ) -> float:
            return pair.state_bytes(sizes[i], copies)

        pairs = greedy_fit(ladders, cost, bound)
        total = sum(cost(i, pair) for i, pair in enumerate(pairs))
        if new and total > bound:
            least = (group["max_state_ratio"] * adamw - bound + total) / adamw
            warn(
                f"max_state_ratio: got {group['max_state_ratio']}. With the smallest structures "
                f"it is {least:.3g}.",
            )
        _restructure(new, pairs)


def limit_time(
    layers: Iterable[CapturedLayer],
    groups: list[Group],
    state: Mapping[Tensor, Mapping[str, Tensor]],
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
        new = [layer for layer in _of_group(layers, group) if layer.statistics.pending]
        new = [layer for layer in new if not state.get(layer.weight)]
        if not new:
            continue
        rows = [int(layer.statistics.sums()[-1][1]) for layer in new]
        T, names = group["T"], group["structures"]
        every = float(T(group["step"]) if callable(T) else T)
        base = sum(base_work(la.statistics.layer, n) for la, n in zip(new, rows, strict=True))
        ladders = [_not_above(candidates(layer.statistics.layer, names), layer) for layer in new]

        def work(
            i: int, pair: StructurePair, rows: list[int] = rows, every: float = every
        ) -> float:
            return pair.work(rows[i], every)

        pairs = greedy_fit(ladders, work, (group["max_step_ratio"] - 1) * base)
        changed |= _restructure(new, pairs)
    return changed


def _of_group(layers: Iterable[CapturedLayer], group: Group) -> list[CapturedLayer]:
    return [layer for layer in layers if _is_in(layer.weight, group)]


def _is_in(param: Tensor, group: Group) -> bool:
    return any(param is member for member in group["params"])


def _smallest(names: Names) -> Names:
    k, c = ("diagonal" if name == "auto" else name for name in names)
    return k, c


def _adamw_bytes(group: Group) -> float:
    """Bytes of AdamW's state of a group."""
    params: list[Tensor] = group["params"]
    return sum(2.0 * p.numel() * p.element_size() for p in params if not is_lazy(p))


def _fixed_bytes(
    layers: Iterable[CapturedLayer], others: Iterable[Uncaptured], group: Group
) -> float:
    """Bytes of the state of a group that do not depend on structures."""
    total = 0.0
    copies = 2 if group["fallback"] == "adamw" else 1
    for param in (uncaptured.param for uncaptured in others):
        if _is_in(param, group) and not is_lazy(param):
            total += copies * param.numel() * max(param.element_size(), 4)
    copies = 2 if group["grafting"] == "adam" else 1
    for layer in layers:
        total += sum(copies * p.numel() * p.element_size() for p in layer.params())
    return total


def _itemsizes(layer: CapturedLayer, group: Group) -> tuple[int, int]:
    """Bytes of a number of ``K`` and of ``C``."""
    default = update_dtype(layer.weight.dtype)
    k, c = (
        (default if name is None else getattr(torch, name)).itemsize
        for name in group["preconditioner_dtype"]
    )
    return k, c


def _not_above(pairs: list[StructurePair], layer: CapturedLayer) -> list[StructurePair]:
    """Pairs from the present one on: a bound on the state may have been met already."""
    k, c = layer.statistics.k, layer.statistics.c
    return [pair for pair in pairs if pair.k.numel <= k.numel and pair.c.numel <= c.numel]


def _restructure(layers: list[CapturedLayer], pairs: list[StructurePair]) -> bool:
    """Change structures where others were chosen; tell whether there were any."""
    changed = False
    for layer, pair in zip(layers, pairs, strict=True):
        if pair.names != (layer.statistics.k.name, layer.statistics.c.name):
            layer.statistics.restructure(pair.names, layer.weight)
            changed = True
    return changed
