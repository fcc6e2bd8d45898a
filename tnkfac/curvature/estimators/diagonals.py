"""Diagonals of curvature matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnkfac.curvature.capture.recording import recording
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
from tnkfac.curvature.estimators.hesscale import add_recursive_diagonal
from tnkfac.curvature.estimators.hutchinson import (
    add_hutchinson,
    add_square,
    signed_columns,
    twice_differentiable,
)
from tnkfac.curvature.estimators.jacobian_rows import (
    SampleRows,
    check_independent,
    owners,
    trainable,
)
from tnkfac.curvature.estimators.losses import describe_loss, vectors
from tnkfac.curvature.moments.second_moment import accumulation_dtype

KINDS = (
    "ggn",
    "ggn-mc",
    "ggn-rademacher",
    "empirical-fisher",
    "hutchinson",
    "hesscale",
    "bl89",
)
FISHERS = {"ggn": "type-2", "ggn-mc": "mc", "empirical-fisher": "empirical"}
"""Kinds that tell samples apart, and the vectors that they back-propagate."""
MOST = 2**22
"""Numbers of the per-sample gradients that are held at one time."""


def diagonal(
    model: nn.Module,
    loss_fn: nn.Module,
    data: Data,
    *,
    kind: str = "ggn",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Diagonal of a curvature matrix of the loss over all data, for every trainable parameter.

    Args:
        model: Any module that returns one tensor; ``"hesscale"`` and ``"bl89"`` need an
            ``nn.Sequential``. It runs in the mode it is in, and is left as it is.
        loss_fn: ``CrossEntropyLoss``, ``MSELoss`` or ``BCEWithLogitsLoss``, mean or sum.
        data: Iterable of ``(x, y)``. Empty batches count nothing.
        kind: Which matrix, and how:

            * ``"ggn"``: Gauss-Newton, exactly, from the columns of a square root of the loss'
              Hessian, sample by sample (BackPACK's ``diag_ggn_exact``, arXiv 1912.10985).
            * ``"ggn-mc"``: the same from ``mc_samples`` targets drawn from the model.
            * ``"ggn-rademacher"``: the same from ``mc_samples`` random signs of all columns and
              samples, one backward pass each; unbiased, of higher variance.
            * ``"empirical-fisher"``: sum of the squared gradients of all samples; of a mean loss
              they carry ``1/N`` (BackPACK's ``sum_grad_squared``).
            * ``"hutchinson"``: the Hessian's, as the mean of ``z * (H z)`` over ``mc_samples``
              vectors of random signs.
            * ``"hesscale"``: the Hessian's, as if the Hessian with respect to every hidden layer
              were diagonal, with the exact diagonal at the outputs (arXiv 2406.03276).
            * ``"bl89"``: the same, also neglecting the off-diagonal derivatives of the softmax in
              a cross-entropy (Becker and LeCun, 1989).
        mc_samples: Draws per sample or batch, for the kinds that draw.
        generator: For the draws, on the device of what is drawn; by default the global one.

    Returns:
        Tensors shaped like the parameters, by their names; in float32 at least.

    Raises:
        TypeError: If model, loss or data are not of a supported type.
        ValueError: For an unknown kind, a loss with class weights or ``ignore_index``, batch
            normalisation in training mode where samples are told apart, modules that
            ``"hesscale"`` and ``"bl89"`` do not know, operations without the second derivative of
            ``"hutchinson"``, or outputs that depend on no trainable parameter.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> data = [(torch.rand(4, 3), torch.rand(4, 2)) for _ in range(2)]
        >>> diagonal(model, torch.nn.MSELoss(), data, kind="empirical-fisher")["0.weight"].shape
        torch.Size([2, 3])
    """
    check_model(model)
    loss = describe_loss(loss_fn)
    check_choice("kind", kind, KINDS)
    check_samples(mc_samples)
    parameters = trainable(model)
    if kind in FISHERS:
        check_independent(model)
    total = {
        name: torch.zeros_like(p, dtype=accumulation_dtype(p.dtype), requires_grad=False)
        for name, p in parameters.items()
    }
    terms = 0
    with undisturbed(model):
        for x, y in batches(data):
            watched = owners(parameters, model) if kind in FISHERS else ()
            with recording(watched) as calls, twice_differentiable(kind == "hutchinson"):
                outputs = predict(model, x)
            if outputs.numel() == 0:
                continue
            loss.check(outputs, y)
            check_dependence(outputs)
            terms += loss.terms(outputs)
            if kind in FISHERS:
                rows = SampleRows(parameters, calls, outputs)
                for vector in vectors(loss, FISHERS[kind], outputs, y, mc_samples, generator):
                    _add_squares(total, rows, vector)
            elif kind == "ggn-rademacher":
                for _ in range(mc_samples):
                    vector = signed_columns(loss, outputs, generator) / mc_samples**0.5
                    add_square(total, parameters, outputs, vector)
            elif kind == "hutchinson":
                add_hutchinson(total, parameters, loss.value(outputs, y), mc_samples, generator)
            else:
                exact = kind == "hesscale"
                add_recursive_diagonal(total, model, parameters, loss, (x, y), exact)
    scale = 1 / loss.divisor(terms) ** (2 if kind == "empirical-fisher" else 1)
    return {name: tensor.mul_(scale) for name, tensor in total.items()}


def _add_squares(total: dict[str, Tensor], rows: SampleRows, vector: Tensor) -> None:
    """Add the squared gradients of every sample."""
    back = rows.backpropagate(vector)
    for name in rows.together:
        total[name] += rows.squares(name, back, MOST)
    for _, name, row in rows.one_by_one(vector):
        total[name] += row.to(total[name].dtype).square()
