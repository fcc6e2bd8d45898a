"""Triton's kernel by its interpreter, against unfolding in float64: a script of ``test_triton``."""

import sys

import torch
from torch import nn

from tnkfac.curvature.layers import Convolution, describe
from tnkfac.curvature.moments import triton_sums

CASES = {
    "linear": (nn.Linear(5, 3), (4, 7, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 11)),
    "conv2d": (nn.Conv2d(3, 5, 3, padding=1), (5, 3, 9, 7)),
    "many channels": (nn.Conv2d(70, 5, 2), (2, 70, 5, 4)),
    "many pixels": (nn.Conv2d(2, 3, 3), (2, 2, 17, 19)),
    "stride, dilation": (nn.Conv2d(4, 6, (3, 2), (2, 3), (2, 0), (1, 2)), (4, 4, 12, 11)),
    "pointwise": (nn.Conv2d(4, 6, 1), (3, 4, 6, 5)),
    "pointwise, stride": (nn.Conv2d(4, 6, 1, stride=2), (3, 4, 6, 5)),
    "circular": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 2, 5, 6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), (3, 4, 5, 6)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 4, 3, 2), (3, 4, 7)),
}


def check(name: str, dtype: torch.dtype, channels_last: bool) -> None:
    """Compare both sides of one layer."""
    torch.manual_seed(0)
    module, shape = CASES[name]
    x = torch.randn(shape).to(dtype)
    g = torch.randn_like(module(x.float())).to(dtype)
    if channels_last and x.ndim == 4:
        x, g = (t.to(memory_format=torch.channels_last) for t in (x, g))
    layer = describe(module)
    a, b = layer.moments(x.double(), g.double(), "reduce")
    X, G = layer.standard_input(x), layer.standard_output(g)
    if isinstance(layer, Convolution):
        sums = triton_sums.squared_sums(X, layer.unfolding, tuple(g.shape[2:]))
    else:
        X, G = X.mT, G.mT
        sums = triton_sums.squared_sums(X)
    assert sums is not None
    found = sums.reshape(layer.groups, -1) / a.positions**2
    torch.testing.assert_close(found.double(), a.rows.diagonal(), rtol=1e-5, atol=1e-6)
    sums = triton_sums.squared_sums(G)
    assert sums is not None
    found = sums.reshape(layer.groups, -1)
    torch.testing.assert_close(found.double(), b.diagonal(), rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    for case in CASES:
        for last in (False, True):
            triton_sums._PROGRAMS = 2 if last else 2048  # several samples to a program
            # the interpreter mistakes bfloat16
            check(case, torch.float16 if last else torch.float32, last)
        print(case, "agrees")
    cube = describe(nn.Conv3d(2, 2, 2))
    assert isinstance(cube, Convolution)
    images = torch.zeros(1, 2, 3, 3, 3)
    assert triton_sums.squared_sums(images, cube.unfolding, (2, 2, 2)) is None
    triton_sums.check(torch.device("cpu"))
    launch = triton_sums.squared_sums
    triton_sums.squared_sums = lambda *arguments: 1.001 * launch(*arguments)
    try:
        triton_sums.check(torch.device("cpu"))
    except AssertionError:
        sys.exit(0)
    sys.exit("A trial passes kernels that are wrong by a thousandth.")
