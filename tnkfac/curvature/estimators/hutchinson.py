"""Random probes of a curvature matrix: one backward pass for all samples."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tnkfac.curvature.estimators.losses import Loss


def twice_differentiable(needed: bool) -> AbstractContextManager[None]:
    """Fused attention has no second derivative; the plain formula has."""
    return sdpa_kernel(SDPBackend.MATH) if needed else nullcontext()


def signed_columns(loss: Loss, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sum of all columns of the root, with a random sign for every sample and column."""
    total = torch.zeros_like(outputs)
    for column in loss.root_columns(outputs):
        shape = (len(outputs), *[1] * (outputs.ndim - 1))
        total += column * _signs(column.new_empty(shape), generator)
    return total


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    bits = torch.randint(2, like.shape, device=like.device, generator=generator)
    return bits.to(like.dtype).mul_(2).sub_(1)


def add_square(
    total: dict[str, Tensor], parameters: dict[str, nn.Parameter], outputs: Tensor, vector: Tensor
) -> None:
    """Add the square of the gradient of all samples together."""
    wanted = list(parameters.values())
    products = torch.autograd.grad(outputs, wanted, vector, retain_graph=True, allow_unused=True)
    for name, g in zip(parameters, products, strict=True):
        if g is not None:
            total[name] += g.to(total[name].dtype).square()


def add_hutchinson(
    total: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    value: Tensor,
    mc_samples: int,
    generator: torch.Generator | None,
) -> None:
    """Add the mean of ``z * (H z)``.

    Raises:
        ValueError: If torch has no second derivative of an operation of the model.
    """
    try:
        _add_products(total, parameters, value, mc_samples, generator)
    except NotImplementedError as error:
        raise ValueError(
            f"kind: got 'hutchinson', but the model has no second derivative ({error}). "
            "Supported: 'ggn', 'ggn-mc', 'ggn-rademacher', 'empirical-fisher'."
        ) from error


def _add_products(
    total: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    value: Tensor,
    mc_samples: int,
    generator: torch.Generator | None,
) -> None:
    wanted = list(parameters.values())
    gradient = torch.autograd.grad(value, wanted, create_graph=True, allow_unused=True)
    pairs = zip(parameters.items(), gradient, strict=True)
    used = [(name, p, g) for (name, p), g in pairs if g is not None and g.requires_grad]
    if not used:
        return
    for _ in range(mc_samples):
        z = [_signs(p, generator) for _, p, _ in used]
        products = torch.autograd.grad(
            [g for *_, g in used],
            [p for _, p, _ in used],
            z,
            retain_graph=True,
            allow_unused=True,
        )
        for (name, *_), sign, product in zip(used, z, products, strict=True):
            if product is not None:
                total[name] += (sign * product).to(total[name].dtype) / mc_samples
