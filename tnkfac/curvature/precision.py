"""Float32 products in float32, whatever training uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

Setting = tuple[Any, str]


def _settings(device: torch.device) -> list[Any]:
    backends: Any = torch.backends
    if device.type == "cuda":
        return [backends.cuda.matmul, backends.cudnn.conv]
    return [backends.mkldnn.matmul, backends.mkldnn.conv] if device.type == "cpu" else []


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No TensorFloat-32 or bfloat16 inside float32 matrix products and convolutions.

    On CUDA convolutions use it by default, and ``torch.set_float32_matmul_precision`` turns it on
    for matrix products everywhere. Factors need more digits: they are inverted.
    """
    reduced = [
        (setting, setting.fp32_precision)
        for setting in _settings(device)
        if setting.fp32_precision not in ("none", "ieee")
    ]
    for setting, _ in reduced:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, before in reduced:
            setting.fp32_precision = before
