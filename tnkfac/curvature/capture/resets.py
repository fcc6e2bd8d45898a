"""Finding out that gradients were reset between backward passes, in whatever way.

``zero_grad`` of an optimizer drops statistics with the gradients, but others reset gradients, too,
and tell nobody: by None or in place. The version of a gradient, which every change in place counts
up, tells where to look: a gradient as a backward pass has left it was not reset. One that was
changed since (clipped, unscaled, reduced) was reset if nothing of it is left. Changes by way of
``.data`` or NumPy are not counted; on the host, a look at the numbers tells.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor


class _Version:
    """A gradient as it was, which another in its place, even at its address, does not equal.

    It is known by an attribute: ids are used again, and torch does not swap or convert a tensor to
    which there is a weak reference.
    """

    _numbers = count()

    def __init__(self, grad: Tensor) -> None:
        grad = _local(grad)
        self._number = vars(grad).setdefault("_tnkfac_number", next(self._numbers))
        self._count = _count(grad)

    def changes_to(self, grad: Tensor) -> int | None:
        """How often the gradient was changed in place since; None if this is another one."""
        grad = _local(grad)
        is_same = vars(grad).get("_tnkfac_number") == self._number
        return _count(grad) - self._count if is_same else None


class Resets:
    """The gradients of a layer from one backward pass to the next."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        """No pass was seen.

        Args:
            params: The weight, and the bias that is trained with it.
        """
        self._params = tuple(params)
        self._seen: _Version | None = None
        self._task = -1
        self._ended = True

    def mark(self) -> None:
        """Take gradients as they are for what passes have left."""
        grad = self._params[0].grad
        self._seen = None if grad is None else _Version(grad)
        self._ended = True

    def mark_after_pass(self) -> None:
        """Take gradients as they are once the backward pass that is running has ended."""
        task = torch._C._current_graph_task_id()
        if task not in (-1, self._task):
            self._task = task
            self._ended = False  # until then, which does not come if the pass fails
            torch.autograd.Variable._execution_engine.queue_callback(self.mark)

    def mark_pass(self) -> None:
        """Take gradients at the first call of a pass and after it, when all have come."""
        if torch._C._current_graph_task_id() != self._task:
            self.mark()
            self.mark_after_pass()

    @property
    def gone(self) -> bool:
        """Whether gradients were set to None."""
        expected = self._seen is not None or self._has_failed
        return expected and self._params[0].grad is None

    @property
    def _has_failed(self) -> bool:
        """Whether the last pass has raised an error after it had come here."""
        return not self._ended and torch._C._current_graph_task_id() == -1

    @property
    def changed(self) -> bool:
        """Whether gradients are not what passes have left."""
        grad = self._params[0].grad
        if self._seen is None or grad is None:
            return self._seen is not None or grad is not None or self._has_failed
        return self._seen.changes_to(grad) != 0

    @property
    def changed_before_pass(self) -> bool:
        """Whether gradients had changed before a backward pass that has now added to them once."""
        grad = self._params[0].grad
        if self._seen is None:
            return False
        return grad is None or self._seen.changes_to(grad) not in (0, 1)

    @property
    def between_passes(self) -> bool:
        """Whether a pass that has added to what was collected has also added to gradients."""
        task = torch._C._current_graph_task_id()
        return task == -1 or task != self._task

    @property
    def on_host(self) -> bool:
        """Whether gradients can be read without waiting."""
        return self._params[0].device.type == "cpu"

    def all_zero(self) -> bool:
        """Whether all gradients are zero; most often the first number tells."""
        gradients = self._gradients()
        if any(bool(grad[(0,) * grad.ndim]) for grad in gradients):
            return False
        return bool(gradients) and not any(bool(grad.any()) for grad in gradients)

    def all_zero_flag(self) -> Tensor:
        """Whether all gradients are zero, as a scalar on the device, without waiting for it."""
        gradients = self._gradients()
        if not gradients:
            return torch.zeros((), dtype=torch.bool, device=self._params[0].device)
        return ~torch.stack([grad.any() for grad in gradients]).any()

    def _gradients(self) -> list[Tensor]:
        grads = (_local(p.grad) for p in self._params if p.grad is not None)
        return [grad for grad in grads if grad.numel()]


class _Handing(torch.autograd.Function):
    """Hands statistics of a compiled graph on to the leaves.

    Its node is older than those of any pass, so that it runs when these have run.
    """

    @staticmethod
    def forward(ctx: Any, owner: weakref.ref[Any], *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.owner = owner
        return tuple(leaf.new_zeros(()).expand(leaf.shape) for leaf in leaves)

    @staticmethod
    def backward(ctx: Any, *parts: Tensor) -> Any:
        statistics = ctx.owner()
        if statistics is not None:
            statistics.arrives()
        return (None, *parts)


def handing(owner: object, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors for compiled graphs whose gradients go to some leaves.

    Args:
        owner: Its ``arrives()`` is called before; held weakly.
        leaves: The leaves.
    """
    with torch.enable_grad():
        handed: tuple[Tensor, ...] = _Handing.apply(weakref.ref(owner), *leaves)
    return handed


def _count(grad: Tensor) -> int:
    return 0 if grad.is_inference() else grad._version


def _local(grad: Tensor) -> Tensor:
    """The local part of a distributed gradient."""
    if type(grad) is Tensor:
        return grad
    local: Tensor = getattr(grad, "_local_tensor", grad)
    return local
