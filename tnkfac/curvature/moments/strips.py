"""Pixels of an axis that the same taps meet: their sum is all that a sum over positions needs."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tnkfac.curvature.moments.tap_classes import TapClass


class Strips(NamedTuple):
    """The pixels of an axis that any tap meets, by the taps that meet them.

    A kernel of three with padding one has three: the first pixel, the last, and all between.

    Attributes:
        slices: Pixels of each.
        box: Which taps meet them, ``[K, S]``.
    """

    slices: tuple[slice, ...]
    box: Tensor

    def sums(self, x: Tensor) -> Tensor:
        """Sum every strip.

        Args:
            x: ``[M, I, R]``.

        Returns:
            ``[M, S, R]``.
        """
        parts = [x[:, pixels] for pixels in self.slices]
        return torch.cat([p if p.shape[1] == 1 else p.sum(1, keepdim=True) for p in parts], 1)


@lru_cache(maxsize=1024)
def box(axis: tuple[TapClass, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which pixels every tap meets, ``[K, I]``."""
    count = sum(taps.count for taps in axis)
    found = torch.zeros(count, axis[0].pixels, dtype=dtype, device="cpu")
    for taps in axis:
        for j, offset in enumerate(taps.offsets):
            for o in range(taps.positions):
                pixel = taps.stride * o + offset
                if 0 <= pixel < taps.pixels:
                    found[taps.first + j * taps.every, pixel] = 1
    return found.to(device)


@lru_cache(maxsize=1024)
def strips(axis: tuple[TapClass, ...], dtype: torch.dtype, device: torch.device) -> Strips | None:
    """The strips of an axis; None where a product with :func:`box` is faster."""
    columns = box(axis, dtype, torch.device("cpu")).T.tolist()
    met: dict[tuple[float, ...], list[int]] = {}
    for pixel, column in enumerate(columns):
        if any(column):
            met.setdefault(tuple(column), []).append(pixel)
    if not 0 < len(met) <= min(MOST, len(columns) // 8):
        return None
    slices = []
    for pixels in met.values():
        step = pixels[1] - pixels[0] if len(pixels) > 1 else 1
        if pixels != list(range(pixels[0], pixels[-1] + 1, step)):
            return None
        if step > 1 and len(columns) < LONG:
            return None
        slices.append(slice(pixels[0], pixels[-1] + 1, step))
    rows = [*zip(*met, strict=True)]  # not a transpose: with one strip, torch.kron fails on that
    return Strips(tuple(slices), torch.tensor(rows, dtype=dtype, device=device))


MOST = 8
"""So many strips, each of eight pixels on average, are summed faster than multiplied."""
LONG = 112
"""Pixels of an axis from which on that holds where strips skip pixels."""
