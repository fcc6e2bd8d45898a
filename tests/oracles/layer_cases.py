"""Layers and inputs to test with: seeded random draws, and a table of named corner cases.

Everything is small and in float64. Equal seeds (or names) give equal layers, inputs and
descriptions, on every platform and in every order.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from oracles.factors import Layer, pad_pairs

__all__ = [
    "CONV",
    "CONV_TRANSPOSE",
    "SPECIAL",
    "Geometry",
    "LayerCase",
    "Padding",
    "Special",
    "draw_conv_geometry",
    "draw_conv_transpose_geometry",
    "random_layer",
    "seed_id",
    "special_layer",
]

Padding = int | str | tuple[int, ...] | tuple[tuple[int, int], ...]

CONV: dict[int, type[_ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE: dict[int, type[_ConvNd]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
KINDS: tuple[type[Layer], ...] = (nn.Linear, *CONV.values(), *CONV_TRANSPOSE.values())
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class LayerCase(NamedTuple):
    """A layer, an input that it accepts, and both in words."""

    module: Layer
    x: Tensor
    description: str


# --- geometry -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """Hyper-parameters of a convolution together with spatial sizes that are legal for them.

    ``output_padding`` is empty for an ordinary convolution.
    """

    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...] = ()

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Padding as one (left, right) pair per axis."""
        return pad_pairs(self.padding, self.kernel_size, self.dilation)


def _draw_taps(rng: random.Random, dims: int) -> tuple[list[int], list[int], list[int]]:
    """Kernel size, stride and dilation per axis; not square in general."""
    largest = 4 if dims < 3 else 3
    kernel = [rng.randint(1, largest) for _ in range(dims)]
    if dims == 3 and rng.random() < 0.3:
        kernel[rng.randrange(3)] = 4
    stride = [rng.choice((1, 1, 2, 3)) for _ in range(dims)]
    dilation = [rng.choice((1, 1, 2)) for _ in range(dims)]
    return kernel, stride, dilation


def _draw_padding(rng: random.Random, kernel: Sequence[int], asymmetric: bool) -> Padding:
    """Padding in one of the forms of torch (and, if wanted, as a tuple of pairs)."""
    forms = ["none", "valid", "int", "tuple", "same"] + ["pairs", "pairs"] * asymmetric
    form = rng.choice(forms)
    if form == "none":
        return 0
    if form == "int":
        return rng.randint(1, 2)
    if form == "tuple":
        return tuple(rng.randint(0, size) for size in kernel)
    if form == "pairs":
        return tuple((rng.randint(0, size), rng.randint(0, size)) for size in kernel)
    return form


def draw_conv_geometry(
    rng: random.Random, dims: int, *, padding_mode: str = "zeros", asymmetric: bool = False
) -> Geometry:
    """Draw a convolution: kernels 1 to 4, strides 1 to 3, dilation 1 or 2, every padding form.

    Args:
        rng: Source of all choices.
        dims: Number of spatial axes.
        padding_mode: Inputs are made large enough for it.
        asymmetric: Also draw padding as a tuple of (left, right) pairs.
    """
    kernel, stride, dilation = _draw_taps(rng, dims)
    padding = _draw_padding(rng, kernel, asymmetric)
    if padding == "same":
        stride = [1] * dims
    draft = Geometry((), tuple(kernel), tuple(stride), padding, tuple(dilation))
    # What a window may find outside: reflection needs pad < size, wrapping around pad <= size.
    margin = {"zeros": 1 - 10**6, "reflect": 1, "replicate": 1 - 10**6, "circular": 0}
    extra = 5 if dims < 3 else 3
    sizes = []
    for k, d, pair in zip(kernel, dilation, draft.pairs, strict=True):
        least = max(1, d * (k - 1) + 1 - sum(pair), max(pair) + margin[padding_mode])
        sizes.append(least + rng.randint(0, extra))
    return Geometry(tuple(sizes), draft.kernel_size, draft.stride, padding, draft.dilation)


def draw_conv_transpose_geometry(
    rng: random.Random, dims: int, *, asymmetric: bool = False
) -> Geometry:
    """Draw a transposed convolution, with output padding wherever it is legal (sometimes zero)."""
    kernel, stride, dilation = _draw_taps(rng, dims)
    sizes = [rng.randint(1, 5 if dims < 3 else 3) for _ in range(dims)]
    pairs: list[tuple[int, int]] = []
    output_padding: list[int] = []
    form = rng.choice(["int", "tuple"] + ["pairs"] * asymmetric)
    for k, s, d, size in zip(kernel, stride, dilation, sizes, strict=True):
        output_padding.append(rng.choice((0, rng.randint(0, max(s, d) - 1))))
        # Padding crops the output; at least one pixel has to stay.
        length = (size - 1) * s + d * (k - 1) + 1 + output_padding[-1]
        left = rng.randint(0, min(2, (length - 1) // 2))
        right = rng.randint(0, min(2, length - 1 - left)) if form == "pairs" else left
        pairs.append((left, right))
    padding: Padding
    if form == "int":
        padding = min(left for left, _ in pairs)
    else:
        padding = tuple(pairs) if form == "pairs" else tuple(left for left, _ in pairs)
    geometry = tuple(sizes), tuple(kernel), tuple(stride), padding, tuple(dilation)
    return Geometry(*geometry, tuple(output_padding))


# --- inputs -------------------------------------------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    """For batched input the memory format of that name, for any number of axes."""
    channel = 1 if x.ndim > 1 else 0
    return x.movedim(channel, -1).contiguous().movedim(-1, channel)


def _permuted(x: Tensor) -> Tensor:
    """Memory order of the axes reversed."""
    axes = tuple(reversed(range(x.ndim)))
    return x.permute(axes).contiguous().permute(axes)


def _sliced(x: Tensor) -> Tensor:
    """Every second entry of a larger tensor, with an offset."""
    large = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
    large[..., 1::2] = x
    return large[..., 1::2]


def _expanded(x: Tensor) -> Tensor:
    """One sample, repeated by a stride of zero."""
    return x[:1].expand_as(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": _channels_last,
    "permuted": _permuted,
    "sliced": _sliced,
    "expanded": _expanded,
}


def _finish(module: Layer, shape: Sequence[int], layout: str, seed: int) -> LayerCase:
    """Float64, seeded parameters and input. The global generator plays no role in the values."""
    generator = torch.Generator().manual_seed(seed)
    module = module.to(torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values)
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    words = f"{module}, x={tuple(shape)}" + (f" {layout}" if layout != "contiguous" else "")
    return LayerCase(module, LAYOUTS[layout](x), words)


def _build(kind: Callable[..., Layer], *args: object, **kwargs: object) -> Layer:
    """Construct a layer without moving the global generator."""
    with torch.random.fork_rng(devices=[]):
        return kind(*args, **kwargs)


# --- random layers ------------------------------------------------------------------------------


def _draw_channels(rng: random.Random, dims: int) -> tuple[int, int, int]:
    """Input channels, output channels, groups; depthwise with and without multiplier included."""
    shape = rng.choice(("plain", "plain", "groups", "groups", "depthwise"))
    if shape == "plain":
        return rng.randint(1, 4 if dims < 3 else 3), rng.randint(1, 5), 1
    groups = rng.randint(2, 4 if dims < 3 else 3)
    if shape == "depthwise":
        return groups, groups * rng.randint(1, 2), groups
    return groups * 2, groups * rng.randint(1, 3), groups


def _random_linear(rng: random.Random) -> tuple[Layer, tuple[int, ...]]:
    d_in, d_out = rng.randint(1, 8), rng.randint(1, 6)
    leading = tuple(rng.randint(1, 4) for _ in range(rng.randint(0, 3)))
    return _build(nn.Linear, d_in, d_out, bias=rng.random() < 0.6), (*leading, d_in)


def _random_convolution(kind: type[_ConvNd], rng: random.Random) -> tuple[Layer, tuple[int, ...]]:
    transposed = kind in CONV_TRANSPOSE.values()
    dims = next(d for d in (1, 2, 3) if kind in (CONV[d], CONV_TRANSPOSE[d]))
    c_in, c_out, groups = _draw_channels(rng, dims)
    bias, batch = rng.random() < 0.6, rng.randint(1, 3)
    leading = () if rng.random() < 0.2 else (batch,)
    if transposed:
        geometry = draw_conv_transpose_geometry(rng, dims)
        special: dict[str, Any] = {"output_padding": geometry.output_padding}
    else:
        mode = rng.choice(PADDING_MODES)
        geometry = draw_conv_geometry(rng, dims, padding_mode=mode)
        special = {"padding_mode": mode}
    module = _build(
        kind,
        c_in,
        c_out,
        geometry.kernel_size,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=groups,
        bias=bias,
        **special,
    )
    return module, (*leading, c_in, *geometry.input_size)


def random_layer(seed: int) -> LayerCase:
    """Draw a supported layer and an input for it; seven seeds in a row cover the seven types."""
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    if issubclass(kind, _ConvNd):
        module, shape = _random_convolution(kind, rng)
    else:
        module, shape = _random_linear(rng)
    layout = rng.choice(("contiguous",) * 4 + ("channels_last", "permuted", "sliced"))
    return _finish(module, shape, layout, seed)


def seed_id(seed: int) -> str:
    """Readable test id of `random_layer`, e.g. ``seed08-Conv1d``."""
    return f"seed{seed:02d}-{KINDS[seed % len(KINDS)].__name__}"


# --- corner cases -------------------------------------------------------------------------------


class Special(NamedTuple):
    """A corner case: how to build the layer, and the shape and memory layout of its input."""

    build: Callable[[], Layer]
    shape: tuple[int, ...]
    layout: str = "contiguous"


def _case(
    kind: Callable[..., Layer],
    *args: object,
    x: tuple[int, ...],
    layout: str = "contiguous",
    **kwargs: object,
) -> Special:
    return Special(partial(_build, kind, *args, **kwargs), x, layout)


SPECIAL: dict[str, Special] = {
    # Linear: every number of input axes, which axis is the batch, where the ones go.
    # A single vector is one sample at one position.
    "linear-unbatched-1d": _case(nn.Linear, 4, 3, x=(4,)),
    "linear-2d": _case(nn.Linear, 4, 3, x=(5, 4)),
    # Only the first axis is the batch, the rest are positions.
    "linear-3d": _case(nn.Linear, 4, 3, x=(3, 5, 4)),
    "linear-4d": _case(nn.Linear, 4, 3, x=(2, 3, 2, 4)),
    # More axes than any fixed table of letters or cases may foresee.
    "linear-6d": _case(nn.Linear, 3, 2, x=(2, 1, 2, 1, 3, 3)),
    # No row of ones; reduce then has nothing that stays one.
    "linear-3d-no-bias": _case(nn.Linear, 4, 3, bias=False, x=(3, 5, 4)),
    # A factor of one row (with bias two): no division by D - 1, no squeeze of size-1 axes.
    "linear-one-feature": _case(nn.Linear, 1, 1, bias=False, x=(3, 1)),
    "linear-one-feature-bias": _case(nn.Linear, 1, 1, x=(3, 2, 1)),
    # Block structures: blocks of 3 with no rest (D = 6, bias included in the last block).
    "linear-no-rest": _case(nn.Linear, 5, 6, x=(4, 5)),
    # Positions before samples in memory (the layout of batch_first=False users).
    "linear-3d-permuted": _case(nn.Linear, 4, 3, x=(3, 5, 4), layout="permuted"),
    "linear-sliced": _case(nn.Linear, 4, 3, x=(5, 4), layout="sliced"),
    # Zero stride over the batch: in-place work on such an input would be wrong.
    "linear-expanded": _case(nn.Linear, 4, 3, x=(5, 4), layout="expanded"),
    #
    # Windows that do not overlap: the unfold is a view, possibly of a cropped or enlarged input.
    "conv2d-1x1": _case(nn.Conv2d, 3, 2, 1, x=(2, 3, 4, 5)),
    # Down-sampling; the last stride leaves the input (7 < 4 * 2), so a plain reshape fails.
    "conv2d-1x1-stride2": _case(nn.Conv2d, 3, 2, 1, stride=2, x=(2, 3, 7, 7)),
    # Down-sampling, divisible.
    "conv2d-1x1-stride2-even": _case(nn.Conv2d, 3, 2, 1, stride=2, x=(2, 3, 6, 4)),
    # Patch embedding.
    "conv2d-dense": _case(nn.Conv2d, 2, 3, 2, stride=2, x=(2, 2, 6, 4)),
    # Patch embedding with a cut-off border: pixels on the right are never read.
    "conv2d-dense-unused": _case(nn.Conv2d, 2, 3, 3, stride=3, x=(2, 2, 8, 7)),
    # Non-square patches.
    "conv2d-dense-rectangular": _case(nn.Conv2d, 2, 3, (2, 3), stride=(2, 3), x=(2, 2, 6, 7)),
    # Gaps between windows; size not divisible by the stride.
    "conv2d-stride-exceeds-kernel": _case(nn.Conv2d, 2, 3, 2, stride=3, x=(2, 2, 10, 7)),
    # The same with padding: the border strips of a window are not those of stride 1.
    "conv1d-stride-exceeds-kernel-padded": _case(
        nn.Conv1d, 2, 3, 2, stride=3, padding=1, x=(2, 2, 9)
    ),
    # One output: the layer is a Linear; stride without effect.
    "conv2d-kernel-is-input": _case(nn.Conv2d, 2, 3, (3, 4), stride=2, x=(2, 2, 3, 4)),
    "conv3d-dense": _case(nn.Conv3d, 2, 3, 2, stride=2, x=(2, 2, 4, 2, 5)),
    # Dense along one axis only: rules that look at all axes at once fail.
    "conv2d-dense-one-axis": _case(nn.Conv2d, 2, 3, (2, 3), stride=(2, 1), x=(2, 2, 6, 5)),
    # 1 x k and k x 1 kernels of Inception.
    "conv2d-1xk": _case(nn.Conv2d, 2, 3, (1, 4), padding=(0, 2), x=(2, 2, 3, 5)),
    "conv2d-kx1": _case(nn.Conv2d, 2, 3, (4, 1), padding=(2, 0), x=(2, 2, 5, 3)),
    #
    # Stride and dilation.
    # Dilation of a single tap means nothing.
    "conv2d-kernel1-dilation2": _case(nn.Conv2d, 2, 3, 1, dilation=2, padding=1, x=(2, 2, 4, 4)),
    # gcd(stride, dilation) > 1: every second pixel is read.
    "conv2d-gcd2": _case(nn.Conv2d, 2, 3, 3, stride=2, dilation=2, x=(2, 2, 9, 8)),
    "conv1d-gcd2-dilation4": _case(
        nn.Conv1d, 2, 3, 2, stride=2, dilation=4, padding=3, x=(2, 2, 9)
    ),
    # Neither divides the other.
    "conv1d-stride3-dilation2": _case(nn.Conv1d, 2, 3, 4, stride=3, dilation=2, x=(2, 2, 14)),
    # Stride and dilation swapped "dense": each pixel read once although windows interleave.
    "conv1d-swapped-dense": _case(nn.Conv1d, 2, 3, 3, dilation=2, x=(2, 2, 6)),
    # Stride divides the kernel (space-to-depth), and does not.
    "conv2d-stride-divides-kernel": _case(nn.Conv2d, 2, 3, 4, stride=2, padding=1, x=(2, 2, 8, 7)),
    "conv2d-k3-stride2": _case(nn.Conv2d, 2, 3, 3, stride=2, padding=1, x=(2, 2, 8, 7)),
    # All hyper-parameters different per axis: transposed axes show.
    "conv2d-all-different": _case(
        nn.Conv2d, 2, 3, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), x=(2, 2, 4, 7)
    ),
    "conv3d-all-different": _case(
        nn.Conv3d,
        2,
        2,
        (1, 2, 3),
        stride=(2, 1, 3),
        padding=(0, 1, 2),
        dilation=(3, 2, 1),
        x=(2, 2, 3, 4, 5),
    ),
    #
    # Padding.
    "conv2d-plain-3x3": _case(nn.Conv2d, 2, 3, 3, padding=1, x=(2, 2, 5, 6)),
    # Whole windows on padding: rows of U that are zero for some positions.
    "conv2d-padding-exceeds-kernel": _case(nn.Conv2d, 2, 3, 2, padding=3, x=(2, 2, 3, 2)),
    # A kernel larger than the input: taps that fall on padding at every position but one.
    "conv1d-kernel-exceeds-input": _case(nn.Conv1d, 2, 3, 5, padding=2, x=(2, 2, 2)),
    # One pixel: only the middle tap reads anything.
    "conv2d-one-pixel": _case(nn.Conv2d, 2, 3, 3, padding=1, x=(2, 2, 1, 1)),
    # Lags larger than the input.
    "conv1d-dilation-exceeds-input": _case(nn.Conv1d, 2, 3, 3, dilation=4, padding=4, x=(2, 2, 3)),
    # 'same' pads one more on the right if dilation * (kernel - 1) is odd.
    "conv2d-same-even": _case(nn.Conv2d, 2, 3, (2, 4), padding="same", x=(2, 2, 4, 5)),
    "conv1d-same-even-dilation3": _case(
        nn.Conv1d, 2, 3, 4, padding="same", dilation=3, x=(2, 2, 7)
    ),
    # Even total although the kernel is even: symmetric again.
    "conv2d-same-even-dilation2": _case(
        nn.Conv2d, 2, 3, (4, 2), padding="same", dilation=2, x=(2, 2, 5, 4)
    ),
    "conv3d-same-mixed": _case(
        nn.Conv3d, 1, 2, (2, 3, 1), padding="same", dilation=(1, 2, 3), x=(2, 1, 3, 4, 2)
    ),
    # 'same' of a kernel that needs none; strings are no tuples.
    "conv2d-same-1x1": _case(nn.Conv2d, 2, 3, 1, padding="same", x=(2, 2, 3, 4)),
    "conv2d-valid": _case(nn.Conv2d, 2, 3, 2, padding="valid", stride=2, x=(2, 2, 5, 4)),
    # Padding modes, at their limits: reflection by size - 1, wrapping by the full size.
    "conv2d-reflect": _case(
        nn.Conv2d, 2, 3, 3, padding=(1, 2), padding_mode="reflect", x=(2, 2, 4, 3)
    ),
    "conv1d-reflect-widest": _case(
        nn.Conv1d, 2, 3, 3, padding=3, padding_mode="reflect", x=(2, 2, 4)
    ),
    "conv2d-circular": _case(
        nn.Conv2d, 2, 3, 3, padding=(2, 1), padding_mode="circular", x=(2, 2, 4, 3)
    ),
    "conv1d-circular-full-turn": _case(
        nn.Conv1d, 2, 3, 3, padding=4, padding_mode="circular", x=(2, 2, 4)
    ),
    "conv2d-replicate": _case(
        nn.Conv2d, 2, 3, 3, padding=(1, 3), padding_mode="replicate", x=(2, 2, 4, 2)
    ),
    # 'same' of an even kernel in a padding mode: the asymmetric side must be the same one.
    "conv2d-circular-same-even": _case(
        nn.Conv2d, 2, 3, (2, 4), padding="same", padding_mode="circular", x=(2, 2, 4, 5)
    ),
    "conv2d-reflect-same-even": _case(
        nn.Conv2d, 2, 3, (4, 2), padding="same", padding_mode="reflect", x=(2, 2, 5, 4)
    ),
    # A padding mode without padding.
    "conv2d-circular-no-padding": _case(
        nn.Conv2d, 2, 3, 2, padding_mode="circular", x=(2, 2, 3, 4)
    ),
    # A padding mode with stride, dilation and groups.
    "conv2d-replicate-strided-grouped": _case(
        nn.Conv2d,
        4,
        2,
        2,
        stride=2,
        dilation=2,
        padding=1,
        groups=2,
        padding_mode="replicate",
        x=(2, 4, 5, 4),
    ),
    "conv3d-reflect": _case(
        nn.Conv3d, 1, 2, 2, padding=(1, 0, 2), padding_mode="reflect", x=(2, 1, 2, 3, 3)
    ),
    #
    # Channels and groups.
    "conv2d-one-input-channel": _case(nn.Conv2d, 1, 3, 3, padding=1, x=(2, 1, 4, 5)),
    "conv2d-one-output-channel": _case(nn.Conv2d, 3, 1, 2, x=(2, 3, 4, 3)),
    # D = 1: a 1x1 convolution of one channel without bias.
    "conv2d-scalar": _case(nn.Conv2d, 1, 1, 1, bias=False, x=(2, 1, 3, 2)),
    "conv2d-no-bias": _case(nn.Conv2d, 2, 3, 3, padding=1, bias=False, x=(2, 2, 4, 4)),
    "conv2d-depthwise": _case(nn.Conv2d, 3, 3, 3, padding=1, groups=3, x=(2, 3, 4, 5)),
    # Depthwise with two outputs per channel: outputs are ordered (group, output).
    "conv2d-depthwise-multiplier": _case(nn.Conv2d, 3, 6, 2, groups=3, x=(2, 3, 4, 3)),
    # Two groups of three output channels; every group has its own row of ones.
    "conv2d-groups2-out6": _case(nn.Conv2d, 4, 6, 2, groups=2, padding=1, x=(2, 4, 3, 4)),
    "conv1d-groups": _case(nn.Conv1d, 6, 4, 3, groups=2, stride=2, x=(2, 6, 8)),
    "conv3d-groups-no-bias": _case(nn.Conv3d, 4, 2, 2, groups=2, bias=False, x=(2, 4, 3, 2, 3)),
    # Grouped 1x1 (ResNeXt, ShuffleNet).
    "conv2d-1x1-groups": _case(nn.Conv2d, 4, 6, 1, groups=2, x=(2, 4, 3, 2)),
    #
    # Batches.
    "conv2d-batch1": _case(nn.Conv2d, 2, 3, 3, padding=1, x=(1, 2, 4, 5)),
    # As many samples as channels: mixed-up axes keep their shapes.
    "conv1d-ambiguous-axes": _case(nn.Conv1d, 3, 3, 3, padding=1, x=(3, 3, 3)),
    "conv1d-unbatched": _case(nn.Conv1d, 2, 3, 2, stride=2, x=(2, 7)),
    "conv2d-unbatched": _case(nn.Conv2d, 2, 3, 3, padding=1, x=(2, 4, 5)),
    "conv3d-unbatched-groups": _case(nn.Conv3d, 2, 2, 2, groups=2, x=(2, 3, 3, 2)),
    "conv2d-unbatched-circular": _case(
        nn.Conv2d, 2, 3, 3, padding=1, padding_mode="circular", x=(2, 4, 3)
    ),
    "conv2d-unbatched-same-even": _case(nn.Conv2d, 2, 3, 2, padding="same", x=(2, 4, 3)),
    "conv2d-channels-last": _case(
        nn.Conv2d, 3, 2, 3, padding=1, x=(2, 3, 4, 5), layout="channels_last"
    ),
    # Channels-last and grouped: channels cannot be split by a view of the batch-first memory.
    "conv2d-channels-last-groups": _case(
        nn.Conv2d, 4, 2, 2, groups=2, x=(2, 4, 3, 4), layout="channels_last"
    ),
    # Views of the input (dense windows) on memory that is not contiguous.
    "conv2d-dense-channels-last": _case(
        nn.Conv2d, 2, 3, 2, stride=2, x=(2, 2, 4, 6), layout="channels_last"
    ),
    "conv2d-dense-sliced": _case(nn.Conv2d, 2, 3, 2, stride=2, x=(2, 2, 4, 5), layout="sliced"),
    "conv1d-sliced": _case(nn.Conv1d, 2, 3, 3, x=(2, 2, 7), layout="sliced"),
    "conv2d-expanded": _case(nn.Conv2d, 2, 3, 3, padding=1, x=(3, 2, 4, 5), layout="expanded"),
    #
    # Transposed convolutions.
    "convT2d-plain-3x3": _case(nn.ConvTranspose2d, 2, 3, 3, padding=1, x=(2, 2, 4, 5)),
    # Up-sampling without overlap: each output is written by one tap.
    "convT2d-dense": _case(nn.ConvTranspose2d, 2, 3, 2, stride=2, x=(2, 2, 3, 4)),
    "convT2d-1x1": _case(nn.ConvTranspose2d, 3, 2, 1, x=(2, 3, 3, 4)),
    # Holes: outputs that no tap writes see only the bias, but count as positions.
    "convT2d-stride-exceeds-kernel": _case(nn.ConvTranspose2d, 2, 3, 2, stride=3, x=(2, 2, 3, 2)),
    "convT1d-1x1-stride3": _case(nn.ConvTranspose1d, 2, 3, 1, stride=3, x=(2, 2, 4)),
    # The up-sampling block of generators.
    "convT2d-k4-stride2": _case(nn.ConvTranspose2d, 2, 3, 4, stride=2, padding=1, x=(2, 2, 3, 4)),
    "convT2d-k3-stride2-output-padding": _case(
        nn.ConvTranspose2d, 2, 3, 3, stride=2, padding=1, output_padding=1, x=(2, 2, 3, 4)
    ),
    # Output padding beyond the last tap: trailing outputs are holes.
    "convT1d-output-padding-holes": _case(
        nn.ConvTranspose1d, 2, 3, 2, stride=3, output_padding=2, x=(2, 2, 3)
    ),
    # Output padding that is legal only because of the dilation.
    "convT1d-output-padding-dilation": _case(
        nn.ConvTranspose1d, 2, 3, 3, dilation=2, output_padding=1, x=(2, 2, 4)
    ),
    # Output padding different per axis.
    "convT2d-all-different": _case(
        nn.ConvTranspose2d,
        2,
        3,
        (3, 2),
        stride=(1, 3),
        padding=(2, 0),
        output_padding=(1, 2),
        dilation=(2, 1),
        x=(2, 2, 3, 2),
    ),
    "convT1d-gcd2": _case(nn.ConvTranspose1d, 2, 3, 3, stride=2, dilation=2, x=(2, 2, 4)),
    "convT1d-stride3-dilation2": _case(
        nn.ConvTranspose1d, 2, 3, 4, stride=3, dilation=2, padding=2, x=(2, 2, 4)
    ),
    # Padding beyond the kernel crops real outputs: border inputs contribute less or nothing.
    "convT2d-padding-crops": _case(nn.ConvTranspose2d, 2, 3, 2, padding=3, x=(2, 2, 7, 8)),
    # One input pixel, one output.
    "convT2d-one-pixel": _case(nn.ConvTranspose2d, 2, 3, 3, stride=2, x=(2, 2, 1, 1)),
    "convT1d-one-output": _case(nn.ConvTranspose1d, 2, 3, 3, padding=1, x=(2, 2, 1)),
    # Weight layout [Ci, Co/G, *K]: groups split the *first* axis, Co/G is the second.
    "convT2d-groups2-out6": _case(nn.ConvTranspose2d, 4, 6, 2, groups=2, stride=2, x=(2, 4, 2, 3)),
    "convT2d-depthwise": _case(nn.ConvTranspose2d, 3, 3, 3, groups=3, padding=1, x=(2, 3, 3, 4)),
    "convT2d-depthwise-multiplier": _case(
        nn.ConvTranspose2d, 3, 6, 3, groups=3, stride=2, x=(2, 3, 2, 3)
    ),
    "convT1d-no-bias": _case(nn.ConvTranspose1d, 2, 3, 3, bias=False, x=(2, 2, 4)),
    # A hole without bias: a column of U that is zero everywhere.
    "convT1d-no-bias-holes": _case(nn.ConvTranspose1d, 2, 3, 1, stride=2, bias=False, x=(2, 2, 3)),
    "convT3d-all-different": _case(
        nn.ConvTranspose3d,
        2,
        2,
        (1, 2, 3),
        stride=(2, 1, 3),
        padding=(0, 1, 2),
        output_padding=(1, 0, 2),
        dilation=(1, 2, 1),
        x=(2, 2, 2, 3, 2),
    ),
    "convT3d-groups": _case(nn.ConvTranspose3d, 4, 2, 2, groups=2, x=(2, 4, 2, 2, 1)),
    "convT1d-unbatched": _case(nn.ConvTranspose1d, 2, 3, 3, stride=2, x=(2, 4)),
    "convT2d-unbatched-groups": _case(nn.ConvTranspose2d, 2, 4, 2, groups=2, x=(2, 3, 2)),
    "convT2d-batch1": _case(nn.ConvTranspose2d, 2, 3, 3, stride=2, x=(1, 2, 3, 2)),
    "convT2d-channels-last": _case(
        nn.ConvTranspose2d, 3, 2, 3, stride=2, x=(2, 3, 3, 2), layout="channels_last"
    ),
    "convT2d-sliced": _case(nn.ConvTranspose2d, 2, 3, 2, stride=2, x=(2, 2, 3, 2), layout="sliced"),
}


def special_layer(name: str) -> LayerCase:
    """Build a corner case of `SPECIAL`; the name is the seed."""
    case = SPECIAL[name]
    built = _finish(case.build(), case.shape, case.layout, zlib.crc32(name.encode()))
    return built._replace(description=f"{name}: {built.description}")
