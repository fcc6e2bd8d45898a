"""Treatment of every parameter by an optimizer, as rows and as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tnkfac.curvature.capture.statistics import Statistics
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.parts import flat, home, origin
from tnkfac.optim.params.registry import Registry
from tnkfac.optim.params.state import ParamState, State, mark
from tnkfac.optim.params.watching import LOOKED_FOR, PROMISED
from tnkfac.optim.report.diagnostics import Diagnostics
from tnkfac.optim.report.plots import draw_report
from tnkfac.optim.report.table import aligned

FROZEN = "frozen"
"""Reason of a parameter that requires no gradient."""
WAITS = "no statistics yet"
"""How the reason begins of a layer whose factors wait; more follows where calls were seen."""


@dataclass(frozen=True)
class Row:
    """Treatment of one parameter, or of a part of one that has factors of its own.

    Attributes:
        name: Qualified name of the parameter, or ``param_<i>``; a part is written as an index,
            ``attention.in_proj_weight[0:768]``. The matrices of a stack, such as those of experts,
            share a row.
        module: Type of the module that owns it; empty if none was found.
        shape: Its shape.
        approximation: ``expand`` or ``reduce``; empty for the fallback.
        structure: Structures of input and output factor; empty for the fallback.
        factor_dims: Groups and rows of both factors, as ``(G, D, C_out / G)``; empty likewise.
        state_bytes: Bytes of the state of this parameter.
        last_update: Step of the last factor update, ``None`` before the first.
        reason: Why the fallback trains it, why its factors wait, or that it is frozen; empty
            otherwise.
        failures: Decompositions of its factors that failed in a row.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    approximation: str
    structure: str
    factor_dims: tuple[int, ...]
    state_bytes: int
    last_update: int | None
    reason: str
    failures: int = 0

    @property
    def state(self) -> str:
        """``"measured"``, ``"promised"``, ``"looked for"``, or the reason.

        What a supported module promises was not measured yet; whether anything multiplies with
        what is looked for is seen in the first passes.
        """
        if self.last_update is not None:
            return "measured"
        if LOOKED_FOR in self.reason:
            return "looked for"
        if self.reason == WAITS or PROMISED in self.reason:
            return "promised"
        return self.reason


class Report(list[Row]):
    """List of :class:`Row`; prints as a table.

    It does not keep the optimizer alive; copies and pickles are of the rows and numbers alone.

    Attributes:
        skipped_updates: Batches that were skipped for non-finite gradients or statistics.
        skipped_steps: How often a layer made no step, because its update was not finite, by name.
        trust_region: By what ``kl_clip`` scaled the last updates of all layers, at most 1; None
            without it, or before the first step.
        diagnose: Looks at the curvature of the layers; None where no optimizer can be asked.
    """

    skipped_updates: int = 0
    skipped_steps: Mapping[str, int] = MappingProxyType({})
    trust_region: float | None = None
    diagnose: Callable[[], Diagnostics | None] | None = None

    def draw(self, path: str | Path) -> Path:
        """Draw spectra of the factors, sizes of the updates and bytes of the state by layer.

        Args:
            path: The file; its ending says which format.

        Returns:
            The file.

        Raises:
            ImportError: Without matplotlib.
            RuntimeError: If the optimizer is gone, or the report is a copy or was unpickled.
        """
        diagnostics = None if self.diagnose is None else self.diagnose()
        if diagnostics is None:
            raise RuntimeError(
                "draw: the optimizer that this report is of cannot be asked for its factors. "
                "Supported: while it lives, by what its report() has returned, not by a copy."
            )
        return draw_report(self, diagnostics, path)

    def __getstate__(self) -> dict[str, Any]:
        """Attributes that are copied and pickled beside the rows."""
        return {key: value for key, value in self.__dict__.items() if key != "diagnose"}

    def __str__(self) -> str:
        """One line per parameter, and one for each guard that acted."""
        titles = [field.name.replace("_", " ") for field in fields(Row)]
        lines = [[_cell(getattr(row, f.name)) for f in fields(Row)] for row in self]
        guards = []
        if self.trust_region is not None and self.trust_region < 1:
            guards.append(f"kl_clip scaled the last updates by {self.trust_region:.3g}.")
        if self.skipped_updates:
            guards.append(
                f"{self.skipped_updates} batches skipped for numbers that are not finite."
            )
        guards += [
            f"{name} made no step {count} times: its update was not finite."
            for name, count in self.skipped_steps.items()
        ]
        return "\n".join([*aligned(titles, lines), *guards])

    __repr__ = __str__


def _cell(value: object) -> str:
    if value is None or value == "" or value == ():
        return "-"
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def summarize(registry: Registry, state: State) -> Report:
    """How every parameter is trained.

    Args:
        registry: The parameters.
        state: State of the optimizer.
    """
    rows = Report(_with_stacks_summed(registry.layers, state))
    for uncaptured in registry.others:
        size, shape = _bytes(state.get(uncaptured.param, {})), _shape(uncaptured.param)
        reason = uncaptured.reason if uncaptured.param.requires_grad else FROZEN
        rows.append(Row(uncaptured.name, uncaptured.kind, shape, "", "", (), size, None, reason))
    return rows


def _with_stacks_summed(layers: Sequence[CapturedLayer], state: State) -> Iterator[Row]:
    """Rows of layers, of which one stands for all matrices of a stack."""
    stacks: dict[int, list[Row]] = {}
    for layer in layers:
        part = origin(layer.weight)
        if part is None or not part.idle:
            yield from _layer_rows(layer, state)
            continue
        for row, param in zip(_layer_rows(layer, state), layer.params(), strict=True):
            own = origin(param)
            assert own is not None
            name = row.name.removesuffix(own.label)
            row = replace(row, name=name, shape=_shape(own.param))
            stacks.setdefault(id(own.param), []).append(row)
    for rows in stacks.values():
        yield _summed(rows)


def _summed(rows: list[Row]) -> Row:
    """One row for those of all matrices of a stack."""
    updates = [row.last_update for row in rows if row.last_update is not None]
    seen = f"{len(updates)} of {len(rows)} matrices were used so far"
    groups, *dims = rows[0].factor_dims
    return replace(
        rows[0],
        structure="; ".join(dict.fromkeys(row.structure for row in rows)),
        factor_dims=(groups * len(rows), *dims),
        state_bytes=sum(row.state_bytes for row in rows),
        last_update=max(updates, default=None),
        reason=seen if 0 < len(updates) < len(rows) else rows[0].reason,
        failures=max(row.failures for row in rows),
    )


def _layer_rows(layer: CapturedLayer, state: State) -> Iterator[Row]:
    statistics = layer.statistics
    structure = ""
    dims: tuple[int, ...] = ()
    if statistics.bound:
        structure = f"{statistics.k.name}, {statistics.c.name}"
        dims = (statistics.layer.groups, statistics.k.dim, statistics.c.dim)
    last_update = mark(state, layer, "last_update")
    updated = last_update >= 0
    waits = "" if updated else _waits(statistics)
    for name, param in layer.named():
        yield Row(
            name,
            layer.kind,
            _shape(param),
            statistics.approx,
            structure,
            dims,
            _bytes(state.get(param, {})),
            last_update if updated else None,
            waits if home(param).requires_grad else FROZEN,
            int(state.get(layer.weight, {}).get("failures", 0)),
        )


def _waits(statistics: Statistics) -> str:
    """Why the factors of a layer wait."""
    why = statistics.refused or statistics.last_event
    return f"{WAITS}: {why}" if why else WAITS


def _bytes(state: ParamState) -> int:
    items = flat(state).items()
    numbers = (value for name, value in items if name.split(".")[-1] != "structures")  # names
    tensors = [value for value in numbers if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _shape(param: Tensor) -> tuple[int, ...]:
    return () if torch.nn.parameter.is_lazy(param) else tuple(param.shape)
