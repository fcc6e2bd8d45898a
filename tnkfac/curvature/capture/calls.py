"""Calls in a forward pass: the identity through which statistics flow to their leaves.

An output is passed through an identity ``autograd.Function``. It keeps the input, and its backward
returns statistics as the gradients of hidden leaves. Unlike tensor hooks it survives in-place
operations on the output, checkpointing and compilation, and leaves no tensor behind when no
backward follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from tnkfac.curvature.capture.graph import kept_input, plain
from tnkfac.curvature.capture.statistics import Statistics
from tnkfac.curvature.layers import Layer
from tnkfac.curvature.precision import FullPrecision, without_autocast

DOUBLE_BACKWARD = (
    "called, but only backward passes with create_graph=True came through the output; what reaches "
    "a weight by way of the derivative of a derivative has no Kronecker factors"
)
FUNCTIONAL_GRADIENT = "called, but differentiated by torch.autograd.grad instead of .backward()"
CHANGED_INPUT = (
    "called, but the input was changed in place before the backward pass; from now on a copy of it "
    "is kept, and the next pass counts"
)
"""Events of the last call of a layer of which nothing was measured."""


class Identity(torch.autograd.Function):
    """Identity on the output of a call; statistics flow into the leaves."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, call: Any, inplace: bool, *leaves: Any) -> Any:
        """Return ``y``, or a copy of it."""
        ctx.save_for_backward(x)
        ctx.call = call
        ctx.shapes = [leaf.shape for leaf in leaves]
        if not inplace:
            return y.clone()
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient as it is, and statistics for the leaves."""
        (g,) = grads
        statistics = ctx.call.backward(ctx, g)
        if statistics is None:
            return (g, None, None, None, *(None for _ in ctx.shapes))
        for statistic, shape in zip(statistics, ctx.shapes, strict=True):
            if statistic is not None and statistic.shape != shape:  # autograd would silently sum it
                raise RuntimeError(f"Statistic of shape {statistic.shape} for a leaf {shape}.")
        return (g, None, None, None, *statistics)


Rows = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes input and output gradient of a call, returns those of a layer."""


class Share(NamedTuple):
    """What one call gives to the statistics of one matrix.

    Attributes:
        statistics: Where it goes.
        layer: The layer that was called.
        rows: Input and output gradient of the layer from those of the call, if they are others.
    """

    statistics: Statistics
    layer: Layer
    rows: Rows | None = None


class Copying(Protocol):
    """Who decides whether inputs are copied because they are changed in place after the call."""

    copies: bool


class TracedCall:
    """One call inside of a compiled graph."""

    def __init__(self, shares: Sequence[Share], shape: torch.Size, terms: float | None) -> None:
        self.shares, self.shape, self.terms = shares, shape, terms
        self.draws: list[int] | None = None

    def backward(self, ctx: Any, g: Tensor) -> tuple[Tensor | None, ...] | None:
        """Statistics of the call, if the pass counts."""
        if torch.is_grad_enabled():
            return None
        with without_autocast(g.device.type):
            return self.measure(self.shares, ctx.saved_tensors[0].detach(), g.detach())

    def measure(
        self, shares: Sequence[Share], x: Tensor, g: Tensor
    ) -> tuple[Tensor | None, ...] | None:
        """Statistics of all that the call has a share in, shaped like their leaves."""
        g = g.reshape(self.shape)  # it may be of the base
        if len(shares) == 1 and shares[0].rows is None:
            statistics, layer, _ = shares[0]
            return statistics.measure(layer, x, g, self.terms, self.draws)
        measured: list[Tensor | None] = []
        for statistics, layer, rows in shares:
            x_share, g_share = (x, g) if rows is None else rows(x, g)
            if not x_share.numel():  # an expert without tokens: its factors stay as they are
                measured += [None] * len(statistics.hidden_leaves)
                continue
            parts = statistics.measure(layer, x_share, g_share, self.terms, self.draws)
            if parts is None:
                return None
            measured += parts
        return tuple(measured)


class EagerCall(TracedCall):
    """One call whose backward pass finds out what it is part of.

    Attributes:
        turn: Number of its pass, where others may have no rows for some of the matrices; else 0.
    """

    turn = 0

    def __init__(
        self,
        shares: Sequence[Share],
        shape: torch.Size,
        terms: float | None,
        weight: Tensor,
        version: int,
        copying: Copying,
    ) -> None:
        self.shares, self.shape, self.terms = shares, shape, terms
        self.weight, self.version, self.copying = weight, version, copying
        self.draws = [0] if shares[0].statistics.explicit_passes else None

    def backward(self, ctx: Any, g: Tensor) -> tuple[Tensor | None, ...] | None:
        """Statistics of the call, if the pass counts and they can travel by the leaves."""
        shares = self.shares
        if torch.is_grad_enabled():
            self._tell(DOUBLE_BACKWARD)
            return None
        retained = self._input(ctx)
        if retained is None:
            self.copying.copies = True
            for share in shares:
                share.statistics.spoil(CHANGED_INPUT)
            return None
        shares, x = retained
        for share in shares:
            share.statistics.begins()
        with without_autocast(g.device.type), FullPrecision(g.device):
            measured = self.measure(shares, plain(x), plain(g))
        if measured is None:
            return None
        if torch._C._will_engine_execute_node(shares[0].statistics.sink):
            self._take_turns(shares, measured)
            return measured
        if _accumulates(self.weight):  # .backward(inputs=...): the leaves are not among these
            self._take_turns(shares, measured)
            parts = iter(measured)
            for share in shares:
                share.statistics.add([next(parts) for _ in share.statistics.hidden_leaves])
        else:
            self._tell(FUNCTIONAL_GRADIENT)
        return None

    def _take_turns(self, shares: Sequence[Share], measured: Sequence[Tensor | None]) -> None:
        """Remember which matrices had rows in this pass."""
        if not self.turn or self.terms is None:
            return
        end = 0
        for share in shares:
            end += len(share.statistics.hidden_leaves)
            if measured[end - 1] is not None:
                share.statistics.turns[self.turn] = self.terms

    def _tell(self, event: str) -> None:
        for share in self.shares:
            share.statistics.last_event = event

    def _input(self, ctx: Any) -> tuple[Sequence[Share], Tensor] | None:
        """The input as it was, and the layers that took it."""
        try:
            (x,) = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            if len(self.shares) > 1 or self.shares[0].rows is not None:
                return None
            share = self.shares[0]
            kept = kept_input(ctx.next_functions[0][0], share.layer, self.shape)
            return None if kept is None else ([share._replace(layer=kept[0])], kept[1])
        # with hooks of saved tensors, as activation checkpointing has them, torch does not look
        return None if x._version > self.version else (self.shares, x)


def _accumulates(weight: Tensor) -> bool:
    """Whether the backward pass that is running adds to the ``.grad`` of a weight."""
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(weight).node)
    except RuntimeError:  # so says torch where torch.autograd.grad returns the gradient instead
        return False


def through(output: Tensor, x: Tensor, call: TracedCall, leaves: Sequence[Tensor]) -> Tensor:
    """Pass an output through the identity, in place.

    Args:
        output: What the call returned.
        x: Its input.
        call: What measures it.
        leaves: Leaves of all that it has a share in.

    Returns:
        What takes the place of the output.
    """
    base = output._base
    if base is None or not _in_same_order(base, output):
        tapped: Tensor = Identity.apply(output, x, call, True, *leaves)
        return tapped
    tapped = Identity.apply(base, x, call, True, *leaves).view(output.shape)
    _ = output.grad_fn  # a stale view must be refreshed before anyone hooks it
    return tapped if type(output) is Tensor else output


def _in_same_order(base: Tensor, view: Tensor) -> bool:
    """Whether a view is a reshape of its base, not one with its numbers in another order."""
    if base.numel() != view.numel():
        return False
    return (base.is_contiguous() and view.is_contiguous()) or _long_axes(base) == _long_axes(view)


def _long_axes(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of axes with several entries."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [(size, stride) for size, stride in pairs if size > 1]
