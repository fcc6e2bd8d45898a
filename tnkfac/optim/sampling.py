"""Backward passes for the factors alone: targets drawn from the model's own distribution."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.curvature import Statistics

LIKELIHOODS = ("categorical", "gaussian", "bernoulli")


def sampled_loss(
    output: Tensor, likelihood: str, average: bool | None, generator: torch.Generator | None
) -> Tensor:
    """Negative log-likelihood of targets drawn from the model.

    Args:
        output: Logits ``[N, C, ..]`` (categorical), logits of any shape (bernoulli), or means of
            any shape (gaussian, of variance one).
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
        average: Over what the log-likelihoods are averaged: samples (False), all positions of all
            samples (True), or nothing (None).
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
        terms = F.cross_entropy(output, drawn, reduction="none")
    elif likelihood == "bernoulli":
        terms = F.binary_cross_entropy_with_logits(output, drawn, reduction="none")
        terms = terms.flatten(1).sum(1) if average is not True else terms.sum(-1)
    else:
        terms = 0.5 * (output - drawn).square()
        terms = terms.flatten(1).sum(1) if average is not True else terms.sum(-1)
    if average is None:
        return terms.sum()
    return terms.sum() / (terms.numel() if average else len(output))


@contextmanager
def listening(statistics: Iterable[Statistics]) -> Iterator[None]:
    """Backward passes inside count for the factors."""
    with ExitStack() as stack:
        for one in statistics:
            stack.enter_context(one.listening())
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
