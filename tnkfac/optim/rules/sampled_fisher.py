"""Backward passes that count for factors alone: targets drawn from the model's distribution."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.optim.params.captured import CapturedLayer

LIKELIHOODS = ("categorical", "gaussian", "bernoulli")


def sample(
    layers: Sequence[CapturedLayer],
    output: Tensor,
    likelihood: str,
    generator: torch.Generator | None,
) -> None:
    """Draw targets and back-propagate for the factors of some layers.

    Args:
        layers: Layers that are due.
        output: Output of the model, ``[N, ..]``.
        likelihood: One of :data:`LIKELIHOODS`.
        generator: Source of random numbers, or torch's own.
    """
    leaves = [leaf for layer in layers for leaf in layer.statistics.hidden_leaves]
    if not leaves or output.numel() == 0:
        return
    draws = max(layer.group["mc_samples"] for layer in layers)
    listeners = [
        layer.statistics.listening(draws, terms)
        for layer, terms in zip(layers, _loss_terms(layers, output, likelihood), strict=True)
    ]
    with listening(listeners), torch.enable_grad():
        for _ in range(draws):
            loss = sampled_loss(output, likelihood, generator)
            torch.autograd.backward(loss, retain_graph=True, inputs=leaves)


def _loss_terms(
    layers: Sequence[CapturedLayer], output: Tensor, likelihood: str
) -> Iterator[float | None]:
    """Over how many terms the loss of training would average, for every layer; None for a sum.

    Where a callable says it, it is what it said of the last layer: earlier ones may run several
    times, or at more positions.
    """
    told = [layer.statistics.told_terms for layer in layers]
    told_terms = [terms for terms in told if terms is not None]
    for layer in layers:
        average = layer.statistics.loss_average
        if callable(average) and told_terms:
            yield told_terms[-1]
        elif average is None:
            yield None
        else:
            yield loss_terms(output, likelihood, average != "batch")


def sampled_loss(output: Tensor, likelihood: str, generator: torch.Generator | None) -> Tensor:
    """Negative log-likelihood of targets drawn from the model, summed.

    Args:
        output: Logits ``[N, C, ..]`` (categorical), logits of any shape (bernoulli), or means of
            any shape (gaussian, of variance one).
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        generator: Source of random numbers, or torch's own.
    """
    output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    with torch.no_grad():
        if likelihood == "categorical":
            classes = output.movedim(1, -1)
            rows = classes.softmax(-1).flatten(0, -2)
            drawn = torch.multinomial(rows, 1, generator=generator).view(classes.shape[:-1])
        elif likelihood == "bernoulli":
            drawn = torch.bernoulli(output.sigmoid(), generator=generator)
        else:
            noise = torch.empty_like(output).normal_(generator=generator)
            drawn = output + noise
    if likelihood == "categorical":
        return F.cross_entropy(output, drawn, reduction="sum")
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(output, drawn, reduction="sum")
    return 0.5 * (output - drawn).square().sum()


def loss_terms(output: Tensor, likelihood: str, positions: bool) -> int:
    """Over how many terms a loss averages.

    Args:
        output: As above, ``[N, ..]``.
        likelihood: As above.
        positions: Whether all positions of a sample count, or samples alone.
    """
    if not positions or output.ndim < 2:
        return len(output)
    return output.numel() // output.shape[1 if likelihood == "categorical" else -1]


@contextmanager
def listening(contexts: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
    """Backward passes inside count for the factors."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextmanager
def kept_gradients(params: Iterable[Tensor]) -> Iterator[None]:
    """Backward passes inside leave every ``.grad`` as it was."""
    before = [(param, param.grad) for param in params]
    for param, _ in before:
        param.grad = None
    try:
        yield
    finally:
        for param, grad in before:
            param.grad = grad
