"""Triton kernel of the diagonal statistics of KFAC-reduce; imported only where Triton is installed.

Sums over positions, squares and the sum over the batch in one pass over the tensor, whatever the
order of its axes in memory. The sums are products with the binary matrix of which tap meets which
pixel, whose entries the kernel works out for itself.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnkfac.curvature.moments.unfolding import Unfolding

_PROGRAMS = 2048
"""Programs that keep a large device busy."""


@triton.jit  # type: ignore[untyped-decorator]
def _squares_of_sums(  # type: ignore[no-untyped-def]
    x, out, N, C, P, W, K, sn, sc, sp,
    k2, stride1, stride2, left1, left2, dilation1, dilation2, out1, out2,
    PER: tl.constexpr, KP: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    TAPS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """``out[b, c, k] = sum_n (sum_p seen[k, p] x[n, c, p])^2`` over the samples of block ``b``."""
    block, channel = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    tap, pixel = tl.arange(0, KP), tl.arange(0, BP)
    i, j = tap // k2, tap % k2
    there = channel < C
    total = tl.zeros((KP, BC), tl.float32)
    sample = x + block.to(tl.int64) * PER * sn
    for _ in range(min(PER, N - block * PER)):
        sums = tl.zeros((KP, BC), tl.float32)
        for first in range(0, P, BP):
            p = first + pixel
            pointers = sample + p[:, None] * sp + channel[None, :] * sc
            values = tl.load(pointers, mask=(p < P)[:, None] & there[None, :], other=0.0)
            if TAPS:
                h, w = p // W, p % W
                if TRANSPOSED:
                    a = h[None, :] * stride1 + (i * dilation1 - left1)[:, None]
                    b = w[None, :] * stride2 + (j * dilation2 - left2)[:, None]
                    seen = (a >= 0) & (a < out1) & (b >= 0) & (b < out2)
                else:
                    a = h[None, :] + (left1 - i * dilation1)[:, None]
                    b = w[None, :] + (left2 - j * dilation2)[:, None]
                    seen = (a >= 0) & (a % stride1 == 0) & (a // stride1 < out1)
                    seen = seen & (b >= 0) & (b % stride2 == 0) & (b // stride2 < out2)
                sums = tl.dot(seen.to(values.dtype), values, sums, input_precision="ieee")
            else:
                sums += tl.sum(values.to(tl.float32), 0)[None, :]
        total += sums * sums
        sample += sn
    to = out + (block * C + channel[None, :]) * K + tap[:, None]
    tl.store(to, total, mask=(tap < K)[:, None] & there[None, :])


def check(device: torch.device) -> None:
    """Raise an error unless the kernel sums a small problem as torch does."""
    unfolding = Unfolding(3, 1, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1))
    x = torch.arange(2 * 3 * 7 * 6, dtype=torch.float64, device="cpu").sin().reshape(2, 3, 7, 6)
    sums = unfolding.summed(x, (4, 3))[0], x[:, :2].sum((2, 3))
    x = x.to(device, torch.float32)
    by_kernel = squared_sums(x, unfolding, (4, 3)), squared_sums(x[:, :2])
    for squares, expected in zip(by_kernel, sums, strict=True):
        assert squares is not None
        expected = expected.square().sum(0).view(squares.shape)
        torch.testing.assert_close(squares.cpu().double(), expected, rtol=1e-4, atol=1e-4)


def usable(tensor: Tensor) -> bool:
    """Whether the kernel can read images."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    even = all(
        tensor.stride(axis) == tensor.stride(axis + 1) * tensor.shape[axis + 1]
        for axis in range(2, tensor.ndim - 1)
    )  # then all pixels are equally spaced
    return tensor.is_cuda and tensor.dtype in kinds and even


def squared_sums(
    x: Tensor, unfolding: Unfolding | None = None, sizes: tuple[int, ...] = ()
) -> Tensor | None:
    """``sum_n (sum_p u_np)^2`` over what every tap meets, ``[C, K]`` in float32, if it can be had.

    Args:
        x: ``[N, C, I1, ..]``.
        unfolding: Which pixels are met; None for every pixel once.
        sizes: Spatial shape of the output.
    """
    taps = 1 if unfolding is None else prod(unfolding.kernel_size)
    if unfolding is not None and (unfolding.dims > 2 or taps > 128):
        return None
    count, channels, *pixels = x.shape
    sn, sc, sp = x.stride(0), x.stride(1), x.stride(-1)
    channel_block = 16 if sp == 1 else 64
    pixel_block = 128 if sp == 1 else 32
    columns = triton.cdiv(channels, channel_block)
    per = max(1, triton.cdiv(count * columns, _PROGRAMS))
    blocks = triton.cdiv(count, per)
    out = torch.empty(blocks, channels, taps, device=x.device)
    every_pixel = unfolding is None or (unfolding.is_pointwise and set(unfolding.stride) == {1})
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # where Triton launches
        _squares_of_sums[(blocks, columns)](
            x, out, count, channels, prod(pixels), pixels[-1], taps, sn, sc, sp,
            *_geometry(None if every_pixel else unfolding, sizes),
            PER=per, KP=max(16, triton.next_power_of_2(taps)), BC=channel_block, BP=pixel_block,
            TAPS=not every_pixel, TRANSPOSED=unfolding is not None and unfolding.transposed,
        )  # fmt: skip
    return out[0] if blocks == 1 else out.sum(0)


def _geometry(unfolding: Unfolding | None, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Second number of taps, strides, paddings, dilations and sizes, of two axes in any case."""
    if unfolding is None:
        return (1, 1, 1, 0, 0, 1, 1, 1, 1)
    left = tuple(before for before, _ in unfolding.padding)
    lead = () if unfolding.dims == 2 else (1,)
    none = () if unfolding.dims == 2 else (0,)
    stride, dilation = (*lead, *unfolding.stride), (*lead, *unfolding.dilation)
    return (unfolding.kernel_size[-1], *stride, *none, *left, *dilation, *lead, *sizes)
