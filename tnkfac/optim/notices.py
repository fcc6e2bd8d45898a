"""What a step tells the user about, once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from tnkfac.optim.layers import CapturedLayer
from tnkfac.optim.registry import Registry


class Notices:
    """Warnings that an optimizer has given, so that none comes twice."""

    def __init__(self) -> None:
        """Nothing was said yet."""
        self._gradients = False
        self._silent: set[int] = set()

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
        """Warn of layers that have a gradient, but never had statistics; of each once.

        Args:
            due: Layers whose taps were on during the passes of this step.
        """
        causes: dict[str, list[str]] = {}
        for layer in due:
            if (
                layer.last_update < 0
                and not layer.statistics.pending
                and layer.weight.grad is not None
                and id(layer.weight) not in self._silent
            ):
                self._silent.add(id(layer.weight))
                cause = layer.statistics.refused or layer.statistics.seen or _unseen()
                causes.setdefault(cause, []).append(layer.named()[0][0])
        if causes:
            found = "; ".join(f"{_some(names)} ({cause})" for cause, names in causes.items())
            warnings.warn(
                f"No statistics reached {found}, which have gradients. Until that changes they are "
                "trained without curvature; see report().",
                stacklevel=5,
            )

    def tell_released(self, released: Sequence[CapturedLayer]) -> None:
        """Warn of layers that the fallback trains from now on."""
        found = "; ".join(
            f"{layer.named()[0][0]}: {layer.statistics.refused}" for layer in released
        )
        warnings.warn(
            f"The fallback trains layers whose curvature cannot be measured any more. {found}.",
            stacklevel=6,
        )


def _unseen() -> str:
    """Why no call of a layer was seen."""
    direct = "its module was not called (but, for example, the weight used directly)"
    dynamo = getattr(torch, "_dynamo", None)
    if dynamo is not None and dynamo.utils.counters["stats"]["unique_graphs"]:
        direct += (
            ", or ran compiled: in eval() mode, without its hook, or in a backward pass that was "
            "told its inputs"
        )
    return direct


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
