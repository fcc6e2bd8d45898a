"""What a step tells the user about, once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch

from tnkfac.optim.layers import CapturedLayer
from tnkfac.optim.registry import Group, Registry

PATIENCE = 3
"""Updates in a row that a layer may miss."""


class Notices:
    """Warnings that an optimizer has given, so that none comes twice."""

    def __init__(self) -> None:
        """Nothing was said yet."""
        self._gradients = False
        self._statistics = False
        self._stale = False
        self._missed: dict[int, tuple[int, int]] = {}

    def check_gradients(self, registry: Registry) -> None:
        """Warn of parameters without gradient.

        Raises:
            ValueError: If a gradient is sparse.
        """
        if all(
            param.grad is not None and param.grad.layout == torch.strided
            for param in registry.params()
        ):
            return
        missing = []
        for name, param in registry.named():
            if param.grad is not None and param.grad.layout != torch.strided:
                raise ValueError(
                    f"{name}.grad: got layout {param.grad.layout}. Supported: dense gradients; "
                    "an Embedding gives them with sparse=False."
                )
            if param.grad is None and param.requires_grad:
                missing.append(name)
        if missing and not self._gradients:
            self._gradients = True
            warnings.warn(
                f"No gradient reached {_some(missing)}; a step leaves them as they are. This is "
                "normal for a part of the model that did not run.",
                stacklevel=5,
            )

    def check_statistics(self, due: Sequence[CapturedLayer]) -> None:
        """Warn of layers that have a gradient, but never had statistics.

        Args:
            due: Layers whose taps were on during the passes of this step.
        """
        if self._statistics:
            return
        silent = [
            layer.named()[0][0]
            for layer in due
            if layer.last_update < 0
            and not layer.statistics.pending
            and layer.weight.grad is not None
        ]
        if silent:
            self._statistics = True
            sampled = any(layer.statistics.chosen_passes for layer in due)
            warnings.warn(
                f"No statistics reached {_some(silent)}, which have gradients: their modules were "
                "not called in training mode (but, for example, their weights were used directly), "
                "or ran compiled without their hooks"
                + (", or sample_fisher() was not called" if sampled else "")
                + ". Until that changes they are trained without curvature; see report().",
                stacklevel=5,
            )

    def check_stale(self, due: Sequence[CapturedLayer], groups: Mapping[int, Group]) -> None:
        """Warn of layers that had statistics, and have missed several updates in a row.

        Args:
            due: Layers whose taps were on during the passes of this step.
            groups: Parameter groups by ``id`` of the parameter.
        """
        if self._stale:
            return
        stale = [layer for layer in due if self._misses(layer, groups) >= PATIENCE]
        if stale:
            self._stale = True
            unhooked = [layer for layer in stale if not layer.statistics.hooked]
            sampled = any(layer.statistics.chosen_passes for layer in stale)
            cause = (
                f"the forward hooks of {_some(_names(unhooked))} were removed; build the optimizer "
                "anew, or load its state into a new one"
                if unhooked
                else "their modules are not called in training mode any more (model.train()), or "
                "run compiled without their hooks"
                + (", or sample_fisher() is not called" if sampled else "")
            )
            warnings.warn(
                f"No statistics have reached {_some(_names(stale))} for {PATIENCE} updates of the "
                f"factors in a row, though there were gradients: {cause}. Until that changes they "
                "are trained with the curvature of their last update; see report().",
                stacklevel=5,
            )

    def _misses(self, layer: CapturedLayer, groups: Mapping[int, Group]) -> int:
        """How many updates in a row a layer has missed; each counts once, at its first step."""
        if layer.statistics.pending or layer.last_update < 0:
            self._missed.pop(id(layer), None)
            return 0
        count, counted = self._missed.get(id(layer), (0, -1))
        date = groups[id(layer.weight)]["last_due"]
        if date != counted and layer.weight.grad is not None and layer.removers:
            count += 1
            self._missed[id(layer)] = count, date
        return count


def _names(layers: Sequence[CapturedLayer]) -> list[str]:
    return [layer.named()[0][0] for layer in layers]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
