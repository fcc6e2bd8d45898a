"""Kronecker factors of one batch: normalised ``A`` of inputs and ``B`` of output gradients."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor, nn

from tnkfac.curvature.layers import describe
from tnkfac.curvature.moments.second_moment import (
    APPROXIMATIONS,
    Approx,
    SecondMoment,
    accumulation_dtype,
)
from tnkfac.curvature.precision import FullPrecision
from tnkfac.curvature.structures import Parts, check_factor_structure, resolve_structure

Factor = Tensor | tuple[Tensor, ...]


def check_approx(approx: str) -> Approx:
    """Return the approximation if it is known.

    Raises:
        ValueError: If it is not.
    """
    for known in get_args(Approx):
        if approx == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"approx: got {approx!r}. Supported: {', '.join(APPROXIMATIONS)}.")


def input_factor(
    module: nn.Module, x: Tensor, approx: str = "expand", structure: str = "dense"
) -> Factor:
    """Input factor ``A`` of a layer.

    ``1/(N S) sum u u^T`` over samples and positions (expand), or ``1/N sum v v^T`` with the mean
    ``v`` over positions (reduce), for every channel group (arXiv 2311.00636).

    Args:
        module: ``Linear``, ``Conv1d/2d/3d``, ``ConvTranspose1d/2d/3d`` or ``Embedding``.
        x: Input as the module receives it, batched or not.
        approx: ``"expand"`` (KFC) or ``"reduce"``.
        structure: ``"dense"``, ``"diagonal"`` or ``"block{k}diagonal"``.

    Returns:
        ``[G, D, D]``, ``[G, D]``, or the pair ``([G, D // k, k, k], [G, r, r])``; ``D`` counts
        ``C_in / G * K`` features, and the bias last if the module has one. In float32 at least;
        zero for an empty batch.

    Raises:
        TypeError: If the module is not supported.
        ValueError: For an unknown approximation or structure, or an input that does not fit.

    Example:
        >>> import torch
        >>> input_factor(torch.nn.Conv2d(3, 8, 3), torch.rand(4, 3, 9, 9)).shape
        torch.Size([1, 28, 28])
    """
    layer = describe(module)
    if not layer.reads_indices:
        x = _accumulating(x)
    moment = layer.input_moment(x, check_approx(approx))
    return _read(moment, structure, 1 / max(moment.rows.count, 1))


def grad_factor(
    module: nn.Module,
    g: Tensor,
    approx: str = "expand",
    structure: str = "dense",
    loss_terms: float | None = None,
) -> Factor:
    """Output-gradient factor ``B`` of a layer.

    ``R sum g g^T`` over samples and positions (expand), or over samples with the sum over
    positions (reduce), for every channel group.

    Args:
        module: ``Linear``, ``Conv1d/2d/3d``, ``ConvTranspose1d/2d/3d`` or ``Embedding``.
        g: Gradient of the back-propagated scalar, shaped like the module's output.
        approx: ``"expand"`` or ``"reduce"``.
        structure: ``"dense"``, ``"diagonal"`` or ``"block{k}diagonal"``.
        loss_terms: ``R``, over how many terms the loss is averaged: the batch size if None, 1 for
            a summed loss.

    Returns:
        ``[G, C_out / G, C_out / G]``, or as for :func:`input_factor`.

    Raises:
        TypeError: If the module is not supported.
        ValueError: For an unknown approximation or structure, or a gradient that does not fit.

    Example:
        >>> import torch
        >>> g = torch.rand(4, 8, 7, 7)
        >>> grad_factor(torch.nn.Conv2d(3, 8, 3), g, structure="diagonal").shape
        torch.Size([1, 8])
    """
    moment = describe(module).output_moment(_accumulating(g), check_approx(approx))
    scale = moment.samples if loss_terms is None else loss_terms
    return _read(moment, structure, float(scale))


def _accumulating(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"Expected a tensor of floating-point numbers: got {tensor!r}.")
    return tensor.detach().to(accumulation_dtype(tensor.dtype))


def _read(moment: SecondMoment, structure: str, scale: float) -> Factor:
    device = moment.device
    structured = resolve_structure(check_factor_structure(structure), moment.dim)
    with torch.autocast(device.type, enabled=False), FullPrecision(device):
        parts: Parts = tuple(part.mul_(scale) for part in structured.statistic(moment))
    return parts[0] if len(parts) == 1 else parts
