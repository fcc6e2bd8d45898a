"""Loss scaling and non-finite numbers, which may spoil a step."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import isfinite

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler


def loss_scale(grad_scaler: GradScaler | None) -> Tensor | float:
    """Scale by which the loss of this step was multiplied.

    Output gradients are captured scaled, and neither ``.grad`` nor the optimizer tells by how
    much once ``unscale_`` has run, so the ``GradScaler`` that calls the step is looked up.

    Args:
        grad_scaler: The scaler if the user passed one, or None.
    """
    scaler = grad_scaler if grad_scaler is not None else _calling_scaler()
    if scaler is None or not scaler.is_enabled():
        return 1.0
    scale = scaler._scale
    return 1.0 if scale is None else scale


def _calling_scaler() -> GradScaler | None:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "step":
            caller = frame.f_locals.get("self")
            if isinstance(caller, torch.amp.GradScaler):
                return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def non_finite(tensors: Iterable[Tensor]) -> Tensor | bool:
    """Whether any entry is infinite or not a number.

    Args:
        tensors: Gradients and statistics of a step.

    Returns:
        A bool where everything is on the CPU; otherwise one where any is non-finite and zero
        where not, as a tensor on the first device, without waiting for it.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        local = getattr(tensor, "to_local", None)
        tensor = tensor if local is None else local()
        if tensor.numel():
            by_device.setdefault(tensor.device, []).append(tensor)
    on_host = by_device.pop(torch.device("cpu"), [])
    bad = bool(on_host) and not finite_on_host(on_host)
    if not by_device:
        return bad
    flags = [~finite(group) for group in by_device.values()]
    device = flags[0].device
    if bad:
        return torch.ones((), device=device)
    if len(flags) == 1:
        return flags[0].float()
    return torch.stack([flag.to(device, non_blocking=True) for flag in flags]).any().float()


def either(a: Tensor | bool, b: Tensor | bool) -> Tensor | bool:
    """Whether one of two flags is set; both as :func:`non_finite` returns them."""
    if isinstance(a, bool) and isinstance(b, bool):
        return a or b
    if isinstance(a, bool):
        a, b = b, a
    assert isinstance(a, Tensor)
    if isinstance(b, bool):
        return torch.ones_like(a) if b else a
    return torch.maximum(a, b.to(a.device, non_blocking=True))


def finite(tensors: list[Tensor]) -> Tensor:
    """Whether all entries of some tensors on one device are finite, without waiting for it."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    ends = list(torch._foreach_norm(filled, float("inf")))
    if len({end.dtype for end in ends}) > 1:
        ends = [end.double() for end in ends]
    largest = torch.stack(ends).amax()
    return largest - largest == 0  # of what is not finite the difference is not a number


def finite_on_host(tensors: list[Tensor]) -> bool:
    """Whether all entries on the CPU are finite; norms take a tenth of the time of maxima."""
    for tensor, norm in zip(tensors, torch._foreach_norm(tensors), strict=True):
        if isfinite(norm.item()):
            continue
        parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if not all(isfinite(end.item()) for end in torch.aminmax(parts)):
            return False  # not only the sum of its squares
    return True


class SkippedUpdates:
    """Counts skipped batches; on a device it is read only when asked for."""

    def __init__(self) -> None:
        """No batch was skipped."""
        self._host = 0
        self._device: Tensor | None = None

    def add(self, skip: Tensor | bool) -> None:
        """Count a batch if ``skip`` is one."""
        if isinstance(skip, bool):
            self._host += skip
        elif self._device is None or self._device.device != skip.device:
            self._host = self.total
            self._device = skip.clone()
        else:
            self._device += skip

    @property
    def total(self) -> int:
        """Number of skipped batches; waits for the device."""
        return self._host + (0 if self._device is None else int(self._device.item()))


class SkippedSteps:
    """Counts steps of layers that were skipped for an update that is not finite.

    Attributes:
        untold: Layers of which the user was not told yet.
    """

    def __init__(self) -> None:
        """No step was skipped."""
        self.untold: set[str] = set()  # known here without waiting
        self._host: Counter[str] = Counter()
        self._device: dict[tuple[str, ...], Tensor] = {}

    def add(self, names: Sequence[str]) -> None:
        """Count a step of each of some layers."""
        self.untold |= {*names} - self._host.keys()
        self._host.update(names)

    def add_flags(self, names: Sequence[str], flags: Tensor) -> None:
        """Count a step of those layers whose flag is set, without waiting for it."""
        key = tuple(names)
        before = self._device.get(key)
        self._device[key] = flags.long() if before is None else before + flags

    @property
    def totals(self) -> dict[str, int]:
        """Skipped steps of the layers that have any; waits for the device."""
        counts = Counter(self._host)
        for names, device in self._device.items():
            largest: dict[str, int] = {}  # a layer may come with each of its parameters
            for name, count in zip(names, device.tolist(), strict=True):
                largest[name] = max(count, largest.get(name, 0))
            counts.update(largest)
        return {name: count for name, count in counts.items() if count}


class AsyncFlags:
    """Flags of past steps on their way from the device to the host, without waiting.

    A step on a device is not known to be good when it is queued. Its flag is copied along and
    looked at before later steps.
    """

    def __init__(self) -> None:
        """Nothing is on its way."""
        self._waiting: list[tuple[torch.cuda.Event, Tensor, Callable[[], None]]] = []

    def send(self, skip: Tensor, undo: Callable[[], None]) -> None:
        """Queue the copy of a flag; ``undo`` is called if it turns out to be one."""
        host = torch.empty((), dtype=skip.dtype, device="cpu", pin_memory=True)
        host.copy_(skip, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(skip.device))
        self._waiting.append((event, host, undo))

    def receive(self, wait: bool = False) -> None:
        """Act on every flag that has arrived, or on all of them."""
        while self._waiting:
            event, host, undo = self._waiting[0]
            if wait:
                event.synchronize()
            elif not event.query():  # type: ignore[no-untyped-call]
                return
            self._waiting.pop(0)
            if host.item():
                undo()
