"""Second moments of per-sample gradients in a Kronecker-factored eigenbasis (arXiv 1806.03884)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.curvature.layers import Layer
from tnkfac.curvature.structures.structure import Decomposable, Parts

_AT_ONCE = 2**23
"""Numbers that are held of the samples at one time."""


def second_moments(
    layer: Layer,
    x: Tensor,
    g: Tensor,
    k: Decomposable,
    c: Decomposable,
    basis: tuple[Parts, Parts],
) -> Tensor:
    """``sum_n (Q_B^T W_n Q_A)^2`` for the gradients ``W_n = [W | b]`` of every sample.

    Weight-sharing positions are summed before squaring, so that these are the diagonal entries of
    the Fisher matrix in the basis. Either the rows of input and output are rotated and multiplied
    per sample, or gradients are formed per sample and rotated: whichever is cheaper.

    Args:
        layer: The layer.
        x: Input as the module received it.
        g: Gradient with respect to its output.
        k: Structure of the input side.
        c: Structure of the output side.
        basis: Eigenvectors of both sides.

    Returns:
        ``[G, C_out / G, D]``.
    """
    x, g = layer.standard_input(x), layer.standard_output(g)
    positions = layer.output_rows(g, g.dtype).positions
    d, out = k.dim, c.dim
    rotate_rows = positions * (d * d + out * out)  # for dense bases; an upper bound else
    rotate_gradients = d * out * (d + out)
    if torch.compiler.is_compiling() or rotate_rows <= rotate_gradients:
        way, each = _from_rows, layer.groups * (positions * (d + out) + d * out)
    else:
        way, each = _from_gradients, layer.groups * d * out
    total = g.new_zeros(layer.groups, out, d)
    step = x.shape[0] if torch.compiler.is_compiling() else max(1, _AT_ONCE // max(1, each))
    for inputs, grad in zip(torch.split(x, step), torch.split(g, step), strict=True):
        total = total + way(layer, inputs, grad, k, c, basis)
    return total


def _from_rows(
    layer: Layer, x: Tensor, g: Tensor, k: Decomposable, c: Decomposable, basis: tuple[Parts, Parts]
) -> Tensor:
    """Rotate the rows of both sides, multiply per sample."""
    rows = layer.input_rows(x, g.shape, g.dtype).unfolded()  # [G, N, S, D]
    if layer.bias:
        rows = F.pad(rows, (0, 1), value=1.0)
    columns = layer.output_rows(g, g.dtype).unfolded()
    count = rows.shape[1]

    def rotated(rows: Tensor, structure: Decomposable, Q: Parts) -> Tensor:
        turned = structure.product(Q, rows.flatten(1, 2).mT, transpose=True)
        return turned.mT.reshape(len(turned), count, -1, structure.dim)  # [G, N, S, dim]

    left, right = rotated(columns, c, basis[1]), rotated(rows, k, basis[0])
    return (left.mT @ right).square().sum(1)


def _from_gradients(
    layer: Layer, x: Tensor, g: Tensor, k: Decomposable, c: Decomposable, basis: tuple[Parts, Parts]
) -> Tensor:
    """Form the gradient of every sample, rotate both of its sides."""
    matrix = layer.sample_matrices(x, g)
    shape = (layer.groups, len(x), c.dim, k.dim)
    turned = k.product(basis[0], matrix.flatten(1, 2).mT, transpose=True)  # [G, D, N Co]
    turned = turned.mT.reshape(shape).transpose(1, 2).flatten(2)  # [G, Co, N D]
    turned = c.product(basis[1], turned, transpose=True)
    return turned.reshape(layer.groups, c.dim, len(x), k.dim).square().sum(2)
