"""BackPACK's quantities, under BackPACK's names, by the estimators of this package.

For models that BackPACK refuses or gets wrong: grouped convolutions, padding modes, output padding,
padding given as a string, and layers that it does not know. BackPACK itself is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tnkfac.curvature.capture.recording import recording
from tnkfac.curvature.estimators.data import check_model, predict, undisturbed
from tnkfac.curvature.estimators.diagonals import diagonal
from tnkfac.curvature.estimators.fisher import kfac
from tnkfac.curvature.estimators.jacobian_rows import (
    SampleRows,
    check_independent,
    owners,
    trainable,
)
from tnkfac.curvature.estimators.losses import describe_loss, vectors
from tnkfac.curvature.estimators.sample_gradients import all_rows, per_sample_gradients

Fields = dict[str, Any]
Quantity = Callable[[nn.Module, nn.Module, Tensor, Tensor, int], Fields]


@contextmanager
def backpack(
    *extensions: Any, model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor
) -> Iterator[None]:
    """Takes the place of BackPACK's context manager of this name, around ``loss.backward()``.

    The quantities are stored on entering, see :func:`compute`; backward passes inside do what they
    do without BackPACK.

    Args:
        extensions: Instances of BackPACK's extensions.
        model: The model, extended with BackPACK or not.
        loss_fn: The loss, likewise.
        x: Input of the model.
        y: Targets.

    Example:
        >>> import torch
        >>> from backpack import extend, extensions
        >>> conv = torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=2)
        >>> model = extend(torch.nn.Sequential(conv, torch.nn.Flatten()))
        >>> loss_fn = extend(torch.nn.MSELoss())
        >>> x, y = torch.rand(2, 4, 5, 5), torch.rand(2, 100)
        >>> loss = loss_fn(model(x), y)
        >>> with backpack(extensions.DiagGGNExact(), model=model, loss_fn=loss_fn, x=x, y=y):
        ...     loss.backward()
        >>> conv.weight.diag_ggn_exact.shape
        torch.Size([4, 2, 3, 3])
    """
    compute(model, loss_fn, x, y, *extensions)
    yield


def compute(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, *extensions: Any) -> None:
    """Store quantities of one batch in the parameters, under the field names of the extensions.

    Args:
        model: Any module that returns one tensor, extended with BackPACK or not.
        loss_fn: ``CrossEntropyLoss``, ``MSELoss`` or ``BCEWithLogitsLoss``, mean or sum.
        x: Input of the model.
        y: Targets.
        extensions: Instances of ``BatchGrad``, ``BatchL2Grad``, ``SumGradSquared``, ``Variance``,
            ``DiagGGNExact``, ``DiagGGNMC``, ``BatchDiagGGNExact``, ``BatchDiagGGNMC``,
            ``SqrtGGNExact``, ``SqrtGGNMC``, ``KFAC`` or ``KFLR``. The factors are lists ``[B, A]``
            for the weight of a supported layer (with a leading axis for more than one channel
            group) and ``[B]`` for its bias, as KFAC-expand and the exact matrix have them.

    Raises:
        TypeError: For another extension, model or loss.
        ValueError: As the estimators of :mod:`tnkfac.curvature`.
    """
    requested = []
    for extension in extensions:
        name = type(extension).__name__
        if name not in QUANTITIES or not hasattr(extension, "savefield"):
            given = extension.__name__ if isinstance(extension, type) else name
            listed = ", ".join(QUANTITIES)
            raise TypeError(f"extensions: got {given}. Supported: instances of {listed}.")
        if getattr(extension, "get_subsampling", lambda: None)() is not None:
            raise ValueError(f"extensions: got {name} with subsampling. Supported: all samples.")
        requested.append((extension, QUANTITIES[name]))
    for extension, quantity in requested:
        samples = getattr(extension, "get_num_mc_samples", lambda: 1)()
        for name, value in quantity(model, loss_fn, x, y, samples).items():
            setattr(model.get_parameter(name), extension.savefield, value)


def _batch_grad(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, _: int) -> Fields:
    return dict(per_sample_gradients(model, loss_fn, [(x, y)]))


def _batch_l2(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, _: int) -> Fields:
    rows = per_sample_gradients(model, loss_fn, [(x, y)])
    return {name: row.square().unsqueeze(-1).flatten(1).sum(1) for name, row in rows.items()}


def _variance(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, _: int) -> Fields:
    rows = per_sample_gradients(model, loss_fn, [(x, y)])
    return {name: row.var(0, unbiased=False) for name, row in rows.items()}


def _diagonal(kind: str) -> Quantity:
    def values(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, samples: int) -> Fields:
        return dict(diagonal(model, loss_fn, [(x, y)], kind=kind, mc_samples=samples))

    return values


def _root(fisher_type: str) -> Quantity:
    """``[C, N, *parameter.shape]``: a root of the Gauss-Newton matrix."""

    def values(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, samples: int) -> Fields:
        check_model(model)
        loss = describe_loss(loss_fn)
        parameters = trainable(model)
        check_independent(model)
        with undisturbed(model):
            with recording(owners(parameters, model)) as calls:
                outputs = predict(model, x)
            loss.check(outputs, y)
            rows = SampleRows(parameters, calls, outputs)
            scale = loss.divisor(loss.terms(outputs)) ** -0.5
            columns = [
                all_rows(rows, vector, parameters)
                for vector in vectors(loss, fisher_type, outputs, y, samples, None)
            ]
        return {name: torch.stack([c[name] for c in columns]) * scale for name in parameters}

    return values


def _batch_diagonal(fisher_type: str) -> Quantity:
    root = _root(fisher_type)

    def values(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, samples: int) -> Fields:
        columns = root(model, loss_fn, x, y, samples)
        return {name: column.square().sum(0) for name, column in columns.items()}

    return values


def _kronecker(fisher_type: str) -> Quantity:
    def values(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, samples: int) -> Fields:
        options: dict[str, Any] = {"fisher_type": fisher_type, "mc_samples": samples}
        data = [(x, y)]
        fields: Fields = {}
        # Positions of one sample add up in the gradient of a bias.
        summed = kfac(model, loss_fn, data, approx="reduce", **options)
        for name, kronecker in kfac(model, loss_fn, data, **options).items():
            layer = kronecker.layer
            features = layer.in_dim - layer.bias
            prefix = f"{name}." if name else ""
            A, B = kronecker.A, kronecker.B
            A = torch.diag_embed(A) if A.ndim == 2 else A[:, :features, :features]
            fields[f"{prefix}weight"] = [_grouped(B), _grouped(A)]
            if layer.bias:
                fields[f"{prefix}bias"] = [_grouped(summed[name].B)]
        return fields

    return values


def _grouped(factor: Tensor) -> Tensor:
    return factor[0] if factor.shape[0] == 1 else factor


QUANTITIES: dict[str, Quantity] = {
    "BatchGrad": _batch_grad,
    "BatchL2Grad": _batch_l2,
    "SumGradSquared": _diagonal("empirical-fisher"),
    "Variance": _variance,
    "DiagGGNExact": _diagonal("ggn"),
    "DiagGGNMC": _diagonal("ggn-mc"),
    "BatchDiagGGNExact": _batch_diagonal("type-2"),
    "BatchDiagGGNMC": _batch_diagonal("mc"),
    "SqrtGGNExact": _root("type-2"),
    "SqrtGGNMC": _root("mc"),
    "KFAC": _kronecker("mc"),
    "KFLR": _kronecker("type-2"),
}
"""Extension -> what it stores. Values are named by parameter."""
