"""Inner products of Jacobian rows: the Gauss-Newton Gram matrix and the empirical NTK."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tnkfac.curvature.capture.recording import recording
from tnkfac.curvature.estimators.data import (
    Data,
    batches,
    check_model,
    predict,
    undisturbed,
)
from tnkfac.curvature.estimators.jacobian_rows import (
    SampleRows,
    check_independent,
    owners,
    trainable,
)
from tnkfac.curvature.estimators.losses import describe_loss
from tnkfac.curvature.moments.second_moment import accumulation_dtype

MOST = 2**25
"""Numbers of the Jacobian rows that are held at one time."""


def gram(model: nn.Module, loss_fn: nn.Module, data: Data) -> Tensor:
    """Gram matrix of the Gauss-Newton matrix of the loss over all data.

    With the Gauss-Newton matrix ``V V^T`` (``V [P, C * N]`` back-propagates a square root of the
    loss' Hessian), this is ``V^T V``: the same non-zero eigenvalues, at the size of the data
    (arXiv 2106.02624).

    Args:
        model: Any module that returns one tensor ``[N, ...]``.
        loss_fn: ``CrossEntropyLoss``, ``MSELoss`` or ``BCEWithLogitsLoss``, mean or sum.
        data: Iterable of ``(x, y)``, with equally many numbers per output.

    Returns:
        ``[C * N, C * N]``, class-major and sample-minor; ``C`` counts the outputs of a sample, and
        ``N`` the samples of all data in order. In float32 at least.

    Raises:
        TypeError: If model, loss or data are not of a supported type.
        ValueError: For a loss with class weights or ``ignore_index``, outputs of several sizes,
            batch normalisation in training mode, or outputs that depend on no trainable parameter.

    Example:
        >>> import torch
        >>> data = [(torch.rand(4, 3), torch.tensor([0, 1, 1, 0]))]
        >>> gram(torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss(), data).shape
        torch.Size([8, 8])
    """
    check_model(model)
    loss = describe_loss(loss_fn)
    parameters = trainable(model)
    check_independent(model)
    jacobians = []
    terms = 0
    with undisturbed(model):
        for x, y in batches(data):
            with recording(owners(parameters, model)) as calls:
                outputs = predict(model, x)
            if outputs.numel() == 0:
                continue
            loss.check(outputs, y)
            terms += loss.terms(outputs)
            rows = SampleRows(parameters, calls, outputs)
            jacobians.append(_Jacobian.of(rows, loss.root_columns(outputs)))
        return _inner_products(jacobians, parameters) / loss.divisor(terms)


def ntk(model: nn.Module, x: Any) -> Tensor:
    """Empirical neural tangent kernel ``J J^T`` of all trainable parameters.

    Args:
        model: Any module that returns one tensor ``[N, ...]``.
        x: Input of the model.

    Returns:
        ``[C * N, C * N]``, class-major and sample-minor; ``C`` counts the outputs of a sample. In
        float32 at least.

    Raises:
        TypeError: If the model is no module, or does not return one tensor.
        ValueError: For batch normalisation in training mode, or outputs that depend on no trainable
            parameter.

    Example:
        >>> import torch
        >>> ntk(torch.nn.Linear(3, 2), torch.rand(4, 3)).shape
        torch.Size([8, 8])
    """
    check_model(model)
    parameters = trainable(model)
    check_independent(model)
    with undisturbed(model):
        with recording(owners(parameters, model)) as calls:
            outputs = predict(model, x)
        jacobians = []
        if outputs.numel():
            rows = SampleRows(parameters, calls, outputs)
            jacobians.append(_Jacobian.of(rows, _entries(outputs)))
        return _inner_products(jacobians, parameters)


def _entries(outputs: Tensor) -> Iterator[Tensor]:
    """Ones at one entry of every sample."""
    flat = outputs.detach().flatten(1) if outputs.ndim > 1 else outputs.detach().unsqueeze(1)
    for entry in range(flat.shape[1]):
        unit = torch.zeros_like(flat)
        unit[:, entry] = 1
        yield unit.view(outputs.shape)


@dataclass
class _Jacobian:
    """Rows of one batch for all columns, formed when they are needed."""

    rows: SampleRows
    back: list[list[Tensor]] = field(default_factory=list)
    single: list[dict[str, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, rows: SampleRows, vectors: Iterator[Tensor]) -> _Jacobian:
        """Back-propagate some vectors."""
        jacobian = cls(rows)
        for vector in vectors:
            jacobian.back.append(rows.backpropagate(vector))
            parts: dict[str, list[Tensor]] = {}
            for _, name, row in rows.one_by_one(vector):
                parts.setdefault(name, []).append(row.flatten())
            jacobian.single.append({name: torch.stack(part) for name, part in parts.items()})
        return jacobian

    def of_parameter(self, name: str, numbers: int, channels: slice | None) -> Tensor:
        """``[C, N, P]`` for a parameter of ``P`` numbers, or the part of some output channels."""
        if name in self.single[0]:
            return torch.stack([part[name] for part in self.single])
        if name in self.rows.unused:
            return self.rows.like.new_zeros(len(self.back), self.rows.samples, numbers)
        everything = slice(None)
        parts = [self.rows.rows(name, back, everything, channels) for back in self.back]
        return torch.stack(
            [part.unsqueeze(-1).flatten(1) for part in parts]
        )  # a number has no axis


def _inner_products(jacobians: Sequence[_Jacobian], parameters: dict[str, nn.Parameter]) -> Tensor:
    """Sum over all parameters, ``[C * N, C * N]``."""
    like = next(iter(parameters.values()))
    counts = {len(jacobian.back) for jacobian in jacobians}
    if len(counts) > 1:
        raise ValueError(f"data: got outputs with {sorted(counts)} numbers. Supported: one size.")
    size = sum(jacobian.rows.samples for jacobian in jacobians) * max(counts, default=0)
    total = torch.zeros(size, size, dtype=accumulation_dtype(like.dtype), device=like.device)
    if not jacobians:
        return total
    for name, parameter in parameters.items():
        if all(name in jacobian.rows.unused for jacobian in jacobians):
            continue
        for channels in _slices(jacobians, name, parameter, size):
            parts = [
                jacobian.of_parameter(name, parameter.numel(), channels) for jacobian in jacobians
            ]
            rows = torch.cat(parts, 1).flatten(0, 1).to(total.dtype)
            total.addmm_(rows, rows.T)
    return total


def _slices(
    jacobians: Sequence[_Jacobian], name: str, parameter: Tensor, size: int
) -> Sequence[slice | None]:
    """Output channels whose rows are held together, or None for a parameter as a whole."""
    for jacobian in jacobians:
        if name not in jacobian.rows.together or not jacobian.rows.sliceable(name):
            return [None]
    channels = jacobians[0].rows.channels(name)
    step = max(1, MOST * channels // max(1, size * parameter.numel()))
    return [slice(first, min(first + step, channels)) for first in range(0, channels, step)]
