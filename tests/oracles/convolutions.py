"""Random (transposed) convolutions of any dimension, and everything around them by brute force.

No index pattern and no network: a layer is torch's own (or, with four axes, a loop over taps),
and its Jacobians are the images of unit vectors, for a convolution is linear in each argument.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from oracles import factors
from oracles.layer_cases import Geometry, draw_conv_geometry, draw_conv_transpose_geometry

__all__ = ["CONV", "TRANSPOSED", "Case", "case", "gradients"]

FLOAT64 = torch.float64
LARGEST = 150_000  # entries of a Jacobian of the whole batch

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True, eq=False)
class Case:
    """A layer with an input and a weight.

    Attributes:
        geometry: Sizes and hyper-parameters.
        transposed: Whether it is a transposed convolution.
        groups: Channel groups.
        batch: Number of samples.
        channels: Input and output channels.
        seed: Of all tensors.
    """

    geometry: Geometry
    transposed: bool
    groups: int
    batch: int
    channels: tuple[int, int]
    seed: int

    # --- arguments of the operations

    @cached_property
    def ungrouped(self) -> dict[str, object]:
        """Keyword arguments of operations without channel groups."""
        g = self.geometry
        options = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation}
        return options | ({"output_padding": g.output_padding} if self.transposed else {})

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of all other operations."""
        return self.ungrouped | {"groups": self.groups}

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.geometry.kernel_size

    @property
    def input_size(self) -> tuple[int, ...]:
        return self.geometry.input_size

    @cached_property
    def output_size(self) -> tuple[int, ...]:
        """Spatial shape of the output, by the formulas of torch's documentation."""
        g = self.geometry
        rows = zip(g.input_size, g.kernel_size, g.stride, g.pairs, g.dilation, strict=True)
        if self.transposed:
            extra = g.output_padding
            sizes = [(i - 1) * s - sum(p) + d * (k - 1) + 1 for i, k, s, p, d in rows]
            return tuple(size + e for size, e in zip(sizes, extra, strict=True))
        return tuple((i + sum(p) - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in rows)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels[0], *self.input_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels[1], *self.output_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        first, second = self.channels if self.transposed else self.channels[::-1]
        return (first, second // self.groups, *self.kernel_size)

    # --- tensors

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A random tensor; equal names give equal tensors."""
        rng = random.Random(f"{self.seed} {self.transposed} {name}")
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        return torch.randn(*shape, generator=generator, dtype=FLOAT64)

    @cached_property
    def x(self) -> Tensor:
        return self.tensor("x", *self.input_shape)

    @cached_property
    def weight(self) -> Tensor:
        return self.tensor("weight", *self.weight_shape)

    def cotangent(self, *leading: int) -> Tensor:
        """A tensor like the output, with leading axes."""
        return self.tensor("v", *leading, *self.output_shape)

    @cached_property
    def s(self) -> Tensor:
        """Three backpropagated vectors per sample."""
        return self.cotangent(3)

    # --- brute force

    def layer(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer itself; batch size and numbers of channels are free."""
        g, dims = self.geometry, len(self.kernel_size)
        options = {"stride": g.stride, "dilation": g.dilation, "groups": self.groups}
        if dims not in _CONV:
            return self._loops(x, weight)
        if not self.transposed:
            return _CONV[dims](_pad(x, g.pairs), weight, **options)
        # Without padding, then cropped; output padding appends zeros before.
        y = _CONV_TRANSPOSE[dims](x, weight, **options)
        sides = zip(g.pairs, g.output_padding, strict=True)
        return _pad(y, [(-left, extra - right) for (left, right), extra in sides])

    def _loops(self, x: Tensor, weight: Tensor) -> Tensor:
        """Unfolded by loops over the taps, times the weight as one matrix per group."""
        matrix = weight.reshape(self.groups, -1, *weight.shape[1:])
        matrix = (matrix.transpose(1, 2) if self.transposed else matrix).flatten(2)
        y = matrix @ self.unfolded(x, self.groups)
        return y.reshape(x.shape[0], -1, *self.output_size)

    def unfolded(self, x: Tensor, groups: int = 1) -> Tensor:
        """Unfolded input ``[N, G, D, S]``, by loops over the taps."""
        g = self.geometry
        args = g.kernel_size, g.stride, g.pairs, g.dilation
        if self.transposed:
            return factors.unfold_transpose(x, *args, g.output_padding, groups)
        return factors.unfold(x, *args, groups)

    @cached_property
    def matrix(self) -> Tensor:
        """Toeplitz matrix ``[C_out * O, C_in * I]``: the images of all unit inputs."""
        size = prod(self.input_shape[1:])
        units = torch.eye(size, dtype=FLOAT64).reshape(size, *self.input_shape[1:])
        return self.layer(units, self.weight).flatten(1).T

    @cached_property
    def input_jacobian(self) -> Tensor:
        """``[N, C_out, O.., N, C_in, I..]``: one Toeplitz matrix per sample."""
        whole = torch.block_diag(*[self.matrix] * self.batch)
        return whole.reshape(*self.output_shape, *self.input_shape)

    @cached_property
    def weight_jacobian(self) -> Tensor:
        """``[N, C_out, O.., *weight]``: the images of all unit weights."""
        units = torch.eye(prod(self.weight_shape), dtype=FLOAT64)
        images = [self.layer(self.x, unit.reshape(self.weight_shape)) for unit in units]
        return torch.stack(images, -1).reshape(*self.output_shape, *self.weight_shape)

    @cached_property
    def jacobians(self) -> Tensor:
        """One weight Jacobian per sample ``[N, C_out * O, P]``."""
        return self.weight_jacobian.reshape(self.batch, -1, prod(self.weight_shape))

    @cached_property
    def unfolding(self) -> Tensor:
        """The matrix of im2col ``[C_in * K * S, C_in * I]``."""
        size = prod(self.input_shape[1:])
        units = torch.eye(size, dtype=FLOAT64).reshape(size, *self.input_shape[1:])
        return self.unfolded(units).flatten(1).T

    @cached_property
    def root(self) -> Tensor:
        """Square root of the GGN of the weight ``[C, N, P]``, by explicit Jacobians."""
        return torch.einsum("cnf,nfp->cnp", self.s.flatten(2), self.jacobians)

    @cached_property
    def block(self) -> Tensor:
        """GGN of the weight ``[P, P]``."""
        rows = self.root.flatten(0, 1)
        return rows.T @ rows


def gradients(case: Case, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``<v, layer>`` for the input and the weight by autograd, over leading axes."""
    leaves = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
    y = case.layer(*leaves)
    leading = v.shape[: v.ndim - y.ndim]
    flat = v.reshape(-1, *y.shape)
    found = [torch.autograd.grad(y, leaves, each, retain_graph=True) for each in flat]
    x, weight = (torch.stack(parts) for parts in zip(*found, strict=True))
    return x.reshape(*leading, *leaves[0].shape), weight.reshape(*leading, *leaves[1].shape)


def _pad(x: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    return F.pad(x, [side for pair in reversed(pairs) for side in pair])


# --- draws --------------------------------------------------------------------------------------


SPECIAL = {
    # As many taps and positions as pixels, but the windows leave a gap and the last tap is off.
    "1d-gap": (Geometry((4,), (2,), (3,), ((0, 1),), (1,)), False),
    "2d-gap": (Geometry((6, 4), (3, 2), (4, 3), ((0, 1), (0, 1)), (1, 1)), False),
    "1d-transposed-gap": (Geometry((2,), (2,), (3,), ((0, 1),), (1,), (0,)), True),
    # Taps that meet nothing but padding, and a kernel larger than the input.
    "2d-far-outside": (Geometry((3, 2), (2, 5), (1, 2), ((3, 0), (2, 3)), (1, 1)), False),
    "4d": (
        Geometry(
            input_size=(3, 2, 3, 2),
            kernel_size=(2, 3, 1, 2),
            stride=(1, 2, 2, 1),
            padding=((1, 0), (1, 1), (0, 0), (0, 1)),
            dilation=(2, 1, 1, 1),
        ),
        False,
    ),
    "4d-dense": (Geometry((2, 3, 1, 3), (2, 3, 1, 2), (2, 3, 1, 2), 0, (1, 1, 1, 1)), False),
    "4d-transposed": (
        Geometry(
            input_size=(2, 1, 2, 2),
            kernel_size=(2, 2, 1, 2),
            stride=(2, 1, 2, 1),
            padding=((1, 0), (0, 1), (0, 0), (1, 1)),
            dilation=(1, 2, 1, 2),
            output_padding=(1, 0, 1, 1),
        ),
        True,
    ),
}


def _draw(seed: int, transposed: bool) -> Case:
    """Small enough that the Jacobian of a batch can be written out."""
    rng = random.Random(7000 + 1000 * transposed + seed)
    dims = seed % 3 + 1
    draw = draw_conv_transpose_geometry if transposed else draw_conv_geometry
    while True:
        geometry, groups = draw(rng, dims, asymmetric=True), rng.choice((1, 2, 2, 3))
        channels = groups * rng.randint(1, 2), groups * rng.randint(1, 2)
        case = Case(geometry, transposed, groups, rng.randint(1, 3), channels, seed)
        inputs, outputs = prod(case.input_shape), prod(case.output_shape)
        if outputs * max(inputs, prod(case.weight_shape)) <= LARGEST:
            return case


SEEDS = range(21)  # seven per number of axes
CONV = (
    *(f"{s % 3 + 1}d-seed{s:02d}" for s in SEEDS),
    *(name for name, (_, transposed) in SPECIAL.items() if not transposed),
)
TRANSPOSED = (
    *(f"{s % 3 + 1}d-transposed-seed{s:02d}" for s in SEEDS),
    *(name for name, (_, transposed) in SPECIAL.items() if transposed),
)


@cache
def case(name: str) -> Case:
    """The case of that name, its brute-force matrices computed at most once."""
    if name in SPECIAL:
        geometry, transposed = SPECIAL[name]
        return Case(geometry, transposed, 2, 2, (4, 2), 4)
    return _draw(int(name[-2:]), "transposed" in name)
