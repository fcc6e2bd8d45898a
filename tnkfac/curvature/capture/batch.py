"""How many samples a pass has, where layers get their inputs in another shape.

Windows of attention, tokens that are routed to experts, and sequences flattened to rows are parts
of samples. The outermost module knows how many these are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tnkfac.curvature.capture.calls import Rows
from tnkfac.curvature.capture.hooks import InertCopy, taking_notes
from tnkfac.curvature.capture.statistics import Statistics


class BatchSize:
    """Samples of the pass that is running.

    Attributes:
        size: The first axis of the first tensor that the model was called with; 0 if unknown.
        passes: How many passes there were that no graph runs.
    """

    def __init__(self) -> None:
        """No pass was seen."""
        self.size = self.passes = 0

    def terms(self, statistics: Statistics) -> float | None:
        """Terms of a loss that is averaged over samples; None where calls tell them."""
        known = self.size and statistics.loss_average == "batch"
        return float(self.size) if known else None


class BatchHook(InertCopy):
    """Pre-hook of an outermost module."""

    def __init__(self, batch: BatchSize) -> None:
        """Tell it to ``batch``."""
        self.batch = batch

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Look at what the model is called with."""
        if not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():  # for which a number that changes is a new graph
            taking_notes(self._count, args, kwargs)
        else:
            self.batch.passes += 1
            self._count(args, kwargs)

    def _count(self, args: Any, kwargs: Any) -> None:
        self.batch.size = next(map(len, _tensors((*args, *kwargs.values()))), 0)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors with an axis of samples; a vector of numbers may be one sample."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_nested:
                continue
            if value.ndim > 1 or (value.ndim == 1 and not value.is_floating_point()):
                yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
            if all(each.ndim > 1 for each in value if isinstance(each, Tensor)):
                continue  # images of several sizes, say
            yield from _tensors(value)


def by_sample(rows: Rows | None, samples: int) -> Rows | None:
    """Rows ``[.., C]`` as ``[samples, n, C]``, where these are known and divide them.

    Args:
        rows: Makes them of what the call has; None if they are that.
        samples: Their number; 0 if it is not known.
    """
    if not samples:
        return rows

    def grouped(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        if rows is not None:
            x, g = rows(x, g)
        count = x.shape[:-1].numel()
        if x.ndim < 2 or x.shape[0] == samples or count % samples:
            return x, g
        return x.reshape(samples, -1, x.shape[-1]), g.reshape(samples, -1, g.shape[-1])

    return grouped


def sequence_first(rows: Rows | None, samples: int) -> Rows:
    """Rows ``[L, samples, C]``, perhaps flattened, as ``[samples, L, C]``."""

    def grouped(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        if rows is not None:
            x, g = rows(x, g)
        x = x.reshape(-1, samples, x.shape[-1]).transpose(0, 1)
        return x, g.reshape(-1, samples, g.shape[-1]).transpose(0, 1)

    return grouped


def hook_batch(owner: object, root: nn.Module, batch: BatchSize) -> Callable[[], object]:
    """Have an outermost module tell how many samples it gets, for as long as ``owner`` lives.

    Returns:
        A callable that removes the hook.
    """
    handle = root.register_forward_pre_hook(BatchHook(batch), with_kwargs=True)
    return weakref.finalize(owner, handle.remove)
