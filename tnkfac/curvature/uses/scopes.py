"""Scopes: the modules inside of which calls are looked at, since they use weights by themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tnkfac.curvature.capture.hooks import InertCopy, hook_around, taking_notes
from tnkfac.curvature.capture.tap import EVALUATION
from tnkfac.curvature.uses.mode import Uses
from tnkfac.curvature.uses.slots import Weight

TRACEABLE = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 14)
"""Whether this torch compiles function modes as they are; older ones refuse parts of attention."""


class Scope:
    """One module in which calls are looked at.

    Attributes:
        weights: The weights that it may use.
    """

    def __init__(self, uses: Uses, weights: Sequence[Weight]) -> None:
        """Nothing is hooked yet.

        Args:
            uses: Who looks at the calls.
            weights: The weights.
        """
        self.uses, self.weights = uses, list(weights)
        self._removers: list[Callable[[], object]] = []

    def hook(self, owner: object, module: nn.Module) -> None:
        """Register the hooks for as long as ``owner`` lives."""
        self._removers = hook_around(owner, module, _Before(self), _After(self))

    def remove(self) -> None:
        """Remove the hooks."""
        for remove in self._removers:
            remove()

    def begin(self, module: nn.Module) -> None:
        """The module is about to run."""
        compiling = torch.compiler.is_compiling()
        if not TRACEABLE and (compiling or _in_compiled_model()):
            return
        if not self._looks(module, compiling):
            if not compiling:
                self.uses.pass_by(self)
            return
        if compiling:  # which compiles anew where anything else is read
            waiting = [weight for weight in self.weights if weight.waits_in_graphs]
        else:
            waiting = [weight for weight in self.weights if weight.waits]
        for weight in waiting:
            weight.looked_at = True
            if not compiling and weight.event == EVALUATION:
                weight.event = ""
        if waiting or compiling:
            self.uses.enter(self, waiting, module)

    def _looks(self, module: nn.Module, compiling: bool) -> bool:
        """Whether a call of the module is one to look into."""
        if not torch.is_grad_enabled() or "_is_replica" in module.__dict__:
            return False
        if not module.training:
            if not compiling:
                self._tell_evaluation()
            return False
        # A compiler keeps this call. Hooks of the outermost module are a graph of their own: one
        # without a call would be run as it is, where nobody knows that the model is compiled.
        if torch._C._are_functorch_transforms_active():
            return False
        return not (torch.compiler._is_exporting_flag if compiling else torch._C._is_tracing())

    def _tell_evaluation(self) -> None:
        """Say why weights may get gradients that no call seen here has given them."""
        for weight in self.weights:
            if not weight.seen:
                weight.event = EVALUATION
                for slot in weight.slots:
                    slot.statistics.last_event = EVALUATION


def _in_compiled_model() -> bool:
    """Whether this runs as it is, but what it calls may be compiled."""
    if "torch._dynamo" not in sys.modules:
        return False
    return callable(torch._C._dynamo.eval_frame.get_eval_frame_callback())


class _Before(InertCopy):
    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def __call__(self, module: nn.Module, args: Any) -> None:
        taking_notes(self.scope.begin, module)


class _After(InertCopy):
    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        taking_notes(self.scope.uses.leave, self.scope)
