"""Brute-force curvature of whole models in float64, from Jacobians and Hessians of autograd."""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from oracles.factors import Layer, canonical_weight

__all__ = [
    "flat_parameters",
    "ggn",
    "joint",
    "layer_indices",
    "loss_hessian",
    "model_jacobian",
    "output_hessian",
    "sample_gradients",
    "unflatten",
]

Data = Sequence[tuple[Tensor, Tensor]]


def flat_parameters(model: nn.Module) -> Tensor:
    """All parameters in one vector, in the order of ``named_parameters``."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def unflatten(model: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    """A vector over all parameters, by name and in their shapes."""
    parts = vector.split([p.numel() for p in model.parameters()])
    named = model.named_parameters()
    return {name: part.view_as(p) for (name, p), part in zip(named, parts, strict=True)}


def _outputs(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda vector: functional_call(model, unflatten(model, vector), (x,))


def model_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """``[*outputs, P]``."""
    return jacrev(_outputs(model, x))(flat_parameters(model))


def output_hessian(loss_fn: nn.Module, outputs: Tensor, y: Tensor) -> Tensor:
    """Hessian of the loss with respect to all outputs of a batch, ``[numel, numel]``."""
    flat = outputs.detach().reshape(-1)
    return hessian(lambda f: loss_fn(f.view_as(outputs), y))(flat)


def joint(data: Data) -> tuple[Tensor, Tensor]:
    """All data as one batch."""
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def ggn(model: nn.Module, loss_fn: nn.Module, data: Data) -> Tensor:
    """Gauss-Newton matrix ``[P, P]`` of the loss over all data."""
    x, y = joint(data)
    jacobian = model_jacobian(model, x).flatten(0, -2)
    return jacobian.T @ output_hessian(loss_fn, model(x), y) @ jacobian


def loss_hessian(model: nn.Module, loss_fn: nn.Module, data: Data) -> Tensor:
    """Hessian ``[P, P]`` of the loss over all data."""
    x, y = joint(data)
    outputs = _outputs(model, x)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        return hessian(lambda vector: loss_fn(outputs(vector), y))(flat_parameters(model))


def sample_gradients(model: nn.Module, loss_fn: nn.Module, data: Data) -> Tensor:
    """What every sample contributes to the gradient of the loss over all data, ``[N, P]``.

    The loss is that of all samples, with the outputs of all but one held fixed.
    """
    x, y = joint(data)
    outputs = model(x).detach().requires_grad_()
    (vector,) = torch.autograd.grad(loss_fn(outputs, y), outputs)
    rows = []
    for n in range(len(x)):
        jacobian = model_jacobian(model, x[n : n + 1]).flatten(0, -2)
        rows.append(vector[n].flatten() @ jacobian)
    return torch.stack(rows)


def layer_indices(model: nn.Module, name: str) -> Tensor:
    """Where the joint matrix ``[G, C_out / G, D]`` of a layer lies among all parameters."""
    numbered = deepcopy(model).double()
    start = 0
    for parameter in numbered.parameters():
        end = start + parameter.numel()
        parameter.data = torch.arange(start, end, dtype=torch.float64).view_as(parameter)
        start = end
    layer: Layer = numbered.get_submodule(name)
    return canonical_weight(layer).long()
