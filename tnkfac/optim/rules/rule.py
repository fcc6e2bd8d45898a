"""The protocol of an update rule: what turns curvature into a preconditioner.

A rule is all that an optimizer of this package is made of, next to its signature. It has no state
of its own: what it keeps of a layer lies in the optimizer's state, as named matrices whose parts
have the channel groups in front. Capture, checks for numbers that are not finite, several
processes, grafting, momentum, checkpoints and everything else is the optimizer's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tnkfac.curvature.capture.statistics import Factors
from tnkfac.curvature.structures import Parts
from tnkfac.optim import options
from tnkfac.optim.options import Group, Options
from tnkfac.optim.params.batches import Batch, Stack
from tnkfac.optim.params.captured import CapturedLayer, Needs
from tnkfac.optim.params.registry import Registry
from tnkfac.optim.params.state import ParamState, State
from tnkfac.optim.report.diagnostics import Spectra

NamedParts = Mapping[str, Parts]
"""Matrices of a layer or of a batch of layers, by name."""


class Rule(ABC):
    """How the curvature of a layer becomes a preconditioner of its gradient.

    A subclass says what it keeps of a layer (:meth:`init`), how a batch of statistics changes that
    (:meth:`update`), perhaps what is derived from it now and then (:meth:`refresh`), and how a
    gradient is preconditioned (:meth:`precondition`). Layers of equal shape come together as one
    :class:`~tnkfac.optim.params.batches.Stack`, whose channel groups are those of all of them.
    """

    options: ClassVar[Options] = options.SHARED
    """Hyper-parameters of a group, with those that the step itself reads."""
    derived: ClassVar[tuple[str, ...]] = ()
    """Names of what :meth:`refresh` makes; checkpoints can do without."""
    stacks_updates: ClassVar[bool] = True
    """Whether :meth:`update` takes layers of equal shape together; else one after the other."""

    # ---------------------------------------------------------------- hyper-parameters

    def complete(self, given: Mapping[str, object]) -> Group:
        """All hyper-parameters, with defaults for those that were not given."""
        return options.chosen(self.options, given)

    def check(self, group: Group, given: Group) -> None:
        """Check a group, and bring those of its values that were given to their stored form.

        Args:
            group: Values of all hyper-parameters.
            given: Those that were set, changed in place.

        Raises:
            TypeError: For a value of the wrong type.
            ValueError: For a value out of range.
        """
        options.check(self.options, group, given)

    def needs(self, group: Group) -> Needs:
        """Measurements of the passes; by default both factors."""
        return Needs()

    def update_interval(self, group: Group, step: int) -> int:
        """Steps between updates, at a step."""
        return 1

    def refresh_interval(self, group: Group, step: int) -> int | None:
        """Steps between refreshes, at a step; None if nothing is derived."""
        return None

    def warms_up(self, layer: CapturedLayer) -> bool:
        """Whether a layer is updated at every step of its first interval."""
        return False

    # ---------------------------------------------------------------- curvature

    @abstractmethod
    def init(self, layer: CapturedLayer) -> NamedParts:
        """Matrices that are kept of a layer, before any statistics.

        Args:
            layer: A layer of known shape; ``layer.statistics`` has its structures ``k`` and ``c``
                and ``layer.statistics.layer.groups``, its channel groups ``G``.
        """

    def starts(self, group: Group) -> bool:
        """Whether the first statistics of a layer go to :meth:`start`."""
        return False

    def start(
        self, layers: Sequence[CapturedLayer], measured: Sequence[Factors]
    ) -> list[NamedParts]:
        """Matrices that are kept of layers after their first statistics.

        Args:
            layers: Layers of whatever shapes that share hyper-parameters, device and dtype.
            measured: Normalised factors of each.
        """
        raise NotImplementedError

    def update(self, batch: Batch) -> NamedParts | None:
        """Take the statistics of a batch of layers into what is kept of them.

        Args:
            batch: Layers, with ``factors()`` and ``read(name)``.

        Returns:
            New matrices by name; the optimizer writes them where all numbers are finite.
        """
        return None

    @abstractmethod
    def precondition(self, batch: Stack, gradient: Tensor) -> Tensor:
        """Precondition the gradients of a batch of layers, at every step.

        A rule that follows the gradients themselves writes what it makes of them by
        ``batch.write``.

        Args:
            batch: Layers of equal shape, with ``read(name)`` and ``write(matrices)``.
            gradient: ``[G, C_out / G, D]`` with the channel groups of all layers, the bias last.

        Returns:
            The same shape.
        """

    def elementwise(self, layer: CapturedLayer, state: ParamState) -> tuple[Tensor, Tensor] | None:
        """``K [G, D]`` and ``C [G, C_out / G]`` if all :meth:`precondition` does is scaling.

        That is by ``C^2 K^2``, number by number. Such layers are stepped without joint matrices,
        and updated end to end in a :class:`~tnkfac.optim.params.batches.EndToEnd`.

        Args:
            layer: The layer.
            state: State of its weight.
        """
        return None

    # ---------------------------------------------------------------- what is derived

    def refresh(self, batch: Stack) -> NamedParts:
        """Derive something from what is kept, such as an eigenbasis.

        Args:
            batch: Layers of equal shape.

        Returns:
            Matrices with the names of :attr:`derived`.

        Raises:
            torch.linalg.LinAlgError: If a decomposition fails; each layer is then repaired.
        """
        raise NotImplementedError

    def source(self) -> tuple[str, ...]:
        """Names of what :meth:`refresh` reads; where it is not finite, it starts anew."""
        return ()

    def is_sound(self, batch: Stack, derived: NamedParts) -> Tensor:
        """Whether what was derived can be right, for every channel group ``[G]``."""
        parts = [part for several in derived.values() for part in several]
        return torch.stack([part.isfinite().flatten(1).all(1) for part in parts]).all(0)

    def repair(self, batch: Stack) -> NamedParts:
        """Derive it for one layer, whatever that takes.

        Raises:
            torch.linalg.LinAlgError: If there is no way.
        """
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            "its decomposition is not finite"
        )

    def stand_in(self, batch: Stack) -> NamedParts:
        """Stand-in for one layer where even :meth:`repair` fails; by default what it had."""
        return {}

    def tolerated_failures(self, group: Group) -> int:
        """How many refreshes of a layer may fail in a row."""
        return 3

    def saves_derived(self, group: Group) -> bool:
        """Whether checkpoints have what is derived."""
        return True

    # ---------------------------------------------------------------- what else can be said

    def feed_taps(self, layer: CapturedLayer, state: ParamState | None, refreshed: bool) -> None:
        """Hand the statistics of a layer what they read of its state, where they do.

        Args:
            layer: The layer.
            state: State of its weight; None if it has no curvature yet.
            refreshed: Whether it was ever refreshed.
        """
        return

    def spectra(self, layer: CapturedLayer, state: ParamState) -> Spectra | None:
        """Eigenvalues of both damped factors of a layer; None if they are not known."""
        return None

    def choose_structures(
        self, new: Sequence[CapturedLayer], registry: Registry, groups: list[Group], state: State
    ) -> None:
        """Give layers that were just found other structures, for example to save memory."""
        return

    def revise_structures(self, registry: Registry, groups: list[Group], state: State) -> bool:
        """Do so once statistics are there; tell whether some were dropped for it."""
        return False
