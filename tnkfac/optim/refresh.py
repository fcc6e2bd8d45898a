"""Decomposing the factors of many layers, whatever happens to some of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tnkfac.curvature import Decomposable, Parts
from tnkfac.optim.decompositions import Decomposer
from tnkfac.optim.layers import CapturedLayer
from tnkfac.optim.parts import read
from tnkfac.optim.registry import Group
from tnkfac.optim.stacks import joined, parted


class Refreshing:
    """Adds decompositions of factors to an optimizer that keeps them in its state."""

    state: Any
    _init_layer: Callable[[CapturedLayer, Group], dict[str, Tensor]]
    _stacks: Callable[[list[CapturedLayer], dict[int, Group]], list[tuple[list[int], Group]]]

    def _decompose(self, due: list[CapturedLayer], groups: dict[int, Group]) -> None:
        """Decompose the factors of some layers; the host waits twice for all of them together."""
        pairs = [self._factors(layer, groups[id(layer.weight)]) for layer in due]
        usable = _all_finite([(*A, *B) for A, B in pairs])
        found: list[dict[str, Parts] | None] = [None] * len(due)
        reasons = ["its factors are not finite"] * len(due)
        good = [index for index in range(len(due)) if usable[index]]
        for places, group in self._stacks([due[index] for index in good], groups):
            stack = [good[place] for place in places]
            decomposer, damping = decomposer_of(due[stack[0]], group), damping_of(group)
            try:
                A, B = (joined([pairs[index][side] for index in stack]) for side in (0, 1))
                together = decomposer.decompose(A, B, damping)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                for index in stack:  # find out whose fault it is
                    try:
                        found[index] = decomposer.decompose(*pairs[index], damping)
                    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                        reasons[index] = str(error)
                continue
            for name, parts in together.items():
                for index, mine in zip(stack, parted(parts, len(stack)), strict=True):
                    found[index] = {**(found[index] or {}), name: mine}
        finite = _all_finite([_tensors(new) for new in found])
        for index, layer in enumerate(due):
            if found[index] is None or finite[index]:
                continue
            group = groups[id(layer.weight)]
            decomposer, damping = decomposer_of(layer, group), damping_of(group)
            try:
                found[index] = decomposer.decompose_in_double(*pairs[index], damping)
                (finite[index],) = _all_finite([_tensors(found[index])])
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                continue
        for index, (layer, new) in enumerate(zip(due, found, strict=True)):
            state, group = self.state[layer.weight], groups[id(layer.weight)]
            layer.last_inverse = group["step"]
            state["last_inverse"].fill_(layer.last_inverse)
            if new is None or not finite[index]:
                if new is not None:
                    reasons[index] = "its decomposition is not finite"
                self._fail(layer, group, reasons[index], restart=not usable[index])
                continue
            state["failures"].zero_()
            for name, parts in new.items():
                for old, part in zip(read(state, name, len(parts)), parts, strict=True):
                    old.copy_(part)

    def _factors(self, layer: CapturedLayer, group: Group) -> tuple[Parts, Parts]:
        """Both factors without the bias of their start, in the dtype of decompositions."""
        state, statistics = self.state[layer.weight], layer.statistics
        weight = state["factor_weight"]
        dtype = torch.promote_types(inverse_dtype(weight.dtype, group), torch.float32)
        A, B = (
            tuple((part / weight).to(dtype) for part in read(state, name, len(s.shapes)))
            for name, s in (("A", statistics.k), ("B", statistics.c))
        )
        return A, B

    def _fail(self, layer: CapturedLayer, group: Group, reason: str, restart: bool) -> None:
        """Keep what there is; factors that are not finite are measured anew."""
        state, name = self.state[layer.weight], layer.named()[0][0]
        state["failures"] += 1
        failures = int(state["failures"])
        if restart:
            state.update(
                {
                    k: v
                    for k, v in self._init_layer(layer, group).items()
                    if k in state
                    and (k in ("A", "B", "factor_weight") or k.startswith(("A.", "B.")))
                }
            )
            layer.last_update = -1
        if failures > group["num_tolerated_failures"]:
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"The factors of {name} could not be decomposed {failures} times in a row: {reason}"
            )
        warnings.warn(
            f"The factors of {name} could not be decomposed: {reason}. The step goes on with the "
            f"last decomposition (failure {failures}, {group['num_tolerated_failures']} tolerated "
            "in a row).",
            stacklevel=2,
        )


def decomposer_of(layer: CapturedLayer, group: Group) -> Decomposer:
    """How the group decomposes the factors of a layer."""
    k, c = layer.statistics.k, layer.statistics.c
    assert isinstance(k, Decomposable)
    assert isinstance(c, Decomposable)
    relative = group["damping"] is None
    return Decomposer(group["compute_method"], group["damping_type"], k, c, relative)


def damping_of(group: Group) -> float:
    """What the decomposer of the group takes."""
    given = group["relative_damping"] if group["damping"] is None else group["damping"]
    return float(given)


def inverse_dtype(dtype: torch.dtype, group: Group) -> torch.dtype:
    """``inv_dtype``, but float64 for factors in float64."""
    chosen: torch.dtype = getattr(torch, group["inv_dtype"])
    return dtype if dtype == torch.float64 else chosen


def _tensors(decomposition: dict[str, Parts] | None) -> list[Tensor]:
    return [part for parts in (decomposition or {}).values() for part in parts]


def _all_finite(tensors: list[Any]) -> list[bool]:
    """Whether each list of tensors is finite, with a single wait for the device."""
    flags = [
        torch.stack([part.isfinite().all() for part in parts]).all() if parts else None
        for parts in tensors
    ]
    device = next((flag.device for flag in flags if flag is not None), torch.device("cpu"))
    true = torch.ones((), dtype=torch.bool, device=device)
    stacked = torch.stack([true if flag is None else flag.to(device) for flag in flags])
    found: list[bool] = stacked.tolist()
    return found
