"""What SINGD and KFAC share: groups, layers, schedule, the step, checkpoints."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from tnkfac.curvature import FirstForward, FullPrecision
from tnkfac.optim import options
from tnkfac.optim.distributed.assignment import Plan
from tnkfac.optim.distributed.reduction import Processes
from tnkfac.optim.finite import SkippedUpdates, Verdicts, either, loss_scale, non_finite
from tnkfac.optim.keeping import Keeping
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.marks import mark, set_mark
from tnkfac.optim.params.registry import Registry, by_parameter
from tnkfac.optim.params.scaling import Scaling
from tnkfac.optim.report.diagnostics import Diagnostics, Spectra, diagnose
from tnkfac.optim.report.notices import Notices
from tnkfac.optim.report.summary import Report, summarize
from tnkfac.optim.step.deferred_check import DeferredCheck
from tnkfac.optim.step.pipeline import step_layers, step_others
from tnkfac.optim.uncompiled import uncompiled


class CurvatureOptimizer(Keeping):
    """Base of optimizers that precondition layers and train every other parameter by a fallback.

    A subclass says which state a layer has and how statistics and gradients use it.
    """

    _counters: ClassVar[tuple[str, ...]] = ("step", "last_due")

    def __init__(
        self, params: Any, defaults: Group, grad_scaler: Any = None, process_group: Any = "auto"
    ) -> None:
        """Sort the parameters and put taps on their layers.

        Args:
            params: Parameters, named parameters, parameter groups, or a module.
            defaults: Hyper-parameters of groups that do not set them.
            grad_scaler: The ``GradScaler`` in use, if it does not call ``step`` itself.
            process_group: The processes that average gradients by hand, if any.
        """
        self._prepare(grad_scaler, process_group)
        listed = self._registry.spell_out(params)
        if not listed:
            raise ValueError("params: got no parameters. Supported: at least one.")
        super().__init__(listed, defaults)
        self._ready = True
        self._sort()

    def _prepare(self, grad_scaler: Any = None, process_group: Any = "auto") -> None:
        """Set what is neither state nor a group."""
        self._ready = False
        self._registry = Registry()
        self._grad_scaler = grad_scaler
        self._skipped = SkippedUpdates()
        self._verdicts = Verdicts()
        self._trust: Tensor | None = None
        self._search: FirstForward | None = None
        self._notices = Notices()
        self._processes = Processes(process_group)
        self._plan = Plan()
        self._excluded = self._paused = False

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
        self._check_group({**self.defaults, **group}, group)
        group.setdefault("base_lr", float(group.get("lr", self.defaults["lr"])))
        for counter in self._counters:
            group.setdefault(counter, 0)
        super().add_param_group(group)
        if self._ready:
            self._sort()

    def _sort(self) -> None:
        found = self._registry.sort(self, self.param_groups, self.state)
        self._read_marks()
        if not found and self._search is None:
            self._search = FirstForward(self, "_search_module")
        for other in self._registry.others:
            group = other.group
            if group["fallback"] == "error" and other.param.requires_grad:
                self.close()
                raise ValueError(
                    f"params: {other.name} is not in a supported layer ({other.reason}) and "
                    "fallback is 'error'. Supported: fallback='adamw', fallback='sgd'."
                )

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """State of every parameter; another may be assigned, an empty one starts anew."""
        state: defaultdict[Tensor, Any] = self.__dict__["state"]
        return state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.__dict__["state"] = state
        if self.__dict__.get("_ready"):
            self._read_marks()

    def _catch_up(self) -> None:
        """Take up what was changed by hand in ``param_groups`` and in ``state``.

        Pruning, growing and resets replace parameters and move states; restarts empty them.
        """
        if self._regroup():
            return
        state = self.state
        for layer in self._registry.layers:
            if not layer.statistics.on and "last_update" not in state.get(layer.weight, ()):
                self._read_marks()
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

    # ---------------------------------------------------------------- what subclasses say

    @abstractmethod
    def _check_group(self, group: Group, given: Group) -> None:
        """Check all hyper-parameters of a group; bring those in ``given`` to their stored form."""

    @abstractmethod
    def _update_layers(
        self,
        layers: list[CapturedLayer],
        group: Group,
        scale: Tensor | float,
        keep: Tensor | None,
    ) -> None:
        """Take the pending statistics of a stack of layers into their states."""

    def _scales(self, layer: CapturedLayer) -> bool:
        """Whether the preconditioner of a layer scales each number of a gradient."""
        return False

    def _scalings(self, layers: list[CapturedLayer]) -> list[Scaling | None]:
        """Preconditioner of every layer where that is so."""
        return [None] * len(layers)

    @abstractmethod
    def _spectra(self, layer: CapturedLayer) -> Spectra | None:
        """Eigenvalues of the damped factors of a layer, or None where others keep them."""

    @abstractmethod
    def _is_due(self, group: Group, step: int) -> bool:
        """Whether factors are to be updated at a step."""

    def _due_since(self, layer: CapturedLayer, group: Group) -> int:
        """Factors of a layer are to be measured if they were last updated before this step."""
        due: int = group["last_due"]
        return due

    def _share_state(self, layer: CapturedLayer, group: Group) -> None:
        """Hand the statistics what they need of the state of a layer."""

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
        self._regroup()  # an emptied state is taken up in the end
        due = [layer for layer in self._registry.layers if layer.statistics.on]
        self._processes.look(self._registry.params, bool(due))
        self._notices.check_processes(self._processes.overlooked, self._registry, due)
        several = self._processes.count > 1
        self._verdicts.receive(wait=several)  # all processes act upon a flag at the same step
        if any(layer.statistics.refused for layer in self._registry.layers):
            due = self._release(due)
        self._place()
        self._notices.check_gradients(self._registry)
        self._ensure_state()
        seen: Tensor | bool | None = None
        pending = [layer for layer in self._registry.layers if layer.statistics.settle()]
        if several and due:
            receive = self._processes.send(due)
            seen = non_finite(self._gradients())  # while messages travel
            receive()
            pending = [layer for layer in self._registry.layers if layer.statistics.pending]
        if not pending and self._rests(due):
            return loss
        if not self._excluded:
            self._notices.check_statistics(due, self.state)
            self._notices.check_stale(due, self.state)
        skip = self._guarded(pending, seen)
        self._skipped.add(skip)
        undo = self._undo(pending) if isinstance(skip, Tensor) else None
        self._advance(pending if skip is not True else [])
        if isinstance(skip, Tensor):
            self._verdicts.send(skip, undo)
        return loss

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
        self._verdicts.receive(wait=True)  # they look at the state that is dropped
        self._registry.release(released)
        for layer in released:
            for param in layer.params():
                self.state.pop(param, None)
        self._notices.tell_released(released)
        return [layer for layer in due if not layer.statistics.refused]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]

    def _guarded(
        self,
        pending: list[CapturedLayer],
        seen: Tensor | bool | None,
    ) -> Tensor | bool:
        """Update factors and step, unless a number is not finite; tell whether one is not.

        Args:
            pending: Layers with statistics.
            seen: Whether a gradient is not finite; None if they were not looked at.
        """
        deferred, gradients = DeferredCheck(), self._gradients()
        if self._processes.count == 1:
            layers = self._registry.layers
            deferred = DeferredCheck.among(layers, self.state, self._scales)
        measured = [tensor for layer in pending for tensor in layer.statistics.sums()]
        if seen is None:
            skip = non_finite([*deferred.others(gradients), *measured])
        else:
            skip = either(seen, non_finite(measured))
        skip = self._processes.agree(skip)
        if skip is True:
            return True
        keep = None if isinstance(skip, bool) else 1 - skip
        device = gradients[0].device if gradients else torch.device("cpu")
        with FullPrecision(device):
            self._update_factors(pending, keep)
            norms = deferred.norms(self._scalings)
            if norms is None:
                return True
            self._move(keep, norms)
        return skip

    def _update_factors(self, pending: list[CapturedLayer], keep: Tensor | None) -> None:
        scale = loss_scale(self._grad_scaler) if pending else 1.0
        for places, group in self._stacks(pending):
            self._update_layers([pending[i] for i in places], group, scale, keep)

    def _move(self, keep: Tensor | None, norms: dict[int, float]) -> None:
        """Step every parameter that has a gradient."""
        layers, naturals, scalings = self._registry.layers, self._naturals, self._scalings
        self._trust = step_layers(layers, naturals, scalings, self.state, keep, norms)
        skip = None if keep is None else 1 - keep
        step_others(self._registry.others, self.state, self.param_groups, skip)
        # torch's fused kernels do not tell autograd that they have written
        increment_version([p for g in self.param_groups for p in g["params"] if p.grad is not None])

    def _advance(self, updated: list[CapturedLayer]) -> None:
        for layer in updated:
            set_mark(self.state, layer, "last_update", layer.group["step"])
        self._registry.clear()
        self._excluded = False
        for group in self.param_groups:
            group["step"] += 1
            if self._is_due(group, group["step"]):
                group["last_due"] = group["step"]
        self._set_taps()

    def _undo(self, pending: list[CapturedLayer]) -> Callable[[], None]:
        """What to do once a step turns out to have been skipped on the device."""
        before = [(layer, layer.group["step"], self._last_update(layer)) for layer in pending]

        def undo() -> None:
            for layer, step, last in before:
                if self._last_update(layer) == step:  # due again
                    set_mark(self.state, layer, "last_update", last)
            self._set_taps()

        return undo

    def _rests(self, due: list[CapturedLayer]) -> bool:
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
        return mark(self.state, layer, "last_update")

    def _read_marks(self) -> None:
        self._set_taps()

    def _set_taps(self) -> None:
        """Switch taps on where the next step is to update factors, and off elsewhere."""
        state = self.state
        for layer in self._registry.layers:
            group = layer.group
            if group is None or self._paused:
                layer.statistics.on = False
                continue
            last = mark(state, layer, "last_update")
            layer.statistics.on = last < self._due_since(layer, group)
            self._share_state(layer, group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Capture anew in a copied or unpickled optimizer."""
        super().__setstate__(state)
        if "_registry" not in self.__dict__:
            self._prepare()
            self._ready = True
            self._sort()

    # ---------------------------------------------------------------- for the user

    @property
    def skipped_updates(self) -> int:
        """Number of batches skipped for non-finite gradients or statistics; waits for them."""
        return self._skipped.total

    @uncompiled
    def report(self) -> Report:
        """How every parameter is trained: a list of rows that prints as a table."""
        self._catch_up()
        report = summarize(self._registry, self.state)
        report.skipped_updates = self.skipped_updates
        report.trust_region = None if self._trust is None else float(self._trust)
        owner = weakref.ref(self)

        def diagnose() -> Diagnostics | None:
            found = owner()
            return None if found is None else found.diagnostics()

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
        found = diagnose(layers, self.state, lambda layer: layer.group["lr"], self._spectra)
        found.trust_region = None if self._trust is None else float(self._trust)
        found.skipped_updates = self.skipped_updates
        return found

    def close(self) -> None:
        """Remove every hook; afterwards the factors stay as they are."""
        self._registry.close()
        if self._search is not None:
            self._search.remove()


_OTHER_KEYS = (
    "params",
    "param_names",
    "initial_lr",
    "max_lr",
    "min_lr",
    "base_lr",
    "step",
    "last_due",
    "last_inverse_due",
    "fallback_options",
)
