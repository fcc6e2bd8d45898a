"""How a convolution unfolds its input: the geometry, and the plain way to do it.

The plain way is a few torch calls, without plans or caches: it is what ``torch.compile`` traces,
and the twin that all algorithms are tested against. All sizes may be symbolic there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.curvature.moments.blocks.slabs import Slabs
from tnkfac.curvature.moments.tap_classes import (
    TapClass,
    TapClasses,
    convolution_taps,
    transposed_taps,
)
from tnkfac.einsum import Network
from tnkfac.einsum.geometry import Axis, conv_axes
from tnkfac.einsum.networks import input_rows, input_rows_transpose


@dataclass(frozen=True)
class Unfolding:
    """Which numbers of an input ``[N, C, I1, ..]`` a convolution multiplies with its weight.

    Attributes:
        channels: Input channels ``C``.
        groups: Channel groups ``G``.
        kernel_size: Taps per spatial dimension.
        stride: Stride per spatial dimension.
        padding: Zeros ``(left, right)`` per spatial dimension.
        dilation: Dilation per spatial dimension.
    """

    channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    transposed: ClassVar[bool] = False
    taps: ClassVar[Callable[..., tuple[TapClass, ...]]] = staticmethod(convolution_taps)

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel_size)

    @property
    def features(self) -> int:
        """Numbers that one position and group meets: ``C / G * K``."""
        return self.channels // self.groups * prod(self.kernel_size)

    @property
    def is_pointwise(self) -> bool:
        """Whether every position meets one pixel, and no padding."""
        return set(self.kernel_size) == {1} and not any(map(any, self.padding))

    def slabs(self, size: int) -> Slabs:
        """The channels that diagonal blocks of so many rows touch."""
        return Slabs(self.channels // self.groups, prod(self.kernel_size), size)

    def single_pixels(self, x: Tensor) -> Tensor | None:
        """The pixels of ``x`` that are met, where every position meets one; else None."""
        every = slice(None), slice(None), *(slice(None, None, stride) for stride in self.stride)
        return x[every] if self.is_pointwise else None

    def output_size(
        self, input_size: Sequence[int], given: tuple[int, ...] | None = None
    ) -> list[int]:
        """Spatial shape of the output.

        Args:
            input_size: Spatial shape of the input.
            given: That of an output that there is, where the input does not tell it.
        """
        axes = zip(input_size, self._reach, self.stride, self.padding, strict=True)
        return [(i + sum(pads) - reach) // s + 1 for i, reach, s, pads in axes]

    def extra(self, input_size: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Torch's ``output_padding`` for an output of these sizes."""
        return [0] * self.dims

    @property
    def _reach(self) -> list[int]:
        """Pixels from the first to the last tap."""
        return [d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]

    def axes(self, input_size: Sequence[int], output_size: Sequence[int]) -> tuple[Axis, ...]:
        """Axes of the convolution, or of the one that a transposed convolution transposes.

        Raises:
            ValueError: If the kernel does not fit into the padded input.
        """
        return conv_axes(input_size, self.kernel_size, self.stride, self.padding, self.dilation)

    def network(self, shape: Sequence[int], output_size: Sequence[int]) -> Network:
        """Network of the unfolded input: legs ``n g``, features ``ci k1 ..``, and the positions.

        Args:
            shape: Shape of the input.
            output_size: Spatial shape of the output.
        """
        return input_rows(shape[0], shape[1], self.groups, self.axes(shape[2:], output_size))

    def unfolded(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Everything that is multiplied with the weight, ``[G, N, S, D]``.

        Args:
            x: ``[N, C, I1, ..]``.
            sizes: Spatial shape of the output.
        """
        for a, reach in enumerate(self._reach):
            axis = 2 + 2 * a  # behind it stand the taps of the axes before
            if any(self.padding[a]):
                x = F.pad(x, [0, 0] * (x.ndim - 1 - axis) + [*self.padding[a]])
            x = _windows(x, axis, reach, self.stride[a], self.dilation[a], sizes[a])
        return self._in_order(x)

    def _in_order(self, x: Tensor) -> Tensor:
        """``[N, Kd, .., K1, C, O1, .., Od]`` to ``[G, N, S, C / G, K1, .., Kd]``, flattened."""
        dims = self.dims
        x = x.permute(0, dims + 1, *range(dims, 0, -1), *range(dims + 2, 2 * dims + 2))
        x = x.flatten(dims + 2).flatten(2, dims + 1)
        x = x.reshape(x.shape[0], self.groups, x.shape[1] // self.groups, x.shape[2], x.shape[3])
        return x.permute(1, 0, 4, 2, 3).flatten(3)

    def summed(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Sum of :meth:`unfolded` over positions, ``[G, N, D]``, without unfolding anything.

        Tap ``k`` sees pixel ``i`` in at most one position, so the sum is a product with one binary
        matrix per axis.
        """
        for a in range(self.dims):
            taps = self.dilation[a] * torch.arange(self.kernel_size[a], device=x.device)
            pixels = torch.arange(x.shape[2], device=x.device)  # the first axis not yet summed
            seen = self._seen(pixels, taps[:, None], a, sizes[a])
            x = torch.tensordot(x, seen.to(x.dtype), dims=([2], [1]))
        return x.reshape(x.shape[0], self.groups, -1).transpose(0, 1)

    def _seen(self, pixels: Tensor, taps: Tensor, a: int, size: int) -> Tensor:
        """Which taps see which pixels of an axis, ``[K, I]``."""
        place, stride = pixels + self.padding[a][0] - taps, self.stride[a]
        return (place >= 0) & (place % stride == 0) & (place // stride < size)


@dataclass(frozen=True)
class TransposedUnfolding(Unfolding):
    """Which numbers of an input a transposed convolution multiplies with its weight.

    Attributes:
        output_padding: Pixels that its output has more, per spatial dimension.
    """

    output_padding: tuple[int, ...]
    transposed: ClassVar[bool] = True
    taps: ClassVar[Callable[..., tuple[TapClass, ...]]] = staticmethod(transposed_taps)

    def output_size(
        self, input_size: Sequence[int], given: tuple[int, ...] | None = None
    ) -> list[int]:
        """Spatial shape of the output, which several may be for one input."""
        if given is not None:
            return list(given)
        reach, extra = self._reach, self.output_padding
        axes = zip(input_size, reach, self.stride, self.padding, extra, strict=True)
        return [(i - 1) * s - sum(pads) + r + e for i, r, s, pads, e in axes]

    def extra(self, input_size: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Pixels that these sizes are more than they have to be."""
        least = self.output_size(input_size)
        triples = zip(sizes, least, self.output_padding, strict=True)
        return [size - (usual - actual) for size, usual, actual in triples]

    def single_pixels(self, x: Tensor) -> Tensor | None:
        """All pixels; strides leave positions out."""
        return x if self.is_pointwise else None

    def axes(self, input_size: Sequence[int], output_size: Sequence[int]) -> tuple[Axis, ...]:
        """Axes of the convolution that it transposes: input and output change places."""
        hyper = zip(self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return tuple(
            Axis(large, k, s, left, right, d, positions=small)
            for small, large, (k, s, (left, right), d) in zip(
                input_size, output_size, hyper, strict=True
            )
        )

    def network(self, shape: Sequence[int], output_size: Sequence[int]) -> Network:
        """Network of the unfolded input."""
        axes = self.axes(shape[2:], output_size)
        return input_rows_transpose(shape[0], shape[1], self.groups, axes)

    def unfolded(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """A convolution with flipped taps over the input with zeros in between unfolds the same."""
        for a, reach in enumerate(self._reach):
            axis = 2 + 2 * a
            x = _spread(x, axis, self.stride[a])
            left = reach - 1 - self.padding[a][0]
            right = sizes[a] + reach - 1 - left - x.shape[axis]
            x = F.pad(x, [0, 0] * (x.ndim - 1 - axis) + [left, right])
            x = _windows(x, axis, reach, 1, self.dilation[a], sizes[a]).flip(1)
        return self._in_order(x)

    def _seen(self, pixels: Tensor, taps: Tensor, a: int, size: int) -> Tensor:
        """Which taps see which pixels of an axis."""
        place = pixels * self.stride[a] + taps - self.padding[a][0]
        return (place >= 0) & (place < size)


@lru_cache(maxsize=4096)
def tap_classes(
    unfolding: Unfolding, input_size: tuple[int, ...], output_size: tuple[int, ...]
) -> TapClasses:
    """The classes of every spatial axis.

    Args:
        unfolding: That of a convolution or transposed convolution.
        input_size: Spatial shape of its input.
        output_size: Spatial shape of its output.

    Raises:
        ValueError: If the kernel does not fit into the padded input.
    """
    unfolding.axes(input_size, output_size)
    hyper = (unfolding.kernel_size, unfolding.stride, unfolding.padding, unfolding.dilation)
    return tuple(
        unfolding.taps(k, s, left, d, i, o)
        for k, s, (left, _), d, i, o in zip(*hyper, input_size, output_size, strict=True)
    )


def _windows(x: Tensor, axis: int, reach: int, stride: int, dilation: int, size: int) -> Tensor:
    """Taps of one axis in front of the channels, positions in its place."""
    return x.unfold(axis, reach, stride)[..., ::dilation].narrow(axis, 0, size).movedim(-1, 1)


def _spread(x: Tensor, axis: int, stride: int) -> Tensor:
    """Put ``stride - 1`` zeros between the entries of an axis."""
    if stride == 1:
        return x
    spread = F.pad(x.unsqueeze(axis + 1), [0, 0] * (x.ndim - 1 - axis) + [0, stride - 1])
    return spread.flatten(axis, axis + 1).narrow(axis, 0, (x.shape[axis] - 1) * stride + 1)
