"""The Hessian's diagonal by a recursion through a chain of modules (HesScale, BL89).

With ``h`` the diagonal of the Hessian with respect to a module's output and ``g`` the gradient,

- a linear map with matrix ``M`` takes ``h`` to ``(M * M)^T h``: the vector-Jacobian product of
  the same layer with squared weights; its weight has the diagonal ``sum h x^2``;
- an elementwise function ``f`` takes it to ``f'^2 h + f'' g``.

That is exact where the Hessian with respect to the output is diagonal (arXiv 2406.03276, eq. 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from tnkfac.curvature.estimators.losses import CrossEntropy, Loss
from tnkfac.curvature.layers import LAYERS, layer_type

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
"""Functions of every entry on its own."""

SELECTING: tuple[type[nn.Module], ...] = (
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.ChannelShuffle,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
    nn.Flatten,
    nn.Identity,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Unflatten,
    nn.UpsamplingNearest2d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
)
"""Every output is an input or a constant: the Jacobian has zeros and ones."""

DROPOUT: tuple[type[nn.Module], ...] = (
    nn.AlphaDropout,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
)

AVERAGING: dict[type[nn.Module], int] = {
    nn.AvgPool1d: 1,
    nn.AvgPool2d: 2,
    nn.AvgPool3d: 3,
    nn.AdaptiveAvgPool1d: 1,
    nn.AdaptiveAvgPool2d: 2,
    nn.AdaptiveAvgPool3d: 3,
}
"""Means over windows, by number of dimensions."""


def add_recursive_diagonal(
    total: dict[str, Tensor],
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    loss: Loss,
    batch: tuple[Tensor, Tensor],
    exact_outputs: bool,
) -> None:
    """Add the diagonal of the Hessian of the summed loss of one batch.

    Args:
        total: What to add to, by parameter name.
        model: A chain of modules.
        parameters: Trainable parameters by name.
        loss: The loss.
        batch: Inputs and targets.
        exact_outputs: Whether to start from the exact diagonal at the outputs (HesScale), or to
            treat a softmax like an elementwise function (BL89).

    Raises:
        ValueError: If the model is no chain of supported modules.
    """
    x, y = batch
    names = {id(p): name for name, p in parameters.items()}
    passed = []
    for module in _chain(model, "model"):
        leaf = x.detach()
        if leaf.is_floating_point():
            leaf.requires_grad_()
        x = module(leaf.clone())  # modules may work in place
        passed.append((module, leaf, x))
    outputs = x.detach()
    g = loss.gradient(outputs, y)
    h = loss.hessian_diagonal(outputs)
    if not exact_outputs and isinstance(loss, CrossEntropy):
        h = h * _probabilities(outputs, y)
    for module, leaf, output in reversed(passed):
        for attribute, entries in _parameter_diagonals(module, leaf, h):
            name = names.get(id(module._parameters[attribute]))
            if name is not None:
                total[name] += entries.to(total[name].dtype)
        h = _pulled(module, leaf, output, g, h)
        (g,) = torch.autograd.grad(output, leaf, g)


def _probabilities(outputs: Tensor, y: Tensor) -> Tensor:
    """Targets as probabilities, shaped like the outputs ``[N, C, ...]``."""
    if y.is_floating_point():
        return y.to(outputs.dtype)
    return F.one_hot(y, outputs.shape[1]).movedim(-1, 1).to(outputs.dtype)


def _chain(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """Modules in the order in which a nested ``nn.Sequential`` calls them."""
    if type(module).forward is nn.Sequential.forward:
        for key, child in module.named_children():
            yield from _chain(child, f"{name}.{key}")
        return
    dropping = isinstance(module, DROPOUT) and (not module.training or module.p == 0)
    normalising = (
        isinstance(module, _BatchNorm) and not module.training and module.running_var is not None
    )
    known = layer_type(module) is not None or isinstance(module, ELEMENTWISE + SELECTING)
    if not (known or dropping or normalising or type(module) in AVERAGING):
        linear = (kind for kind, layer in LAYERS.items() if not layer.reads_indices)
        listed = (*linear, *ELEMENTWISE, *SELECTING, *AVERAGING)
        names = ", ".join(kind.__name__ for kind in listed)
        mode = " in training mode" if isinstance(module, (*DROPOUT, _BatchNorm)) else ""
        raise ValueError(
            f"{name}: got {type(module).__name__}{mode}. Supported: nn.Sequential of {names}; "
            "batch normalisation and dropout in eval mode."
        )
    yield module


def _parameter_diagonals(module: nn.Module, x: Tensor, h: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Diagonals with respect to the parameters of one module, by attribute."""
    if isinstance(module, _BatchNorm):
        assert module.running_mean is not None
        assert module.running_var is not None
        plain = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        if module.weight is not None:
            yield "weight", (h * plain.square()).sum(axes)
            yield "bias", h.sum(axes)
        return
    if layer_type(module) is None:
        return
    leaves = {
        name: torch.zeros_like(p).requires_grad_()
        for name, p in module._parameters.items()
        if p is not None
    }
    squared = functional_call(module, leaves, (x.detach().square(),))
    diagonals = torch.autograd.grad(squared, list(leaves.values()), h)
    yield from zip(leaves, diagonals, strict=True)


def _pulled(module: nn.Module, x: Tensor, output: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """The diagonal with respect to the input of one module."""
    if isinstance(module, ELEMENTWISE):
        leaf = x.detach().requires_grad_()
        y = module(leaf.clone())
        (first,) = torch.autograd.grad(y, leaf, torch.ones_like(y), create_graph=True)
        second = torch.zeros_like(first)
        if first.requires_grad:
            (second,) = torch.autograd.grad(first, leaf, torch.ones_like(first))
        return (first.square() * h + second * g).detach()
    if type(module) in AVERAGING:
        h = h * _averaging_weights(module, x)
    elif layer_type(module) is not None or isinstance(module, _BatchNorm):
        leaf = x.detach().requires_grad_()
        output, x = _squared(module, leaf), leaf
    (pulled,) = torch.autograd.grad(output, x, h, retain_graph=True)
    return pulled.detach()


def _squared(module: nn.Module, x: Tensor) -> Tensor:
    """Output of the same linear module with squared coefficients."""
    if not isinstance(module, _BatchNorm):
        weights = {
            name: p.detach().square() for name, p in module._parameters.items() if p is not None
        }
        squared: Tensor = functional_call(module, weights, (x,))
        return squared
    assert module.running_var is not None
    factor = 1 / (module.running_var + module.eps)
    if module.weight is not None:
        factor = factor * module.weight.detach().square()
    return x * factor.view(1, -1, *[1] * (x.ndim - 2))


def _averaging_weights(module: Any, x: Tensor) -> Tensor:
    """Weight of every pixel in every mean, shaped like the output but for batch and channels."""
    dims = AVERAGING[type(module)]
    ones = torch.ones_like(x[:1, :1])
    if "Adaptive" not in type(module).__name__:
        return _pool_weights(module, ones, dims)
    counts = torch.ones((), dtype=x.dtype, device=x.device)
    for length, size in zip(x.shape[2:], module(ones).shape[2:], strict=True):
        ends = [-(-(i + 1) * length // size) - i * length // size for i in range(size)]
        counts = counts[..., None] * torch.tensor(ends, dtype=x.dtype, device=x.device)
    return 1 / counts


def _pool_weights(module: Any, ones: Tensor, dims: int) -> Tensor:
    """Mean over met pixels divided by their number; torch counts in two dimensions at least."""
    lifted = dims == 1

    def sizes(value: Any, lift: int) -> tuple[int, ...]:
        entries = tuple(value) if isinstance(value, tuple) else (value,) * dims
        return (lift, *entries) if lifted else entries

    settings = (
        sizes(module.kernel_size, 1),
        sizes(module.stride, 1),
        sizes(module.padding, 0),
        module.ceil_mode,
        module.count_include_pad,
    )
    pool = F.avg_pool3d if dims == 3 else F.avg_pool2d
    ones = ones.unsqueeze(2) if lifted else ones
    divisor = getattr(module, "divisor_override", None)
    weights = pool(ones, *settings, divisor) / pool(ones, *settings, 1)
    return weights.squeeze(2) if lifted else weights
