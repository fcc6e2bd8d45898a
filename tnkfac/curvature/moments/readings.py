"""Reading a Gram matrix along its routes: all features but the bias."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tnkfac.curvature.layers import Layer
from tnkfac.curvature.moments import unfold
from tnkfac.curvature.moments.algorithms import block_routes, expand_routes
from tnkfac.curvature.moments.contraction import fill_planned_gram
from tnkfac.curvature.moments.lags.gather import fill_correlation_gram
from tnkfac.curvature.moments.position_sums import sum_of_squares, sum_over_positions
from tnkfac.curvature.moments.syrk import fill_gram
from tnkfac.curvature.moments.tap_classes import TapClasses, one_tap, tap_classes
from tnkfac.curvature.moments.windows import (
    CHUNK,
    chunks,
    fill_pixels_gram,
    fill_windows_gram,
    window_rows,
)

if TYPE_CHECKING:
    from tnkfac.curvature.moments.second_moment import Gram


def fill_dense(gram: Gram, out: Tensor) -> None:
    """Fill ``out [G, D, D]`` with the Gram matrix."""
    x, layer = gram.tensor, gram.layer
    if gram.approx == "reduce":
        fill_gram(out, _sums(gram).transpose(1, 2), gram.scale * _weight(gram) ** 2)
    elif layer.kind == "linear":
        fill_gram(out, x.flatten(0, 1).T.unsqueeze(0), gram.scale)
    elif not gram.is_input:
        fill_pixels_gram(out, x, gram.scale)
    elif layer.kind == "conv" and _is_pointwise(layer):
        steps = (slice(None), slice(None), *(slice(None, None, s) for s in layer.stride))
        fill_pixels_gram(out, x[steps], gram.scale)
    else:
        sizes = _output_size(gram)
        route = expand_routes(layer, tuple(x.shape), sizes)[0].name
        if route == "network":
            fill_planned_gram(out, layer, x, sizes, gram.scale)
            return
        fill = fill_windows_gram if route in ("im2col", "view") else fill_correlation_gram
        fill(out, x, _classes(gram), gram.scale)


def _is_pointwise(layer: Layer) -> bool:
    return set(layer.kernel_size) == {1} and not any(map(any, layer.padding))


def diagonal(gram: Gram) -> Tensor:
    """The diagonal ``[G, D]``."""
    x = gram.tensor
    if gram.approx == "reduce":
        return _sums(gram).square().sum(1) * (gram.scale * _weight(gram) ** 2)
    if gram.layer.kind == "linear":
        return sum_of_squares(x.flatten(0, 1)).unsqueeze(0) * gram.scale
    return _boxed(gram, sum_of_squares(x)) * gram.scale


def total(gram: Gram) -> Tensor:
    """Sum of all rows, ``[G, D]``."""
    x = gram.tensor
    if gram.approx == "reduce":
        return _sums(gram).sum(1) * (gram.scale * _weight(gram))
    if gram.layer.kind == "linear":
        return x.sum((0, 1)).unsqueeze(0) * gram.scale
    return _boxed(gram, x.sum(0)) * gram.scale


def fill_blocks(gram: Gram, blocks: Tensor, last: Tensor) -> None:
    """Fill the diagonal blocks ``[G, B, k, k]`` and the last one ``[G, r, r]``."""
    size, count = blocks.shape[2], blocks.shape[1]
    x, layer = gram.tensor, gram.layer
    if gram.approx == "reduce":
        rows = _sums(gram).transpose(1, 2) * _weight(gram)
        _add_blocks(blocks, last, rows, gram.scale, 0.0)
    elif layer.kind == "linear":
        _add_blocks(blocks, last, x.flatten(0, 1).T.unsqueeze(0), gram.scale, 0.0)
    elif gram.is_input and _in_slabs(gram, size):
        ends = [(b, b + size) for b in range(0, count * size, size)]
        for at, (first, end) in enumerate(ends):
            blocks[:, at] = _slab(gram, first, end)
        if last.shape[1]:
            last.copy_(_slab(gram, count * size, count * size + last.shape[1]))
    else:
        taps = _classes(gram) if gram.is_input else _one_tap(x)
        _unfold_blocks(gram, taps, blocks, last)


def rows(gram: Gram) -> Iterator[Tensor]:
    """Rows as columns ``[G, D, M]``, a bounded part of them at a time."""
    x, layer = gram.tensor, gram.layer
    scale = gram.scale**0.5
    if gram.approx == "reduce":
        parts: Iterable[Tensor] = [_sums(gram).transpose(1, 2)]
        scale *= _weight(gram)
    elif layer.kind == "linear":
        parts = torch.split(x.flatten(0, 1).T.unsqueeze(0), max(1, CHUNK // x.shape[2]), 2)
    else:
        classes = _classes(gram) if gram.is_input else _one_tap(x)
        groups = layer.groups
        parts = (part for some in chunks(x, classes) for part in window_rows(some, groups, classes))
    for part in parts:
        yield part if scale == 1 else part * scale


def _in_slabs(gram: Gram, size: int) -> bool:
    routes = block_routes(gram.layer, tuple(gram.tensor.shape), _output_size(gram), size)
    return routes[0].name == "slabs"


def _slab(gram: Gram, first: int, end: int) -> Tensor:
    """Rows and columns ``first`` to ``end``: the channels that they touch are a layer, too."""
    layer, x = gram.layer, gram.tensor
    taps = prod(layer.kernel_size)
    low, high = first // taps, -(-end // taps)
    part = x.reshape(x.shape[0], layer.groups, -1, *x.shape[2:])[:, :, low:high].flatten(1, 2)
    channels = (high - low) * layer.groups
    small = replace(gram, layer=replace(layer, in_channels=channels, bias=False), tensor=part)
    start = first - low * taps
    return small.dense()[:, start : start + end - first, start : start + end - first]


def _unfold_blocks(gram: Gram, classes: TapClasses, blocks: Tensor, last: Tensor) -> None:
    """Unfold a few samples at a time."""
    groups, x = gram.layer.groups, gram.tensor
    beta = 0.0
    for part in chunks(x, classes):
        for rows in window_rows(part, groups, classes):
            _add_blocks(blocks, last, rows, gram.scale, beta)
            beta = 1.0
    if beta == 0.0:
        blocks.zero_()
        last.zero_()


def _add_blocks(blocks: Tensor, last: Tensor, rows: Tensor, scale: float, beta: float) -> None:
    """Add the products of ``rows [G, D, M]`` within every block."""
    size = blocks.shape[2]
    end = blocks.shape[1] * size
    for out, part in (
        (blocks, rows[:, :end].reshape(len(rows), -1, size, rows.shape[2])),
        (last.unsqueeze(1), rows[:, None, end : end + last.shape[1]]),
    ):
        if out.numel():
            square = out.flatten(0, 1)  # a copy where a slice of several groups is not one stack
            part = part.flatten(0, 1)
            torch.baddbmm(square, part, part.mT, beta=beta, alpha=scale, out=square)
            if square.data_ptr() != out.data_ptr():
                out.copy_(square.view_as(out))


def _sums(gram: Gram) -> Tensor:
    """Sum over positions, ``[G, N, D]``."""
    x, layer = gram.tensor, gram.layer
    if layer.kind == "linear":
        return (x[:, 0] if x.shape[1] == 1 else x.sum(1)).unsqueeze(0)
    sums = _boxed_rows(gram, x.flatten(0, 1))
    return sums.reshape(x.shape[0], layer.groups, -1).transpose(0, 1)


def _weight(gram: Gram) -> float:
    return 1 / gram.positions if gram.is_input else 1.0


def _boxed(gram: Gram, x: Tensor) -> Tensor:
    """Sum ``x [C, I1, ..]`` over all positions, ``[G, D]``."""
    return _boxed_rows(gram, x).reshape(gram.layer.groups, -1)


def _boxed_rows(gram: Gram, x: Tensor) -> Tensor:
    return (
        sum_over_positions(x, _classes(gram))
        if gram.is_input
        else x.flatten(1).sum(1, keepdim=True)
    )


def _classes(gram: Gram) -> TapClasses:
    return tap_classes(gram.layer, tuple(gram.tensor.shape[2:]), _output_size(gram))


def _output_size(gram: Gram) -> tuple[int, ...]:
    return tuple(unfold.output_size(gram.layer, gram.tensor.shape, gram.output_size))


def _one_tap(x: Tensor) -> TapClasses:
    return one_tap(tuple(x.shape[2:]))
