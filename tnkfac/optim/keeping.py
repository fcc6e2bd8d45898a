"""The state of an optimizer: made, placed on processes, saved, restored."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tnkfac.optim.distributed.assignment import Placement, PlacementRow, Plan, update_cost, workers
from tnkfac.optim.distributed.reduction import Copy, Processes
from tnkfac.optim.finite import Verdicts
from tnkfac.optim.options import Group
from tnkfac.optim.params import checkpoint
from tnkfac.optim.params.batches import Stacking
from tnkfac.optim.params.captured import CapturedLayer, update_dtype
from tnkfac.optim.params.registry import Registry, by_parameter
from tnkfac.optim.step import fallback
from tnkfac.optim.step.grafting import adam_state

PATIENCE = timedelta(minutes=1)
"""How long ``state_dict`` waits for the other processes, if they keep parts of the state."""


class Keeping(Stacking, Optimizer):
    """Adds to an optimizer that processes share the work on its state, and perhaps the state."""

    _registry: Registry
    _processes: Processes
    _plan: Plan
    _verdicts: Verdicts

    @abstractmethod
    def _init_layer(self, layer: CapturedLayer, group: Group) -> dict[str, Tensor]:
        """State of a layer, kept under its weight."""

    @abstractmethod
    def _catch_up(self) -> None:
        """Take up what was changed by hand in ``param_groups`` and in ``state``."""

    @abstractmethod
    def _sort(self) -> None:
        """Find the layers among all parameters that are not sorted yet."""

    @abstractmethod
    def _read_marks(self) -> None:
        """Take up what the state says of when layers were updated."""

    # ---------------------------------------------------------------- making

    def _ensure_state(self) -> None:
        state = self.state
        for layer in self._registry.layers:
            if not layer.statistics.bound:
                continue
            weight, bias, group = layer.weight, layer.bias, layer.group
            has_gradient = weight.grad is not None
            if has_gradient or layer.statistics.pending:
                own = state[weight]
                if "last_update" not in own:
                    own.update(self._layer_state(layer, group))
                if has_gradient:
                    _complete(own, weight, group)
            if bias is not None and bias.grad is not None:
                _complete(state[bias], bias, group)
        for other in self._registry.others:
            if other.param.grad is not None and not state.get(other.param):
                group = other.group
                state[other.param].update(fallback.init_state(other.param, group))

    def _layer_state(self, layer: CapturedLayer, group: Group) -> dict[str, Tensor]:
        state = self._init_layer(layer, group)
        if not self._plan.keeps(layer):
            state = {key: value for key, value in state.items() if key in checkpoint.ON_HOST}
        state["last_update"] = torch.tensor(-1, device="cpu")
        return state

    def _drop_misfit(self, layer: CapturedLayer) -> None:
        """Start the curvature anew that was handed on to a new weight, and has another shape."""
        if not self._has_factors(layer) or not layer.statistics.bound:
            return
        group, state = layer.group, self.state[layer.weight]
        fresh = self._init_layer(layer, group)
        fits = [key in state and state[key].shape == part.shape for key, part in fresh.items()]
        if self._plan.keeps(layer) and not all(fits):
            state.update(self._layer_state(layer, group))
            self._read_marks()

    # ---------------------------------------------------------------- placing

    def _place(self) -> None:
        """Give layers their places among the processes, once these are known."""
        count = self._processes.count
        if count == 1:
            return
        if self._plan.world != count:
            self._plan = Plan(count, self._processes.rank)
        fresh = [
            layer
            for layer in self._registry.layers
            if layer.statistics.bound and not self._plan.knows(layer)
        ]
        if not fresh:
            return
        costs = [_cost(layer) for layer in fresh]
        own = [layer.group for layer in fresh]
        counts = [
            count if _is_read_by_taps(layer) else workers(_fraction(group), count)
            for layer, group in zip(fresh, own, strict=True)
        ]
        self._plan.extend(fresh, costs, counts)
        self._drop(fresh)

    def _drop(self, layers: list[CapturedLayer]) -> None:
        """Let go of what other processes keep."""
        for layer in layers:
            state = self.state.get(layer.weight)
            if state and not self._plan.keeps(layer):
                for key in self._placed_keys(layer):
                    state.pop(key, None)

    def _placed_keys(self, layer: CapturedLayer) -> list[str]:
        """What of the state of a layer only its keepers have."""
        found = self._init_layer(layer, layer.group)
        return sorted(key for key in found if key not in checkpoint.ON_HOST)

    def _share(self, layers: list[CapturedLayer], keys: tuple[str, ...]) -> None:
        """Copy parts of the state from the processes that have updated them to all keepers.

        Args:
            layers: Layers.
            keys: Names of the parts; of matrices with several tensors, what these begin with.
        """
        copies = []
        for layer in layers:
            place = self._plan.place(layer)
            if place.owner is None or self._plan.rank not in place.keepers:
                continue
            state = self.state[layer.weight]
            chosen = [state[key] for key in sorted(state) if key.split(".")[0] in keys]
            copies.append(Copy(layer.name, place.owner, place.keepers, chosen))
        self._processes.copy(copies)

    def _naturals(self, layers: list[CapturedLayer], matrices: list[Tensor]) -> list[Tensor]:
        """Precondition the gradient matrices of several layers, in the processes that can."""
        measured = [self._has_factors(layer) for layer in layers]
        kept = [i for i, la in enumerate(layers) if measured[i] and self._plan.keeps(la)]
        mine = super()._naturals([layers[i] for i in kept], [matrices[i] for i in kept])
        known = dict(zip(kept, mine, strict=True))
        found, copies = [], []
        for i, layer in enumerate(layers):
            row = self._plan.row(layer)
            if not measured[i]:
                natural = matrices[i].clone()
            elif len(row) > 1:
                natural = known[i].contiguous() if i in known else torch.empty_like(matrices[i])
                copies.append(Copy(layer.name, self._plan.source(layer), row, [natural]))
            else:
                natural = known[i]
            found.append(natural)
        self._processes.copy(copies)
        return found

    def _has_factors(self, layer: CapturedLayer) -> bool:
        """Whether there is a state of curvature; none where only the bias was ever trained."""
        return "last_update" in self.state.get(layer.weight, {})

    def placement(self) -> Placement:
        """Which process updates the preconditioner of each layer, and which ones keep it.

        Under ``DistributedDataParallel`` or ``fully_shard`` it follows ``grad_worker_fraction``;
        on one device the only process does and keeps all.

        Returns:
            A list of rows that prints as a table.

        Raises:
            ValueError: If ``grad_worker_fraction`` does not fit the number of processes.

        Example:
            >>> import tnkfac
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
            >>> print(tnkfac.SINGD(model.parameters()).placement())
            name       cost  state bytes  updated by  kept by
            ---------  ----  -----------  ----------  -------
            0          152   272          all         all
            ---------  ----  -----------  ----------  -------
            process 0  152   272
        """
        self._catch_up()
        self._processes.find(list(self._registry.params()))
        self._place()
        found, world = Placement(), self._plan.world
        costs, sizes = [0.0] * world, [0] * world
        for layer in self._registry.layers:
            if not layer.statistics.bound:
                continue
            place, cost = self._plan.place(layer), _cost(layer)
            parts = self._init_layer(layer, layer.group)
            size = sum(
                part.numel() * part.element_size()
                for key, part in parts.items()
                if key not in checkpoint.ON_HOST
            )
            for rank in place.keepers:
                sizes[rank] += size
                costs[rank] += cost if place.owner in (None, rank) else 0
            owner = "all" if place.owner is None else str(place.owner)
            keepers = ", ".join(map(str, place.keepers))
            every = len(place.keepers) == world
            found.append(PlacementRow(layer.name, cost, size, owner, "all" if every else keepers))
        found.costs, found.state_bytes = costs, sizes
        return found

    # ---------------------------------------------------------------- saving

    @contextmanager
    def _whole_state(self) -> Iterator[None]:
        """Have here what only other processes keep."""
        copies, lacking = [], []
        for layer in self._registry.layers:
            row, state = self._plan.row(layer), self.state.get(layer.weight)
            if len(row) == 1 or not state:
                continue
            keys = self._placed_keys(layer)
            if not self._plan.keeps(layer):
                fresh = self._init_layer(layer, layer.group)
                state.update({key: fresh[key] for key in keys})
                lacking.append(layer)
            tensors = [state[key] for key in keys]
            copies.append(Copy(layer.name, self._plan.source(layer), row, tensors))
        try:
            self._processes.copy(copies, PATIENCE)
            yield
        finally:
            self._drop(lacking)

    @contextmanager
    def _without_strangers(self) -> Iterator[None]:
        """Leave out the states of parameters that were taken out of their group by hand."""
        known = by_parameter(self.param_groups)
        strangers = {p: self.state.pop(p) for p in list(self.state) if id(p) not in known}
        try:
            yield
        finally:
            self.state.update(strangers)

    def state_dict(self) -> dict[str, Any]:
        """State of every parameter and hyper-parameters of every group, without callables.

        Where processes keep parts of it (``grad_worker_fraction`` below 1) it is put together, for
        which all of them have to call this.

        Raises:
            RuntimeError: If processes keep parts of the state and one does not take part.
        """
        self._verdicts.receive(wait=True)
        self._catch_up()
        ours = self.register_state_dict_post_hook(lambda _, saved: self._saved(saved), prepend=True)
        try:
            with self._whole_state(), self._without_strangers():
                return super().state_dict()
        finally:
            ours.remove()

    def _saved(self, saved: dict[str, Any]) -> dict[str, Any]:
        """What is saved of a whole state; hooks of the user come afterwards."""
        state = {k: dict(v) if isinstance(v, dict) else v for k, v in saved["state"].items()}
        groups = checkpoint.without_callables(saved["param_groups"])
        return {**saved, "state": state, "param_groups": groups}

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the argument is neither changed nor kept.

        Callables and hyper-parameters that it lacks stay as they are. The layers that it had
        captured are captured, and others are not.

        Args:
            state_dict: A saved state.
        """
        self._catch_up()
        self._verdicts.receive(wait=True)  # what they undo is of the state that goes
        before = [dict(group) for group in self.param_groups]
        given: list[dict[str, Any]] = []  # what hooks of the user have made of the argument
        last = self.register_load_state_dict_pre_hook(lambda _, found: given.append(found))
        first = self.register_load_state_dict_post_hook(
            lambda _: self._restore(given[0], before), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            first.remove()

    def _restore(self, saved: dict[str, Any], before: list[Group]) -> None:
        """Complete what torch has loaded; hooks of the user come afterwards."""
        params = [param for group in self.param_groups for param in group["params"]]
        checkpoint.restore_groups(self.param_groups, before)
        self._registry.link(self.param_groups)
        self._choose_layers(saved["param_groups"], before)
        checkpoint.restore_tensors(self.state, saved, params, self._dtypes())
        self._registry.clear()
        for layer in self._registry.layers:
            checkpoint.split_second_moments(layer, self.state, layer.group["step"])
        self._read_marks()
        self._drop(self._registry.layers)

    def _choose_layers(self, saved: list[Group], before: list[Group]) -> None:
        """Go on with the layers that the saved optimizer had captured, if they are others.

        Args:
            saved: Its groups; those of older versions captured all tied weights.
            before: The groups before loading.
        """
        contradicts = self._registry.contradicts(self.state, self.param_groups)
        if checkpoint.chooses_alike(self.param_groups, before) and not contradicts:
            return
        for group, own in zip(self.param_groups, saved, strict=True):
            if contradicts and "capture_tied" not in own:
                group["capture_tied"] = True
        self._registry.forget()
        self._plan = Plan()
        self._sort()

    def _dtypes(self) -> dict[int, dict[str, torch.dtype]]:
        """In which dtypes a new state would be, by ``id`` of the parameter and name."""
        found = {}
        for layer in self._registry.layers:
            if not layer.statistics.bound:
                continue
            group = layer.group
            for param in layer.params():
                made: dict[str, Tensor] = {}
                _complete(made, torch.empty(0, dtype=param.dtype, device="meta"), group)
                found[id(param)] = {key: part.dtype for key, part in made.items()}
            made = self._layer_state(layer, group)
            found[id(layer.weight)] |= {k.split(".")[0]: part.dtype for k, part in made.items()}
        for other in self._registry.others:
            like = torch.empty(0, dtype=other.param.dtype, device="meta")
            made = fallback.init_state(like, other.group)
            found[id(other.param)] = {key: part.dtype for key, part in made.items()}
        return found


def _complete(state: dict[str, Tensor], param: Tensor, group: Group) -> None:
    """Add to the state of a weight or bias what does not depend on the rule."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(param, dtype=update_dtype(param.dtype))
    if group["grafting"] == "adam" and "exp_avg_sq" not in state:
        state.update(adam_state(param))


def _cost(layer: CapturedLayer) -> float:
    statistics = layer.statistics
    return update_cost(statistics.layer.groups, (statistics.k, statistics.c))


def _fraction(group: Group) -> float:
    """``grad_worker_fraction``; one where every process needs all factors."""
    return 1.0 if group.get("adaptive_damping") else float(group["grad_worker_fraction"])


def _is_read_by_taps(layer: CapturedLayer) -> bool:
    """Whether what is measured of a layer depends on its state."""
    statistics = layer.statistics
    return statistics.k.reads_factor or statistics.c.reads_factor or statistics.squares
