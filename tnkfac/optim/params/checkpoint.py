"""Saving and restoring state, where ``torch.optim.Optimizer`` alone would lose something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tnkfac.optim.params.captured import CapturedLayer

State = dict[str, Any]
ON_HOST = ("first_update", "last_update", "last_inverse", "failures")
"""Numbers that the host reads."""


def without_callables(groups: list[State]) -> list[State]:
    """Groups as they are saved: a schedule given as a callable is not data."""
    return [{k: v for k, v in group.items() if not callable(v)} for group in groups]


def restore_tensors(
    state: dict[Tensor, State],
    saved: dict[str, Any],
    params: list[Tensor],
    dtypes: Mapping[int, Mapping[str, torch.dtype]],
) -> None:
    """Put saved tensors back in the dtype of a new state; torch takes that of the parameter.

    Args:
        state: State of the optimizer, just loaded by torch.
        saved: What was loaded.
        params: Parameters in the order of the groups.
        dtypes: Those of a new state, by ``id`` of the parameter and what names begin with; all
            else stays as it was saved.
    """
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    for key, param in zip(keys, params, strict=True):
        known = dtypes.get(id(param), {})
        for name, value in saved["state"].get(key, {}).items():
            if isinstance(value, Tensor):
                device = torch.device("cpu") if name in ON_HOST else param.device
                dtype = known.get(name.split(".")[0], value.dtype)
                state[param][name] = value.detach().to(device, dtype, copy=True)


def chooses_alike(groups: list[State], before: list[State]) -> bool:
    """Whether groups leave the same layers to the fallback as before."""

    def choice(group: State) -> tuple[Any, ...]:
        return tuple(group["skip_layers"]), group["capture_tied"]

    return [*map(choice, groups)] == [*map(choice, before)]


def restore_groups(groups: list[State], before: list[State]) -> None:
    """Give groups back what the saved ones lack: callables, and keys of newer versions."""
    for group, live in zip(groups, before, strict=True):
        for name, value in live.items():
            group.setdefault(name, value)


def split_second_moments(layer: CapturedLayer, state: dict[Tensor, State], step: int) -> None:
    """Give weight and bias second moments of their own; up to 0.1 the weight kept them as a matrix.

    Args:
        layer: A layer.
        state: State of the optimizer, just loaded.
        step: What counted their updates then: the steps of the group.
    """
    own = state.get(layer.weight, {})
    if "exp_avg_sq" not in own or "step" in own:
        return
    parts = layer.statistics.layer.from_matrix(own["exp_avg_sq"], layer.weight.shape)
    for param, part in zip(layer.params(), parts, strict=False):
        assert part is not None
        count = torch.full((), float(step), dtype=torch.float32, device=param.device)
        state[param].update(exp_avg_sq=part.contiguous(), step=count)
