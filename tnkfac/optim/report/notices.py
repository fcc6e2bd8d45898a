"""Warnings of a step to the user, each given once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tnkfac.curvature.callers import warn
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.registry import Registry
from tnkfac.optim.params.sharding import is_distributed
from tnkfac.optim.params.state import State, mark
from tnkfac.optim.params.watching import Watched

WEIGHTY = 0.01
"""Share of all numbers from which on a parameter without curvature is worth a warning."""
PATIENCE = 3
"""Updates in a row that a layer may miss."""


class Notices:
    """Warnings that an optimizer has given, so that none comes twice."""

    def __init__(self) -> None:
        """Nothing was said yet."""
        self._gradients = False
        self._silent: set[int] = set()
        self._processes = self._stale = self._lost = False
        self._missed: dict[int, tuple[int, int]] = {}

    def check_processes(
        self, overlooked: bool, registry: Registry, due: Sequence[CapturedLayer]
    ) -> None:
        """Warn where other processes may train the same parameters, but nothing tells of them.

        Args:
            overlooked: Whether there are other processes that nothing ties these parameters to.
            registry: All parameters.
            due: Layers whose factors are about to be updated.
        """
        if self._processes or not due or not overlooked:
            return
        self._processes = True
        if any(is_distributed(param) for param in registry.params()):
            return  # of these another warning tells
        warn(
            "There are several processes, but these parameters are in no DistributedDataParallel "
            "and not fully sharded, so factors are those of this process alone. If gradients are "
            "averaged by hand, replicas will drift apart: pass process_group="
            "torch.distributed.group.WORLD, or wrap the model. If this process trains a model of "
            "its own, pass process_group=None.",
        )

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
            warn(
                f"No gradient reached {_some(missing)}; a step leaves them as they are. This is "
                "normal for a part of the model that did not run.",
            )

    def check_statistics(self, due: Sequence[CapturedLayer], state: State) -> list[CapturedLayer]:
        """Warn of layers that have a gradient, but never had statistics; of each once.

        Args:
            due: Layers whose taps were on during the passes of this step.
            state: State of the optimizer.

        Returns:
            Those of which no call was seen.
        """
        causes: dict[str, list[str]] = {}
        unseen = []
        for layer in due:
            if (
                not layer.statistics.pending
                and mark(state, layer, "last_update") < 0
                and layer.weight.grad is not None
                and id(layer.weight) not in self._silent
            ):
                self._silent.add(id(layer.weight))
                cause = layer.statistics.refused or layer.statistics.last_event
                if not cause:
                    cause = _unseen()
                    unseen.append(layer)
                causes.setdefault(cause, []).append(layer.named()[0][0])
        if causes:
            listed = "; ".join(f"{_some(names)} ({cause})" for cause, names in causes.items())
            warn(
                f"No statistics reached {listed}, which have gradients. Until that changes they "
                "are trained without curvature; see report().",
            )
        return unseen

    def check_overlooked(self, overlooked: Sequence[Watched]) -> None:
        """Warn of parameters that have a gradient, but whose uses cannot be seen; of each once.

        Args:
            overlooked: These parameters.
        """
        new = [watched for watched in overlooked if id(watched.param) not in self._silent]
        self._silent |= {id(watched.param) for watched in new}
        if new:
            listed = "; ".join(f"{f.weight.name} ({f.overlooked_where})" for f in new[:5])
            warn(
                f"The fallback begins to train {len(new)} parameters, and goes on with it, since "
                f"what gives them gradients was not seen. {listed}. report() lists all.",
            )

    def tell_released(self, released: Sequence[CapturedLayer]) -> None:
        """Warn of layers that the fallback trains from now on."""
        listed = "; ".join(
            f"{layer.named()[0][0]}: {layer.statistics.refused}" for layer in released
        )
        warn(
            f"The fallback trains layers whose curvature cannot be measured any more. {listed}.",
        )

    def tell_lost(self, lost: Sequence[Watched], registry: Registry) -> None:
        """Warn, once, of parameters that no call was seen to use and that weigh something.

        Args:
            lost: These parameters.
            registry: All parameters.
        """
        if not lost or self._lost:
            return
        total = sum(param.numel() for param in registry.params())
        matrices = [found for found in lost if not found.weight.is_table]
        heavy = [found for found in matrices if found.param.numel() > WEIGHTY * total]
        if heavy:
            self._lost = True
            share = sum(found.param.numel() for found in matrices) / total
            listed = "; ".join(f"{f.weight.name}: {f.weight.refused}" for f in heavy[:5])
            warn(
                f"The fallback trains {len(matrices)} matrices ({share:.1%} of all numbers), whose "
                f"curvature cannot be measured. {listed}. report() lists all.",
            )

    def tell_skipped(self, names: set[str]) -> None:
        """Warn of layers whose update was not finite, and forget them.

        Args:
            names: The layers.
        """
        listed = sorted(names)
        names.clear()
        warn(
            f"The update of {_some(listed)} is not finite, though gradients and statistics are; it "
            "makes no step. If that goes on: more damping, a smaller learning rate, or float64. "
            "report() counts such steps.",
        )

    def check_stale(self, due: Sequence[CapturedLayer], state: State) -> None:
        """Warn of layers that had statistics, and have missed several updates in a row.

        Args:
            due: Layers whose taps were on during the passes of this step.
            state: State of the optimizer.
        """
        if self._stale:
            return
        stale = [layer for layer in due if self._misses(layer, state) >= PATIENCE]
        if stale:
            self._stale = True
            unhooked = [layer for layer in stale if not layer.statistics.hooked]
            sampled = any(layer.statistics.explicit_passes for layer in stale)
            cause = (
                f"the forward hooks of {_some(_names(unhooked))} were removed; build the optimizer "
                "anew, or load its state into a new one"
                if unhooked
                else "their modules are not called in training mode any more (model.train()), or "
                "run compiled without their hooks"
                + (", or sample_fisher() is not called" if sampled else "")
            )
            warn(
                f"No statistics have reached {_some(_names(stale))} for {PATIENCE} updates of the "
                f"factors in a row, though there were gradients: {cause}. Until that changes they "
                "are trained with the curvature of their last update; see report().",
            )

    def _misses(self, layer: CapturedLayer, state: State) -> int:
        """How many updates in a row a layer has missed; each counts once, at its first step."""
        if layer.statistics.pending or mark(state, layer, "last_update") < 0:
            self._missed.pop(id(layer), None)
            return 0
        count, counted = self._missed.get(id(layer), (0, -1))
        date = layer.group["last_due"]
        if date != counted and layer.weight.grad is not None and layer.removers:
            count += 1
            self._missed[id(layer)] = count, date
        return count


def _names(layers: Sequence[CapturedLayer]) -> list[str]:
    return [layer.named()[0][0] for layer in layers]


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
