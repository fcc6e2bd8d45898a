"""Losses as likelihoods: what a Fisher or Gauss-Newton matrix needs of them.

Everything here belongs to the loss *summed* over its terms; a mean divides the curvature by
:meth:`Loss.terms`, once, over all data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Loss(ABC):
    """A loss that is the negative log-likelihood of a distribution, up to a factor.

    Attributes:
        mean: Whether its terms are averaged (``reduction="mean"``) or summed.
    """

    mean: bool

    def divisor(self, terms: int) -> int:
        """Divisor of the loss of all data, whose sum has so many terms."""
        return max(terms, 1) if self.mean else 1

    def terms(self, outputs: Tensor) -> int:
        """Number of terms of the loss in a batch of outputs ``[N, ...]``."""
        return outputs.numel()

    def samples(self, outputs: Tensor, positions: bool) -> int:
        """Number of likelihoods in a batch of outputs ``[N, ...]``.

        Args:
            outputs: Outputs of the model.
            positions: Whether all axes between the first and the last count.
        """
        return prod(outputs.shape[:-1]) if positions and outputs.ndim > 1 else outputs.shape[0]

    @abstractmethod
    def check(self, outputs: Tensor, targets: Any) -> None:
        """Raise a ``ValueError`` if outputs and targets do not belong together."""

    @abstractmethod
    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The summed loss, differentiable."""

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of the summed loss with respect to the outputs, shaped like them."""
        leaf = outputs.detach().requires_grad_()
        gradient: Tensor = torch.autograd.grad(self.value(leaf, targets), leaf)[0]
        return gradient

    @abstractmethod
    def root_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """Columns of a square root ``S`` of the Hessian with respect to the outputs.

        Yields:
            Tensors shaped like ``outputs [N, ...]``; column ``c`` of all samples at once. For every
            sample, the sum of their outer products is the Hessian of its summed loss.
        """

    @abstractmethod
    def hessian_diagonal(self, outputs: Tensor) -> Tensor:
        """Diagonal of the Hessian with respect to the outputs, shaped like them."""

    @abstractmethod
    def sampled_gradient(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Gradient of the summed loss at targets drawn from the model, shaped like the outputs.

        Its covariance is the Hessian of :meth:`root_columns`.
        """


class CrossEntropy(Loss):
    """``CrossEntropyLoss``: classes on axis 1 of the outputs ``[N, C, ...]``."""

    def terms(self, outputs: Tensor) -> int:
        """One per sample and position."""
        return outputs.numel() // outputs.shape[1]

    def samples(self, outputs: Tensor, positions: bool) -> int:
        """Its terms."""
        return self.terms(outputs)

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Class indices ``[N, ...]`` without ``ignore_index``, or probabilities ``[N, C, ...]``."""
        if outputs.ndim < 2:
            raise ValueError(f"outputs: got {tuple(outputs.shape)}. Supported: [N, C, ...].")
        if not isinstance(targets, Tensor):
            raise ValueError(f"y: got {type(targets).__name__}. Supported: a tensor.")
        classes = (outputs.shape[0], *outputs.shape[2:])
        probabilities = targets.is_floating_point()
        if targets.shape != (outputs.shape if probabilities else torch.Size(classes)):
            raise ValueError(
                f"y: got {tuple(targets.shape)} for outputs {tuple(outputs.shape)}. Supported: "
                f"class indices {classes}, or probabilities shaped like the outputs."
            )
        if not probabilities and bool((targets < 0).any()):
            raise ValueError("y: got a negative class (ignore_index). Supported: classes.")

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of ``-log p[target]``."""
        return F.cross_entropy(outputs, targets, reduction="sum")

    def root_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """Column ``c`` of ``diag(sqrt p) - p sqrt(p)^T``, one position at a time."""
        p = outputs.detach().softmax(1)
        for c in range(p.shape[1]):
            column = -p * p[:, c : c + 1].sqrt()
            column[:, c] += p[:, c].sqrt()
            yield from _one_position(column)

    def hessian_diagonal(self, outputs: Tensor) -> Tensor:
        """``p (1 - p)``."""
        p = outputs.detach().softmax(1)
        return p * (1 - p)

    def sampled_gradient(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """``p - onehot(class)``."""
        p = outputs.detach().softmax(1)
        rows = p.movedim(1, -1)
        drawn = torch.multinomial(rows.reshape(-1, p.shape[1]), 1, generator=generator)
        onehot = F.one_hot(drawn.reshape(rows.shape[:-1]), p.shape[1]).to(p.dtype)
        return p - onehot.movedim(-1, 1)


class SquaredError(Loss):
    """``MSELoss``: a Gaussian of variance one half for every entry."""

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Equal shapes."""
        _check_equal_shapes(outputs, targets)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of ``(output - target)^2``."""
        return F.mse_loss(outputs, targets, reduction="sum")

    def root_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """``sqrt(2)`` at one entry of every sample."""
        yield from _one_entry(torch.full_like(outputs.detach(), 2.0**0.5))

    def hessian_diagonal(self, outputs: Tensor) -> Tensor:
        """Twos."""
        return torch.full_like(outputs.detach(), 2.0)

    def sampled_gradient(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Normal numbers of variance two."""
        return _normal(outputs, generator).mul(2.0**0.5)


class BinaryCrossEntropy(Loss):
    """``BCEWithLogitsLoss``: a Bernoulli distribution for every entry."""

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Equal shapes."""
        _check_equal_shapes(outputs, targets)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of the binary cross-entropies."""
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")

    def root_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """``sqrt(p (1 - p))`` at one entry of every sample."""
        yield from _one_entry(self.hessian_diagonal(outputs).sqrt())

    def hessian_diagonal(self, outputs: Tensor) -> Tensor:
        """``p (1 - p)``."""
        p = outputs.detach().sigmoid()
        return p * (1 - p)

    def sampled_gradient(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """``p - bit``."""
        p = outputs.detach().sigmoid()
        drawn: Tensor = torch.bernoulli(p, generator=generator)
        return p - drawn


_LOSSES: dict[type[nn.Module], type[Loss]] = {
    nn.CrossEntropyLoss: CrossEntropy,
    nn.MSELoss: SquaredError,
    nn.BCEWithLogitsLoss: BinaryCrossEntropy,
}


def describe_loss(loss_fn: nn.Module) -> Loss:
    """The :class:`Loss` of a loss module.

    Raises:
        TypeError: If it is not a ``CrossEntropyLoss``, ``MSELoss`` or ``BCEWithLogitsLoss``.
        ValueError: For class weights, ``ignore_index``, label smoothing or ``reduction="none"``.
    """
    names = ", ".join(kind.__name__ for kind in _LOSSES)
    kind = type(loss_fn)
    if kind not in _LOSSES:
        given = kind.__name__ if isinstance(loss_fn, nn.Module) else repr(loss_fn)
        raise TypeError(f"loss_fn: got {given}. Supported: {names}.")
    options = {"weight": None, "pos_weight": None, "label_smoothing": 0.0, "ignore_index": -100}
    for option, stock in options.items():
        value = getattr(loss_fn, option, stock)
        if value is not stock and (isinstance(value, Tensor) or value != stock):
            raise ValueError(f"loss_fn: got {option}={value}. Supported: {option}={stock}.")
    if loss_fn.reduction not in ("mean", "sum"):
        raise ValueError(f"loss_fn: got reduction={loss_fn.reduction!r}. Supported: mean, sum.")
    return _LOSSES[kind](mean=loss_fn.reduction == "mean")


def vectors(
    loss: Loss,
    fisher_type: str,
    outputs: Tensor,
    targets: Any,
    mc_samples: int,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Vectors at the outputs from which a Fisher or Gauss-Newton matrix is back-propagated.

    Args:
        loss: The loss.
        fisher_type: ``"type-2"``, ``"mc"``, ``"empirical"``, or ``"forward-only"`` for nothing.
        outputs: ``[N, ...]``.
        targets: For ``"empirical"``.
        mc_samples: Draws, for ``"mc"``.
        generator: For the draws.
    """
    if fisher_type == "type-2":
        yield from loss.root_columns(outputs)
    elif fisher_type == "mc":
        for _ in range(mc_samples):
            yield loss.sampled_gradient(outputs, generator) / mc_samples**0.5
    elif fisher_type == "empirical":
        yield loss.gradient(outputs, targets)


def _check_equal_shapes(outputs: Tensor, targets: Any) -> None:
    if not isinstance(targets, Tensor) or targets.shape != outputs.shape:
        given = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"y: got {given}. Supported: shaped like outputs {tuple(outputs.shape)}.")


def _one_entry(values: Tensor) -> Iterator[Tensor]:
    """``values [N, ...]`` at one entry of every sample, zeros elsewhere."""
    flat = values.flatten(1) if values.ndim > 1 else values.unsqueeze(1)
    for entry in range(flat.shape[1]):
        column = torch.zeros_like(flat)
        column[:, entry] = flat[:, entry]
        yield column.reshape(values.shape)


def _one_position(values: Tensor) -> Iterator[Tensor]:
    """``values [N, C, ...]`` at one position of every sample, zeros elsewhere."""
    if values.ndim == 2:
        yield values
        return
    flat = values.flatten(2)
    for position in range(flat.shape[2]):
        column = torch.zeros_like(flat)
        column[:, :, position] = flat[:, :, position]
        yield column.reshape(values.shape)


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
