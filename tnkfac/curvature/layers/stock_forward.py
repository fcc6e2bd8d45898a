"""The ``forward`` that a call of a layer runs, through whatever wrappers, and what it reads."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from torch import nn

REPLACED_FORWARD = "its forward was replaced"
"""Reason of a layer that computes something else."""
_DEPTH = 32
"""Wrappers around wrappers."""
Geometry = tuple[Any, ...]


def geometry(module: Any) -> Geometry:
    """Attributes that the ``forward`` of a convolution reads, beside the parameters."""
    return (  # torch.compile traces this, but no operator.attrgetter
        module.groups,
        module.stride,
        module.padding,
        module.dilation,
        module.output_padding,
        module.padding_mode,
        module._reversed_padding_repeated_twice,
    )


def snapshot(module: nn.Module) -> Geometry:
    """A :func:`geometry` with copies of lists, which do not change with the module."""
    return tuple(list(part) if isinstance(part, list) else part for part in geometry(module))


def hashable(values: Geometry) -> Geometry:
    """A :func:`geometry` with tuples in the place of lists."""
    return tuple(tuple(part) if isinstance(part, list) else part for part in values)


def forward_of(module: nn.Module) -> Any:
    """The function that a call of the module runs: its own ``forward``, or that of its class."""
    return module.__dict__.get("forward") or type(module).forward


def has_known_wrappers(module: nn.Module) -> bool:
    """Whether all wrappers are by libraries that hand input and output on."""
    forward = forward_of(module)
    while (inner := getattr(forward, "__wrapped__", None)) is not None:
        function = forward.func if isinstance(forward, partial) else forward
        function = getattr(function, "__func__", function)
        by = getattr(function, "__globals__", {}).get("__name__", "")  # `wraps` copies __module__
        if by.split(".")[0] not in ("torch", "accelerate"):
            return False
        forward = inner
    return True


def leads_to(forward: Any, module: nn.Module, stock: Any) -> bool:
    """Whether wrappers end in the stock ``forward`` of this module and of no other."""
    for _ in range(_DEPTH):
        if isinstance(forward, MethodType):
            if forward.__self__ is not module:
                return False
            forward = forward.__func__
        if forward is stock:
            return True
        if isinstance(forward, partial) and forward.func is stock:
            return len(forward.args) == 1 and forward.args[0] is module and not forward.keywords
        forward = getattr(forward, "__wrapped__", None)
    return False
