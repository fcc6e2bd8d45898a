"""Structures that ``structures="auto"`` chooses, within ``max_state_ratio`` and ``max_step_ratio``.

Every factor has a ladder of structures, from blocks of 64 rows down to diagonal. Costs are counted,
in bytes and in multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import product

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from tnkfac.curvature.callers import warn
from tnkfac.curvature.layers import Layer
from tnkfac.curvature.structures import Structure, resolve_structure
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer, Uncaptured, update_dtype

BLOCKS = (64, 32, 8)
"""Rows of the blocks, the largest first."""
MOST = 8
"""Numbers of both factors for each of a weight with channel groups, at most."""
EARLIER = ("dense", "block128diagonal", "block32diagonal", "block8diagonal", "diagonal")
"""What ``"auto"`` could be up to version 0.1, whose files do not name it."""
HEAVY = 4
"""Times AdamW's state from which on structures asked for by name are warned of."""
LARGE = 2**26
"""Bytes of a layer up to which they are not."""
LATER = 100
"""Steps after which intervals are those that count."""
SMALL = 2**24
"""Bytes of a state that need no bound."""
Names = tuple[str, str]


def ladder(name: str, dim: int) -> list[str]:
    """Structures of a factor in order of their size; a name other than ``"auto"`` stands alone.

    Args:
        name: What the user asked for.
        dim: Rows of the factor.
    """
    if name != "auto":
        return [name]
    whole = ["dense"] if dim <= BLOCKS[0] else []
    return [*whole, *(f"block{rows}diagonal" for rows in BLOCKS if rows < dim), "diagonal"]


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

    def memory(self, sizes: tuple[int, int], copies: int) -> int:
        """Bytes of both factors, each kept so many times with so many bytes a number."""
        k, c = sizes
        return copies * self.groups * (k * self.k.numel + c * self.c.numel)

    def work(self, rows: int, every: float) -> float:
        """Multiply-adds of a step beyond those of a first-order optimizer.

        Args:
            rows: Samples times positions.
            every: Steps between updates.
        """
        sides = ((self.k, self.c), (self.c, self.k))
        products = sum(side.numel * opposite.dim for side, opposite in sides)  # with K K^T
        statistics = rows * (self.k.numel + self.c.numel)
        return self.groups * (products + statistics / every) + self.update_work / every

    @property
    def update_work(self) -> float:
        """Multiply-adds of an update, which takes three products a side, without statistics."""
        return self.groups * sum(3.0 * side.numel**2 / side.dim for side in (self.k, self.c))


def candidates(layer: Layer, names: Names) -> list[StructurePair]:
    """All pairs from the ladders of both factors, the largest first.

    The factors of depthwise convolutions and their like have many more numbers than the weight
    where they are dense; such pairs are left out.
    """
    k, c = ladder(names[0], layer.in_dim), ladder(names[1], layer.out_dim)
    pairs = sorted(_pairs(layer, product(k, c)), key=lambda pair: -pair.numel)
    most = MOST * layer.groups * layer.in_dim * layer.out_dim
    light = [pair for pair in pairs if layer.groups == 1 or pair.numel <= most]
    return light or pairs[-1:]


def _pairs(layer: Layer, several: Iterable[Names]) -> list[StructurePair]:
    return [
        StructurePair(
            (k, c),
            resolve_structure(k, layer.in_dim),
            resolve_structure(c, layer.out_dim, output=True),
            layer.groups,
        )
        for k, c in several
    ]


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
    gains = [(steps[1] - steps[0], i) for i, steps in enumerate(costs) if len(steps) > 1]
    heapify(gains)  # the largest gain has the smallest number
    while total > bound and gains:
        gain, i = heappop(gains)
        total += gain
        rungs[i] += 1
        rest = costs[i][rungs[i] :]
        if len(rest) > 1:
            heappush(gains, (rest[1] - rest[0], i))
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
    k, c = (EARLIER if name == "auto" else (name,) for name in names)
    for pair in _pairs(layer, product(k, c)):
        parts = [(pair.groups, *shape) for s in (pair.k, pair.c) for shape in s.part_shapes]
        if [p for p in parts if math.prod(p)] == [w for w in wanted if math.prod(w)]:
            return pair.names
    return None


def limit_state(
    layers: Iterable[CapturedLayer],
    others: Iterable[Uncaptured],
    groups: list[Group],
    state: Mapping[Tensor, Mapping[str, Tensor]],
) -> bool:
    """Choose structures of new layers within the ``max_state_ratio`` of their groups.

    Lazy layers wait until their size is known. Layers that have measured something in another
    structure lose that; returns whether there are any.

    Args:
        layers: All layers.
        others: Parameters that the fallback trains.
        groups: Parameter groups.
        state: State of the optimizer; layers that have one keep their structures.
    """
    changed = False
    whole = sum(map(_adamw_bytes, groups))
    for group in groups:
        names, ratio = group["structures"], group["max_state_ratio"]
        if ratio is None or (ratio == "auto" and "auto" not in names):
            continue
        known = [layer for layer in _of_group(layers, group) if layer.statistics.bound]
        new = [layer for layer in known if not state.get(layer.weight)]
        if not new:
            continue
        copies = 3 if group["alpha1"] != 0 and not group["kfac_like"] else 2  # with K K^T
        adamw = _adamw_bytes(group)
        if ratio == "auto":
            allowed = max(1.0, SMALL / max(whole, 1.0)) * 2 * sum(map(_momentum_bytes, known))
            bound = allowed - sum(map(_momentum_bytes, known))
            bound += sum(_given_bytes(layer, group, copies) for layer in known)
        else:
            allowed = ratio * adamw
            bound = allowed - _fixed_bytes(known, others, group)
        for layer in known:
            if state.get(layer.weight):
                bound -= _present(layer).memory(_itemsizes(layer, group), copies)
        ladders = [_not_above(candidates(layer.statistics.layer, names), layer) for layer in new]
        sizes = [_itemsizes(layer, group) for layer in new]

        def cost(
            i: int, pair: StructurePair, sizes: list[tuple[int, int]] = sizes, copies: int = copies
        ) -> float:
            return pair.memory(sizes[i], copies)

        pairs = greedy_fit(ladders, cost, bound)
        total = sum(cost(i, pair) for i, pair in enumerate(pairs))
        if total > bound:
            least = (allowed - bound + total) / adamw
            warn(f"max_state_ratio: got {ratio!r}. With the smallest structures it is {least:.3g}.")
        measured = any(layer.statistics.pending for layer in new)
        changed |= _restructure(new, pairs) and measured
    return changed


def warn_of_size(new: Iterable[CapturedLayer], groups: list[Group]) -> None:
    """Warn of structures asked for by name that are far larger than AdamW's state.

    Args:
        new: Layers that were just found.
        groups: Parameter groups.
    """
    for group in groups:
        heavy = []
        for layer in _of_group(new, group):
            if "auto" in group["structures"] or not layer.statistics.bound:
                continue
            held = _present(layer).memory(_itemsizes(layer, group), 2)
            adamw = 2 * layer.weight.numel() * layer.weight.element_size()
            if held > max(HEAVY * adamw, LARGE):
                heavy.append((held, adamw, layer))
        if not heavy:
            continue
        held, adamw = sum(h[0] for h in heavy), sum(h[1] for h in heavy)
        work = sum(2 * _present(layer).update_work for *_, layer in heavy)
        *_, largest = max(heavy, key=lambda h: h[0])
        warn(
            f"structures: got {group['structures']!r}. For {largest.named()[0][0]} and "
            f"{len(heavy) - 1} more they take {held / 2**30:.1f} GiB, {held / adamw:.0f} times "
            f"AdamW's state, and an update {work / 1e12:.1f} trillion operations. "
            "structures='auto' stays within AdamW's state."
        )


def limit_time(
    layers: Iterable[CapturedLayer],
    groups: list[Group],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    interval: Callable[[Group, int], int],
) -> bool:
    """Choose structures within the ``max_step_ratio`` of the groups, once batches were seen.

    Layers that change lose the statistics of this batch, and start with the next one; returns
    whether there are any.

    Args:
        layers: All layers.
        groups: Parameter groups.
        state: State of the optimizer; layers that have one keep their structures.
        interval: Steps between updates of a group at a step.
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
        names = group["structures"]
        every = float(interval(group, group["step"] + LATER))
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
    members = set(map(id, group["params"]))
    return [layer for layer in layers if id(layer.weight) in members]


def _adamw_bytes(group: Group) -> float:
    """Bytes of AdamW's state of a group."""
    params: list[Tensor] = group["params"]
    return sum(2.0 * p.numel() * p.element_size() for p in params if not is_lazy(p))


def _fixed_bytes(
    layers: Iterable[CapturedLayer], others: Iterable[Uncaptured], group: Group
) -> float:
    """Bytes of the state of a group that do not depend on structures, nor on grafting."""
    members = set(map(id, group["params"]))
    total = 0.0
    copies = 2 if group["fallback"] == "adamw" else 1
    for param in (uncaptured.param for uncaptured in others):
        if id(param) in members and not is_lazy(param):
            total += copies * param.numel() * max(param.element_size(), 4)
    return total + sum(map(_momentum_bytes, layers))


def _momentum_bytes(layer: CapturedLayer) -> float:
    """Bytes of the momentum of weight and bias."""
    return float(
        sum(p.numel() * update_dtype(p.dtype).itemsize for p in layer.params() if not is_lazy(p))
    )


def _given_bytes(layer: CapturedLayer, group: Group, copies: int) -> float:
    """Bytes of a factor whose structure was asked for by name, next to one that is chosen."""
    shape, sizes = layer.statistics.layer, _itemsizes(layer, group)
    sides = zip(group["structures"], (shape.in_dim, shape.out_dim), sizes, strict=True)
    return float(
        sum(
            copies * shape.groups * size * resolve_structure(name, dim).numel
            for name, dim, size in sides
            if name != "auto"
        )
    )


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
    return [pair for pair in pairs if pair.k.numel <= k.numel and pair.c.numel <= c.numel] or [
        _present(layer)
    ]


def _present(layer: CapturedLayer) -> StructurePair:
    """The structures that a layer has."""
    k, c = layer.statistics.k, layer.statistics.c
    return StructurePair((k.name, c.name), k, c, layer.statistics.layer.groups)


def _restructure(layers: list[CapturedLayer], pairs: list[StructurePair]) -> bool:
    """Change structures where others were chosen; tell whether there were any."""
    changed = False
    for layer, pair in zip(layers, pairs, strict=True):
        if pair.names != (layer.statistics.k.name, layer.statistics.c.name):
            layer.statistics.restructure(pair.names, layer.weight)
            changed = True
    return changed
