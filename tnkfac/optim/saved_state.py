"""Whether a saved state is one that this optimizer can go on with exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import StateDict

from tnkfac.optim import options
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer, Uncaptured
from tnkfac.optim.params.registry import Registry
from tnkfac.optim.params.state import MARKS, ParamState, State, complete, has_curvature
from tnkfac.optim.rules.rule import Rule
from tnkfac.optim.rules.runner import RuleRunner
from tnkfac.optim.step import fallback

_OPTIONAL = ("first_update", "structures")
"""What files of older versions lack."""


def check_groups(saved: StateDict, groups: list[Group], rule: Rule) -> None:
    """Check hyper-parameters before anything is loaded.

    Args:
        saved: What is to be loaded.
        groups: Live groups.
        rule: The rule of this optimizer.

    Raises:
        ValueError: If they are those of another optimizer, or out of range.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        raise ValueError(
            f"state_dict: got {_shown(saved)}. Supported: a dict with 'state' and 'param_groups'."
        )
    special = rule.options.keys() - options.SHARED.keys()
    for index, (given, live) in enumerate(zip(saved["param_groups"], groups, strict=False)):
        where = f"state_dict['param_groups'][{index}]"
        if special and 2 * len(special & given.keys()) <= len(special):  # older files lack some
            raise ValueError(
                f"{where}: got the keys of another optimizer, {', '.join(sorted(given))}. "
                f"Supported: a state with {', '.join(sorted(special))}."
            )
        try:
            rule.check({**live, **given}, dict(given))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        for name in ("step", "last_due", "last_refresh_due"):
            count = given.get(name, 0)
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"{where}: got {name}={count!r}. Supported: an int from 0.")


def check_states(registry: Registry, state: State, runner: RuleRunner) -> None:
    """Check what was loaded against the state that these layers would have.

    Raises:
        ValueError: If a tensor is missing, superfluous, or of another shape or kind.
    """
    for layer in registry.layers:
        if layer.statistics.bound:
            _check_layer(layer, state, runner)
    for uncaptured in registry.others:
        param_state = state.get(uncaptured.param)
        found = uncaptured.kind  # else its layer may be found when the model runs
        if registry.is_looked_for(uncaptured.param):
            continue
        if param_state and found and not is_lazy(uncaptured.param):
            _check_uncaptured(uncaptured, param_state)
    check_parts(registry, state)


def check_parts(registry: Registry, state: State) -> None:
    """Check that no state is one of parts that a parameter does not have.

    Args:
        registry: The parameters.
        state: State of the optimizer.

    Raises:
        ValueError: If there is one.
    """
    names = {id(param): name for name, param in registry.named()}
    for param, labels in registry.parts_of().items():
        saved = {key for key, value in state.get(param, {}).items() if isinstance(value, dict)}
        if not saved <= labels:
            raise ValueError(
                f"state of {names[id(param)]}: got parts {', '.join(sorted(saved))}. "
                f"Supported: {', '.join(sorted(labels))}."
            )


def _check_layer(layer: CapturedLayer, state: State, runner: RuleRunner) -> None:
    fresh = runner.kept(layer)
    curvature = {key: part for key, part in fresh.items() if key not in _OPTIONAL}
    if not runner.rule.saves_derived(layer.group):
        curvature = {k: v for k, v in curvature.items() if not runner.is_derived(k)}
    for name, param in layer.named():
        param_state = state.get(param)
        if not param_state:
            continue
        expected: ParamState = {}
        complete(expected, param, layer.group)
        optional = set(expected)
        if param is layer.weight:
            known = {**fresh, **expected}
            kept = fresh.keys() & param_state.keys()
            required = set(curvature) if kept else set()
            if has_curvature(layer, state):
                required |= optional
        else:
            known, required = expected, optional
        _compare(name, param_state, known, required)
    if has_curvature(layer, state):
        _check_marks(layer.named()[0][0], state[layer.weight])


def _check_uncaptured(uncaptured: Uncaptured, param_state: ParamState) -> None:
    if "last_update" in param_state:
        raise ValueError(
            f"state of {uncaptured.name}: got that of a layer with curvature. Supported: that of "
            f"the fallback, since {uncaptured.reason}."
        )
    expected = fallback.init_state(uncaptured.param, uncaptured.group)
    _compare(uncaptured.name, param_state, expected, set(expected))


def _compare(
    name: str, param_state: ParamState, known: Mapping[str, Tensor], required: set[str]
) -> None:
    """Compare the state of a parameter with what it should be."""
    for key in sorted(required - param_state.keys()):
        _refuse(name, key, "nothing", known.get(key))
    for key, part in param_state.items():
        expected = known.get(key)
        if expected is None:
            _refuse(name, key, _shown(part), None)
        if not isinstance(part, Tensor) or part.is_complex() != expected.is_complex():
            _refuse(name, key, _shown(part), expected)
        if key != "structures" and part.shape != expected.shape:
            _refuse(name, key, _shown(part), expected)


def _check_marks(name: str, param_state: ParamState) -> None:
    """Check the numbers that the host reads."""
    for key in param_state.keys() & MARKS:
        number = int(param_state[key])
        if number < -1:
            raise ValueError(f"state of {name}: got {key}={number}. Supported: at least -1.")


def _refuse(name: str, key: str, saved: str, expected: Tensor | None) -> NoReturn:
    wanted = "nothing" if expected is None else _shown(expected)
    raise ValueError(f"state of {name}: got {saved} for {key!r}. Supported: {wanted}.")


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
