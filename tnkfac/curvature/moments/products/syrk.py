"""Products of a matrix with its transpose: half of the work, where that is worth its copy."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from tnkfac.curvature.moments.products.convolved import pays, row_products

HALVED = 256
"""From this size on, a symmetric product on the CPU is computed in halves."""

FEW = 96
"""With fewer columns, copying the other half costs more than computing it."""

COMPUTED = 2**18
"""Numbers of a large product that are computed at one time."""

STRIP = 128
"""Rows that are transposed at one time."""


def fill_product(out: Tensor, parts: Iterable[Tensor], columns: int) -> None:
    """``out = sum u u^T`` over some parts ``u`` for every group.

    Args:
        out: ``[G, D, D]``, overwritten.
        parts: ``[G, D, M]`` each.
        columns: Sum of all ``M``.
    """
    if out.shape[0] == 1 and out.shape[1] >= HALVED and pays(out, out.dtype, columns, out.numel()):
        _fill_strips(out[0], parts)
        return
    halved, beta = halved_from(out, columns), 0.0
    for u in parts:
        add_product(out, u, beta, halved)
        beta = 1.0
        del u  # before the next one is formed
    if beta == 0.0:
        out.zero_()
    mirror(out, halved)


def _fill_strips(out: Tensor, parts: Iterable[Tensor]) -> None:
    """``out = sum u u^T`` of ``u [1, D, M]``, strip by strip of columns down to the diagonal."""
    size, first = len(out), True
    width = -(-size // max(2, size**2 // COMPUTED))
    strips = [slice(start, min(start + width, size)) for start in range(0, size, width)]
    for u in parts:
        for strip in strips:
            part, found = out[: strip.stop, strip], row_products(u[0, : strip.stop], u[0, strip])
            part.copy_(found) if first else part.add_(found)
        first = False
        del u, found  # before the next one is formed
    if first:
        out.zero_()
    for strip in strips[1:]:
        transpose(out[: strip.start, strip], out[strip, : strip.start])


def fill_sample_products(out: Tensor, parts: Iterable[Tensor]) -> None:
    """``out = sum u u^T`` by a product for every sample, of parts ``u [N, G, D, M]``."""
    out.zero_()
    for u in parts:
        out.add_(torch.matmul(u, u.mT).sum(0))
        del u


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


def add_product(out: Tensor, u: Tensor, beta: float, halved: int) -> None:
    """``out = beta * out + u u^T``, without the lower blocks of halves.

    Args:
        out: ``[G, D, D]``.
        u: ``[G, D, M]``.
        beta: Factor of what is there.
        halved: From :func:`halved_from`, the same for all products and :func:`mirror`.
    """
    right = u.mT
    if out.shape[1] >= halved:
        half = out.shape[1] // 2
        for part in (slice(0, half), slice(half, None)):
            add_product(out[:, part, part], u[:, part], beta, halved)
        out, u, right = out[:, :half, half:], u[:, :half], right[:, :, half:]
    if out.shape[0] == 1:
        torch.addmm(out[0], u[0], right[0], beta=beta, out=out[0])
    else:
        torch.baddbmm(out, u, right, beta=beta, out=out)


def mirror(out: Tensor, halved: int) -> None:
    """Fill the lower blocks of halves."""
    if out.shape[1] >= halved:
        half = out.shape[1] // 2
        transpose(out[0, :half, half:], out[0, half:, :half])
        for part in (slice(0, half), slice(half, None)):
            mirror(out[:, part, part], halved)


def transpose(block: Tensor, out: Tensor) -> None:
    """``out = block^T``, through strips: columns a power of two apart fall on one cache line."""
    rows, columns = block.shape
    strip = block.new_empty(min(STRIP, rows), columns + 16)[:, :columns]
    for first in range(0, rows, STRIP):
        part = strip[: min(STRIP, rows - first)]
        out[:, first : first + len(part)] = part.copy_(block[first : first + len(part)]).T
