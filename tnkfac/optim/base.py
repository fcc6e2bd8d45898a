"""The optimizer around a rule: groups, layers, schedule, the step, checkpoints."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.amp.grad_scaler import GradScaler
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict

from tnkfac.curvature.capture.rehearsal import rehearse
from tnkfac.curvature.capture.tap import FirstForward
from tnkfac.curvature.precision import FullPrecision
from tnkfac.curvature.uses.slots import Slot, Weight
from tnkfac.optim import checkpoint, options, saved_state
from tnkfac.optim.distributed.assignment import Placement
from tnkfac.optim.distributed.reduction import Processes, full_tensor
from tnkfac.optim.finite import (
    AsyncFlags,
    SkippedSteps,
    SkippedUpdates,
    either,
    loss_scale,
    non_finite,
)
from tnkfac.optim.options import Group, Params
from tnkfac.optim.params import state as states
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.history import begun_in_layer
from tnkfac.optim.params.parts import PartStates
from tnkfac.optim.params.registry import Registry, by_parameter
from tnkfac.optim.params.state import ParamState, State, has_curvature, mark, set_mark
from tnkfac.optim.report.diagnostics import Diagnostics, diagnose
from tnkfac.optim.report.notices import Notices
from tnkfac.optim.report.summary import Report, summarize
from tnkfac.optim.rules.rule import Rule
from tnkfac.optim.rules.runner import RuleRunner
from tnkfac.optim.step import fallback
from tnkfac.optim.step.elementwise import DeferredCheck
from tnkfac.optim.step.pipeline import StepContext, step_layers, step_others
from tnkfac.optim.uncompiled import uncompiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_OTHER_KEYS = (
    "params",
    "param_names",
    "initial_lr",
    "max_lr",
    "min_lr",
    "base_lr",
    "step",
    "last_due",
    "last_refresh_due",
    "fallback_options",
)
"""Keys of groups that are no hyper-parameters."""


class CurvatureOptimizer(Optimizer):
    """Preconditions layers by a rule, and trains every other parameter by a fallback.

    A subclass has a ``rule`` and passes on its hyper-parameters, in the easiest case all that it
    is given::

        class Mine(CurvatureOptimizer):
            rule = MyRule()

    Args:
        params: Parameters, named parameters, parameter groups, or a ``torch.nn.Module``.
        grad_scaler: The ``GradScaler`` in use, if it does not call ``step`` itself.
        process_group: The processes that average gradients by hand, if any.
        **given: Hyper-parameters of the rule; all others have the defaults of its table.

    Raises:
        TypeError: For a hyper-parameter of the wrong type, or an unknown one.
        ValueError: For a hyper-parameter out of range, or no parameters.
    """

    rule: Rule

    def __init__(
        self,
        params: Params,
        *,
        grad_scaler: GradScaler | None = None,
        process_group: ProcessGroup | str | None = "auto",
        **given: object,
    ) -> None:
        """See the class."""
        for name in given:
            if name not in self.rule.options and name != "fallback_options":
                options.refuse_unknown(name, self.rule.options)
        defaults = self.rule.complete(given)
        self.rule.check(defaults, defaults)
        self._prepare(grad_scaler, process_group)
        listed = self._registry.spell_out(params)
        if not listed:
            raise ValueError("params: got no parameters. Supported: at least one.")
        super().__init__(listed, defaults)
        self._ready = True
        self._sort()

    def _prepare(
        self,
        grad_scaler: GradScaler | None = None,
        process_group: ProcessGroup | str | None = "auto",
    ) -> None:
        """Set what is neither state nor a group."""
        self._ready = False
        self._registry: Registry = Registry(self.rule.needs)
        self._grad_scaler = grad_scaler
        self._skipped, self._skipped_steps = SkippedUpdates(), SkippedSteps()
        self._flags = AsyncFlags()
        self._trust: Tensor | None = None
        self._search: FirstForward | None = None
        self._notices = Notices()
        self._processes = Processes(process_group)
        self._runner = RuleRunner(self.rule, self._processes)
        self._excluded = self._paused = False
        self._found_inf: Tensor | None = None

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; layers among them are found like those of the constructor.

        Args:
            param_group: ``params``, and hyper-parameters that differ from the defaults.

        Raises:
            ValueError: For a hyper-parameter out of range, or no parameters.
            TypeError: For a hyper-parameter of the wrong type.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"param_group: got {param_group!r}. Supported: a dict with 'params'.")
        group = dict(param_group)
        params = group["params"]
        if isinstance(params, set):
            raise TypeError("params: got a set, but parameters must be ordered. Supported: a list.")
        params = [params] if isinstance(params, Tensor) else self._registry.spell_out(params)
        group["params"] = params
        options.warn_near_misses(group, {*self.defaults, *_OTHER_KEYS})
        self.rule.check({**self.defaults, **group}, group)
        group.setdefault("base_lr", float(group.get("lr", self.defaults["lr"])))
        counters = ("step", "last_due", *(("last_refresh_due",) if self.rule.derived else ()))
        for counter in counters:
            group.setdefault(counter, 0)
        super().add_param_group(group)
        if self._ready:
            self._sort()

    def _sort(self) -> None:
        """Find the layers among all parameters that are not sorted yet."""
        known = {id(layer) for layer in self._registry.layers}
        has_modules = self._registry.sort(self, self.param_groups, self.state)
        self._follow_state()
        new = [layer for layer in self._registry.layers if id(layer) not in known]
        self.rule.choose_structures(new, self._registry, self.param_groups, self._states)
        if not has_modules and self._search is None:
            self._search = FirstForward(self, "_search_module")
        try:
            self._refuse_others()
        except ValueError:
            self.close()
            raise

    def _refuse_others(self) -> None:
        """Raise an error for parameters without a layer, where the fallback is one.

        Raises:
            ValueError: If there are any.
        """
        for uncaptured in self._registry.others:
            param = uncaptured.param
            if uncaptured.group["fallback"] != "error" or not param.requires_grad:
                continue
            if not self._registry.is_looked_for(param):
                raise ValueError(_not_captured(uncaptured.name, uncaptured.reason))

    @property
    def state(self) -> defaultdict[Tensor, ParamState]:
        """State of every parameter; another may be assigned, an empty one starts anew."""
        state: defaultdict[Tensor, ParamState] = self.__dict__["state"]
        return state

    @state.setter
    def state(self, state: defaultdict[Tensor, ParamState]) -> None:
        self.__dict__["state"] = state
        if self.__dict__.get("_ready"):
            self._follow_state()

    @property
    def _states(self) -> State:
        """The state, in which parts of parameters are found as well."""
        return PartStates(self.state) if self._registry.has_parts else self.state

    def _declare(self, weight: Weight, slots: list[Slot]) -> bool:
        """Take up layers that the calls of a pass are seen to use."""
        known = {id(layer) for layer in self._registry.layers}
        if not self._registry.declare(weight, slots, self.state):
            return False
        state = self._states
        new = [layer for layer in self._registry.layers if id(layer) not in known]
        for layer in new:
            states.follow_structures(layer, state)
        self.rule.choose_structures(new, self._registry, self.param_groups, state)
        for layer in new:
            self._drop_misfit(layer)
        self._set_taps()
        return True

    def _catch_up(self) -> None:
        """Take up what was changed by hand in ``param_groups`` and in ``state``.

        Pruning, growing and resets replace parameters and move states; restarts empty them.
        """
        if self._regroup():
            return
        state = self._states
        for layer in self._registry.layers:
            if not layer.statistics.enabled and "last_update" not in state.get(layer.weight, ()):
                self._follow_state()
                return

    def _regroup(self) -> bool:
        """Take up what was changed by hand in ``param_groups`` alone; tell whether anything was."""
        if self._registry.link(self.param_groups):
            return False
        self._registry.drop_departed(self.param_groups)
        before = {id(layer) for layer in self._registry.layers}
        self._sort()
        for layer in self._registry.layers:
            if id(layer) not in before:
                self._drop_misfit(layer)
        return True

    def _search_module(self, module: nn.Module) -> bool:
        """Look for layers in a module that is about to run; tell whether there are any."""
        known = by_parameter(self.param_groups)
        if not any(id(param) in known for param in module.parameters()):
            return False
        self._registry.remember(module)
        self._sort()
        return True

    # ---------------------------------------------------------------- the step

    @uncompiled
    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Re-evaluates the model and returns the loss; called once, with gradients.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._step()
        except BaseException:  # also an interrupt: what there is goes on like its checkpoint
            self._registry.clear()
            self._follow_state()
            raise
        return loss

    def _step(self) -> None:
        """Take what the passes have left into the state and the parameters."""
        self._regroup()  # an emptied state is taken up in the end
        self._take_up_uses()
        if not self._registry.has_parts:
            self._step_whole()
            return
        parts = self._registry.parts
        parts.begin(full_tensor)
        try:
            self._step_whole()
        finally:
            parts.end()

    def _step_whole(self) -> None:
        """Do so while parts have the memory and the gradients of their parameters."""
        due = [layer for layer in self._registry.layers if layer.statistics.enabled]
        several = False
        if distributed.is_available() and distributed.is_initialized():
            self._processes.look(self._registry.params, bool(due))
            self._notices.check_processes(self._processes.overlooked, self._registry, due)
            several = self._processes.count > 1
        self._flags.receive(wait=several)  # all processes act upon a flag at the same step
        if any(layer.statistics.refused for layer in self._registry.layers):
            due = self._release(due)
        if several:
            self._runner.placing.place(self._registry.layers, self._states)
        if not self._all_have_gradients():
            self._notices.check_gradients(self._registry)
        self._ensure_state()
        bad_gradients: Tensor | bool | None = None
        pending = self._registry.pending()
        if several and due:
            receive = self._processes.send(due)
            bad_gradients = non_finite(self._gradients())  # while messages travel
            receive()
            pending = [layer for layer in self._registry.layers if layer.statistics.pending]
        if not pending and self._all_lrs_zero(due):
            return
        if due and not self._excluded:
            unseen = self._notices.check_statistics(due, self._states)
            if unseen:
                self._registry.look_everywhere(self, unseen)
            self._notices.check_stale(due, self._states)
        found_inf = self._step_if_finite(pending, bad_gradients)
        self._skipped.add(found_inf)
        if self._skipped_steps.untold:
            self._notices.tell_skipped(self._skipped_steps.untold)
        undo = self._undo(pending)
        self._advance(self._updated(pending) if found_inf is not True else [])
        if isinstance(found_inf, Tensor):
            self._flags.send(found_inf, undo)

    def _take_up_uses(self) -> None:
        """See how parameters were used that no supported module multiplies with."""
        lost, news = self._registry.settle(self._paused or self._excluded)
        overlooked = self._registry.overlooked()
        if overlooked and not self._excluded:
            self._notices.check_overlooked(overlooked)
        if not news:
            return
        for other in self._registry.others:
            state = self.state.get(other.param, {})
            if begun_in_layer(state, other.group) and not self._registry.is_looked_for(other.param):
                del self.state[other.param]
        saved_state.check_parts(self._registry, self._states)
        for found in lost:
            if self._registry.group_of(found.param)["fallback"] == "error":
                raise ValueError(_not_captured(found.weight.name, found.weight.refused))
        if any(group["fallback"] == "error" for group in self.param_groups):
            self._refuse_others()
        if not lost:
            return
        gone = [found for found in lost if "exp_avg" not in self.state.get(found.param, {})]
        for found in gone:  # the fallback starts with a state of its own
            self.state.pop(found.param, None)
        self._notices.tell_lost(lost, self._registry)

    def _release(self, due: list[CapturedLayer]) -> list[CapturedLayer]:
        """Leave layers to the fallback whose statistics have refused; return the others.

        Several processes go on without: they hold the same layers, and one alone may have refused.
        """
        released = [layer for layer in self._registry.layers if layer.statistics.refused]
        for layer in released:
            if layer.group["fallback"] == "error":
                raise ValueError(
                    f"params: {layer.named()[0][0]} cannot be measured any more "
                    f"({layer.statistics.refused}) and fallback is 'error'. Supported: "
                    "fallback='adamw', fallback='sgd'."
                )
        if self._processes.count > 1:
            return due
        self._flags.receive(wait=True)  # they look at the state that is dropped
        self._registry.release(released)
        for layer in released:
            for param in layer.owned():
                self.state.pop(param, None)
        self._notices.tell_released(released)
        return [layer for layer in due if not layer.statistics.refused]

    def _all_have_gradients(self) -> bool:
        """Whether every parameter has a dense gradient."""
        params = (param for group in self.param_groups for param in group["params"])
        return all(p.grad is not None and p.grad.layout == torch.strided for p in params)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]

    def _step_if_finite(
        self, pending: list[CapturedLayer], bad_gradients: Tensor | bool | None
    ) -> Tensor | bool:
        """Update factors and step, unless a number is not finite; tell whether one is not.

        Args:
            pending: Layers with statistics.
            bad_gradients: Whether a gradient is not finite; None if they were not looked at.
        """
        layers, state, gradients = self._registry.layers, self._states, self._gradients()
        diagonals, unread = self._runner.diagonals(layers, state), gradients
        deferred = None
        if diagonals and self._runner.placing.assignment.world == 1:
            deferred = DeferredCheck(layers, diagonals, state)
            unread = deferred.others(gradients)
        measured = [tensor for layer in pending for tensor in layer.statistics.sums()]
        if bad_gradients is None:
            skip = non_finite([*unread, *measured])
        else:
            skip = either(bad_gradients, non_finite(measured))
        if self._processes.holders:
            skip = self._processes.agree(skip)
        if skip is True:
            return True
        found_inf = self._found_inf = skip if isinstance(skip, Tensor) else None
        device = gradients[0].device if gradients else torch.device("cpu")
        with FullPrecision(device):
            if pending:
                scale = loss_scale(self._grad_scaler)
                self._runner.update(pending, state, scale, found_inf)
            self._runner.refresh(layers, pending, state, found_inf)
            norms = {} if deferred is None else deferred.norms()
            if norms is None:
                return True
            skipped = self._skipped_steps
            self._step_params(StepContext(state, found_inf, skipped, diagonals, norms))
        return skip

    def _step_params(self, context: StepContext) -> None:
        """Step every parameter that has a gradient."""
        self._trust = step_layers(self._registry.layers, self._precondition, context)
        others, found_inf = self._registry.others, context.found_inf
        step_others(others, self._states, self.param_groups, found_inf)
        # torch's fused kernels do not tell autograd that they have written
        increment_version([p for g in self.param_groups for p in g["params"] if p.grad is not None])

    def _precondition(self, layers: list[CapturedLayer], gradients: list[Tensor]) -> list[Tensor]:
        """Precondition the joint gradient matrices of several layers."""
        return self._runner.precondition(layers, gradients, self._states, self._found_inf)

    # ---------------------------------------------------------------- the clock

    def _advance(self, updated: list[CapturedLayer]) -> None:
        """Count a step, and see what the next one is to do."""
        self._runner.count(updated, self.param_groups, self._states)
        self._registry.clear()
        self._excluded = False
        self._set_taps()

    def _updated(self, pending: list[CapturedLayer]) -> list[CapturedLayer]:
        """Layers that a step has taken something of: statistics, or gradients where these do."""
        taken = [
            layer
            for layer in self._registry.layers
            if not layer.needs.statistics and has_curvature(layer, self._states)
        ]
        return [*pending, *taken]

    def _undo(self, pending: list[CapturedLayer]) -> Callable[[], None]:
        """Function that undoes a step which turns out to have been skipped on the device."""
        before = [(layer, layer.group["step"], self._last_update(layer)) for layer in pending]

        def undo() -> None:
            for layer, step, last in before:
                if self._last_update(layer) == step:  # due again
                    set_mark(self._states, layer, "last_update", last)
            self._set_taps()

        return undo

    def _all_lrs_zero(self, due: list[CapturedLayer]) -> bool:
        """Whether a step without statistics is none: every learning rate is zero.

        It is one where no layer was to be measured, but there was a pass all the same.
        """
        lrs = [group["lr"] for group in self.param_groups]
        on_host = all(not isinstance(lr, Tensor) or lr.device.type == "cpu" for lr in lrs)
        if not on_host or any(float(lr) != 0 for lr in lrs):
            return False
        return any(layer.weight.grad is not None for layer in due) or not self._gradients()

    # ---------------------------------------------------------------- statistics

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and drop statistics that no step has taken.

        Args:
            set_to_none: Set gradients to None instead of zero.
        """
        super().zero_grad(set_to_none)
        self._registry.heal()
        self._catch_up()
        self._registry.clear()

    @contextmanager
    def no_stats(self) -> Iterator[None]:
        """Passes inside this context contribute no statistics."""
        was_paused, self._paused = self._paused, True
        self._set_taps()
        try:
            yield
        finally:
            self._excluded, self._paused = True, was_paused
            self._set_taps()

    def _last_update(self, layer: CapturedLayer) -> int:
        """Step of the last update of its factors, or -1."""
        return mark(self._states, layer, "last_update")

    def _follow_state(self) -> None:
        """Take up what the state says of structures, and of when layers were updated."""
        for layer in self._registry.layers:
            layer.cached_products.clear()
            states.follow_structures(layer, self._states)
        self._set_taps()

    def _set_taps(self) -> None:
        """Switch taps on where the next step is to update factors, and off elsewhere."""
        state = self._states
        for layer in self._registry.layers:
            if self._paused or not layer.needs.statistics:
                layer.statistics.enabled = False
                continue
            layer.statistics.enabled = self._runner.is_due(layer, state)
            param_state = state[layer.weight] if has_curvature(layer, state) else None
            self.rule.feed_taps(layer, param_state, mark(state, layer, "last_refresh") >= 0)

    def __setstate__(self, state: StateDict) -> None:
        """Capture anew in a copied or unpickled optimizer."""
        super().__setstate__(state)
        if "_registry" not in self.__dict__:
            self._prepare()
            self._ready = True
            self._sort()

    # ---------------------------------------------------------------- state

    def _ensure_state(self) -> None:
        """Make the states of all that are about to be trained."""
        state = self._states
        if self.rule.revise_structures(self._registry, self.param_groups, state):
            self._excluded = True  # statistics that are missing from this step are no surprise
        for layer in self._registry.layers:
            if not layer.statistics.bound:
                continue
            if layer.weight.grad is not None or layer.statistics.pending:
                param_state = state[layer.weight]
                if "last_update" not in param_state:
                    param_state.update(self._runner.kept(layer))
                states.complete(param_state, layer.weight, layer.group)
            if layer.bias is not None and layer.bias.grad is not None:
                states.complete(state[layer.bias], layer.bias, layer.group)
        for uncaptured in self._registry.others:
            param = uncaptured.param
            if param.grad is not None and not state.get(param):
                state[param].update(fallback.init_state(param, uncaptured.group))

    def _drop_misfit(self, layer: CapturedLayer) -> None:
        """Start the curvature anew that was handed on to a new weight, and has another shape."""
        if not has_curvature(layer, self._states) or not layer.statistics.bound:
            return
        saved = self._states[layer.weight]
        fresh = {k: v for k, v in self._runner.fresh(layer).items() if k not in states.ON_HOST}
        fits = [key in saved and saved[key].shape == part.shape for key, part in fresh.items()]
        if self._runner.placing.assignment.is_grad_worker(layer) and not all(fits):
            saved.update(self._runner.kept(layer))
            self._follow_state()

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
            0          152   136          all         all
            ---------  ----  -----------  ----------  -------
            process 0  152   136
        """
        self._catch_up()
        self._processes.find(list(self._registry.params()))
        self._runner.placing.place(self._registry.layers, self._states)
        return self._runner.placing.table(self._registry.layers)

    def state_dict(self) -> StateDict:
        """State of every parameter and hyper-parameters of every group, without callables.

        Where processes keep parts of it (``grad_worker_fraction`` below 1) it is put together, for
        which all of them have to call this.

        Raises:
            RuntimeError: If processes keep parts of the state and one does not take part.
        """
        self._flags.receive(wait=True)
        self._catch_up()
        hook = self.register_state_dict_post_hook(
            lambda _, saved: checkpoint.as_saved(saved, self._runner), prepend=True
        )
        try:
            whole = self._runner.placing.whole_state(self._registry.layers, self._states)
            with whole, checkpoint.without_strangers(self.state, self.param_groups):
                return super().state_dict()
        finally:
            hook.remove()

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what :meth:`state_dict` returned; the argument is neither changed nor kept.

        Callables and hyper-parameters that it lacks stay as they are; all others are those of the
        saved optimizer from then on, with what follows from them: which layers are captured, in
        which structures, and what is measured.

        Args:
            state_dict: A saved state.

        Raises:
            ValueError: If it is of another optimizer, or does not fit these parameters; then
                nothing has changed.
        """
        self._catch_up()
        self._flags.receive(wait=True)  # what they undo is of the state that goes
        live = self.__dict__["state"], self.param_groups
        before = [dict(group) for group in self.param_groups]
        given: list[StateDict] = []  # what hooks of the user have made of the argument

        def receive(_: Optimizer, saved: StateDict) -> None:
            saved_state.check_groups(saved, self.param_groups, self.rule)
            given.append(saved)

        last = self.register_load_state_dict_pre_hook(receive)
        first = self.register_load_state_dict_post_hook(
            lambda _: self._restore(given[0], before), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            if self.param_groups is not live[1]:
                self.__dict__["state"], self.__dict__["param_groups"] = live
                self._forget_layers()
            raise
        finally:
            last.remove()
            first.remove()

    def _restore(self, saved: StateDict, before: list[Group]) -> None:
        """Complete what torch has loaded; hooks of the user come afterwards."""
        params = [param for group in self.param_groups for param in group["params"]]
        checkpoint.restore_groups(self.param_groups, before)
        self._registry.link(self.param_groups)
        self._choose_layers(saved["param_groups"], before)
        dtypes = checkpoint.expected_dtypes(self._registry, self._runner)
        checkpoint.restore_tensors(self.state, saved, params, dtypes)
        self._registry.clear()
        for layer in self._registry.layers:
            checkpoint.split_second_moments(layer, self._states, layer.group["step"])
        self._follow_state()
        self._runner.placing.drop(self._registry.layers, self._states)
        saved_state.check_states(self._registry, self._states, self._runner)
        checkpoint.complete_derived(self._registry.layers, self._states, self._runner)
        self._set_taps()

    def _choose_layers(self, saved: list[Group], before: list[Group]) -> None:
        """Go on with the layers that the saved optimizer had captured, if they are others.

        Args:
            saved: Its groups; those of older versions captured all tied weights.
            before: The groups before loading.
        """
        contradicts = self._registry.contradicts(self._states, self.param_groups)
        if checkpoint.captures_alike(self.param_groups, before, self.rule) and not contradicts:
            return
        for group, saved_group in zip(self.param_groups, saved, strict=True):
            if contradicts and "capture_tied" not in saved_group:
                group["capture_tied"] = True
        self._forget_layers()

    def _forget_layers(self) -> None:
        """Find all layers anew."""
        self._registry.forget()
        self._runner.placing.forget()
        self._sort()

    # ---------------------------------------------------------------- for the user

    @uncompiled
    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Call the model once, so that all weights it uses are known before it is compiled.

        Weights that a model uses without calling a layer are found at the calls that use them,
        which a compiled graph does not show. One eager step of training does the same. Parameters,
        buffers, modes and random generators are left as they were.

        Args:
            *args: What the model is called with.
            **kwargs: The same, by name.

        Raises:
            RuntimeError: If no model, or more than one, owns the parameters.

        Example:
            >>> import tnkfac
            >>> attention = torch.nn.MultiheadAttention(8, 2)
            >>> optimizer = tnkfac.SINGD(attention.parameters())
            >>> optimizer.prepare(*[torch.randn(5, 3, 8)] * 3)
            >>> compiled = torch.compile(attention)
        """
        roots = self._registry.roots()
        if len(roots) != 1:
            raise RuntimeError(
                f"prepare: {len(roots)} models own the parameters. Supported: one; of several, run "
                "one training step each before compiling."
            )
        rehearse(roots[0], args, kwargs)

    @property
    def skipped_updates(self) -> int:
        """Number of batches skipped for non-finite gradients or statistics; waits for them."""
        return self._skipped.total

    @uncompiled
    def report(self) -> Report:
        """How every parameter is trained: a list of rows that prints as a table."""
        self._catch_up()
        report = summarize(self._registry, self._states)
        report.skipped_updates = self.skipped_updates
        report.skipped_steps = self._skipped_steps.totals
        report.trust_region = None if self._trust is None else float(self._trust)
        owner = weakref.ref(self)

        def diagnose() -> Diagnostics | None:
            optimizer = owner()
            return None if optimizer is None else optimizer.diagnostics()

        report.diagnose = diagnose
        return report

    @uncompiled
    def diagnostics(self) -> Diagnostics:
        """Condition of the factors and size of the last update, of every layer.

        It decomposes what is not decomposed, so it is not for every step.

        Returns:
            A list of rows that prints as a table, writes for TensorBoard, and has all spectra.
        """
        self._catch_up()
        layers = self._registry.layers
        spectra = self._runner.spectra
        diagnostics = diagnose(layers, self._states, spectra)
        diagnostics.trust_region = None if self._trust is None else float(self._trust)
        diagnostics.skipped_updates = self.skipped_updates
        return diagnostics

    def close(self) -> None:
        """Remove every hook; afterwards the factors stay as they are."""
        self._registry.close()
        if self._search is not None:
            self._search.remove()


def _not_captured(name: str, reason: str) -> str:
    return (
        f"params: {name} is not in a supported layer ({reason}) and fallback is 'error'. "
        "Supported: fallback='adamw', fallback='sgd'."
    )
