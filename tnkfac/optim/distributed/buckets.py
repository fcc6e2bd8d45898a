"""Messages between processes: tensors end to end, symmetric ones as triangles, in buckets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

BUCKET = 25 * 2**20
"""Bytes that are sent in one message."""


def buckets(entries: Sequence[tuple[Tensor, bool]]) -> Iterator[list[int]]:
    """Places of entries that are sent together: neighbours of one device and dtype."""
    bucket: list[int] = []
    kind, room = None, 0
    for place, (tensor, symmetric) in enumerate(entries):
        nbytes = size(tensor, symmetric) * tensor.element_size()
        if bucket and (kind != (tensor.device, tensor.dtype) or nbytes > room):
            yield bucket
            bucket = []
        if not bucket:
            kind, room = (tensor.device, tensor.dtype), BUCKET
        bucket.append(place)
        room -= nbytes
    if bucket:
        yield bucket


def size(tensor: Tensor, symmetric: bool) -> int:
    """Numbers that are sent: of symmetric matrices, upper triangles."""
    if not symmetric:
        return tensor.numel()
    rows = tensor.shape[-1]
    return tensor.numel() // (rows * rows) * (rows * (rows + 1) // 2)


def packed(tensor: Tensor, symmetric: bool) -> Tensor:
    """A tensor as the vector that is sent."""
    if not symmetric:
        return tensor.reshape(-1)
    upper, _ = _triangle(tensor.shape[-1], tensor.device)
    return tensor.reshape(-1, tensor.shape[-1] ** 2).index_select(1, upper).view(-1)


def unpacked(flat: Tensor, like: Tensor, symmetric: bool) -> Tensor:
    """The tensor of which such a vector was sent, in the shape of another one."""
    if not symmetric:
        return flat.view(like.shape)
    _, back = _triangle(like.shape[-1], like.device)
    triangle = like.shape[-1] * (like.shape[-1] + 1) // 2
    return flat.view(-1, triangle).index_select(1, back).view(like.shape)


@lru_cache(maxsize=64)
def _triangle(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the upper triangle lies in a matrix, and where an entry of that lies in the former."""
    i, j = torch.triu_indices(rows, rows, device="cpu")
    back = torch.empty(rows, rows, dtype=torch.int64, device="cpu")
    back[i, j] = back[j, i] = torch.arange(len(i), device="cpu")
    return (i * rows + j).to(device), back.view(-1).to(device)
