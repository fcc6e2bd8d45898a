"""Gradients of layers with diagonal factors, scaled and brought to size by two launches in all.

A table tells Triton's kernel where each gradient and its factors lie. It is kept as long as they
lie there, and copied without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from tnkfac.curvature.triton_check import trusted
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.scaling import ElementwisePreconditioner
from tnkfac.optim.step import grafting
from tnkfac.optim.step.apply import Update

ScaledLayers = Sequence[tuple[CapturedLayer, ElementwisePreconditioner]]


class Lookup(NamedTuple):
    """How the numbers of a tensor find theirs of ``K [G, D]`` and ``C [G, C_out / G]``.

    In memory a tensor is ``[G * per, n1, n2]``. With ``[g, a, b, c]`` along it, that of ``K`` is at
    ``g k_group + a ka + b kb + c kc``, and that of ``C`` likewise.
    """

    n1: int
    n2: int
    per: int
    k_group: int
    ka: int
    kb: int
    kc: int
    c_group: int
    ca: int
    cb: int
    cc: int


@lru_cache(maxsize=4096)
def lookup(
    inputs_first: bool, shape: tuple[int, ...], stride: tuple[int, ...], groups: int, rows: int
) -> Lookup | None:
    """Lookup of a weight; None where it lies neither row by row nor with channels last.

    Args:
        inputs_first: Whether the first axis counts inputs.
        shape: Shape of the weight.
        stride: Its strides.
        groups: Channel groups ``G``.
        rows: Rows ``D`` of the input factor, with that of a bias.
    """
    first, second, taps = shape[0], shape[1], prod(shape[2:])
    last = not _lies(shape, stride, range(len(shape)))
    if last and not _lies(shape, stride, (0, *range(2, len(shape)), 1)):
        return None
    n1, n2 = (taps, second) if last else (second, taps)
    if inputs_first:
        inner = (1, 0) if last else (0, 1)
        outer = (0, 1) if last else (1, 0)
        return Lookup(n1, n2, first // groups, rows, taps, *inner, second, 0, *outer)
    inner = (1, taps) if last else (taps, 1)
    return Lookup(n1, n2, first // groups, rows, 0, *inner, first // groups, 1, 0, 0)


def _lies(shape: tuple[int, ...], stride: tuple[int, ...], order: Sequence[int]) -> bool:
    """Whether axes follow one another in memory in this order."""
    expected = 1
    for axis in reversed(order):
        if shape[axis] > 1 and stride[axis] != expected:
            return False
        expected *= shape[axis]
    return True


def _alike(gradient: Tensor, param: Tensor) -> bool:
    """Whether numbers lie in the same order; axes of one number do not matter."""
    pairs = zip(param.shape, gradient.stride(), param.stride(), strict=True)
    return all(size == 1 or a == b for size, a, b in pairs)


def triton_kernels(like: Tensor) -> ModuleType | None:
    """Triton's kernels, if there are any for factors like this; their scalars are in float32."""
    if not like.is_cuda or like.dtype != torch.float32:
        return None
    return trusted(_load, like.device)


def _load() -> ModuleType:
    from tnkfac.optim.step import triton_kernels as kernels

    return kernels


def suits(scaled: ScaledLayers) -> bool:
    """Whether kernels can take these layers, of one device and dtype, at once."""
    if not scaled or triton_kernels(scaled[0][1].K) is None:
        return False
    return all(
        _rule(layer, scaling)
        and layer.weight.numel() < 2**31
        and (not layer.group["grafting"] or grafting.number(layer.group) is not None)
        for layer, scaling in scaled
    )


def _rule(layer: CapturedLayer, scaling: ElementwisePreconditioner) -> Lookup | None:
    weight, rows = layer.weight, scaling.K.shape[1]
    first = layer.statistics.layer.inputs_first
    return lookup(first, tuple(weight.shape), weight.stride(), len(scaling.C), rows)


def sized_gradients(scaled: ScaledLayers) -> list[Update]:
    """Preconditioned gradients of weights, and of biases that have one, of the size they should.

    Args:
        scaled: Layers that suit, with their factors.
    """
    rows: list[tuple[int, ...]] = []
    owners: list[int] = []
    gradients: list[Tensor] = []  # alive until the kernel is queued
    numbers, sizes = 0, []
    for index, (layer, scaling) in enumerate(scaled):
        K, C = scaling.K, scaling.C
        before = numbers
        for param in layer.params():
            gradient = param.grad
            if gradient is None:
                continue
            rule = _rule(layer, scaling)
            address = K.data_ptr()
            if param is layer.bias:
                D, outputs = K.shape[1], C.shape[1]
                rule = Lookup(1, 1, outputs, D, 0, 0, 0, outputs, 1, 0, 0)
                address += (D - 1) * K.element_size()
            assert rule is not None
            if not _alike(gradient, param):
                gradient = torch.empty_like(param).copy_(gradient)
            gradients.append(gradient)
            place = gradient.data_ptr(), address, C.data_ptr(), numbers, gradient.numel()
            rows.append((*place, *rule))
            owners.append(index)
            numbers += gradient.numel()
        group = layer.group
        count, size = (
            (numbers - before) ** 0.5,
            grafting.number(group) if group["grafting"] else 0.0,
        )
        sizes.append(size * count if group["grafting"] else -1.0)
    device, dtype = gradients[0].device, gradients[0].dtype
    kernels = triton_kernels(scaled[0][1].K)
    assert kernels is not None
    tiles, lengths = _tiles(tuple(row[4] for row in rows), tuple(owners), kernels.BLOCK, device)
    sized = any(size >= 0 for size in sizes)
    targets = _sent(tuple(sizes), torch.float64, device) if sized else None
    table = _sent(tuple(rows), torch.int64, device)
    out = kernels.scaled(table, tiles, lengths, targets, numbers, dtype)
    updates: list[Update] = []
    parts = iter(torch.split(out, [row[4] for row in rows]))
    for layer, _ in scaled:
        weight = next(parts).as_strided(layer.weight.shape, layer.weight.stride())
        pairs = [(layer.weight, weight)]
        if layer.bias is not None and layer.bias.grad is not None:
            pairs.append((layer.bias, next(parts)))
        updates.append(Update(layer, pairs))
    return updates


@lru_cache(maxsize=64)
def _tiles(
    counts: tuple[int, ...], owners: tuple[int, ...], block: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row, first number and layer of every tile; and how many tiles each layer has."""
    lengths = [0] * (owners[-1] + 1)
    tiles: list[tuple[int, ...]] = []
    for row, (count, owner) in enumerate(zip(counts, owners, strict=True)):
        tiles += [(row, first, owner) for first in range(0, count, block)]
        lengths[owner] += -(-count // block)
    return _sent(tuple(tiles), torch.int32, device), _sent(tuple(lengths), torch.int64, device)


@lru_cache(maxsize=256)
def _sent(
    numbers: tuple[float, ...] | tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Numbers on the device; copied from pinned memory, which the host does not wait for."""
    pinned = device.type == "cuda"
    on_host = torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=pinned)
    return on_host.to(device, non_blocking=True)
