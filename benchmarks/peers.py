"""What tnkfac's input factors are compared with, and the layers that only occur here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import opt_einsum
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Call = Callable[[], Tensor]

TRANSPOSED: dict[str, tuple[int, int, int, int, int, int, int]] = {
    # name: dimensions, channels, input size, kernel, stride, padding, output padding
    "DCGAN generator 2": (2, 512, 4, 4, 2, 1, 0),
    "DCGAN generator 3": (2, 256, 8, 4, 2, 1, 0),
    "DCGAN generator 4": (2, 128, 16, 4, 2, 1, 0),
    "DCGAN generator 5": (2, 64, 32, 4, 2, 1, 0),
    "U-Net up 1": (2, 512, 16, 2, 2, 0, 0),
    "U-Net up 2": (2, 256, 32, 2, 2, 0, 0),
    "U-Net up 3": (2, 128, 64, 2, 2, 0, 0),
    "decoder 3x3": (2, 128, 16, 3, 2, 1, 1),
    "decoder 3x3, wide": (2, 64, 32, 3, 2, 1, 1),
    "decoder 5x5": (2, 64, 16, 5, 2, 2, 1),
    "FCN-8s, stride 4": (2, 21, 32, 4, 4, 0, 0),
    "3-d U-Net up": (3, 32, 8, 2, 2, 0, 0),
    "vocoder, stride 8": (1, 256, 64, 16, 8, 4, 0),
    "vocoder, stride 2": (1, 64, 2048, 4, 2, 1, 0),
}
"""Transposed convolutions of generators, decoders and vocoders."""


@dataclass
class Problem:
    """One factor to compute.

    Attributes:
        network: Where the layer is from.
        name: Of the layer.
        category: Of its hyper-parameters.
        module: The layer, without bias.
        x: Its input.
        approx: ``"expand"`` or ``"reduce"``.
        structure: ``"dense"`` or ``"diagonal"``.
    """

    network: str
    name: str
    category: str
    module: Any
    x: Tensor
    approx: str
    structure: str

    @property
    def quantity(self) -> str:
        """Approximation and structure."""
        return f"{self.approx} {self.structure}"

    @property
    def unfolded(self) -> int:
        """Numbers of the unfolded input."""
        m = self.module
        with torch.no_grad():
            y = m(self.x[:1])
        return len(self.x) * m.in_channels * prod(m.kernel_size) * int(prod(y.shape[2:]))


def im2col(problem: Problem) -> Call:
    """What users write today: unfold, then a matrix product, a mean or squares."""
    m, x = problem.module, problem.x
    groups = m.groups

    def unfold() -> Tensor:
        if not m.transposed:
            return F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride)
        return _unfold_transposed(m, x)

    def dense() -> Tensor:
        if problem.approx == "expand":
            u = unfold().unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)
            return u @ u.transpose(1, 2) / u.shape[2]
        u = unfold().mean(2).unflatten(1, (groups, -1)).transpose(0, 1)
        return u.transpose(1, 2) @ u / len(x)

    def diagonal() -> Tensor:
        u = unfold()
        u = u.square().mean((0, 2)) if problem.approx == "expand" else u.mean(2).square().mean(0)
        return u.unflatten(0, (groups, -1))

    return dense if problem.structure == "dense" else diagonal


def _unfold_transposed(m: Any, x: Tensor) -> Tensor:
    """Unfolded input of the convolution that equals a transposed one: zeros between the pixels."""
    dims = x.ndim - 2
    sizes = [(i - 1) * s + 1 for i, s in zip(x.shape[2:], m.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in m.stride))] = x
    pads: list[int] = []
    for a in range(dims):
        side = m.dilation[a] * (m.kernel_size[a] - 1) - m.padding[a]
        pads = [side, side + m.output_padding[a], *pads]
    spread = F.pad(spread, pads)
    if dims == 2:
        return (
            F.unfold(spread, m.kernel_size, m.dilation)
            .unflatten(1, (x.shape[1], -1))
            .flip(2)
            .flatten(1, 2)
        )
    for a in range(dims):  # torch unfolds images only
        spread = spread.unfold(2 + a, m.dilation[a] * (m.kernel_size[a] - 1) + 1, 1)
        spread = spread[..., :: m.dilation[a]]
    taps = list(range(2 + dims, 2 + 2 * dims))
    spread = spread.permute(0, 1, *taps, *range(2, 2 + dims)).flatten(2 + dims)
    return spread.flatten(2, 1 + dims).flip(2).flatten(1, 2)


def einconv_simplified(problem: Problem) -> Call | None:
    """The reference tensor networks, simplified; patterns and order are found beforehand."""
    m, x = problem.module, problem.x
    if problem.structure != "dense" or m.transposed:
        return None
    try:
        from einconv.expressions import convNd_kfac_reduce, convNd_kfc
    except ImportError:
        return None
    source = convNd_kfc if problem.approx == "expand" else convNd_kfac_reduce
    equation, operands, shape = source.einsum_expression(
        x, m.kernel_size, m.stride, m.padding, m.dilation, m.groups, simplify=True
    )
    path, _ = opt_einsum.contract_path(equation, *operands)
    scale = 1.0
    if problem.approx == "expand":  # the reference divides by the batch size only
        with torch.no_grad():
            scale = 1 / prod(m(x[:1]).shape[2:])

    def factor() -> Tensor:
        result: Tensor = opt_einsum.contract(equation, *operands, optimize=path)
        return result.reshape(shape) * scale if scale != 1 else result.reshape(shape)

    return factor


def transposed_module(row: tuple[int, int, int, int, int, int, int]) -> nn.Module:
    """The layer of one row of :data:`TRANSPOSED`."""
    dims, channels, _, kernel, stride, padding, output_padding = row
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    module: nn.Module = kind(channels, 1, kernel, stride, padding, output_padding, bias=False)
    return module
