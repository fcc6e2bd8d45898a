"""Linear layers as matrices, by explicit loops over taps and positions.

Per sample ``n`` and channel group every layer is ``Y_n = W U_n (+ b)``, with the unfolded input
``U_n`` of shape ``[D, S]``. Its columns are the ``S`` positions that share the weight (all middle
axes of a linear layer, all output positions of a convolution); its rows are
``(channel, k_1, ..., k_d)`` in row-major order, and a last row of ones if there is a bias.
"""

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def source_index(module: Any, axis: int, k: int, o: int, size: int) -> int | None:
    """Return which of ``size`` inputs meets tap ``k`` at output ``o``; ``None``: a zero does."""
    i: int
    stride, dilation = module.stride[axis], module.dilation[axis]
    if module.transposed:
        i, remainder = divmod(o + module.padding[axis] - dilation * k, stride)
        return i if remainder == 0 and 0 <= i < size else None
    if module.padding == "same":
        left = dilation * (module.kernel_size[axis] - 1) // 2
    else:
        left = 0 if module.padding == "valid" else module.padding[axis]
    i = stride * o + dilation * k - left
    if 0 <= i < size:
        return i
    outside: dict[str, int | None] = {
        "zeros": None,
        "replicate": min(max(i, 0), size - 1),
        "circular": i % size,
        "reflect": -i if i < 0 else 2 * (size - 1) - i,
    }
    return outside[module.padding_mode]


def unfold_input(module: Any, x: Tensor, out: Tensor) -> Tensor:
    """Return ``U`` ``[N, G, D, S]`` of a call ``out = module(x)``, by one copy per entry."""
    if isinstance(module, nn.Linear):
        x = x if x.ndim > 1 else x.unsqueeze(0)
        u = x.reshape(x.shape[0], 1, -1, x.shape[-1]).transpose(2, 3)
    else:
        kernel = module.kernel_size
        x = x if x.ndim == 2 + len(kernel) else x.unsqueeze(0)
        in_size, out_size = x.shape[2:], out.shape[-len(kernel) :]
        u = x.new_zeros(*x.shape[:2], *kernel, *out_size)
        for taps in product(*map(range, kernel)):
            for positions in product(*map(range, out_size)):
                axes = enumerate(zip(taps, positions, in_size, strict=True))
                found = [source_index(module, axis, *koi) for axis, koi in axes]
                source = [i for i in found if i is not None]
                if len(source) == len(kernel):
                    u[(..., *taps, *positions)] = x[(..., *source)]
        u = u.reshape(x.shape[0], module.groups, -1, out_size.numel())
    if module.bias is not None:
        u = torch.cat([u, torch.ones_like(u[:, :, :1])], dim=2)
    return u


def output_columns(module: Any, out: Tensor) -> Tensor:
    """Return an output (or its gradient) as ``[N, G, Co / G, S]``."""
    if isinstance(module, nn.Linear):
        out = out if out.ndim > 1 else out.unsqueeze(0)
        return out.reshape(out.shape[0], 1, -1, out.shape[-1]).transpose(2, 3)
    out = out if out.ndim == 2 + len(module.kernel_size) else out.unsqueeze(0)
    return out.reshape(out.shape[0], module.groups, -1, out.shape[2:].numel())


def to_matrix(module: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``[W | b]`` as ``[G, Co / G, D]``; weight and bias may be gradients."""
    groups = getattr(module, "groups", 1)
    if isinstance(module, TRANSPOSED):  # [Ci, Co / G, *K]
        matrix = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(2)
    else:  # [Co, Ci / G, *K]
        matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    return matrix if bias is None else torch.cat([matrix, bias.reshape(groups, -1, 1)], dim=2)


def from_matrix(module: Any, matrix: Tensor) -> list[Tensor]:
    """Invert ``to_matrix``: ``[weight]`` or ``[weight, bias]``."""
    bias = [] if module.bias is None else [matrix[:, :, -1].flatten()]
    matrix = matrix if module.bias is None else matrix[:, :, :-1]
    if isinstance(module, TRANSPOSED):
        matrix = matrix.unflatten(2, (-1, *module.kernel_size)).transpose(1, 2)
    return [matrix.reshape(module.weight.shape), *bias]
