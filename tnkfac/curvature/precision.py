"""Float32 products in float32, whatever training uses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from threading import RLock
from typing import Any
from weakref import WeakSet

import torch


def _settings(device: torch.device) -> list[Any]:
    backends: Any = torch.backends
    if device.type == "cuda":
        return [backends.cuda.matmul, backends.cudnn.conv]
    return [backends.mkldnn.matmul, backends.mkldnn.conv] if device.type == "cpu" else []


class Guard:
    """A lock that stands in nobody's way for long if an interrupt has left it held.

    A KeyboardInterrupt may fall between the last line of a ``with`` block and its end. Then the
    same thread goes in again, and others go on after a while.
    """

    def __init__(self) -> None:
        """Nobody is inside."""
        self._lock = RLock()

    def __enter__(self) -> None:
        """Go in, after a second whether somebody is inside or not."""
        self._lock.acquire(timeout=1.0)

    def __exit__(self, *error: object) -> None:
        """Go out."""
        with suppress(RuntimeError):  # it is another thread's
            self._lock.release()


class FullPrecision:
    """No TensorFloat-32 or bfloat16 inside float32 matrix products and convolutions.

    On CUDA convolutions use it by default, and ``torch.set_float32_matmul_precision`` turns it on
    for matrix products everywhere. Factors need more digits: they are inverted.
    """

    def __init__(self, device: torch.device) -> None:
        """On the backends of one device."""
        self._backends = _settings(device)

    def __enter__(self) -> None:
        with _lock:
            for backend in self._backends:
                setting = backend.fp32_precision
                if setting not in ("none", "ieee"):
                    _before[id(backend)] = setting
                    backend.fp32_precision = "ieee"
                _inside.setdefault(id(backend), WeakSet()).add(self)

    def __exit__(self, *error: object) -> None:
        with _lock:
            for backend in self._backends:
                users = _inside[id(backend)]
                users.discard(self)
                if not users and id(backend) in _before:
                    backend.fp32_precision = _before.pop(id(backend))


_lock = Guard()
_inside: dict[int, WeakSet[FullPrecision]] = {}
"""Who is inside by backend: autograd has a thread for every GPU. Who was interrupted is gone."""
_before: dict[int, str] = {}
"""The user's settings meanwhile."""


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Operations inside keep the dtype of their arguments."""
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
