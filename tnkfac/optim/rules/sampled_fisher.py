"""Backward passes that count for KFAC's factors alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tnkfac.optim import options
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.registry import Registry
from tnkfac.optim.rules import sampling
from tnkfac.optim.uncompiled import uncompiled


class FisherPasses:
    """Adds passes with drawn targets to an optimizer whose ``fisher_type`` is ``"mc"``."""

    _registry: Registry
    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]

    @uncompiled
    def sample_fisher(
        self,
        output: Tensor,
        likelihood: str = "categorical",
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw targets from the model's own distribution and back-propagate for the factors only.

        To be called between forward and backward pass, for every micro-batch; every ``.grad`` stays
        as it is. On steps without a factor update it does nothing. ``B`` is the mean over draws;
        every call counts as further samples.

        Args:
            output: Output of the model that the loss is computed from: logits ``[N, C, ..]``, or
                anything ``[N, ..]`` for the other likelihoods.
            likelihood: ``"categorical"`` (cross-entropy), ``"gaussian"`` with variance one (half
                the squared error, summed over outputs) or ``"bernoulli"`` (binary cross-entropy
                with logits, summed over outputs).
            generator: Source of random numbers, or torch's own.

        Raises:
            ValueError: If ``fisher_type`` is not ``"mc"``, or for an unknown likelihood.
        """
        options.choices("likelihood", likelihood, sampling.LIKELIHOODS)
        chosen = self._sampled_layers("sample_fisher")
        leaves = [leaf for layer in chosen for leaf in layer.statistics.hidden_leaves]
        if not leaves or output.numel() == 0:
            return
        draws = max(layer.group["mc_samples"] for layer in chosen)
        terms = _loss_terms(chosen, output, likelihood)
        listeners = [
            layer.statistics.listening(draws, own) for layer, own in zip(chosen, terms, strict=True)
        ]
        with sampling.listening(listeners), torch.enable_grad():
            for _ in range(draws):
                loss = sampling.sampled_loss(output, likelihood, generator)
                torch.autograd.backward(loss, retain_graph=True, inputs=leaves)

    @contextmanager
    def fisher_pass(self) -> Iterator[None]:
        """Backward passes inside count for the factors, and leave every ``.grad`` as it is.

        For targets drawn by oneself: the loss has to be averaged like that of training, and not
        scaled. Keep the graph (``retain_graph=True``) if the training loss follows on it. Passes
        through the same outputs are draws, over which ``B`` is the mean, here and in later blocks.

        Raises:
            ValueError: If ``fisher_type`` is not ``"mc"``.
        """
        chosen = self._sampled_layers("fisher_pass")
        params = [param for group in self.param_groups for param in group["params"]]
        listeners = [layer.statistics.listening() for layer in chosen]
        with sampling.listening(listeners), sampling.kept_gradients(params):
            yield

    def _sampled_layers(self, caller: str) -> list[CapturedLayer]:
        """Layers whose output factor is that of drawn targets, and due."""
        sampled = [layer for layer in self._registry.layers if layer.statistics.chosen_passes]
        if not sampled:
            raise ValueError(
                f"fisher_type: got {self.defaults['fisher_type']!r}, but {caller}() is for 'mc'."
            )
        return [layer for layer in sampled if layer.statistics.on]


def _loss_terms(
    chosen: list[CapturedLayer], output: Tensor, likelihood: str
) -> Iterator[float | None]:
    """Over how many terms the loss of training would average, for every layer; None for a sum.

    Where a callable says it, it is what it said of the last layer: earlier ones may run several
    times, or at more positions.
    """
    told = [layer.statistics.told for layer in chosen if layer.statistics.told is not None]
    for layer in chosen:
        average = layer.statistics.loss_average
        if callable(average) and told:
            yield told[-1]
        elif average is None:
            yield None
        else:
            yield sampling.loss_terms(output, likelihood, average != "batch")
