"""Saving and restoring, where ``torch.optim.Optimizer`` alone would lose something."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.parts import flat, nested, origin
from tnkfac.optim.params.registry import Registry, by_parameter
from tnkfac.optim.params.state import (
    ON_HOST,
    ParamState,
    State,
    complete,
    has_curvature,
    set_mark,
)
from tnkfac.optim.rules.rule import Rule
from tnkfac.optim.rules.runner import RuleRunner
from tnkfac.optim.step import fallback

_OLD_NAMES = {"last_inverse": "last_refresh"}
_OLD_GROUP_NAMES = {"last_inverse_due": "last_refresh_due"}
"""Names up to 0.1."""
CAPTURING = (
    "skip_layers",
    "capture_tied",
    "capture_embeddings",
    "structures",
    "kfac_approx",
    "loss_average",
)
"""Hyper-parameters that say which layers are captured, and how."""


@contextmanager
def without_strangers(state: dict[Tensor, ParamState], groups: list[Group]) -> Iterator[None]:
    """Leave out the states of parameters that were taken out of their group by hand."""
    known = by_parameter(groups)
    strangers = {param: state.pop(param) for param in list(state) if id(param) not in known}
    try:
        yield
    finally:
        state.update(strangers)


def as_saved(saved: StateDict, runner: RuleRunner) -> StateDict:
    """State dict of torch without what can be derived and without callables."""
    state = {k: flat(v) if isinstance(v, dict) else v for k, v in saved["state"].items()}
    for group in saved["param_groups"]:
        if not runner.rule.saves_derived(group):
            for index in group["params"]:
                param_state = state.get(index, {})
                state[index] = {k: v for k, v in param_state.items() if not runner.is_derived(k)}
    groups = [
        {k: v for k, v in group.items() if not callable(v)} for group in saved["param_groups"]
    ]
    return {**saved, "state": state, "param_groups": groups}


def restore_groups(groups: list[Group], before: list[Group]) -> None:
    """Give groups back what the saved ones lack: callables, and keys of newer versions."""
    for group, live in zip(groups, before, strict=True):
        for old, new in _OLD_GROUP_NAMES.items():
            if old in group:
                group[new] = group.pop(old)
        for name, value in live.items():
            group.setdefault(name, value)


def restore_tensors(
    state: dict[Tensor, ParamState],
    saved: StateDict,
    params: list[Tensor],
    dtypes: Mapping[tuple[int, str], Mapping[str, torch.dtype]],
) -> None:
    """Put saved tensors back in the dtype of a new state; torch takes that of the parameter.

    Args:
        state: State of the optimizer, just loaded by torch.
        saved: What was loaded.
        params: Parameters in the order of the groups.
        dtypes: Those of a new state, by ``id`` of the parameter, label of the part, and what
            names begin with; all else stays as it was saved.

    Raises:
        ValueError: If a tensor is of another kind.
    """
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    for key, param in zip(keys, params, strict=True):
        if param not in state:
            continue
        own = nested(saved["state"].get(key, {}))
        state[param] = _restored(state[param], own, param.device, dtypes.get((id(param), ""), {}))
        for label, part in own.items():
            if isinstance(part, dict) and label.endswith("]"):
                known = dtypes.get((id(param), label), {})
                param_state: dict[str, Any] = state[param]
                param_state[label] = _restored({}, part, param.device, known)


def _restored(
    loaded: Mapping[str, Any],
    saved: Mapping[str, Any],
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Any]:
    """What torch has loaded, with tensors as they were saved."""
    restored = {name: value for name, value in loaded.items() if name in saved}
    for name in _OLD_NAMES.keys() & restored.keys():
        del restored[name]
    for name, value in saved.items():
        name = _OLD_NAMES.get(name, name)
        if isinstance(value, Tensor):
            where = torch.device("cpu") if name in ON_HOST else device
            dtype = dtypes.get(name.split(".")[0], value.dtype)
            if value.is_floating_point() != dtype.is_floating_point or value.is_complex():
                raise ValueError(f"{name!r}: got {value.dtype}. Supported: {dtype}.")
            restored[name] = value.detach().to(where, dtype, copy=True)
    return restored


def split_second_moments(layer: CapturedLayer, state: State, step: int) -> None:
    """Give weight and bias second moments of their own; up to 0.1 the weight kept them as a matrix.

    Args:
        layer: A layer.
        state: State of the optimizer, just loaded.
        step: What counted their updates then: the steps of the group.
    """
    param_state = state.get(layer.weight, {})
    if "exp_avg_sq" not in param_state or "step" in param_state:
        return
    parts = layer.statistics.layer.from_matrix(param_state["exp_avg_sq"], layer.weight.shape)
    for param, part in zip(layer.params(), parts, strict=False):
        assert part is not None
        count = torch.full((), float(step), dtype=torch.float32, device=param.device)
        state[param].update(exp_avg_sq=part.contiguous(), step=count)


def captures_alike(groups: Iterable[Group], before: Iterable[Group], rule: Rule) -> bool:
    """Whether groups have the same layers captured as before, and the same measured of them."""

    def choice(group: Group) -> list[object]:
        return [*(group[name] for name in CAPTURING), rule.needs(group)]

    return [*map(choice, groups)] == [*map(choice, before)]


def expected_dtypes(
    registry: Registry, runner: RuleRunner
) -> dict[tuple[int, str], dict[str, torch.dtype]]:
    """Dtypes of a new state, by ``id`` of the parameter and label of the part, and by name.

    Args:
        registry: All parameters.
        runner: What keeps something of layers.
    """
    dtypes: dict[tuple[int, str], dict[str, torch.dtype]] = {}
    for layer in registry.layers:
        if not layer.statistics.bound:
            continue
        for param in layer.params():
            made: ParamState = {}
            complete(made, torch.empty(0, dtype=param.dtype, device="meta"), layer.group)
            dtypes[_place(param)] = {key: part.dtype for key, part in made.items()}
        made = runner.kept(layer)
        dtypes[_place(layer.weight)] |= {k.split(".")[0]: part.dtype for k, part in made.items()}
    for uncaptured in registry.others:
        like = torch.empty(0, dtype=uncaptured.param.dtype, device="meta")
        made = fallback.init_state(like, uncaptured.group)
        dtypes[id(uncaptured.param), ""] = {key: part.dtype for key, part in made.items()}
    return dtypes


def _place(tensor: Tensor) -> tuple[int, str]:
    part = origin(tensor)
    return (id(tensor), "") if part is None else (id(part.param), part.label)


def complete_derived(layers: Iterable[CapturedLayer], state: State, runner: RuleRunner) -> None:
    """Have made anew what a file lacks of what is derived."""
    for layer in layers:
        if not has_curvature(layer, state) or not runner.placing.assignment.is_grad_worker(layer):
            continue
        param_state = state[layer.weight]
        if runner.rule.derived and not any(map(runner.is_derived, param_state)):
            fresh = runner.fresh(layer)
            param_state.update({key: part for key, part in fresh.items() if runner.is_derived(key)})
            set_mark(state, layer, "last_refresh", -1)
