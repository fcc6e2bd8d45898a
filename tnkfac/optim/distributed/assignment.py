"""Which process updates the preconditioner of a layer, and which ones keep it.

The processes stand in a grid of ``workers`` rows (KAISA, arXiv 2107.01739, section 3.1): those of a
column keep the preconditioner of a layer, one of them updates it, and in every row the one that
keeps it hands the preconditioned gradient to the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import prod

from tnkfac.curvature.structures import Structure
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.report.table import aligned


@dataclass(frozen=True)
class LayerAssignment:
    """Processes that update and keep the preconditioner of a layer.

    Attributes:
        inv_worker: The process that updates it; None where every one does, since that costs less
            than to send it.
        grad_workers: The processes that keep it and apply it, in order.
    """

    inv_worker: int | None
    grad_workers: tuple[int, ...]


def workers(fraction: float, world: int) -> int:
    """How many processes keep the preconditioner of a layer.

    Args:
        fraction: ``grad_worker_fraction``.
        world: Number of processes.

    Raises:
        ValueError: If that many do not divide the number of processes.
    """
    count = max(1, round(fraction * world))
    if world % count:
        divisors = [str(g / world) for g in range(1, world + 1) if world % g == 0]
        raise ValueError(
            f"grad_worker_fraction: got {fraction}, which are {count} of {world} processes. "
            f"Supported: numbers of processes that divide all, {', '.join(divisors)}."
        )
    return count


def assign(
    costs: Sequence[float], counts: Sequence[int], loads: list[float]
) -> list[LayerAssignment]:
    """Assign layers, the costliest first, each where the least is to be done.

    Args:
        costs: Cost of the update of each layer; zero for one that every process makes.
        counts: How many processes are to keep each; all keep what every process updates.
        loads: Cost so far of each process, updated in place.
    """
    world = len(loads)
    assigned = [LayerAssignment(None, tuple(range(world)))] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if not costs[i]:
            continue
        columns = world // counts[i]
        column = min(range(columns), key=lambda c: sum(loads[c::columns]))
        grad_workers = tuple(range(column, world, columns))
        inv_worker = min(grad_workers, key=lambda rank: loads[rank])
        loads[inv_worker] += costs[i]
        assigned[i] = LayerAssignment(inv_worker, grad_workers)
    return assigned


def update_cost(groups: int, structures: Iterable[Structure]) -> float:
    """Multiply-adds of the decomposition or the update of factors, up to a number.

    Args:
        groups: Channel groups.
        structures: Structures of both factors; vectors cost nothing that is worth a message.
    """
    return float(groups * sum(_cost(shape) for s in structures for shape in s.part_shapes))


def _cost(shape: Sequence[int]) -> int:
    return prod(shape) * shape[-1] if len(shape) > 1 else 0


class Assignment:
    """Workers of all layers, as one of several processes sees them."""

    def __init__(self, world: int = 1, rank: int = 0) -> None:
        """No layer is assigned; such layers are updated and kept by every process."""
        self.world, self.rank = world, rank
        self.loads = [0.0] * world
        self._layers: dict[int, LayerAssignment] = {}

    def extend(
        self, layers: Sequence[CapturedLayer], costs: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Assign layers that are not yet; all others stay where they are.

        Args:
            layers: The same in every process.
            costs: As for :func:`assign`.
            counts: Likewise.
        """
        for layer, assigned in zip(layers, assign(costs, counts, self.loads), strict=True):
            self._layers[id(layer)] = assigned

    def has(self, layer: CapturedLayer) -> bool:
        """Whether a layer is assigned."""
        return id(layer) in self._layers

    def of(self, layer: CapturedLayer) -> LayerAssignment:
        """Workers of a layer."""
        return self._layers.get(id(layer)) or LayerAssignment(None, tuple(range(self.world)))

    def is_inv_worker(self, layer: CapturedLayer) -> bool:
        """Whether this process updates the preconditioner of a layer."""
        return self.of(layer).inv_worker in (None, self.rank)

    def is_grad_worker(self, layer: CapturedLayer) -> bool:
        """Whether this process keeps the preconditioner of a layer, and applies it."""
        return self.rank in self.of(layer).grad_workers

    def source(self, layer: CapturedLayer) -> int:
        """The process in the row of this one that keeps the preconditioner of a layer."""
        grad_workers = self.of(layer).grad_workers
        columns = self.world // len(grad_workers)
        return grad_workers[self.rank // columns]

    def row(self, layer: CapturedLayer) -> tuple[int, ...]:
        """The processes that get preconditioned gradients of a layer from the same one."""
        columns = self.world // len(self.of(layer).grad_workers)
        first = self.rank // columns * columns
        return tuple(range(first, first + columns))


@dataclass(frozen=True)
class PlacementRow:
    """Workers, cost and size of the preconditioner of one layer.

    Attributes:
        name: Qualified name of the layer.
        cost: Multiply-adds of an update or a decomposition, up to a number common to all layers.
        state_bytes: Bytes of what its grad workers keep.
        updated_by: The process that updates it, or ``all``.
        kept_by: The processes that keep it, or ``all``.
    """

    name: str
    cost: float
    state_bytes: int
    updated_by: str
    kept_by: str


class Placement(list[PlacementRow]):
    """List of :class:`PlacementRow`; prints as a table.

    Attributes:
        costs: Sum over what each process updates.
        state_bytes: Sum over what each process keeps.
    """

    costs: Sequence[float] = ()
    state_bytes: Sequence[int] = ()

    def __str__(self) -> str:
        """One line per layer, and one per process."""
        titles = [field.name.replace("_", " ") for field in fields(PlacementRow)]
        layers = [[_cell(getattr(row, f.name)) for f in fields(PlacementRow)] for row in self]
        totals = [
            [f"process {rank}", _cell(cost), _cell(size), "", ""]
            for rank, (cost, size) in enumerate(zip(self.costs, self.state_bytes, strict=True))
        ]
        return "\n".join(aligned(titles, layers, totals))

    __repr__ = __str__


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
