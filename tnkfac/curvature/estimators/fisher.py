"""Kronecker factors of a whole model: GGN and Fisher matrices over data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tnkfac.curvature.callers import warn
from tnkfac.curvature.capture.recording import Call, gradients, recording
from tnkfac.curvature.estimators.data import (
    Data,
    batches,
    check_choice,
    check_dependence,
    check_model,
    check_samples,
    predict,
    undisturbed,
)
from tnkfac.curvature.estimators.kronecker import Kronecker
from tnkfac.curvature.estimators.losses import Loss, describe_loss, vectors
from tnkfac.curvature.factors import check_approx
from tnkfac.curvature.layers import LAYERS, Layer, describe, layer_type
from tnkfac.curvature.moments.second_moment import Approx, SecondMoment, accumulation_dtype

FISHER_TYPES = ("type-2", "mc", "empirical", "forward-only")
LOSS_AVERAGES = ("batch", "batch+sequence", None)


class _Told(str):
    """The default of ``loss_average``: equal to a name, but no statement of the caller's."""


_BATCH = _Told("batch")


def kfac(
    model: nn.Module,
    loss_fn: nn.Module,
    data: Data,
    *,
    approx: str = "expand",
    fisher_type: str = "type-2",
    mc_samples: int = 1,
    loss_average: str | None = _BATCH,
    generator: torch.Generator | None = None,
) -> dict[str, Kronecker]:
    """Kronecker-factored curvature of every supported layer, streamed over data.

    The loss is the mean (or the sum, as ``loss_fn`` says) over all of ``data``. The block of
    a layer and channel group is ``B (x) A`` with ``A`` as in :func:`tnkfac.curvature.input_factor`
    and ``B = sum g g^T / R`` over samples, vectors and (expand) positions, where ``g`` is what
    back-propagation of the vectors below gives at the layer's output and ``R`` what the mean
    divides by (arXiv 1503.05671, 1602.01407, 2311.00636). For one layer without weight sharing
    and ``"type-2"`` this is the exact Gauss-Newton matrix.

    Args:
        model: Any module that returns one tensor. It runs in the mode it is in; parameters,
            their ``.grad`` and buffers are left as they are.
        loss_fn: ``CrossEntropyLoss``, ``MSELoss`` or ``BCEWithLogitsLoss``, mean or sum.
        data: Iterable of ``(x, y)``. Empty batches count nothing.
        approx: ``"expand"`` (KFC) or ``"reduce"``.
        fisher_type: Vectors that are back-propagated: ``"type-2"``, all columns of a square root of
            the loss' Hessian; ``"mc"``, gradients at targets drawn from the model;
            ``"empirical"``, gradients at the targets, with ``B = T sum g g^T`` for the mean's
            gradients over ``T`` samples (for cross-entropy, its terms); ``"forward-only"``, none,
            and ``B = I``.
        mc_samples: Targets drawn per sample, for ``"mc"``.
        loss_average: What the caller believes the loss to be averaged over: ``"batch"``,
            ``"batch+sequence"`` (positions of the output, too), or None for a sum.
        generator: For the drawn targets, on the device of the outputs; by default the global one.

    Returns:
        A :class:`Kronecker` for every layer with a trainable weight that ran, by module name. A
        warning names those that did not, as where a weight is used without a call of its module.

    Raises:
        TypeError: If model, loss or data are not of a supported type.
        ValueError: For unknown names, a loss with class weights or ``ignore_index``, a
            ``loss_average`` that contradicts ``loss_fn``, a model without supported layers, or
            outputs that depend on no trainable parameter.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten())
        >>> data = [(torch.rand(2, 1, 6, 6), torch.rand(2, 64)) for _ in range(3)]
        >>> factors = kfac(model, torch.nn.MSELoss(), data, fisher_type="mc")
        >>> factors["0"].A.shape, factors["0"].B.shape
        (torch.Size([1, 10, 10]), torch.Size([1, 4, 4]))
    """
    check_model(model)
    loss = describe_loss(loss_fn)
    kind = check_approx(approx)
    check_choice("fisher_type", fisher_type, FISHER_TYPES)
    check_samples(mc_samples)
    _check_average(loss, loss_average)
    layers = _trainable_layers(model)
    sums = {module: _Sums(layer, kind) for module, (_, layer) in layers.items()}
    terms = samples = 0
    with undisturbed(model):
        for x, y in batches(data):
            with recording(layers) as calls:
                outputs = predict(model, x)
            if outputs.numel() == 0:
                continue
            loss.check(outputs, y)
            if fisher_type != "forward-only":
                check_dependence(outputs)
            if loss_average is not None and loss_average is not _BATCH:
                _check_positions(loss, loss_average, outputs)
            terms += loss.terms(outputs)
            samples += loss.samples(outputs, loss_average == "batch+sequence")
            propagated = vectors(loss, fisher_type, outputs, y, mc_samples, generator)
            _add(sums, calls, outputs, propagated)
    estimates = {}
    for module, (name, _) in layers.items():
        if terms and (sums[module].A is None or sums[module].lost):
            why = "ran another forward" if sums[module].lost else "did not run"
            warn(f"kfac: layer {name!r} {why} and is left out.")
            continue
        weight = _weight(loss, fisher_type, terms, samples)
        estimates[name] = sums[module].kronecker(weight, like=module.get_parameter("weight"))
    return estimates


def _weight(loss: Loss, fisher_type: str, terms: int, samples: int) -> float | None:
    """Factor on the sum of ``g g^T`` of the summed loss; None for an identity."""
    if fisher_type == "forward-only":
        return None
    divisor = loss.divisor(terms)
    if fisher_type == "empirical" and loss.mean:
        return samples / divisor**2
    return 1 / divisor


@dataclass
class _Sums:
    """Un-normalised factors of one layer."""

    layer: Layer
    approx: Approx
    A: Tensor | None = None
    B: Tensor | None = None
    rows: int = 0
    lost: bool = False

    def called(self, call: Call) -> Layer | None:
        """The layer as it was called, if its factors have the same shape."""
        layer = call.layer
        if layer is None or layer.weight_shape != self.layer.weight_shape:
            return None
        return layer

    def add_input(self, moment: SecondMoment) -> None:
        self.A = _plus(self.A, moment)
        self.rows += moment.rows.count

    def add_gradient(self, moment: SecondMoment) -> None:
        self.B = _plus(self.B, moment)

    def kronecker(self, weight: float | None, like: Tensor) -> Kronecker:
        dtype, (d, out) = accumulation_dtype(like.dtype), (self.layer.in_dim, self.layer.out_dim)
        B = like.new_zeros((self.layer.groups, out, out), dtype=dtype)
        if self.A is not None:
            A = self.A / self.rows
        else:
            diagonal = self.layer.reads_indices and self.approx == "expand"
            shape = (self.layer.groups, d) if diagonal else (self.layer.groups, d, d)
            A = like.new_zeros(shape, dtype=dtype)
        if weight is None:
            B = B + torch.eye(out, dtype=dtype, device=like.device)
        elif self.B is not None:
            B = self.B * weight
        return Kronecker(self.layer, A.detach(), B.detach())


def _plus(total: Tensor | None, moment: SecondMoment) -> Tensor:
    with torch.autocast(moment.device.type, enabled=False):
        part = moment.diagonal() if moment.rows.is_diagonal else moment.dense()
    if total is None:
        return part
    if total.ndim != part.ndim:  # one of them is diagonal
        total, part = (torch.diag_embed(t) if t.ndim == 2 else t for t in (total, part))
    return total.add_(part)


def _add(
    sums: dict[nn.Module, _Sums],
    calls: dict[nn.Module, list[Call]],
    outputs: Tensor,
    propagated: Iterable[Tensor],
) -> None:
    """Add the statistics of one batch."""
    flat = [(sums[module], call) for module, recorded in calls.items() for call in recorded]
    layers = [total.called(call) for total, call in flat]
    for (total, call), layer in zip(flat, layers, strict=True):
        taken, x = call.taken()
        if layer is None or taken is None:
            total.lost = True
            continue
        layer = replace(taken, bias=total.layer.bias)
        dtype = accumulation_dtype(x.dtype if x.is_floating_point() else outputs.dtype)
        total.add_input(layer.input_moment(x, total.approx, call.shape, dtype))
    for vector in propagated:
        grads = gradients([call for _, call in flat], outputs, vector)
        for (total, _), layer, g in zip(flat, layers, grads, strict=True):
            if layer is not None:
                total.add_gradient(
                    layer.output_moment(g, total.approx, accumulation_dtype(g.dtype))
                )


def _trainable_layers(model: nn.Module) -> dict[nn.Module, tuple[str, Layer]]:
    """Supported layers with a trainable weight, and their names."""
    layers = {}
    for name, module in model.named_modules():
        if layer_type(module, indices=True) is None:
            continue
        weight, bias = (module._parameters.get(p) for p in ("weight", "bias"))
        if weight is not None and weight.requires_grad:
            trained = bias is not None and bias.requires_grad
            layers[module] = (name, replace(describe(module), bias=trained))
    if not layers:
        names = ", ".join(kind.__name__ for kind in LAYERS)
        raise ValueError(f"model: got no layer with a trainable weight. Supported: {names}.")
    return layers


def _check_average(loss: Loss, loss_average: str | None) -> None:
    check_choice("loss_average", loss_average, LOSS_AVERAGES)
    if loss_average is not _BATCH and loss.mean != (loss_average is not None):
        reduction = "mean" if loss.mean else "sum"
        raise ValueError(
            f"loss_average: got {loss_average!r}, but loss_fn has reduction={reduction!r}. "
            "Supported: 'batch' and 'batch+sequence' for a mean, None for a sum."
        )


def _check_positions(loss: Loss, loss_average: str, outputs: Tensor) -> None:
    """Cross-entropy of ``[N, C, positions]`` is a mean over the positions as well."""
    if loss_average == "batch" and loss.samples(outputs, False) != outputs.shape[0]:
        raise ValueError(
            f"loss_average: got 'batch', but loss_fn averages over the positions of outputs "
            f"{tuple(outputs.shape)}, too. Supported: 'batch+sequence'."
        )
