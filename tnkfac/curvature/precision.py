"""Float32 products in float32, whatever training uses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Setting = tuple[Any, str]


def _settings(device: torch.device) -> list[Any]:
    backends: Any = torch.backends
    if device.type == "cuda":
        return [backends.cuda.matmul, backends.cudnn.conv]
    return [backends.mkldnn.matmul, backends.mkldnn.conv] if device.type == "cpu" else []


class FullPrecision:
    """No TensorFloat-32 or bfloat16 inside float32 matrix products and convolutions.

    On CUDA convolutions use it by default, and ``torch.set_float32_matmul_precision`` turns it on
    for matrix products everywhere. Factors need more digits: they are inverted.
    """

    def __init__(self, device: torch.device) -> None:
        """On the backends of one device."""
        self._backends = _settings(device)
        self._reduced: list[Setting] = []

    def __enter__(self) -> None:
        for backend in self._backends:
            before = backend.fp32_precision
            if before not in ("none", "ieee"):
                self._reduced.append((backend, before))
                backend.fp32_precision = "ieee"

    def __exit__(self, *error: object) -> None:
        for backend, before in self._reduced:
            backend.fp32_precision = before
        self._reduced.clear()


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Operations inside keep the dtype of their arguments."""
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
