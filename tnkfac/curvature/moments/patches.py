"""Rows of an unfolded input, which is never formed as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.curvature.moments.algorithms import (
    Algorithm,
    block_algorithms,
    dense_algorithms,
    slabs_together,
)
from tnkfac.curvature.moments.blocks.lines import fill_from_lines
from tnkfac.curvature.moments.contraction import fill_from_network
from tnkfac.curvature.moments.lags.gather import fill_from_lags
from tnkfac.curvature.moments.matrices import to_matrix, to_weight
from tnkfac.curvature.moments.position_sums import (
    fused_squared_sums,
    sample_sums,
    sum_of_squares,
    sum_over_positions,
)
from tnkfac.curvature.moments.rows import Pixels, Rows, TracedRows
from tnkfac.curvature.moments.unfolding import Unfolding, tap_classes
from tnkfac.curvature.moments.windows import (
    CHUNK,
    chunks,
    fill_blocks_from_windows,
    fill_from_pixels,
    fill_from_windows,
    window_rows,
)


class Patches(Rows):
    """Windows of images ``[N, C, I1, ..]``: what a convolution multiplies with its weight."""

    def __init__(
        self, x: Tensor, dtype: torch.dtype, unfolding: Unfolding, sizes: Sequence[int]
    ) -> None:
        """Unfold with a geometry, to positions of these sizes."""
        super().__init__(x, dtype, unfolding.groups, unfolding.features, x.shape[0], prod(sizes))
        self.unfolding, self.sizes = unfolding, tuple(sizes)
        self.classes = tap_classes(unfolding, tuple(x.shape[2:]), self.sizes)

    def parts(self) -> Iterator[Tensor]:
        """Unfold a few samples at a time."""
        for chunk in chunks(self.x, self.classes):
            yield from window_rows(chunk, self.groups, self.classes)

    def sample_sums(self) -> Tensor:
        """Sums over boxes of pixels."""
        return sample_sums(self.x, self.classes).reshape(self.samples, self.groups, self.dim)

    def unfolded(self) -> Tensor:
        """The plain way, also where no tap meets a position."""
        return self.unfolding.unfolded(self.x, self.sizes)

    def squared_sums(self) -> Tensor:
        """One kernel of Triton's on CUDA."""
        fused = fused_squared_sums(self.raw, self.unfolding, self.sizes)
        return super().squared_sums() if fused is None else fused.view(self.groups, self.dim)

    def dense(self, out: Tensor) -> None:
        """The second moment, by the cheapest algorithm."""
        pixels = self.unfolding.single_pixels(self.x)
        if pixels is not None:
            shape = (self.samples, self.groups, self.dim, -1)
            fill_from_pixels(out, pixels.reshape(shape))
        else:
            best = dense_algorithms(self.unfolding, tuple(self.x.shape), self.sizes)[0]
            FILL[best.name](out, self)

    def diagonal(self) -> Tensor:
        """Sums of squared pixels over boxes."""
        return self._over_boxes(sum_of_squares(self.x))

    def total(self) -> Tensor:
        """Sums of pixels over boxes."""
        return self._over_boxes(self.x.sum(0))

    def _over_boxes(self, x: Tensor) -> Tensor:
        return sum_over_positions(x, self.classes).reshape(self.groups, self.dim)

    def blocks(self, blocks: Tensor, last: Tensor) -> None:
        """Unfold, form the whole matrix, or a small one for every block."""
        pixels = self.unfolding.single_pixels(self.x)
        if pixels is not None:
            Pixels(pixels, self.dtype, self.groups).blocks(blocks, last)
            return
        size = blocks.shape[2]
        shape = tuple(self.raw.shape)
        name = block_algorithms(self.unfolding, shape, self.sizes, size)[0].name
        if name == "im2col":
            if not fill_blocks_from_windows(blocks, last, self.x, self.classes):
                super().blocks(blocks, last)
        elif name == "slabs":
            self._by_slabs(blocks, last)
        elif name == "lines":
            fill_from_lines(blocks, last, self.x, self.classes)
        else:
            self._from_whole(blocks, last)

    def _from_whole(self, blocks: Tensor, last: Tensor) -> None:
        """Parts of the dense matrix."""
        whole = blocks.new_empty(self.groups, self.dim, self.dim)
        self.dense(whole)
        size, end = blocks.shape[2], blocks.shape[1] * blocks.shape[2]
        for index, first in enumerate(range(0, end, size)):
            blocks[:, index] = whole[:, first : first + size, first : first + size]
        last.copy_(whole[:, end:, end:])

    def _by_slabs(self, blocks: Tensor, last: Tensor) -> None:
        """The channels that blocks touch become groups, as many at once as memory bears."""
        slabs = self.unfolding.slabs(blocks.shape[2])
        step = slabs_together(self.unfolding, tuple(self.raw.shape), blocks.shape[2])
        for start in range(0, slabs.count, step):
            some = range(start, min(start + step, slabs.count))
            part = Patches(
                slabs.taken(self.x, self.groups, some),
                self.dtype,
                replace(
                    self.unfolding,
                    channels=self.groups * len(some) * slabs.width,
                    groups=self.groups * len(some),
                ),
                self.sizes,
            )
            moments = blocks.new_empty(part.groups, part.dim, part.dim)
            part.dense(moments)
            moments = moments.view(self.groups, len(some), part.dim, part.dim)
            for members, found in slabs.cut(moments, some):
                if members[0] < blocks.shape[1]:
                    blocks[:, members.start : members.stop : members.step] = found
                else:
                    last.copy_(found[:, 0])

    def times(self, V: Tensor) -> Tensor:
        """Convolve with ``V`` as weight, then take the weight gradient, a few samples at a time."""
        unfolding, x, count = self.unfolding, self.x, V.shape[2]
        if not count or not self.samples:
            return torch.zeros_like(V)
        transposed = unfolding.transposed
        weight = to_weight(V.mT, unfolding.kernel_size, transposed)
        pads = list(unfolding.padding)
        if any(left != right for left, right in pads):
            x = F.pad(x, [p for pair in reversed(pads) for p in pair])
            pads = [(0, 0)] * unfolding.dims
        hyper = (
            unfolding.stride,
            [left for left, _ in pads],
            unfolding.dilation,
            transposed,
            unfolding.extra(x.shape[2:], self.sizes),
            self.groups,
        )
        product = torch.zeros_like(weight)
        each = max(1, count * self.groups * self.positions, x[:1].numel())
        mask = (False, True, False)
        for part in torch.split(x, max(1, CHUNK // each)):
            y = torch.ops.aten.convolution(part, weight, None, *hyper)
            grads = torch.ops.aten.convolution_backward(y, part, weight, None, *hyper, mask)
            product += grads[1]
        return to_matrix(product, self.groups, transposed).mT

    def columns(self, first: int, last: int) -> Tensor:
        """The product with columns of the identity."""
        eye = torch.eye(self.dim, dtype=self.dtype, device=self.raw.device)
        selected = torch.cat([eye[:, :first], eye[:, self.dim - last :]], 1)
        return self.times(selected.expand(self.groups, -1, -1))

    def algorithms(self, width: int) -> tuple[Algorithm, ...]:
        """Sums over boxes for the diagonal; else what the cost model knows."""
        shape = tuple(self.raw.shape)
        if width == 1:
            numbers = self.raw.numel()
            held = numbers // max(1, self.samples)
            return (Algorithm("box sums", 2 * numbers, held, 0.5 * numbers),)
        if width != self.dim:
            return block_algorithms(self.unfolding, shape, self.sizes, width)
        return dense_algorithms(self.unfolding, shape, self.sizes)


class TracedPatches(TracedRows):
    """Windows of images for ``torch.compile``, unfolded only where that is asked for."""

    def __init__(self, x: Tensor, unfolding: Unfolding, sizes: Sequence[int]) -> None:
        """Unfold with a geometry, to positions of these sizes."""
        count = x.shape[0]
        Rows.__init__(
            self, x, x.dtype, unfolding.groups, unfolding.features, count, _product(sizes)
        )
        self._unfolding, self._sizes = unfolding, sizes

    def unfolded(self) -> Tensor:
        """All rows, ``[G, N, S, D]``."""
        return self._unfolding.unfolded(self.raw, self._sizes)

    def sample_sums(self) -> Tensor:
        """Products with binary matrices."""
        return self._unfolding.summed(self.raw, self._sizes).transpose(0, 1)

    def diagonal(self) -> Tensor:
        """Products of squares with binary matrices."""
        return self._unfolding.summed(self.raw.square(), self._sizes).sum(1)

    def total(self) -> Tensor:
        """Sum over samples."""
        return self.sample_sums().sum(0)


def _product(sizes: Sequence[int]) -> int:
    """Product of sizes that may be symbolic."""
    positions = 1
    for size in sizes:
        positions = positions * size
    return positions


def _by_windows(out: Tensor, rows: Patches) -> None:
    fill_from_windows(out, rows.x, rows.classes)


def _by_lags(out: Tensor, rows: Patches) -> None:
    fill_from_lags(out, rows.x, rows.classes)


def _by_network(out: Tensor, rows: Patches) -> None:
    fill_from_network(out, rows.unfolding, rows.x, rows.sizes)


FILL: dict[str, Callable[[Tensor, Patches], None]] = {
    "im2col": _by_windows,
    "view": _by_windows,
    "lags": _by_lags,
    "polyphase lags": _by_lags,
    "tap classes": _by_lags,
    "network": _by_network,
}
"""How to form a dense second moment, by the name of its cost in ``algorithms``."""
