"""Randomised backpropagation for the convolutions of a model, switched on and off."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnkfac.einsum.crs.sampled_convolution import conv
from tnkfac.einsum.crs.samples import check_generator, fractions_below_one

_STOCK: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def apply(
    model: nn.Module, keep: Mapping[str, float], *, generator: torch.Generator | None = None
) -> Handle:
    """Switch the convolutions of a model to randomised backpropagation.

    While a layer is in training mode, its backward pass is that of :func:`conv`, with masks of its
    own at every call; in ``eval()`` mode it is the ordinary one. Layers keep their type, parameters
    and hooks. Copies and unpickled models compute exact gradients.

    Memory is saved where nobody else keeps the input of the layer: a ReLU keeps its own output,
    and an optimizer that captures the statistics of the layer keeps them for that step.

    Args:
        model: Any module. Its ``Conv1d``, ``Conv2d`` and ``Conv3d`` are switched, subclasses
            included that override neither ``forward`` nor ``_conv_forward``.
        keep: As in :func:`conv`.
        generator: As in :func:`conv`.

    Returns:
        A handle whose ``undo()`` switches back. As a context manager it does so at the end.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: For an unknown key or a fraction outside ``(0, 1]``, or a model without
            convolutions.
        RuntimeError: If a layer is switched already.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3))
        >>> with apply(model, {"space": 0.25}) as handle:
        ...     model(torch.rand(2, 3, 9, 9)).sum().backward()
        >>> handle.layers
        ('0', '2')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}. Supported: a torch.nn.Module.")
    fractions = dict(keep) if fractions_below_one(keep) else {}
    check_generator(generator)
    switched: list[tuple[str, nn.Module, Any]] = []
    for name, module in model.named_modules():
        kind = next((kind for kind in _STOCK if isinstance(module, kind)), None)
        if kind is None or type(module).forward is not kind.forward:
            continue
        current: Any = module._conv_forward
        if isinstance(current, _ConvForward):
            raise RuntimeError(f"The layer {name!r} is randomised already: undo() that first.")
        if getattr(current, "__func__", None) is kind._conv_forward:
            switched.append((name, module, kind))
    if not switched:
        names = ", ".join(kind.__name__ for kind in _STOCK)
        raise ValueError(
            f"model: {type(model).__name__} has no layer to switch. Supported: {names}."
        )
    for _, module, kind in switched:
        module.__dict__["_conv_forward"] = _ConvForward(module, kind, fractions, generator)
    return Handle(tuple((name, module) for name, module, _ in switched))


class Handle:
    """Layers that :func:`apply` has switched.

    Attributes:
        layers: Their qualified names.
    """

    def __init__(self, modules: tuple[tuple[str, nn.Module], ...]) -> None:
        """Made by :func:`apply`."""
        self.layers = tuple(name for name, _ in modules)
        self._modules = tuple(module for _, module in modules)

    def undo(self) -> None:
        """Switch the layers back; a second call does nothing."""
        for module in self._modules:
            module.__dict__.pop("_conv_forward", None)
        self._modules = ()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


class _ConvForward:
    """Stands in for the method ``_conv_forward`` of one module, which its ``forward`` calls.

    It copies and pickles as that method.
    """

    def __init__(
        self,
        module: nn.Module,
        kind: Any,
        keep: Mapping[str, float],
        generator: torch.Generator | None,
    ) -> None:
        self._module = weakref.ref(module)  # held by the module itself
        self._kind = kind
        self._keep = keep
        self._generator = generator

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        module: Any = self._module()
        if not (module.training and self._keep):
            y: Tensor = self._kind._conv_forward(module, x, weight, bias)
            return y
        padding = module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        return conv(
            x,
            weight,
            bias,
            stride=module.stride,
            padding=padding,
            dilation=module.dilation,
            groups=module.groups,
            keep=self._keep,
            generator=self._generator,
        )

    def __reduce__(self) -> Any:
        # The copy of the module has no attributes yet, so this finds the method of its class.
        return getattr, (self._module(), "_conv_forward")
