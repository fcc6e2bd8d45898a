"""Which slices a randomised convolution keeps: fractions, random masks, lists of indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from numbers import Real

import torch
from torch import Tensor

from tnkfac.einsum.geometry import Axis

Index = tuple[Tensor | None, ...]
"""Kept indices of every axis of a tensor, on the CPU; None keeps an axis whole."""

KEYS = ("channels", "space", "batch", "output")


def fractions_below_one(keep: Mapping[str, float]) -> dict[str, float]:
    """The fractions below 1.

    Raises:
        TypeError: If it is no mapping to numbers.
        ValueError: For an unknown key, or a fraction that is not in ``(0, 1]``.
    """
    if not isinstance(keep, Mapping):
        raise TypeError(f"keep: got {keep!r}. Supported: a dict with keys of {KEYS}.")
    for key, value in keep.items():
        if key not in KEYS:
            raise ValueError(f"keep: got the key {key!r}. Supported: {', '.join(map(repr, KEYS))}.")
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"keep[{key!r}]: got {value!r}. Supported: a number in (0, 1].")
        if not 0 < value <= 1:
            raise ValueError(f"keep[{key!r}]: got {value!r}. Supported: a number in (0, 1].")
    return {key: float(value) for key, value in keep.items() if value < 1}


def check_generator(generator: object) -> None:
    """Raise TypeError unless it is a generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        kind = type(generator).__name__
        raise TypeError(f"generator: got a {kind}. Supported: a torch.Generator or None.")


@dataclass(frozen=True, eq=False)
class Sample:
    """Slices that one call keeps.

    Attributes:
        x: Indices into the padded input ``[N, C_in, I1, ...]``.
        g: Indices into the output gradient ``[N, C_out, O1, ...]``.
        scale: What makes the estimate unbiased.
        source: The generator, so that its ``id`` stays its own.
    """

    x: Index
    g: Index
    scale: float
    source: torch.Generator | None


def sampled_legs(
    axes: Sequence[Axis], shape: torch.Size, fractions: Mapping[str, float]
) -> list[tuple[str, int, float]]:
    """Name, size and kept fraction of every leg that is sampled, in the order of drawing."""
    root = 1 / len(axes)
    legs = [("batch", shape[0], fractions.get("batch", 1.0))]
    legs += [("channels", shape[1], fractions.get("channels", 1.0))]
    for a, axis in enumerate(axes):
        legs += [(f"space{a}", axis.input_size, fractions.get("space", 1.0) ** root)]
    for a, axis in enumerate(axes):
        legs += [(f"output{a}", axis.output_size, fractions.get("output", 1.0) ** root)]
    return [leg for leg in legs if leg[2] < 1]


def uniform(count: int, device: torch.device | str, generator: torch.Generator | None) -> Tensor:
    """All random numbers of a call; a value of a leg is kept if its number is below ``p``."""
    return torch.rand(count, device=device, dtype=torch.float32, generator=generator)


def select(
    axes: Sequence[Axis],
    legs: Sequence[tuple[str, int, float]],
    numbers: Tensor,
    generator: torch.Generator | None,
) -> Sample:
    """Turn random numbers into lists of indices."""
    parts = torch.split(numbers, [size for _, size, _ in legs])
    indices = {
        name: (part < p).nonzero().squeeze(1)
        for (name, _, p), part in zip(legs, parts, strict=True)
    }
    x = [indices.get("batch"), indices.get("channels")]
    g = [indices.get("batch"), None]
    for a, axis in enumerate(axes):
        pixels, outputs = _match(axis, indices.get(f"space{a}"), indices.get(f"output{a}"))
        x.append(pixels)
        g.append(outputs)
    return Sample(tuple(x), tuple(g), 1 / prod(p for _, _, p in legs), generator)


def _match(
    axis: Axis, pixels: Tensor | None, outputs: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Along one axis, what is needed of the kept pixels and output positions.

    Returns:
        Indices of pixels, from the start of the padded input, and of output positions. With one
        tap the two lists are pairs.
    """
    if pixels is None and outputs is None:
        return None, None
    both = min(axis.left, axis.right)
    start = axis.left - both  # of the pixels in the padded input
    size = axis.input_size + axis.left + axis.right - 2 * both
    if pixels is not None:
        pixels = pixels + start
    if axis.kernel_size == 1:
        outputs = torch.arange(axis.output_size, device="cpu") if outputs is None else outputs
        met = axis.stride * outputs - both
        alive = torch.zeros(size, dtype=torch.bool, device="cpu")
        alive[slice(None) if pixels is None else pixels] = True
        inside = (met >= 0) & (met < size)
        inside &= alive[met.clamp(0, size - 1)]
        return met[inside], outputs[inside]
    if outputs is not None:
        taps = axis.dilation * torch.arange(axis.kernel_size, device="cpu")
        met = (axis.stride * outputs[:, None] + taps - both).flatten()
        alive = torch.zeros(size, dtype=torch.bool, device="cpu")
        alive[met[(met >= 0) & (met < size)]] = True
        pixels = alive.nonzero().squeeze(1) if pixels is None else pixels[alive[pixels]]
    return pixels, outputs
