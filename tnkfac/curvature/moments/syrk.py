"""Products of a matrix with its transpose: half of the work, where that is worth its copy."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

HALVED = 256
"""From this size on, a symmetric product on the CPU is computed in halves."""

FEW = 600
"""With fewer columns, copying the other half costs more than computing it."""

STRIP = 128
"""Rows that are transposed at one time."""


def fill_gram(out: Tensor, rows: Tensor, scale: float) -> None:
    """``out = scale * rows rows^T`` for every group.

    Args:
        out: ``[G, D, D]``, overwritten.
        rows: ``[G, D, M]``.
        scale: Factor of the product.
    """
    halved = halved_from(out, rows.shape[2])
    add_product(out, rows, scale, 0.0, halved)
    mirror(out, halved)


def halved_from(out: Tensor, columns: int) -> int:
    """Size from which a product with so many columns, in all, is computed in halves."""
    worthwhile = out.shape[0] == 1 and out.device.type == "cpu" and columns >= FEW
    return HALVED if worthwhile else sys.maxsize


def triangle(features: int, groups: int, columns: int) -> float:
    """Fraction of a symmetric product that is computed on the CPU."""
    fraction = 1.0
    while groups == 1 and columns >= FEW and features >= HALVED:
        fraction, features = (0.5 + fraction) / 2, features // 2
    return fraction


def add_product(out: Tensor, rows: Tensor, scale: float, beta: float, halved: int) -> None:
    """``out = beta * out + scale * rows rows^T``, without the lower blocks of halves.

    Args:
        out: ``[G, D, D]``.
        rows: ``[G, D, M]``.
        scale: Factor of the product.
        beta: Factor of what is there.
        halved: From :func:`halved_from`, the same for all products and :func:`mirror`.
    """
    right = rows.mT
    if out.shape[1] >= halved:
        half = out.shape[1] // 2
        for part in (slice(0, half), slice(half, None)):
            add_product(out[:, part, part], rows[:, part], scale, beta, halved)
        out, rows, right = out[:, :half, half:], rows[:, :half], right[:, :, half:]
    if out.shape[0] == 1:
        torch.addmm(out[0], rows[0], right[0], beta=beta, alpha=scale, out=out[0])
    else:
        torch.baddbmm(out, rows, right, beta=beta, alpha=scale, out=out)


def mirror(out: Tensor, halved: int) -> None:
    """Fill the lower blocks of halves."""
    if out.shape[1] >= halved:
        half = out.shape[1] // 2
        _transpose(out[0, :half, half:], out[0, half:, :half])
        for part in (slice(0, half), slice(half, None)):
            mirror(out[:, part, part], halved)


def _transpose(block: Tensor, out: Tensor) -> None:
    """``out = block^T``, through strips: columns a power of two apart fall on one cache line."""
    rows, columns = block.shape
    strip = block.new_empty(min(STRIP, rows), columns + 16)[:, :columns]
    for first in range(0, rows, STRIP):
        part = strip[: min(STRIP, rows - first)]
        out[:, first : first + len(part)] = part.copy_(block[first : first + len(part)]).T
