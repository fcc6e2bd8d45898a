"""Triton kernels of a step with diagonal factors; imported only where Triton is installed.

Layers are many and small, so a launch for each costs more than its work. Here one launch takes all
of them: factors lie end to end, and gradients are found through a table of addresses. Their twins
in torch are in :mod:`tnkfac.optim.diagonals`, and in ``scaling`` and ``multi`` beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from tnkfac.optim.diagonals import Rule, Segments

BLOCK = 1024
"""Numbers that one program takes at a time."""
COLUMNS = 16
"""Numbers in a row of the table of gradients."""
_KINDS = {torch.float32: tl.float32, torch.float64: tl.float64}


def check(device: torch.device) -> None:
    """Raise an error unless the kernels update and scale a small problem as torch does."""
    from tnkfac.optim import diagonals, fused

    shapes = ((1, 5, 3), (1, 4, 2))
    X = torch.arange(1.0, 15.0, dtype=torch.float32, device="cpu").cos().add_(2)
    F, moving = X.sin().square(), X.cos()
    rule = diagonals.Rule("own", 0.1, 0.5, 0.2, 0.25)
    at = diagonals._segments(shapes, X.device), diagonals._segments(shapes, device)
    new = diagonals._updated(X, moving, F, None, at[0], rule)
    found = updated(X.to(device), moving.to(device), F.to(device), None, at[1], rule, None)
    for one, other in zip(found, new, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)
    K, C, gradient = X[:5], X[5:8], F[:12].view(3, 4)
    G, K2, C2 = (part.to(device) for part in (gradient, K, C))
    where = fused.lookup(False, (3, 4), (4, 1), 1, 5)
    assert where is not None
    row = G.data_ptr(), K2.data_ptr(), C2.data_ptr(), 0, 12, *where
    table = torch.tensor([row], dtype=torch.int64, device=device)
    tiles, lengths = fused._tiles((12,), (0,), BLOCK, device)
    size = torch.full((1,), 2.0, dtype=torch.float64, device=device)
    expected = C.square().view(3, 1) * gradient * K[:4].square()
    expected *= 2 / torch.linalg.vector_norm(expected)
    sized = scaled(table, tiles, lengths, size, 12, torch.float32)
    torch.testing.assert_close(sized.cpu().view(3, 4), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- factors


@triton.jit  # type: ignore[untyped-decorator]
def _means(  # type: ignore[no-untyped-def]
    X, F, weights, starts, lengths, found, bad, layers, S,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means of ``F``, ``X X F`` and ``X X`` of a segment; no layer is bad yet."""
    s = tl.program_id(0)
    start, length = tl.load(starts + s), tl.load(lengths + s)
    lane = tl.arange(0, BLOCK)
    one = tl.zeros((BLOCK,), X.dtype.element_ty)
    both, square = one, one
    for first in range(0, length, BLOCK):
        there = first + lane < length
        x = tl.load(X + start + first + lane, mask=there, other=0.0)
        f = tl.load(F + start + first + lane, mask=there, other=0.0)
        one += f
        both += x * x * f
        square += x * x
    count = length.to(X.dtype.element_ty)
    weight = tl.load(weights + s) if WEIGHTED else 1.0
    tl.store(found + s, tl.sum(one, 0) / count * weight)
    tl.store(found + S + s, tl.sum(both, 0) / count * weight)
    tl.store(found + 2 * S + s, tl.sum(square, 0) / count)
    tl.store(bad + tl.load(layers + s), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _step_of(  # type: ignore[no-untyped-def]
    X, F, M, at, there, weight, both, square, alpha, MOMENTUM: tl.constexpr
):  # fmt: skip
    """Numbers of a segment, and what they are to be multiplied with."""
    x = tl.load(X + at, mask=there, other=0.0)
    f = tl.load(F + at, mask=there, other=0.0) * weight
    step = (x * x * f * both + x * x * square - 1.0) * 0.5
    if MOMENTUM:
        step += alpha * tl.load(M + at, mask=there, other=0.0)
    return x, tl.where(there, step, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _updates(  # type: ignore[no-untyped-def]
    X, F, M, weights, starts, lengths, partners, layers, found, bad, new, S, total,
    damping, alpha, rate, most,
    WEIGHTED: tl.constexpr, UNIT: tl.constexpr, RELATIVE: tl.constexpr, MOMENTUM: tl.constexpr,
    BOUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``new``: a segment after its update, and behind all of them its momentum."""
    s = tl.program_id(0)
    start, length, partner = tl.load(starts + s), tl.load(lengths + s), tl.load(partners + s)
    mean, other = tl.load(found + s), tl.load(found + partner)
    mean = tl.where(mean == 0, 1.0, mean)  # factors of zeros stay what they are
    other = tl.where(other == 0, 1.0, other)
    weight = tl.load(weights + s) if WEIGHTED else 1.0
    both, square = tl.load(found + S + partner), tl.load(found + 2 * S + partner) * damping
    if UNIT:
        weight, both = weight / mean, both / other
    if RELATIVE:
        square = square * mean * other
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), X.dtype.element_ty)
    if BOUNDED:
        for first in range(0, length, BLOCK):
            at, there = start + first + lane, first + lane < length
            x, step = _step_of(X, F, M, at, there, weight, both, square, alpha, MOMENTUM)
            largest = tl.maximum(largest, tl.abs(step))
        top = tl.max(largest, 0)
        rate = tl.where(top * rate > most, most / top, rate)
    lost = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, length, BLOCK):
        at, there = start + first + lane, first + lane < length
        x, step = _step_of(X, F, M, at, there, weight, both, square, alpha, MOMENTUM)
        value = x - x * step * rate
        fine = (tl.abs(value) < float("inf")) & (tl.abs(step) < float("inf"))
        lost += tl.where(fine, 0, 1)
        tl.store(new + at, value, mask=there)
        if MOMENTUM:
            tl.store(new + total + at, step, mask=there)
    count = tl.sum(lost, 0)
    tl.atomic_max(bad + tl.load(layers + s), count, mask=count > 0)


@triton.jit  # type: ignore[untyped-decorator]
def _keep_old(  # type: ignore[no-untyped-def]
    X, M, starts, lengths, layers, bad, keep, new, total,
    KEPT: tl.constexpr, MOMENTUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put back what was, in layers where a number is not finite, or if the batch is skipped."""
    s = tl.program_id(0)
    start, length = tl.load(starts + s), tl.load(lengths + s)
    lost = tl.load(bad + tl.load(layers + s))
    if KEPT:
        lost = tl.where(tl.load(keep) > 0, lost, 1)
    if lost > 0:
        lane = tl.arange(0, BLOCK)
        for first in range(0, length, BLOCK):
            at, there = start + first + lane, first + lane < length
            tl.store(new + at, tl.load(X + at, mask=there), mask=there)
            if MOMENTUM:
                tl.store(new + total + at, tl.load(M + at, mask=there), mask=there)


def updated(
    X: Tensor,
    momentum: Tensor | None,
    factors: Tensor,
    weights: Tensor | None,
    at: Segments,
    rule: Rule,
    keep: Tensor | None,
) -> list[Tensor]:
    """``K`` and ``C`` of all layers after an update, and their momenta.

    Args:
        X: All ``K`` and ``C`` end to end.
        momentum: Their momenta, or None.
        factors: All ``A`` and ``B`` end to end.
        weights: What the factors of each segment are multiplied with, or None for one.
        at: Where the segments lie.
        rule: Damping and step sizes.
        keep: Scalar that is zero where the batch is to be skipped, or None.
    """
    S, total = len(at.lengths), len(X)
    block = min(BLOCK, triton.next_power_of_2(at.longest))
    found = X.new_empty(3, S)
    bad = torch.empty(S, dtype=torch.int32, device=X.device)
    new = X.new_empty((1 if momentum is None else 2) * total)
    M, own = X if momentum is None else momentum, X if weights is None else weights
    moving, weighted = momentum is not None, weights is not None
    with torch.cuda.device_of(X):  # type: ignore[no-untyped-call]  # where Triton launches
        _means[(S,)](
            X, factors, own, at.starts, at.lengths, found, bad, at.layer, S,
            WEIGHTED=weighted, BLOCK=block,
        )  # fmt: skip
        _updates[(S,)](
            X, factors, M, own, at.starts, at.lengths, at.partner, at.layer, found, bad, new, S,
            total, rule.damping, rule.alpha, rule.rate, rule.most,
            WEIGHTED=weighted, UNIT=rule.units == "own", RELATIVE=rule.units == "product",
            MOMENTUM=moving, BOUNDED=rule.most > 0, BLOCK=block,
        )  # fmt: skip
        _keep_old[(S,)](
            X, M, at.starts, at.lengths, at.layer, bad, X if keep is None else keep, new, total,
            KEPT=keep is not None, MOMENTUM=moving, BLOCK=block,
        )  # fmt: skip
    return [new] if momentum is None else [new[:total], new[total:]]


# ---------------------------------------------------------------- gradients


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(table, row, first, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``K K C C G`` for some numbers of one gradient; where they lie; which there are."""
    entry = table + row * 16
    G = tl.load(entry).to(tl.pointer_type(KIND))
    K = tl.load(entry + 1).to(tl.pointer_type(KIND))
    C = tl.load(entry + 2).to(tl.pointer_type(KIND))
    count = tl.load(entry + 4).to(tl.int32)
    n1, n2 = tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32)
    per, k_group = tl.load(entry + 7).to(tl.int32), tl.load(entry + 8).to(tl.int32)
    ka, kb = tl.load(entry + 9).to(tl.int32), tl.load(entry + 10).to(tl.int32)
    kc, c_group = tl.load(entry + 11).to(tl.int32), tl.load(entry + 12).to(tl.int32)
    ca, cb = tl.load(entry + 13).to(tl.int32), tl.load(entry + 14).to(tl.int32)
    cc = tl.load(entry + 15).to(tl.int32)
    at = first + tl.arange(0, BLOCK)
    there = at < count
    c, rest = at % n2, at // n2
    b, a = rest % n1, rest // n1
    group, a = a // per, a % per
    k = tl.load(K + group * k_group + a * ka + b * kb + c * kc, mask=there, other=0.0)
    o = tl.load(C + group * c_group + a * ca + b * cb + c * cc, mask=there, other=0.0)
    g = tl.load(G + at, mask=there, other=0.0)
    return (k * k) * (o * o) * g, tl.load(entry + 3) + at, there


@triton.jit  # type: ignore[untyped-decorator]
def _squares(table, tiles, sums, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of squares of a tile of scaled gradients, in float64."""
    tile = tl.program_id(0)
    row, first = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1)
    value, _, _ = _scaled(table, row, first, KIND, BLOCK)
    value = value.to(tl.float64)
    tl.store(sums + tile, tl.sum(value * value, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _to_size(  # type: ignore[no-untyped-def]
    table, tiles, totals, sizes, out, SIZED: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write a tile of scaled gradients, such that those of a layer have the norm they should."""
    tile = tl.program_id(0)
    row, first = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1)
    value, at, there = _scaled(table, row, first, KIND, BLOCK)
    if SIZED:
        layer = tl.load(tiles + 3 * tile + 2)
        size, total = tl.load(sizes + layer), tl.load(totals + layer)
        norm = tl.sqrt(tl.where(total == 0, 1.0, total))
        scale = tl.where(total == 0, 0.0, size / norm)
        value *= tl.where(size < 0, 1.0, scale).to(KIND)  # below zero: as it is
    tl.store(out + at, value, mask=there)


def scaled(
    table: Tensor,
    tiles: Tensor,
    lengths: Tensor,
    sizes: Tensor | None,
    numbers: int,
    dtype: torch.dtype,
) -> Tensor:
    """Scaled gradients end to end.

    Args:
        table: A row of :data:`COLUMNS` for every gradient: the addresses of it, of ``K`` and of
            ``C``; where it goes; its numbers; and how to find those of ``K`` and ``C``.
        tiles: ``[.., 3]``: row of the table, first number, and layer, in order of layers.
        lengths: Tiles of every layer.
        sizes: Norms that layers are given, below zero for none; None for none at all.
        numbers: Numbers of all gradients.
        dtype: Their dtype.
    """
    out = torch.empty(numbers, dtype=dtype, device=table.device)
    kind, count = _KINDS[dtype], len(tiles)
    totals = table
    with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]
        if sizes is not None:
            sums = torch.empty(count, dtype=torch.float64, device=table.device)
            _squares[(count,)](table, tiles, sums, KIND=kind, BLOCK=BLOCK)
            totals = torch.segment_reduce(sums, "sum", lengths=lengths, unsafe=True)
        _to_size[(count,)](
            table, tiles, totals, table if sizes is None else sizes, out,
            SIZED=sizes is not None, KIND=kind, BLOCK=BLOCK,
        )  # fmt: skip
    return out
