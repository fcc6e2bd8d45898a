"""Slots: the matrices, with factors of their own, that calls use of a parameter."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from tnkfac.curvature.capture.statistics import Statistics
from tnkfac.curvature.layers import Layer
from tnkfac.curvature.uses.blocks import Block, Span

OVERLAPPING = "used in parts that overlap"
BOTH_WAYS = "used as W and as its transpose, whose sums would mix inputs with output gradients"
OTHER_SHAPES = "used by calls of other shapes"
NO_BLOCK = "used through a view that is no block of it"
NOT_CONTIGUOUS = "used in parts, but its numbers do not lie in order"
PART_OF_CONVOLUTION = "a convolution uses a part of it"
CHECKPOINTED = "used inside of a checkpoint of a part of its module"
UNRECORDED = (
    "used where no gradients are recorded, as inside of a reentrant checkpoint of a part of its "
    "module"
)
COMPILED = "first used inside of a compiled graph: run one pass before compiling"
COMPILED_VIEW = "used inside of a compiled graph through a view whose place that does not tell"
COMPILED_GROUPS = "how many rows each matrix gets is known only when a compiled graph runs"
ANOTHER_BIAS = "called with another bias than before"
UNUSED = "no product takes it"
"""Why a parameter, or a call of it, has no curvature."""


LOOKED_UP = frozenset(
    {"add", "__add__", "__radd__", "__iadd__", "embedding", "index_select", "__getitem__", "cat"}
)
"""Functions that look up or add rows of a table."""


class BiasSlot(NamedTuple):
    """The bias of a slot.

    Attributes:
        module: The module that owns it, held weakly.
        attribute: Its name there.
        span: Which numbers of it, or None for all.
    """

    module: weakref.ref[nn.Module]
    attribute: str
    span: Span | None


@dataclass
class Slot:
    """A matrix with factors of its own.

    Attributes:
        block: Which part of the weight it is, or None for all of it.
        outputs_first: Whether its rows, as they lie in memory, are outputs.
        layer: What it is a layer of.
        bias: The bias that is trained with it.
        statistics: What is measured of it; set by who declares it.
        used: Whether a call was seen to use it.
        measured: Whether a step has taken what was measured of it.
        rows: Rows of calls on the meta device, where nothing can be measured.
    """

    block: Block | None
    outputs_first: bool
    layer: Layer
    bias: BiasSlot | None = None
    statistics: Statistics = field(init=False)
    used: bool = False
    measured: bool = False
    rows: int = 0

    def is_entry(self, weight: Weight) -> bool:
        """Whether it is one matrix of a stack, such as that of an expert."""
        return self.block is not None and self.block.is_entry(weight.shape)


@dataclass(eq=False)
class Weight:
    """A parameter that is captured by its uses.

    Attributes:
        name: Its qualified name.
        shape: Its shape.
        owners: Modules that hold it, held weakly, and under which names.
        slots: What calls were seen to multiply with.
        refused: Why it has no curvature, or empty.
        event: Why the last call of it could not be taken, or empty.
        seen: Whether a known call has used it.
        copies: Whether inputs are copied, because they are changed in place after the call.
        functions: Names of functions that made something else of it than a product.
        settled: Whether a step has seen how it is used.
        looked_at: Whether calls were looked at since the last step.
    """

    name: str
    shape: tuple[int, ...]
    owners: list[tuple[weakref.ref[nn.Module], str]]
    slots: list[Slot] = field(default_factory=list)
    refused: str = ""
    event: str = ""
    seen: bool = False
    copies: bool = False
    functions: set[str] = field(default_factory=set)
    settled: bool = False
    looked_at: bool = False

    @property
    def is_table(self) -> bool:
        """Whether it was only looked up, or added to something: no matrix is multiplied with it."""
        return not self.seen and bool(self.functions) and self.functions <= LOOKED_UP

    def unused(self) -> str:
        """Why it has no slots."""
        return f"{UNUSED}, but {self._named_functions()}" if self.functions else UNUSED

    def used_otherwise(self) -> str:
        """Why its factors would not be those of all its uses."""
        return f"taken by products and by {self._named_functions()} (capture_tied is False)"

    def _named_functions(self) -> str:
        return ", ".join(sorted(self.functions))

    def add(self, new: list[Slot]) -> None:
        """Take up slots, in the order of their numbers."""
        self.slots = sorted(
            [*self.slots, *new], key=lambda slot: 0 if slot.block is None else slot.block.offset
        )

    def drop_expected(self) -> bool:
        """Drop slots that no call was seen to use yet; False if some were."""
        if any(slot.used or slot.measured for slot in self.slots):
            return False
        self.slots = []
        return True

    def refuse(self, why: str) -> str:
        """Measure nothing of it from now on; returns why."""
        self.refused = self.event = why
        for slot in self.slots:
            slot.statistics.refuse(why)
        return why

    def count_turns(self) -> None:
        """Count, for matrices of a stack, the passes that had rows for others of it alone."""
        entries = [slot.statistics for slot in self.slots if slot.is_entry(self)]
        turns: dict[int, float] = {}
        for statistics in entries:
            turns |= statistics.turns
        for statistics in entries:
            missed = sum(turns.values()) - sum(statistics.turns.values())
            if missed and statistics.pending:
                statistics.add_terms(missed)
                statistics.turns |= turns

    @property
    def waits(self) -> bool:
        """Whether calls are to be looked at: of what is not known yet, or is to be measured."""
        return self.waits_in_graphs or not (self.refused or self.settled)

    @property
    def waits_in_graphs(self) -> bool:
        """The same of calls in a graph, which shows what is measured in it, but nothing else."""
        if self.refused:
            return False
        return not self.slots or any(slot.statistics.enabled for slot in self.slots)
