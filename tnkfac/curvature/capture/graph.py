"""Reading autograd's graph: which operation is behind the output of a layer, and what it kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from tnkfac.curvature.layers import Layer

_PASSING = (
    "AliasBackward",
    "AsStridedBackward",
    "CloneBackward",
    "ReshapeAliasBackward",
    "SqueezeBackward",
    "TBackward",
    "ToCopyBackward",
    "TransposeBackward",
    "UnsafeViewBackward",
    "UnsqueezeBackward",
    "ViewBackward",
)
"""Nodes that hand numbers on: other shapes, dtypes and devices."""

_PRODUCTS = {
    "AddmmBackward": "_saved_mat1",
    "AddmvBackward": "_saved_vec",
    "ConvolutionBackward": "_saved_input",
    "LinearBackward": "_saved_input",
    "MmBackward": "_saved_self",
    "MvBackward": "_saved_vec",
}
"""Nodes that multiply an input with a weight, and where they keep the input."""


def kept_input(node: Any, layer: Layer, shape: torch.Size) -> tuple[Layer, Tensor] | None:
    """The input of a call as the operation behind its output has kept it.

    Autocast casts inputs, padding modes write them out, and products copy what is not contiguous;
    a change of the input behind the call does not reach these copies.

    Args:
        node: Node of the output.
        layer: The layer that was called.
        shape: Shape of the output.

    Returns:
        The layer that takes what was kept, and this; None where nothing was.
    """
    node = _behind(node)
    if _kind(node) == "AddBackward":  # of the bias
        node = _behind(node.next_functions[0][0])
    try:
        x = getattr(node, _PRODUCTS.get(_kind(node), ""), None)
    except RuntimeError:  # changed as well, as torch itself is about to say
        return None
    if x is None:
        return None
    return layer.of_kept(x, getattr(node, "_saved_padding", ()), shape)


def is_product(output: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> bool:
    """Whether an output is what a layer returns of an input, as far as the graph can tell.

    Args:
        output: What the module returned.
        weight: Its weight.
        bias: Its bias.
        x: Its input; one without gradient is nowhere in the graph.
    """
    node = _behind(output.grad_fn)
    if _kind(node) == "AddBackward" and bias is not None and _reaches(node, _node(bias)):
        node = _behind(node.next_functions[0][0])
    if _kind(node) not in _PRODUCTS or not _reaches(node, _node(weight)):
        return False
    return _reaches(node, _node(x)) if x.requires_grad else _may_have_kept(node, x)


def _may_have_kept(node: Any, x: Tensor) -> bool:
    """Whether a product may have taken an input that is nowhere in the graph.

    Said to be so where it has kept no tensor of the same kind, or hooks would be called to see it.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return True
    held = getattr(node, _PRODUCTS[_kind(node)], None)
    if held is None or (held.dtype, held.numel()) != (x.dtype, x.numel()) or not x.is_contiguous():
        return True
    return bool(held.data_ptr() == x.data_ptr())


def is_compiled(output: Tensor) -> bool:
    """Whether a compiled graph is behind the output."""
    return _kind(_behind(output.grad_fn)) == "CompiledFunctionBackward"


def _kind(node: Any) -> str:
    """Name of a node without its number."""
    return "" if node is None else node.name().rstrip("0123456789")


def _behind(node: Any) -> Any:
    """The first node that changes numbers."""
    while node is not None and _kind(node) in _PASSING:
        node = node.next_functions[0][0]
    return node


def _node(tensor: Tensor) -> Any:
    return _behind(get_gradient_edge(tensor).node)


def _reaches(node: Any, wanted: Any) -> bool:
    """Whether one of the arguments of a node is what another node computes."""
    return any(_behind(before) == wanted for before in _arguments(node))


def _arguments(node: Any) -> Iterator[Any]:
    return (before for before, _ in node.next_functions if before is not None)


def plain(tensor: Tensor) -> Tensor:
    """Detached, dense, and of no subclass."""
    if type(tensor) is not Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            tensor = tensor.detach().as_subclass(Tensor)
    return (tensor if tensor.layout is torch.strided else tensor.to_dense()).detach()
