"""Second moments of unfolded inputs without unfolding: lags and borders.

The entry of taps ``k`` and ``l`` of a matrix is ``sum_o x[s o + a_k] x[s o + a_l]``, and over
*all* positions ``o``, also those beyond the output, it depends on the lag ``a_l - a_k`` only. So

- all lags of all channel pairs are correlated once: for stride one, a weight gradient of the
  convolution of ``x`` with itself; with a stride, that of its phases (every ``s``-th pixel);
- the few positions that do not exist are taken away. Along one axis they meet few pixels, which
  become channels, and along the other axes there are lags again. Positions that do not exist along
  several axes are added back: the sum runs over all subsets of axes, with alternating signs;
- every pair of taps looks its value up.

For a 3x3 kernel these are 25 lags, half of them by symmetry, in place of 81 pairs of taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from tnkfac.curvature.moments.lags.autocorrelation import correlate
from tnkfac.curvature.moments.lags.borders import Border, Lags, TapPairs, axis_lags, tap_pairs
from tnkfac.curvature.moments.tap_classes import TapClasses

TABLE = 2**18
"""Most numbers of the table that entries of the matrix are looked up in at one time."""


def fill_from_lags(out: Tensor, x: Tensor, classes: TapClasses) -> None:
    """Fill ``out`` with the second moment of all windows.

    Args:
        out: ``[G, D, D]``, overwritten; ``D = C / G * K1 * ..``.
        x: ``[N, C, I1, ..]``.
        classes: Classes of taps per axis; of a convolution one, of a transposed one several.
    """
    groups, channels = out.shape[0], x.shape[1] // out.shape[0]
    lags = [axis_lags(axis) for axis in classes]
    tables = [
        _Table(x, groups, [tap_pairs(t, n) for t, n in zip(taps, lags, strict=True)], lags)
        for taps in product(*classes)
    ]
    corr = correlate(x, groups, lags).flatten(2)
    index = _lookup(classes, tuple(lags), channels, x.device)
    width = channels * sum(table.width for table in tables) + 1
    rows = corr.shape[0]
    chunk = max(1, TABLE // width)
    taps = out.shape[1] // channels
    target = out.view(rows, -1) if out.is_contiguous() else None
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        parts = [table.values(corr, first, last) for table in tables]
        if len(parts) > 1:  # taps of different classes never meet: their entries are a zero
            parts.append(x.new_zeros(last - first, 1))
        numbers = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if target is not None:
            torch.index_select(numbers, 1, index, out=target[first:last])
            continue
        picked = numbers.index_select(1, index).view((last - first), taps, -1)
        for row in range(first, last):
            group, channel = divmod(row, channels)
            out[group, channel * taps : (channel + 1) * taps] = picked[row - first]


class _Table:
    """Values of all entries of one class of taps, for some rows at a time."""

    def __init__(self, x: Tensor, groups: int, pairs: list[TapPairs], lags: list[Lags]) -> None:
        self._pairs = pairs
        self.width = prod(len(p.lags) for p in pairs)
        self._sizes = [len(p.lags) for p in pairs]
        counts = tuple(n.count for n in lags)
        self._lags = _flat(tuple(p.lags for p in pairs), counts, x.device)
        self._corrections: list[tuple[list[int], Tensor, Tensor]] = []
        for axes in product((False, True), repeat=len(pairs)):
            if any(axes) and all(p.borders for p, on in zip(pairs, axes, strict=True) if on):
                inner = [a for a, on in enumerate(axes) if on]
                values = _corrections(x, groups, pairs, lags, inner)
                values = values if len(inner) % 2 == 0 else values.neg_()
                sizes = tuple(values.shape[2:])
                index = tuple(
                    range(n) if on else p.lags for p, on, n in zip(pairs, axes, sizes, strict=True)
                )
                flat = _flat(index, sizes, x.device)
                self._corrections.append((inner, values.flatten(2), flat))

    def values(self, corr: Tensor, first: int, last: int) -> Tensor:
        """Values for rows ``first`` to ``last``, ``[rows, C / G * width]``."""
        channels = corr.shape[1]
        lags = corr[first:last].flatten(0, 1).index_select(1, self._lags)
        values = lags.view(last - first, channels, *self._sizes)
        for inner, correction, flat in self._corrections:
            part = values
            for a in inner:
                active = self._pairs[a].active
                part = part.narrow(2 + a, active, self._sizes[a] - active)
            picked = correction[first:last].flatten(0, 1).index_select(1, flat)
            part.add_(picked.view(part.shape))
        return values.flatten(1)


@lru_cache(maxsize=1024)
def _flat(
    index: tuple[Sequence[int], ...], counts: tuple[int, ...], device: torch.device
) -> Tensor:
    """Indices into flattened axes of all combinations of indices per axis."""
    flat = torch.zeros((), dtype=torch.int64, device="cpu")
    for picked, count in zip(index, counts, strict=True):
        flat = flat[..., None] * count + torch.tensor(list(picked), device="cpu")
    return flat.flatten().to(device)


def _corrections(
    x: Tensor, groups: int, pairs: list[TapPairs], lags: list[Lags], inner: list[int]
) -> Tensor:
    """Products over positions that exist along none of the axes ``inner``.

    Returns:
        ``[C, C / G, ..]`` with one axis per spatial axis: the active entries of those in ``inner``,
        all lags of the others.
    """
    total: Tensor | None = None
    for borders in product(*(pairs[a].borders for a in inner)):
        part = _at_borders(x, groups, pairs, lags, dict(zip(inner, borders, strict=True)))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _at_borders(
    x: Tensor, groups: int, pairs: list[TapPairs], lags: list[Lags], borders: dict[int, Border]
) -> Tensor:
    """Correlations of the pixels at one side of each of the axes."""
    dims = len(pairs)
    for a, border in borders.items():
        x = x.narrow(2 + a, border.first, border.pixels)
    outer = [a for a in range(dims) if a not in borders]
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    x = x.permute(0, 1, *(3 + a for a in borders), 2, *(3 + a for a in outer))
    pixels = [border.pixels for border in borders.values()]
    corr = correlate(x.flatten(1, 2 + len(pixels)), groups, [lags[a] for a in outer])
    # [G, p1, .., C / G, q1, .., C / G, lags..]: pixels in front are slices, which add up fast.
    corr = corr.view(groups, *pixels, x.shape[2 + len(pixels)], *pixels, -1, *corr.shape[2:])
    count = len(borders)
    for done, (a, border) in enumerate(borders.items()):
        shape = corr.select(1 + done, 0).select(1 + count, 0).shape
        summed = corr.new_zeros(len(pairs[a].lags) - pairs[a].active, *shape)
        for entry, p, q in border.parts:
            summed[entry] += corr.select(1 + done, p).select(1 + count, q)
        corr = summed
        del summed
    place = {a: count - 1 - i for i, a in enumerate(borders)}  # the last entries are in front
    place |= {a: count + 3 + i for i, a in enumerate(outer)}
    corr = corr.permute(count, count + 1, count + 2, *(place[a] for a in range(dims)))
    return corr.flatten(0, 1).contiguous()


@lru_cache(maxsize=512)
def _lookup(
    classes: TapClasses, lags: tuple[Lags, ...], channels: int, device: torch.device
) -> Tensor:
    """Where in a row of all tables, the last number being zero, the entries of the matrix are.

    Returns:
        ``[K * C / G * K]``: for one channel, first tap, second channel, second tap.
    """
    kernel = [sum(taps.count for taps in axis) for axis in classes]
    dims = len(kernel)
    # Second channel, first and second tap.
    index = torch.full((channels, *kernel, *kernel), -1, device="cpu")
    start = 0
    for taps in product(*classes):
        pairs = [tap_pairs(t, n) for t, n in zip(taps, lags, strict=True)]
        width = prod(len(p.lags) for p in pairs)
        flat = torch.zeros((), dtype=torch.int64, device="cpu")
        for p in pairs:
            entries = torch.tensor(p.entries, device="cpu")
            flat = flat[..., None, None] * len(p.lags) + entries
        flat = flat.permute(*range(0, 2 * dims, 2), *range(1, 2 * dims, 2))
        slots = tuple(t.slots for t in taps)
        rows = start + width * torch.arange(channels, device="cpu").view(-1, *[1] * (2 * dims))
        place = (slice(None), *slots, *slots)
        index[place] = rows + flat
        start += channels * width
    index[index < 0] = start
    order = (*range(1, 1 + dims), 0, *range(1 + dims, 1 + 2 * dims))
    return index.permute(order).flatten().to(device)
