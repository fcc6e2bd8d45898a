"""Sums over positions of large float32 images on the CPU: one product, by oneDNN.

A convolution with a kernel of one is the product of a tall matrix and a narrow one, and torch
leaves it to oneDNN. That takes AVX-512 wherever there is any; the BLAS behind torch's own products
keeps to half of it on some processors.
"""

from __future__ import annotations

from functools import lru_cache, reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from tnkfac.curvature.moments.strips import box
from tnkfac.curvature.moments.tap_classes import TapClasses

ENOUGH = 3 << 18
"""Numbers from which on it is faster: it takes 0.2 ms to begin."""
PIXELS = 100
"""Pixels of an image from which on that holds."""
MOST = 1 << 16
"""Numbers of the narrow matrix, which has to stay in the cache."""
COLUMNS = 16
"""Numbers that a CPU takes at a time; of so many images torch leaves convolutions to oneDNN."""


def sums(x: Tensor, classes: TapClasses) -> Tensor | None:
    """Sum what every tap meets over all positions; None where another way is faster.

    Args:
        x: ``[M, I1, .., Id]``.
        classes: Classes of taps per axis.

    Returns:
        ``[M, K1 * .. * Kd]``.
    """
    count, *sizes = x.shape
    if x.numel() < ENOUGH or count % COLUMNS or x.device.type != "cpu":
        return None
    library: Any = torch.backends.mkldnn  # its former name
    if x.dtype != torch.float32 or not library.is_available() or not library.enabled:
        return None
    weight = _weight(classes)
    if weight is None:
        return None
    images = x.reshape(COLUMNS, count // COLUMNS, 1, prod(sizes)).permute(0, 3, 1, 2)
    found = torch.nn.functional.conv2d(images, weight)
    return found.permute(0, 2, 3, 1).reshape(count, -1)[:, : _taps(classes)]


@lru_cache(maxsize=128)
def _weight(classes: TapClasses) -> Tensor | None:
    """Which taps meet which pixels, ``[K, P, 1, 1]``; rows of zeros may follow."""
    unused = -_taps(classes) % COLUMNS
    pixels = prod(axis[0].pixels for axis in classes)
    if pixels < PIXELS or (_taps(classes) + unused) * pixels > MOST:
        return None
    joint = reduce(torch.kron, [box(axis, torch.float32, torch.device("cpu")) for axis in classes])
    padded = torch.nn.functional.pad(joint, (0, 0, 0, unused))
    return padded.view(*padded.shape, 1, 1).contiguous(memory_format=torch.channels_last)


def _taps(classes: TapClasses) -> int:
    return prod(sum(part.count for part in axis) for axis in classes)
