"""Seeing layer inputs and output gradients: the only file that registers hooks.

One forward hook per layer, the *tap*, passes the output through an identity
``autograd.Function``. It keeps the input, and its backward returns the layer's statistics as the
gradients of hidden leaves. Unlike tensor hooks it survives in-place operations on the output,
checkpointing and compilation, and leaves no tensor behind when no backward follows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.parameter import is_lazy

from tnkfac.curvature.accumulate import Statistics
from tnkfac.curvature.layers import Layer
from tnkfac.curvature.precision import FullPrecision, without_autocast


class _Identity(torch.autograd.Function):
    """Identity on the output of a layer; statistics flow into the leaves."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, measure: Any, inplace: bool, *leaves: Any) -> Any:
        ctx.save_for_backward(x)
        ctx.measure = measure
        ctx.shapes = [leaf.shape for leaf in leaves]
        if not inplace:
            return y.clone()
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        if torch.is_grad_enabled():  # create_graph=True: not a pass of training
            return (g, None, None, None, *(None for _ in ctx.shapes))
        exact = nullcontext() if torch.compiler.is_compiling() else FullPrecision(g.device)
        with without_autocast(g.device.type), exact:
            statistics = ctx.measure(ctx.saved_tensors[0].detach(), g.detach())
        if statistics is None:
            return (g, None, None, None, *(None for _ in ctx.shapes))
        for statistic, shape in zip(statistics, ctx.shapes, strict=True):
            if statistic.shape != shape:  # autograd would silently sum it to the leaf's shape
                raise RuntimeError(f"Statistic of shape {statistic.shape} for a leaf {shape}.")
        return (g, None, None, None, *statistics)


class Tap:
    """Forward hook of one module.

    It keeps no reference to the optimizer, and copies and pickles as a hook that does nothing, so
    a copied model contributes no statistics.
    """

    def __init__(self, statistics: Statistics, weight: Tensor) -> None:
        """Measure into ``statistics`` while the module's weight is ``weight``."""
        self.statistics = statistics
        self.layer: Layer | None = None
        self._weight_id = id(weight)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Tap the output, or leave it alone where nothing may be measured."""
        statistics = self.statistics
        if not (statistics.on and torch.is_grad_enabled() and module.training):
            return None
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._is_tracing():  # before anything that a trace would record
            return None
        weight = module._parameters.get("weight")
        if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
            return None  # functional_call, or frozen
        if not output.requires_grad or torch._C._are_functorch_transforms_active():
            return None
        x = args[0] if args else kwargs["input"]
        if x.numel() == 0:
            return None
        terms = None
        if callable(statistics.loss_average):
            terms = float(statistics.loss_average(module, output.shape))
        layer = self.layer
        if layer is None:  # lazy modules know their shape only now
            layer = self.layer = statistics.bind(module)

        shape = output.shape

        def measure(x: Tensor, g: Tensor) -> tuple[Tensor, ...] | None:
            return statistics.measure(layer, x, g.reshape(shape), terms)  # g may be of the base

        if compiling:
            if torch.compiler._is_exporting_flag:
                return None
            return _Identity.apply(output, x, measure, False, *statistics.leaves(output))
        if not _is_plain(module, output):
            return None
        if weight.grad is None and statistics.pending and id(weight) == self._weight_id:
            statistics.clear()  # left over from a pass whose gradients were dropped
        leaves = statistics.leaves(weight)
        base = output._base
        if base is None or base.numel() != output.numel():
            return _Identity.apply(output, x, measure, True, *leaves)
        tapped = _Identity.apply(base, x, measure, True, *leaves).view(output.shape)
        _ = output.grad_fn  # a stale view must be refreshed before anyone hooks it
        return tapped

    @staticmethod
    def weight_of(module: nn.Module) -> Tensor:
        """The weight of a supported module."""
        weight = module._parameters["weight"]
        assert weight is not None
        return weight

    def __deepcopy__(self, memo: Any) -> Any:
        """A copied model has a hook that does nothing."""
        return no_tap

    def __reduce__(self) -> Any:
        """So has an unpickled one."""
        return _make_no_tap, ()


class _NoTap:
    """What a tap becomes in a copied or unpickled model."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        return None

    def __deepcopy__(self, memo: Any) -> _NoTap:
        return self

    def __reduce__(self) -> Any:
        return _make_no_tap, ()


no_tap = _NoTap()


def _make_no_tap() -> _NoTap:
    return no_tap


def _is_plain(module: nn.Module, output: Any) -> bool:
    return (
        type(output) is Tensor
        and torch.autograd.forward_ad._current_level < 0
        and "_is_replica" not in module.__dict__  # faster than to ask a module for what it lacks
    )


def attach(owner: object, module: nn.Module, tap: Tap) -> Callable[[], Any]:
    """Register a tap for as long as ``owner`` lives.

    Returns:
        A callable that removes the hook.
    """
    handle = module.register_forward_hook(tap, with_kwargs=True, prepend=True)
    _forget_compiled_frames()
    if not any(is_lazy(p) for p in module._parameters.values() if p is not None):
        tap.layer = tap.statistics.bind(module)
        tap.statistics.leaves(tap.weight_of(module))  # a compiled graph cannot make them
    return weakref.finalize(owner, handle.remove)


def _forget_compiled_frames() -> None:
    """A model that was compiled and run before would ignore its new hooks without a word."""
    dynamo = getattr(torch, "_dynamo", None)
    if dynamo is not None and dynamo.utils.counters["stats"]["unique_graphs"]:
        dynamo.reset()


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
    measured = [tap.statistics for tap in taps if isinstance(tap, Tap) and tap.statistics.on]
    for statistics in measured:
        statistics.on = False
    try:
        yield
    finally:
        for statistics in measured:
            statistics.on = True


@dataclass(frozen=True)
class Call:
    """One call of a layer in a forward pass.

    Attributes:
        x: Input as the module received it, detached.
        edge: Where the gradient with respect to the output can be asked for, also after the output
            was changed in place.
        shape: Shape of the output.
    """

    x: Tensor
    edge: GradientEdge
    shape: torch.Size

    def gradient(self, outputs: Tensor, vector: Tensor) -> Tensor:
        """Vector-Jacobian product of ``outputs`` with respect to the output of this call."""
        found = gradients([self], outputs, vector)
        return found[0]


def gradients(calls: Sequence[Call], outputs: Tensor, vector: Tensor) -> list[Tensor]:
    """Vector-Jacobian products of ``outputs`` with respect to the outputs of all calls.

    The graph is kept, so that more vectors may follow. Calls that the outputs do not depend on
    get zeros.
    """
    edges = [call.edge for call in calls]
    found = torch.autograd.grad(outputs, edges, vector, retain_graph=True, allow_unused=True)
    return [
        vector.new_zeros(call.shape) if g is None else g.reshape(call.shape)
        for call, g in zip(calls, found, strict=True)
    ]


@contextmanager
def recording(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[Call]]]:
    """Record all calls of some modules, in training and in ``eval()`` mode.

    Args:
        modules: Layers or other modules that take a tensor first and return one.

    Yields:
        For every module, its calls so far. Calls whose output requires no gradient are left out.
    """
    calls: dict[nn.Module, list[Call]] = {module: [] for module in modules}

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor) and isinstance(output, Tensor) and output.requires_grad:
            calls[module].append(Call(x.detach(), get_gradient_edge(output), output.shape))

    handles = [m.register_forward_hook(record, with_kwargs=True, prepend=True) for m in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def output_shapes(model: nn.Module, x: Tensor) -> dict[nn.Module, tuple[int, ...]]:
    """Shape of the output of every module that returns a tensor, in a pass without gradients.

    Args:
        model: The network.
        x: Its input; on the meta device nothing is computed.
    """
    found: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found[module] = tuple(output.shape)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found
