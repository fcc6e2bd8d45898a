"""One spatial dimension of a convolution, in integers only.

The *index pattern* of a dimension is the binary tensor ``P[k, o, i]`` that is one exactly
where tap ``k`` of the kernel meets input pixel ``i`` at output position ``o``::

    i = stride * o + dilation * k - left

(arXiv 2307.02275, section 3). Everything here is a fact about that equation; no tensor is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd

Padding = int | str | Sequence[int | tuple[int, int]]
"""Padding of all dimensions: one int, ``'same'``, ``'valid'``, or one entry per dimension."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Hyper-parameters of one spatial dimension.

    Attributes:
        input_size: Number of input pixels.
        kernel_size: Number of taps.
        stride: Pixels between neighbouring output positions.
        left: Zeros in front of the first pixel.
        right: Zeros behind the last pixel.
        dilation: Pixels between neighbouring taps.
        positions: Keep only the first output positions; by default all that fit.

    Raises:
        ValueError: If a size is not positive, a padding is negative, or no output fits.

    Example:
        >>> Axis(input_size=9, kernel_size=2, stride=2).output_size
        4
    """

    input_size: int
    kernel_size: int
    stride: int = 1
    left: int = 0
    right: int = 0
    dilation: int = 1
    positions: int | None = None

    def __post_init__(self) -> None:
        """Refuse what has no output."""
        for name in ("input_size", "kernel_size", "stride", "dilation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive: got {getattr(self, name)} in {self}.")
        if self.left < 0 or self.right < 0:
            raise ValueError(f"padding must not be negative: got {(self.left, self.right)}.")
        if self.input_size + self.left + self.right < self.reach:
            raise ValueError(f"The dilated kernel is larger than the padded input: {self}.")
        if self.positions is not None and not 1 <= self.positions <= self._fitting:
            raise ValueError(f"positions must lie in [1, {self._fitting}]: got {self.positions}.")

    @property
    def reach(self) -> int:
        """Number of pixels from the first to the last tap, both included."""
        return self.dilation * (self.kernel_size - 1) + 1

    @property
    def _fitting(self) -> int:
        return 1 + (self.input_size + self.left + self.right - self.reach) // self.stride

    @property
    def output_size(self) -> int:
        """Number of output positions."""
        return self._fitting if self.positions is None else self.positions

    @property
    def end(self) -> int:
        """One behind the last pixel that the last output position meets."""
        return self.stride * (self.output_size - 1) + self.reach - self.left

    @property
    def is_unpadded(self) -> bool:
        """Whether every tap falls on a pixel."""
        return self.left == 0 and self.end <= self.input_size

    @property
    def is_injective(self) -> bool:
        """Whether no pixel is met twice, so that unfolding only rearranges pixels.

        Two pairs ``(o, k)`` meet when ``stride * do = -dilation * dk``, and the smallest such
        step is ``(dilation, stride) / gcd(stride, dilation)``. This covers dense layers (kernel =
        stride), down-sampling (kernel < stride), 1x1 kernels and a single output position.
        """
        common = gcd(self.stride, self.dilation)
        return (
            self.kernel_size <= self.stride // common or self.output_size <= self.dilation // common
        )

    @property
    def used(self) -> int:
        """Number of leading pixels that any tap can meet; those behind never contribute."""
        return max(1, min(self.input_size, self.end))

    def cropped(self) -> Axis:
        """This pattern over the used pixels only, with no more padding than is needed."""
        right = max(0, self.end - self.used)
        if self.used + self.left + right < self.reach:
            return self
        return replace(self, input_size=self.used, right=right, positions=self.output_size)

    @property
    def coarse(self) -> tuple[int, int, Axis] | None:
        """First pixel met, step, and the axis over those, where stride and dilation share a factor.

        Only every ``gcd(stride, dilation)``-th pixel is met. None if all may be, or none is.
        """
        step = gcd(self.stride, self.dilation)
        first = -self.left % step
        if step == 1 or first >= self.input_size:
            return None
        size = (self.input_size - first - 1) // step + 1
        stride, dilation = self.stride // step, self.dilation // step
        left = (self.left + first) // step
        end = stride * (self.output_size - 1) + dilation * (self.kernel_size - 1) + 1 - left
        right = max(0, end - size)
        axis = Axis(size, self.kernel_size, stride, left, right, dilation, self.output_size)
        return first, step, axis

    def taps(self) -> Iterator[tuple[int, int, int]]:
        """All ``(k, o, i)`` at which the pattern is one."""
        for k in range(self.kernel_size):
            for o in range(self.output_size):
                i = self.stride * o + self.dilation * k - self.left
                if 0 <= i < self.input_size:
                    yield k, o, i


def per_axis(value: int | Sequence[int], dims: int, name: str) -> tuple[int, ...]:
    """Spell out an int or a sequence of ints for ``dims`` dimensions.

    Raises:
        TypeError: If an entry is no int.
        ValueError: If the number of entries is neither one nor ``dims``.
    """
    entries = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(_is_int(entry) for entry in entries):
        raise TypeError(f"{name}: got {value!r}. Supported: an int, or one per dimension.")
    if len(entries) == 1:
        return entries * dims
    if len(entries) != dims:
        raise ValueError(f"{name} needs 1 or {dims} entries: got {value!r}.")
    return entries


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def same_padding(kernel_size: int, dilation: int) -> tuple[int, int]:
    """Padding of ``'same'``: the odd zero goes to the right, as in torch."""
    total = dilation * (kernel_size - 1)
    return total // 2, total - total // 2


def resolve_padding(
    padding: Padding,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[tuple[int, int], ...]:
    """Spell out every form of padding as one ``(left, right)`` pair per dimension.

    Args:
        padding: An int, ``'same'`` (stride 1 only), ``'valid'``, or one int or pair per dimension.
        kernel_size: Taps per dimension.
        stride: Stride per dimension.
        dilation: Dilation per dimension.

    Raises:
        TypeError: If it is none of these.
        ValueError: For an unknown string, ``'same'`` with a stride, or a wrong number of entries.
    """
    dims = len(kernel_size)
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * dims
        if padding != "same":
            raise ValueError(f"padding: got {padding!r}. Supported: int, pairs, 'same', 'valid'.")
        if any(s != 1 for s in stride):
            raise ValueError(f"padding='same' needs stride 1: got {tuple(stride)}.")
        return tuple(same_padding(k, d) for k, d in zip(kernel_size, dilation, strict=True))
    entries = tuple(padding) if isinstance(padding, Sequence) else (padding,)
    pairs = [entry if isinstance(entry, Sequence) else (entry, entry) for entry in entries]
    if not all(len(pair) == 2 and all(_is_int(p) for p in pair) for pair in pairs):
        raise TypeError(
            f"padding: got {padding!r}. Supported: int, an int or a pair (left, right) per "
            "dimension, 'same', 'valid'."
        )
    if len(pairs) == 1:
        pairs *= dims
    if len(pairs) != dims:
        raise ValueError(f"padding needs 1 or {dims} entries: got {padding!r}.")
    return tuple((int(pair[0]), int(pair[1])) for pair in pairs)


def conv_axes(
    input_size: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
) -> tuple[Axis, ...]:
    """Axes of a convolution over an input of spatial shape ``input_size``."""
    dims = len(input_size)
    kernel = per_axis(kernel_size, dims, "kernel_size")
    strides = per_axis(stride, dims, "stride")
    dilations = per_axis(dilation, dims, "dilation")
    pads = resolve_padding(padding, kernel, strides, dilations)
    return tuple(
        Axis(i, k, s, left, right, d)
        for i, k, s, (left, right), d in zip(
            input_size, kernel, strides, pads, dilations, strict=True
        )
    )


def conv_transpose_axes(
    input_size: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    output_padding: int | Sequence[int] = 0,
) -> tuple[Axis, ...]:
    """Axes of the convolution whose transpose maps ``input_size`` to a larger output.

    The roles are swapped: ``input_size`` is the *output* size of the returned axes, and the
    output of the transposed convolution is their input.
    """
    dims = len(input_size)
    kernel = per_axis(kernel_size, dims, "kernel_size")
    strides = per_axis(stride, dims, "stride")
    dilations = per_axis(dilation, dims, "dilation")
    extra = per_axis(output_padding, dims, "output_padding")
    pads = resolve_padding(padding, kernel, strides, dilations)
    return tuple(
        transposed_axis(o, k, s, pad, d, e)
        for o, k, s, pad, d, e in zip(
            input_size, kernel, strides, pads, dilations, extra, strict=True
        )
    )


def transposed_axis(
    size: int,
    kernel_size: int,
    stride: int,
    pads: tuple[int, int],
    dilation: int,
    output_padding: int,
) -> Axis:
    """One dimension of :func:`conv_transpose_axes`."""
    if not 0 <= output_padding < max(stride, dilation):
        raise ValueError(
            "output_padding must be non-negative and smaller than stride or dilation: "
            f"got {output_padding} with stride {stride} and dilation {dilation}."
        )
    left, right = pads
    large = (size - 1) * stride - left - right + dilation * (kernel_size - 1) + 1 + output_padding
    if large < 1:
        raise ValueError(
            f"The output of the transposed convolution is empty: input size {size}, kernel size "
            f"{kernel_size}, stride {stride}, padding {pads}, dilation {dilation}."
        )
    return Axis(large, kernel_size, stride, left, right, dilation, positions=size)
