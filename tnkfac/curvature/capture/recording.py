"""Calls of layers in passes that estimators run, without an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tnkfac.curvature.capture.graph import is_compiled, is_product, kept_input, plain
from tnkfac.curvature.layers import Layer, describe, is_wrapped, layer_type


@dataclass(frozen=True)
class Call:
    """One call of a layer in a forward pass.

    Attributes:
        x: Input as the module received it, detached.
        edge: Where the gradient with respect to the output can be asked for, also after the output
            was changed in place.
        shape: Shape of the output.
        layer: The layer as it was called, if it is a supported one that ran its own ``forward``.
        version: How often the input had been changed in place.
    """

    x: Tensor
    edge: GradientEdge
    shape: torch.Size
    layer: Layer | None
    version: int

    def taken(self) -> tuple[Layer | None, Tensor]:
        """The input as it was at the call, and the layer that takes it.

        Raises:
            RuntimeError: If the input was changed in place since, and nobody has kept it.
        """
        if self.x._version == self.version:
            return self.layer, self.x
        retained = None
        if self.layer is not None:
            retained = kept_input(self.edge.node, self.layer, self.shape)
        if retained is None:
            raise RuntimeError(
                f"The input {tuple(self.x.shape)} of a module was changed in place after the call. "
                "Supported: changes out of place."
            )
        return retained[0], retained[1].detach()

    def gradient(self, outputs: Tensor, vector: Tensor) -> Tensor:
        """Vector-Jacobian product of ``outputs`` with respect to the output of this call."""
        grads = gradients([self], outputs, vector)
        return grads[0]


def gradients(calls: Sequence[Call], outputs: Tensor, vector: Tensor) -> list[Tensor]:
    """Vector-Jacobian products of ``outputs`` with respect to the outputs of all calls.

    The graph is kept, so that more vectors may follow. Calls that the outputs do not depend on
    get zeros.
    """
    if not calls:
        return []
    edges = [call.edge for call in calls]
    grads = torch.autograd.grad(outputs, edges, vector, retain_graph=True, allow_unused=True)
    return [
        vector.new_zeros(call.shape) if g is None else g.reshape(call.shape)
        for call, g in zip(calls, grads, strict=True)
    ]


def _edge(output: Tensor, reshaped: bool) -> GradientEdge:
    """Graph edge at which gradients of an output arrive, also once it is changed in place.

    Of a view they arrive at its base then, and no more at the view.

    Args:
        output: What a module returned.
        reshaped: Whether a view of everything is a reshape for sure, as those of layers are.
    """
    base = output._base
    if base is None or not base.requires_grad or base.numel() != output.numel():
        return get_gradient_edge(output)
    reshaped = reshaped or (base.is_contiguous() and output.is_contiguous())
    return get_gradient_edge(base if reshaped else output)


def _ran(module: nn.Module, x: Tensor, output: Tensor) -> Layer | None:
    """The layer that a call was, if a supported one ran its own ``forward``."""
    if layer_type(module, indices=True) is None:
        return None
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    wrapped = is_wrapped(module) and not is_compiled(output)
    if wrapped and (weight is None or not is_product(output, weight, bias, x)):
        return None
    return describe(module)


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
            with torch._C.DisableTorchFunctionSubclass():
                layer = _ran(module, x, output)
                edge = _edge(output, layer is not None)
                calls[module].append(Call(plain(x), edge, output.shape, layer, x._version))

    handles = [m.register_forward_hook(record, with_kwargs=True, prepend=True) for m in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def output_sizes(modules: Iterable[nn.Module], run: Callable[[], Any]) -> dict[int, int]:
    """Numbers in the outputs of layers in a pass, by ``id`` of their weights.

    Args:
        modules: The layers.
        run: The pass.
    """
    sizes: dict[int, int] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            key = id(module._parameters.get("weight"))
            sizes[key] = sizes.get(key, 0) + output.numel()

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return sizes
