"""Work and state of the preconditioners, spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor

from tnkfac.optim.distributed.assignment import (
    Assignment,
    LayerAssignment,
    Placement,
    PlacementRow,
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
    """Assignment of layers to processes, and what is sent because of it.

    Attributes:
        processes: The processes that train the same parameters.
        assignment: Workers of all layers.
    """

    def __init__(self, processes: Processes, fresh: Fresh) -> None:
        """Every process does and keeps everything.

        Args:
            processes: Those that train the same parameters.
            fresh: The state of the curvature of a layer before any statistics.
        """
        self.processes = processes
        self.assignment = Assignment()
        self._fresh = fresh

    def forget(self) -> None:
        """Assign no layer any more."""
        self.assignment = Assignment()

    def place(self, layers: Sequence[CapturedLayer], state: State) -> None:
        """Assign layers to processes, once these are known."""
        count = self.processes.count
        if count == 1:
            return
        if self.assignment.world != count:
            self.assignment = Assignment(count, self.processes.rank)
        new = [la for la in layers if la.statistics.bound and not self.assignment.has(la)]
        if not new:
            return
        counts = [
            count if _is_read_by_taps(layer) else workers(_fraction(layer), count) for layer in new
        ]
        self.assignment.extend(new, [_cost(layer) for layer in new], counts)
        self.drop(new, state)

    def drop(self, layers: Sequence[CapturedLayer], state: State) -> None:
        """Let go of what other processes keep."""
        for layer in layers:
            param_state = state.get(layer.weight)
            if param_state and not self.assignment.is_grad_worker(layer):
                for key in self._placed_keys(layer):
                    param_state.pop(key, None)

    def _placed_keys(self, layer: CapturedLayer) -> list[str]:
        """Keys of the state of a layer that only its grad workers have."""
        return sorted(key for key in self._fresh(layer) if key not in ON_HOST)

    def share(self, layers: Sequence[CapturedLayer], names: Sequence[str], state: State) -> None:
        """Copy matrices from the processes that have updated them to all grad workers.

        Args:
            layers: Layers.
            names: Names of the matrices.
            state: State of the optimizer.
        """
        copies = []
        for layer in layers:
            assigned = self.assignment.of(layer)
            if assigned.inv_worker is None or self.assignment.rank not in assigned.grad_workers:
                continue
            param_state = state[layer.weight]
            parts = [param_state[key] for key in sorted(param_state) if key.split(".")[0] in names]
            copies.append(Copy(layer.name, assigned.inv_worker, assigned.grad_workers, parts))
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
        local = [i for i, layer in enumerate(layers) if self.assignment.is_grad_worker(layer)]
        preconditioned = here([layers[i] for i in local], [matrices[i] for i in local])
        done = dict(zip(local, preconditioned, strict=True))
        updates, copies = [], []
        for i, layer in enumerate(layers):
            row = self.assignment.row(layer)
            if len(row) > 1:
                update = done[i].contiguous() if i in done else torch.empty_like(matrices[i])
                copies.append(Copy(layer.name, self.assignment.source(layer), row, [update]))
            else:
                update = done[i]
            updates.append(update)
        self.processes.copy(copies)
        return updates

    @contextmanager
    def whole_state(self, layers: Sequence[CapturedLayer], state: State) -> Iterator[None]:
        """Have here what only other processes keep."""
        copies, lacking = [], []
        for layer in layers:
            row, param_state = self.assignment.row(layer), state.get(layer.weight)
            if len(row) == 1 or not param_state:
                continue
            keys = self._placed_keys(layer)
            if not self.assignment.is_grad_worker(layer):
                fresh = self._fresh(layer)
                param_state.update({key: fresh[key] for key in keys})
                lacking.append(layer)
            tensors = [param_state[key] for key in keys]
            copies.append(Copy(layer.name, self.assignment.source(layer), row, tensors))
        try:
            self.processes.copy(copies, PATIENCE)
            yield
        finally:
            self.drop(lacking, state)

    def table(self, layers: Sequence[CapturedLayer]) -> Placement:
        """Who updates and who keeps the preconditioner of every layer."""
        placement, world = Placement(), self.assignment.world
        costs, sizes = [0.0] * world, [0] * world
        for layer in layers:
            if not layer.statistics.bound:
                continue
            assigned = self.assignment.of(layer)
            cost, state_bytes = _cost(layer), size(self._fresh(layer))
            for rank in assigned.grad_workers:
                sizes[rank] += state_bytes
                costs[rank] += cost if assigned.inv_worker in (None, rank) else 0
            placement.append(_row(layer.name, cost, state_bytes, assigned, world))
        placement.costs, placement.state_bytes = costs, sizes
        return placement


def _row(layer: str, cost: float, taken: int, to: LayerAssignment, world: int) -> PlacementRow:
    updated_by = "all" if to.inv_worker is None else str(to.inv_worker)
    kept_by = "all" if len(to.grad_workers) == world else ", ".join(map(str, to.grad_workers))
    return PlacementRow(layer, cost, taken, updated_by, kept_by)


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
