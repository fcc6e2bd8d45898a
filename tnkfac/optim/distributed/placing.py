"""Work and state of the preconditioners, spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor

from tnkfac.optim.distributed.assignment import (
    Place,
    Placement,
    PlacementRow,
    Plan,
    update_cost,
    workers,
)
from tnkfac.optim.distributed.reduction import Copy, Processes
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.state import ON_HOST, ParamState, State, size

PATIENCE = timedelta(minutes=1)
"""How long a whole state waits for the other processes, if they keep parts of it."""
Fresh = Callable[[CapturedLayer], ParamState]
"""Gives the state of the curvature of a layer before any statistics."""


class Placing:
    """Which process updates and keeps the preconditioner of which layer.

    Attributes:
        processes: The processes that train the same parameters.
        plan: The places of all layers.
    """

    def __init__(self, processes: Processes, fresh: Fresh) -> None:
        """Every process does and keeps everything.

        Args:
            processes: Those that train the same parameters.
            fresh: The state of the curvature of a layer before any statistics.
        """
        self.processes = processes
        self.plan = Plan()
        self._fresh = fresh

    def forget(self) -> None:
        """No layer has a place any more."""
        self.plan = Plan()

    def place(self, layers: Sequence[CapturedLayer], state: State) -> None:
        """Give layers their places among the processes, once these are known."""
        count = self.processes.count
        if count == 1:
            return
        if self.plan.world != count:
            self.plan = Plan(count, self.processes.rank)
        new = [la for la in layers if la.statistics.bound and not self.plan.knows(la)]
        if not new:
            return
        counts = [
            count if _is_read_by_taps(layer) else workers(_fraction(layer), count) for layer in new
        ]
        self.plan.extend(new, [_cost(layer) for layer in new], counts)
        self.drop(new, state)

    def drop(self, layers: Sequence[CapturedLayer], state: State) -> None:
        """Let go of what other processes keep."""
        for layer in layers:
            own = state.get(layer.weight)
            if own and not self.plan.keeps(layer):
                for key in self._placed_keys(layer):
                    own.pop(key, None)

    def _placed_keys(self, layer: CapturedLayer) -> list[str]:
        """What of the state of a layer only its keepers have."""
        return sorted(key for key in self._fresh(layer) if key not in ON_HOST)

    def share(self, layers: Sequence[CapturedLayer], names: Sequence[str], state: State) -> None:
        """Copy matrices from the processes that have updated them to all keepers.

        Args:
            layers: Layers.
            names: Names of the matrices.
            state: State of the optimizer.
        """
        copies = []
        for layer in layers:
            place = self.plan.place(layer)
            if place.owner is None or self.plan.rank not in place.keepers:
                continue
            own = state[layer.weight]
            parts = [own[key] for key in sorted(own) if key.split(".")[0] in names]
            copies.append(Copy(layer.name, place.owner, place.keepers, parts))
        self.processes.copy(copies)

    def precondition(
        self,
        layers: Sequence[CapturedLayer],
        matrices: Sequence[Tensor],
        here: Callable[[list[CapturedLayer], list[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """Precondition gradients in the processes that can, and hand them to the others.

        Args:
            layers: Layers.
            matrices: Their gradients ``[G, C_out / G, D]``.
            here: Does so in this process.
        """
        kept = [i for i, layer in enumerate(layers) if self.plan.keeps(layer)]
        done = here([layers[i] for i in kept], [matrices[i] for i in kept])
        known = dict(zip(kept, done, strict=True))
        updates, copies = [], []
        for i, layer in enumerate(layers):
            row = self.plan.row(layer)
            if len(row) > 1:
                update = known[i].contiguous() if i in known else torch.empty_like(matrices[i])
                copies.append(Copy(layer.name, self.plan.source(layer), row, [update]))
            else:
                update = known[i]
            updates.append(update)
        self.processes.copy(copies)
        return updates

    @contextmanager
    def whole_state(self, layers: Sequence[CapturedLayer], state: State) -> Iterator[None]:
        """Have here what only other processes keep."""
        copies, lacking = [], []
        for layer in layers:
            row, own = self.plan.row(layer), state.get(layer.weight)
            if len(row) == 1 or not own:
                continue
            keys = self._placed_keys(layer)
            if not self.plan.keeps(layer):
                fresh = self._fresh(layer)
                own.update({key: fresh[key] for key in keys})
                lacking.append(layer)
            tensors = [own[key] for key in keys]
            copies.append(Copy(layer.name, self.plan.source(layer), row, tensors))
        try:
            self.processes.copy(copies, PATIENCE)
            yield
        finally:
            self.drop(lacking, state)

    def table(self, layers: Sequence[CapturedLayer]) -> Placement:
        """Who updates and who keeps the preconditioner of every layer."""
        placement, world = Placement(), self.plan.world
        costs, sizes = [0.0] * world, [0] * world
        for layer in layers:
            if not layer.statistics.bound:
                continue
            place, cost, taken = self.plan.place(layer), _cost(layer), size(self._fresh(layer))
            for rank in place.keepers:
                sizes[rank] += taken
                costs[rank] += cost if place.owner in (None, rank) else 0
            placement.append(_row(layer.name, cost, taken, place, world))
        placement.costs, placement.state_bytes = costs, sizes
        return placement


def _row(name: str, cost: float, taken: int, place: Place, world: int) -> PlacementRow:
    owner = "all" if place.owner is None else str(place.owner)
    every = len(place.keepers) == world
    return PlacementRow(
        name, cost, taken, owner, "all" if every else ", ".join(map(str, place.keepers))
    )


def _cost(layer: CapturedLayer) -> float:
    statistics = layer.statistics
    return update_cost(statistics.layer.groups, (statistics.k, statistics.c))


def _fraction(layer: CapturedLayer) -> float:
    """``grad_worker_fraction``; one where every process needs all factors."""
    return 1.0 if layer.needs.everywhere else float(layer.group["grad_worker_fraction"])


def _is_read_by_taps(layer: CapturedLayer) -> bool:
    """Whether what is measured of a layer depends on its state."""
    statistics = layer.statistics
    return statistics.k.reads_factor or statistics.c.reads_factor or statistics.squares
