"""Triton kernels that scale gradients; imported only where Triton is installed.

Layers are many and small, so a launch for each costs more than its work. Here one launch takes all
of them: gradients are found through a table of addresses. Their twins in torch are in
:mod:`tnkfac.optim.step.elementwise` and :mod:`tnkfac.optim.step.apply`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers that one program takes at a time."""
COLUMNS = 16
"""Numbers in a row of the table of gradients."""
_KINDS = {torch.float32: tl.float32, torch.float64: tl.float64}


def check(device: torch.device) -> None:
    """Raise an error unless the kernels scale a small problem as torch does."""
    X = torch.arange(1.0, 9.0, dtype=torch.float32, device="cpu").cos().add_(2)
    K, C, gradient = X[:5], X[5:8], torch.arange(12.0, device="cpu").sin().view(3, 4)
    G, K2, C2 = (part.to(device) for part in (gradient, K, C))
    columns, rows = (4, 1, 3, 5, 0, 1, 1), (3, 1, 0, 0)  # of 3 x 4 numbers, as of a linear layer
    row = G.data_ptr(), K2.data_ptr(), C2.data_ptr(), 0, 12, *columns, *rows
    table = torch.tensor([row], dtype=torch.int64, device=device)
    tiles = torch.zeros(1, 3, dtype=torch.int32, device=device)
    lengths = torch.ones(1, dtype=torch.int64, device=device)
    size = torch.full((1,), 2.0, dtype=torch.float64, device=device)
    expected = C.square().view(3, 1) * gradient * K[:4].square()
    expected *= 2 / torch.linalg.vector_norm(expected)
    sized = scaled(table, tiles, lengths, size, 12, torch.float32)
    torch.testing.assert_close(sized.cpu().view(3, 4), expected, rtol=1e-4, atol=1e-5)


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
    index = first + tl.arange(0, BLOCK)
    there = index < count
    c, quotient = index % n2, index // n2
    b, a = quotient % n1, quotient // n1
    group, a = a // per, a % per
    k = tl.load(K + group * k_group + a * ka + b * kb + c * kc, mask=there, other=0.0)
    o = tl.load(C + group * c_group + a * ca + b * cb + c * cc, mask=there, other=0.0)
    g = tl.load(G + index, mask=there, other=0.0)
    return (k * k) * (o * o) * g, tl.load(entry + 3) + index, there


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
    value, index, there = _scaled(table, row, first, KIND, BLOCK)
    if SIZED:
        layer = tl.load(tiles + 3 * tile + 2)
        size, total = tl.load(sizes + layer), tl.load(totals + layer)
        norm = tl.sqrt(tl.where(total == 0, 1.0, total))
        scale = tl.where(total == 0, 0.0, size / norm)
        value *= tl.where(size < 0, 1.0, scale).to(KIND)  # below zero: as it is
    tl.store(out + index, value, mask=there)


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
