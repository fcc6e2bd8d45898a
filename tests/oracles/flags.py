"""Whether a batch is finite, told as on a device: a tensor now, a number one step later."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tnkfac.optim.finite import non_finite

__all__ = ["Delayed", "flag"]


class Delayed:
    """Flags that reach the host one step later."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Callable[[], None]]] = []

    def send(self, skip: Tensor, undo: Callable[[], None]) -> None:
        self.waiting.append((skip, undo))

    def receive(self, wait: bool = False) -> None:
        for skip, undo in self.waiting:
            if skip.item():
                undo()
        self.waiting.clear()


def flag(tensors: Iterable[Tensor]) -> Tensor:
    """One where a number is not finite."""
    return torch.tensor(float(non_finite(tensors)))
