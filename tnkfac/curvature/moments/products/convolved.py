"""Products of channels with each other by convolutions: what torch multiplies fastest on CPUs.

``sum_{n, p} x[n, c, p] x[n, d, p]`` is the weight gradient of a convolution with one tap. Torch
hands that to oneDNN, and matrix products to MKL, which uses half the width of AMD's processors.
Where the channels are in groups, it also takes small blocks at the rate of large ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 2**22
"""Multiply-adds from which on a convolution is worth its call."""

FEW = 256
"""Rows from which on it is worth its sums of large results."""

TOGETHER = 2**20
"""Numbers that are read by one call: copies of them stay in the cache, and few sums are long."""

DILATION = 2
"""It says nothing about one tap, but without it torch runs small batches by MKL."""

WIDTH = 128
"""Rows that become the pixels of one image, where channels are in groups, up to twice as many."""

NARROW = 64
"""The same where they are long."""

WIDEST = 1024
"""Rows of one image, where they are not."""


def pays(x: Tensor, dtype: torch.dtype, count: int, numbers: int) -> bool:
    """Whether so many products, summed over ``count`` rows, are faster as a convolution."""
    large = count >= FEW and count * numbers >= LEAST
    return large and dtype == torch.float32 and x.device.type == "cpu" and _has_onednn()


def _has_onednn() -> bool:
    """Whether convolutions are oneDNN's."""
    backend: Any = torch.backends.mkldnn
    return bool(backend.is_available() and backend.enabled)


def images_of(rows: Tensor) -> Iterator[Tensor]:
    """View rows ``[M, G, D]`` as pixels of images, ``[N, G, D, P]``, some of them at a time."""
    count = len(rows)
    width = next((w for w in range(WIDTH, 2 * WIDTH) if count % w == 0), WIDTH)
    if 2 * width * rows[:1].numel() > TOGETHER:
        width = NARROW
    whole = count - count % width
    first: Any = rows[:whole]
    for images in first.unflatten(0, (-1, width)), rows[whole:].unsqueeze(0):
        if images.numel():
            yield from in_cache(images.permute(0, 2, 3, 1))


def wide_images(rows: Tensor) -> Iterator[Tensor]:
    """View rows ``[M, D]`` as pixels of images ``[1, D, P]``, as large as the cache bears."""
    for part in torch.split(rows, max(WIDTH, min(WIDEST, TOGETHER // rows.shape[1]))):
        yield part.T.unsqueeze(0)


def channel_products(x: Tensor, groups: int) -> Tensor:
    """Sum over samples and pixels of the products of channels of one group.

    Args:
        x: ``[N, G * D, P]``.
        groups: Channel groups ``G``.

    Returns:
        ``[G, D, D]``.
    """
    size = x.shape[1] // groups
    weight, images = x.new_empty(1).expand(x.shape[1], size, 1, 1), x.unsqueeze(2)
    args = (None, [1, 1], [0, 0], [DILATION] * 2, False, [0, 0], groups, (False, True, False))
    products: Tensor = torch.ops.aten.convolution_backward(images, images, weight, *args)[1]
    return products.view(groups, size, size)


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """``left right^T`` of rows ``[A, M]`` and ``[B, M]``, the numbers of a row next to each other.

    The rows are pixels of an image with ``M`` channels, and filters.
    """
    image = left.unsqueeze(0).unsqueeze(0).permute(0, 3, 1, 2)
    products = F.conv2d(image, right.unsqueeze(2).unsqueeze(3), dilation=DILATION)
    return products[0, :, 0].T


def fill_products(out: Tensor, parts: Iterable[Tensor]) -> None:
    """Fill ``out [G, D, D]`` with products within groups, of all parts ``[N, G * D, P]``."""
    first = True
    for part in parts:
        _add_products(out, part, first)
        first = False
        del part  # before the next one is formed
    if first:
        out.zero_()


def _add_products(out: Tensor, part: Tensor, first: bool) -> None:
    """Add the products of one part, or overwrite what is there."""
    groups, size, _ = out.shape
    if groups > 1 and len(part) == 1:
        u = part[0].reshape(groups, size, -1)
        torch.baddbmm(out, u, u.mT, beta=0.0 if first else 1.0, out=out)
        return
    step = max(1, TOGETHER * groups // part.numel())  # groups that stay in the cache
    for start in range(0, groups, step):
        some = out[start : start + step]
        x = part[:, start * size : (start + len(some)) * size]
        found = channel_products(x, len(some)).view_as(some)
        some.copy_(found) if first else some.add_(found)


def in_cache(images: Tensor) -> tuple[Tensor, ...]:
    """Cut images ``[N, ..]`` into parts of a few samples, but not of one, which takes longest."""
    parts = min(-(-images.numel() // TOGETHER), len(images) // 2)
    return torch.tensor_split(images, max(1, parts))


def fill_blocks(blocks: Tensor, last: Tensor, parts: Iterable[Tensor]) -> None:
    """Fill the diagonal blocks ``[G, B, k, k]`` and the last ``[G, r, r]``.

    Args:
        blocks: Overwritten.
        last: Overwritten, too.
        parts: ``[N, G, D, P]`` each, at least one.
    """
    count, size = blocks.shape[1:3]
    stack = blocks.flatten(0, 1)  # a copy where a slice of several groups is not one stack
    end, first = count * size, True
    for part in parts:
        _add_products(stack, part[:, :, :end].flatten(1, 2), first)
        if last.numel():
            rest = part[:, :, end : end + last.shape[1]].permute(1, 2, 0, 3).flatten(2)
            products = rest @ rest.mT
            last.copy_(products) if first else last.add_(products)
        first = False
        del part
    if stack.data_ptr() != blocks.data_ptr():
        blocks.copy_(stack.view_as(blocks))
