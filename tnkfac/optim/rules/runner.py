"""Running a rule over layers: states are made, updated, refreshed, and gradients preconditioned."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tnkfac.curvature import switch
from tnkfac.optim.distributed.placing import Placing
from tnkfac.optim.distributed.reduction import Processes
from tnkfac.optim.options import Group
from tnkfac.optim.params.batches import EndToEnd, Stack, joined, parted, stacks
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.scaling import Diagonals
from tnkfac.optim.params.state import (
    ON_HOST,
    ParamState,
    State,
    curvature_state,
    has_curvature,
    mark,
    set_mark,
    write_where,
)
from tnkfac.optim.report.diagnostics import Spectra
from tnkfac.optim.rules.refreshing import refresh
from tnkfac.optim.rules.rule import Rule


class RuleRunner:
    """Runs a rule over the layers of an optimizer, in batches and on several processes.

    Attributes:
        rule: The rule.
        placing: Which process updates and keeps which layer.
        restarted: Layers that the last refresh had to begin anew.
    """

    def __init__(self, rule: Rule, processes: Processes) -> None:
        """Nothing is kept yet.

        Args:
            rule: The rule.
            processes: Those that train the same parameters.
        """
        self.rule = rule
        self.placing = Placing(processes, self.fresh)
        self.restarted: list[CapturedLayer] = []

    # ---------------------------------------------------------------- states

    def fresh(self, layer: CapturedLayer) -> ParamState:
        """State of the curvature of a layer before any statistics, as its grad workers have it."""
        rule = self.rule
        return curvature_state(layer, rule.init, rule.warms_up(layer), bool(rule.derived))

    def kept(self, layer: CapturedLayer) -> ParamState:
        """State of :meth:`fresh`, as far as this process keeps it."""
        fresh = self.fresh(layer)
        if self.placing.assignment.is_grad_worker(layer):
            return fresh
        return {key: part for key, part in fresh.items() if key in ON_HOST}

    def is_derived(self, key: str) -> bool:
        """Whether a key of a state is one of a matrix that is derived."""
        return key.split(".")[0] in self.rule.derived

    # ---------------------------------------------------------------- the clock

    def count(
        self, updated: Sequence[CapturedLayer], groups: Sequence[Group], state: State
    ) -> None:
        """Count a step, and note when which factors are due.

        Args:
            updated: Layers whose statistics this step has taken.
            groups: Parameter groups.
            state: State of the optimizer.
        """
        restarted = set(map(id, self.restarted))  # what they had is gone with their factors
        for layer in updated:
            if id(layer) in restarted:
                continue
            step = layer.group["step"]
            if mark(state, layer, "last_update") < 0 and "first_update" in state[layer.weight]:
                set_mark(state, layer, "first_update", step)
            set_mark(state, layer, "last_update", step)
        for group in groups:
            step = group["step"] = group["step"] + 1
            if step % self.rule.update_interval(group, step) == 0:
                group["last_due"] = step
            every = self.rule.refresh_interval(group, step) if self.rule.derived else None
            if every is not None and step % every == 0:
                group["last_refresh_due"] = step

    def is_due(self, layer: CapturedLayer, state: State) -> bool:
        """Whether the next step is to update the factors of a layer."""
        last, group = mark(state, layer, "last_update"), layer.group
        if last >= 0 and layer.statistics.bound and self.rule.warms_up(layer):
            step: int = group["step"]
            start = max(0, mark(state, layer, "first_update"))  # older files lack it
            if step < start + self.rule.update_interval(group, step):
                return last < step
        due: int = group["last_due"]
        return last < due

    # ---------------------------------------------------------------- updates

    def update(
        self,
        pending: Sequence[CapturedLayer],
        state: State,
        loss_scale: Tensor | float,
        found_inf: Tensor | None,
    ) -> None:
        """Take statistics into the state: starts together, diagonals together, else in stacks.

        Args:
            pending: Layers with statistics.
            state: State of the optimizer.
            loss_scale: By how much the loss of the passes was multiplied.
            found_inf: Scalar that is one where nothing is to be written.
        """
        rule, assignment = self.rule, self.placing.assignment
        first, diagonal, others = self._divided(pending, state)
        if first and (found_inf is None or not bool(found_inf)):  # decompositions wait anyway
            for layers in first:
                here = [layer for layer in layers if assignment.is_inv_worker(layer)]
                self._start(here, state, loss_scale)
        batches: list[EndToEnd | Stack] = []
        batches += [EndToEnd(layers, state, loss_scale, found_inf) for layers in diagonal]
        updates_here = assignment.is_grad_worker if rule.derived else assignment.is_inv_worker
        here = [layer for layer in others if updates_here(layer)]
        alone = [[place] for place in range(len(here))]
        for places in stacks(here, state) if rule.stacks_updates else alone:
            batches.append(Stack([here[i] for i in places], state, loss_scale, found_inf))
        for batch in batches:
            new = rule.update(batch)
            if new is not None:
                batch.write(new)
        if assignment.world > 1 and not rule.derived:  # of the others, what is derived is shared
            sent = [*others, *(layer for layers in first for layer in layers)]
            names = {key.split(".")[0] for layer in sent for key in self.fresh(layer)}
            self.placing.share(sent, sorted(names - {*ON_HOST}), state)

    def _divided(
        self, pending: Sequence[CapturedLayer], state: State
    ) -> tuple[list[list[CapturedLayer]], list[list[CapturedLayer]], list[CapturedLayer]]:
        """Layers that start, layers that are updated end to end, and all others."""
        first: dict[object, list[CapturedLayer]] = {}
        diagonal: dict[object, list[CapturedLayer]] = {}
        others = []
        for layer in pending:
            key = id(layer.group), layer.weight.device, layer.weight.dtype
            if mark(state, layer, "last_update") < 0 and self.rule.starts(layer.group):
                first.setdefault(key if not switch.plain else id(layer), []).append(layer)
            elif not switch.plain and self.rule.elementwise(layer, state[layer.weight]) is not None:
                diagonal.setdefault(key, []).append(layer)
            else:
                others.append(layer)
        return [*first.values()], [*diagonal.values()], others

    def _start(self, layers: list[CapturedLayer], state: State, loss_scale: Tensor | float) -> None:
        if not layers:
            return
        measured = [layer.statistics.factors(loss_scale) for layer in layers]
        for layer, new in zip(layers, self.rule.start(layers, measured), strict=True):
            write_where(state[layer.weight], new, None)

    def refresh(
        self,
        layers: Sequence[CapturedLayer],
        pending: Sequence[CapturedLayer],
        state: State,
        found_inf: Tensor | None,
    ) -> None:
        """Derive anew what is due.

        Args:
            layers: All layers.
            pending: Those that were updated in this step.
            state: State of the optimizer.
            found_inf: Scalar that is one where nothing is to be written.
        """
        self.restarted = []
        if not self.rule.derived:
            return
        measured = {id(layer) for layer in pending}
        due = []
        for layer in layers:
            waits = mark(state, layer, "last_refresh") < layer.group["last_refresh_due"]
            updated = id(layer) in measured or mark(state, layer, "last_update") >= 0
            if state.get(layer.weight) and waits and updated:
                due.append(layer)
        if due and (found_inf is None or not bool(found_inf)):
            self.restarted = refresh(self.rule, due, state, self.placing, self.fresh)

    # ---------------------------------------------------------------- gradients

    def precondition(
        self,
        layers: Sequence[CapturedLayer],
        gradients: Sequence[Tensor],
        state: State,
        found_inf: Tensor | None,
    ) -> list[Tensor]:
        """Precondition the gradients of several layers; those without curvature stay.

        Args:
            layers: Layers.
            gradients: Joint matrices ``[G, C_out / G, D]`` of each.
            state: State of the optimizer.
            found_inf: Scalar that is one where nothing is to be written.
        """

        def here(layers: list[CapturedLayer], matrices: list[Tensor]) -> list[Tensor]:
            updates = list(matrices)
            for places in stacks(layers, state):
                batch = Stack([layers[i] for i in places], state, found_inf=found_inf)
                (gradient,) = joined([(matrices[i],) for i in places])
                together = self.rule.precondition(batch, gradient)
                for i, (update,) in zip(places, parted((together,), len(places)), strict=True):
                    updates[i] = update
            return updates

        ready = [i for i, layer in enumerate(layers) if has_curvature(layer, state)]
        inputs = [layers[i] for i in ready], [gradients[i] for i in ready]
        updates = list(gradients)
        alone = self.placing.assignment.world == 1
        done = here(*inputs) if alone else self.placing.precondition(*inputs, here)
        for i, update in zip(ready, done, strict=True):
            updates[i] = update
        return updates

    def diagonals(self, layers: Sequence[CapturedLayer], state: State) -> Diagonals:
        """Diagonal factors of layers that have them, unless others wait for their gradients."""
        assignment = self.placing.assignment
        pairs: Diagonals = {}
        for layer in layers if not switch.plain else ():
            param_state = state.get(layer.weight)
            if param_state and (assignment.world == 1 or len(assignment.row(layer)) == 1):
                pair = self.rule.elementwise(layer, param_state)
                if pair is not None:
                    pairs[id(layer)] = pair
        return pairs

    def spectra(self, layer: CapturedLayer, state: ParamState) -> Spectra | None:
        """Eigenvalues of the damped factors of a layer, or None where others keep them."""
        here = self.placing.assignment.is_grad_worker(layer)
        return self.rule.spectra(layer, state) if here else None
