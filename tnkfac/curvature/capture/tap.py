"""Seeing layer inputs and output gradients: a forward hook for each layer, the *tap*."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tnkfac.curvature.capture.batch import BatchSize, by_sample
from tnkfac.curvature.capture.calls import EagerCall, Identity, Share, TracedCall, through
from tnkfac.curvature.capture.graph import is_compiled, is_product
from tnkfac.curvature.capture.hooks import InertCopy, forget_compiled_frames
from tnkfac.curvature.capture.statistics import Statistics
from tnkfac.curvature.layers import Layer, is_wrapped, layer_type
from tnkfac.curvature.layers.stock_forward import (
    REPLACED_FORWARD,
    Geometry,
    forward_of,
    geometry,
    has_known_wrappers,
    hashable,
    snapshot,
)

EVALUATION = "called in eval() mode"
REPLACED_WEIGHT = "called with another tensor in the place of the weight"
TRANSFORMED = "called inside of torch.func"
FORWARD_MODE = "called inside of torch.autograd.forward_ad"
REPLICA = "run as a replica of DataParallel"
EMPTY = "called with an empty batch, or without outputs"
UNKNOWN_FORWARD = "run compiled, by a forward or a wrapper that the optimizer cannot look into"
TAPPED = "called, but no backward pass came through the output"
"""Events of the last call of a layer of which nothing was measured."""


def _has_own_dispatch(tensor: Tensor) -> bool:
    """Whether a subclass has no numbers of its own, or hides them."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def opaque(role: str, tensor: Tensor) -> str | None:
    """Why a tensor of a call cannot be read, if so."""
    hidden = tensor.is_nested or (type(tensor) is not Tensor and _has_own_dispatch(tensor))
    return _opaque(role, tensor) if hidden else None


def _opaque(role: str, tensor: Tensor) -> str:
    kind = "nested tensor" if tensor.is_nested else type(tensor).__name__
    return f"called, but the {role} is a {kind}, which only its own operations can read"


class Tap(InertCopy):
    """Forward hook of one module, which keeps no reference to the optimizer.

    Attributes:
        statistics: Where it measures.
        layer: The layer as it was called last, once its shape is known.
        copies: Whether inputs are copied, because they are changed in place after the call.
    """

    def __init__(
        self, statistics: Statistics, weight: Tensor, batch: BatchSize | None = None
    ) -> None:
        """Measure into ``statistics`` while the module's weight is ``weight``.

        Args:
            statistics: What is measured of it.
            weight: Its weight.
            batch: How many samples a pass has, if somebody knows.
        """
        self.statistics = statistics
        self._batch = batch or BatchSize()
        self.layer: Layer | None = None
        self.copies = False
        self._weight_id = id(weight)
        self._forward: Any = None
        self._wrapped = False
        self._known = True
        self._geometry: Geometry = ()
        self._unbatched = 0  # axes of one sample

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Tap the output, or leave it alone where nothing may be measured."""
        statistics = self.statistics
        if self.layer is None:  # lazy modules know their shape only now
            self.describe(module)
        if not (statistics.enabled and torch.is_grad_enabled()):
            return None
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._is_tracing():  # before anything that a trace would record
            return None
        weight = module._parameters.get("weight")
        if weight is not None and not weight.requires_grad and isinstance(weight, nn.Parameter):
            return None
        if compiling:
            return self._trace(module, weight, args, kwargs, output)
        if type(output) is Tensor:
            return self._run(module, weight, args, kwargs, output)
        with torch._C.DisableTorchFunctionSubclass():
            return self._run(module, weight, args, kwargs, output)

    def _trace(self, module: nn.Module, weight: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Tap an output inside of a graph that is being compiled."""
        if not (module.training and isinstance(weight, nn.Parameter) and output.requires_grad):
            return None
        if torch.compiler._is_exporting_flag or torch._C._are_functorch_transforms_active():
            return None
        x = args[0] if args else kwargs["input"]
        if not (x.numel() and output.numel()):
            return None
        if forward_of(module) is not self._forward or not self._known:
            self.statistics.last_event = UNKNOWN_FORWARD
            return None
        layer = self._called(module, weight)
        if layer is None:
            return None
        shares = (self._share(layer, x),)
        call = TracedCall(shares, output.shape, self._terms(module, output))
        return Identity.apply(output, x, call, False, *self.statistics.graph_leaves(output))

    def _run(self, module: nn.Module, weight: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Tap an output, in place."""
        statistics = self.statistics
        obstacle = self._obstacle(module, weight, output)
        if obstacle is None:
            x = args[0] if args else kwargs["input"]
            if type(x) is not Tensor and _has_own_dispatch(x):
                if hasattr(x, "trigger_wait"):  # of a collective, which the layer has waited for
                    x = x.trigger_wait()
                else:
                    obstacle = _opaque("input", x)
            if obstacle is None and not (x.numel() and output.numel()):
                obstacle = EMPTY
        if obstacle is not None:
            statistics.last_event = obstacle or statistics.last_event
            return None
        layer = self._called(module, weight)
        if layer is None or (self._wrapped and not self._hands_on(module, weight, x, output)):
            return None
        statistics.last_event = TAPPED
        if self.copies:
            x = x.detach().clone()
        shares, terms = (self._share(layer, x),), self._terms(module, output)
        call = EagerCall(shares, output.shape, terms, weight, x._version, self)
        statistics.drop_stale()
        return through(output, x, call, statistics.leaves(weight))

    def _obstacle(self, module: nn.Module, weight: Any, output: Any) -> str | None:
        """Why a call cannot be measured, empty where no gradient of a weight comes from it."""
        if type(output) is not Tensor:
            if not isinstance(output, Tensor):
                return f"called, but it returned a {type(output).__name__}"
            if _has_own_dispatch(output):
                return _opaque("output", output)
        if torch._C._are_functorch_transforms_active():  # a batched output hides its gradient
            return TRANSFORMED
        if not output.requires_grad or output.is_meta:
            return ""
        if not isinstance(weight, nn.Parameter):
            return REPLACED_WEIGHT
        if not module.training:
            return EVALUATION
        if torch.autograd.forward_ad._current_level >= 0:
            return FORWARD_MODE
        if "_is_replica" in module.__dict__:  # faster than to ask a module for what it lacks
            return REPLICA
        if output.is_nested:
            return _opaque("output", output)
        forward = forward_of(module)
        if forward is not self._forward and not self._examine(module):
            return ""
        return None

    def _examine(self, module: nn.Module) -> bool:
        """Look at a ``forward`` that is new here."""
        if layer_type(module, indices=True) is None:
            self.statistics.refuse(REPLACED_FORWARD)
            return False
        self._look(module)
        return True

    def _look(self, module: nn.Module) -> None:
        self._forward, self._wrapped = forward_of(module), is_wrapped(module)
        self._known = not self._wrapped or has_known_wrappers(module)

    def _hands_on(self, module: nn.Module, weight: Tensor, x: Tensor, output: Tensor) -> bool:
        """Whether a wrapper returns what the stock ``forward`` does."""
        if is_compiled(output) or is_product(output, weight, module._parameters["bias"], x):
            return True
        self.statistics.refuse(f"{REPLACED_FORWARD} by a wrapper that changes the result")
        return False

    def _called(self, module: nn.Module, weight: Tensor) -> Layer | None:
        """The layer as it is called now; None if its factors would have another shape."""
        layer = self.layer
        assert layer is not None  # since every call begins with it
        if layer.has_geometry and (current := geometry(module)) != self._geometry:
            layer = layer.called(hashable(current))
        if id(weight) != self._weight_id and layer.weight_shape != tuple(weight.shape):
            self.statistics.refuse(f"a weight of shape {tuple(weight.shape)} took its place")
            return None
        if layer.groups != self.statistics.layer.groups:
            self.statistics.refuse(f"its groups became {layer.groups}")
            return None
        return layer

    def describe(self, module: nn.Module) -> Layer:
        """Take up what the module is now; its shape must be known."""
        self.layer = self.statistics.bind(module)
        self._look(module)
        if self.layer.has_geometry:
            self._geometry = snapshot(module)
            self._unbatched = self.layer.dims + 1
        return self.layer

    def _share(self, layer: Layer, x: Tensor) -> Share:
        """What a call gives to the statistics, with rows of whole samples."""
        if layer.has_geometry:
            if x.ndim == self._unbatched:
                self._batch.size = 0  # one image: the model's first axis is not that of samples
            return Share(self.statistics, layer)
        samples = self._batch.size
        parted = samples and x.shape[0] != samples and not layer.reads_indices
        return Share(self.statistics, layer, by_sample(None, samples) if parted else None)

    def _terms(self, module: nn.Module, output: Tensor) -> float | None:
        average = self.statistics.loss_average
        if not callable(average):
            return self._batch.terms(self.statistics)
        terms = float(average(module, output.shape))
        if not torch.compiler.is_compiling():
            self.statistics.told_terms = terms
        return terms

    @staticmethod
    def weight_of(module: nn.Module) -> Tensor:
        """The weight of a supported module."""
        weight = module._parameters["weight"]
        assert weight is not None
        return weight


def attach(owner: object, module: nn.Module, tap: Tap) -> Callable[[], Any]:
    """Register a tap for as long as ``owner`` lives.

    Returns:
        A callable that removes the hook.
    """
    handle = module.register_forward_hook(tap, with_kwargs=True, prepend=True)
    tap.statistics.hooks.append(handle)
    forget_compiled_frames()
    if not any(is_lazy(p) for p in module._parameters.values() if p is not None):
        tap.describe(module)
        tap.statistics.leaves(tap.weight_of(module))  # a compiled graph cannot make them
    return weakref.finalize(owner, handle.remove)


class FirstForward:
    """Global hook that calls back with the outermost module of the next forward pass.

    The last resort where no module could be found from the parameters.
    """

    def __init__(self, owner: Any, method: str) -> None:
        """Call ``getattr(owner, method)(module)`` once; ``owner`` is held weakly."""
        self._owner = weakref.ref(owner)
        self._method = method
        self._handle = nn.modules.module.register_module_forward_pre_hook(self)
        self.remove = weakref.finalize(owner, self._handle.remove)

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Look at the module; stay until one holds the parameters."""
        owner = self._owner()
        if owner is None or torch.compiler.is_compiling():
            return
        if getattr(owner, self._method)(module):
            self.remove()


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """Keep the taps of all optimizers from measuring, in this model."""
    taps = (hook for m in model.modules() for hook in m._forward_hooks.values())
    measured = [tap.statistics for tap in taps if isinstance(tap, Tap) and tap.statistics.enabled]
    for statistics in measured:
        statistics.enabled = False
    try:
        yield
    finally:
        for statistics in measured:
            statistics.enabled = True
