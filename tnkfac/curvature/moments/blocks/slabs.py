"""Diagonal blocks of the second moment of an unfolded input, by the channels that they touch.

A block of 64 rows of a 3x3 convolution is about seven channels. With these as a channel group of
their own its moment is a part of that of the group, and all groups are formed at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slabs:
    """The channels of each block, the same number for all.

    Attributes:
        channels: Channels of a group of the layer.
        taps: Rows for each of them.
        size: Rows of a block; the last may have fewer.
    """

    channels: int
    taps: int
    size: int

    @cached_property
    def count(self) -> int:
        """Number of blocks."""
        return -(-self.channels * self.taps // self.size)

    @cached_property
    def width(self) -> int:
        """Channels of a slab."""
        return max(-(-self._end(i) // self.taps) - self._begin(i) for i in range(self.count))

    def first(self, block: int) -> int:
        """First channel of a slab."""
        return min(self._begin(block), self.channels - self.width)

    def _begin(self, block: int) -> int:
        return block * self.size // self.taps

    def _end(self, block: int) -> int:
        return min((block + 1) * self.size, self.channels * self.taps)

    def inside(self, block: int) -> slice:
        """Rows of a block among those of its slab."""
        shift = self.first(block) * self.taps
        return slice(block * self.size - shift, self._end(block) - shift)

    def taken(self, x: Tensor, groups: int, blocks: range) -> Tensor:
        """The channels of some slabs ``[N, G * B * width, ..]``, of ``x [N, C, ..]``."""
        index = _index(self, groups, blocks, x.device)
        return x.index_select(1, index)

    def cut(self, moments: Tensor, blocks: range) -> Iterator[tuple[range, Tensor]]:
        """The blocks inside of the moments ``[G, B, D, D]`` of slabs, as many at once as possible.

        Yields:
            Evenly spaced numbers of blocks, and these, ``[G, B', k, k]``.
        """
        places: dict[tuple[int, int], list[int]] = {}
        for block in blocks:
            inside = self.inside(block)
            places.setdefault((inside.start, inside.stop), []).append(block)
        for (start, stop), members in places.items():
            for run in _runs(members):
                at = slice(run.start - blocks.start, run.stop - blocks.start, run.step)
                yield run, moments[:, at, start:stop, start:stop]


def _runs(numbers: list[int]) -> list[range]:
    """Ascending numbers as few ranges."""
    if len(numbers) < 2:
        return [range(n, n + 1) for n in numbers]
    step = numbers[1] - numbers[0]
    end = next((i for i, n in enumerate(numbers) if n != numbers[0] + i * step), len(numbers))
    return [range(numbers[0], numbers[end - 1] + 1, step), *_runs(numbers[end:])]


@lru_cache(maxsize=256)
def _index(slabs: Slabs, groups: int, blocks: range, device: torch.device) -> Tensor:
    """Channels of some slabs of all groups."""
    first = torch.tensor([slabs.first(block) for block in blocks], device="cpu")
    inside = first.unsqueeze(1) + torch.arange(slabs.width, device="cpu")
    groups_at = slabs.channels * torch.arange(groups, device="cpu").view(-1, 1, 1)
    return (groups_at + inside).flatten().to(device)
