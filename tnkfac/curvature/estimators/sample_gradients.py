"""Gradients of every sample."""

from __future__ import annotations

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


def per_sample_gradients(model: nn.Module, loss_fn: nn.Module, data: Data) -> dict[str, Tensor]:
    """Contribution of every sample to the gradient of the loss over all data.

    Args:
        model: Any module that returns one tensor ``[N, ...]``.
        loss_fn: ``CrossEntropyLoss``, ``MSELoss`` or ``BCEWithLogitsLoss``, mean or sum.
        data: Iterable of ``(x, y)``.

    Returns:
        ``[N, *parameter.shape]`` for every trainable parameter, by name, with all samples of the
        data in order. Their sum is the gradient: those of a mean loss carry its ``1/N``.

    Raises:
        TypeError: If model, loss or data are not of a supported type.
        ValueError: For a loss with class weights or ``ignore_index``, batch normalisation in
            training mode, or outputs that depend on no trainable parameter.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> data = [(torch.rand(4, 3), torch.tensor([0, 1, 1, 0]))]
        >>> per_sample_gradients(model, torch.nn.CrossEntropyLoss(), data)["weight"].shape
        torch.Size([4, 2, 3])
    """
    check_model(model)
    loss = describe_loss(loss_fn)
    parameters = trainable(model)
    check_independent(model)
    parts: dict[str, list[Tensor]] = {name: [] for name in parameters}
    terms = 0
    with undisturbed(model):
        for x, y in batches(data):
            with recording(owners(parameters, model)) as calls:
                outputs = predict(model, x)
            if outputs.numel() == 0:
                continue
            loss.check(outputs, y)
            terms += loss.terms(outputs)
            batch = SampleRows(parameters, calls, outputs)
            vector = loss.gradient(outputs, y)
            for name, part in all_rows(batch, vector, parameters).items():
                parts[name].append(part)
    for name, p in parameters.items():
        if not parts[name]:
            dtype = accumulation_dtype(p.dtype)
            parts[name] = [torch.zeros(0, *p.shape, dtype=dtype, device=p.device)]
    joined = {n: part[0] if len(part) == 1 else torch.cat(part) for n, part in parts.items()}
    return {name: rows.div_(loss.divisor(terms)) for name, rows in joined.items()}


def all_rows(
    rows: SampleRows, vector: Tensor, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Per-sample gradients of one batch for one vector, ``[N, *parameter.shape]`` each."""
    back = rows.backpropagate(vector)
    gradients = {name: rows.rows(name, back, slice(None)).detach() for name in rows.together}
    single: dict[str, list[Tensor]] = {}
    for _, name, row in rows.one_by_one(vector):
        single.setdefault(name, []).append(row.to(accumulation_dtype(row.dtype)))
    gradients |= {name: torch.stack(parts) for name, parts in single.items()}
    for name in rows.unused:
        p = parameters[name]
        dtype = accumulation_dtype(p.dtype)
        gradients[name] = torch.zeros(rows.samples, *p.shape, dtype=dtype, device=p.device)
    return {name: gradients[name] for name in parameters}
