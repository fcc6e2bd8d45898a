"""Deriving something from what is kept of many layers, whatever happens to some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from tnkfac.curvature.callers import warn
from tnkfac.optim.distributed.placing import Placing
from tnkfac.optim.params.batches import Stack, parted, stacks
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.state import ParamState, State, pack, set_mark, unpack
from tnkfac.optim.rules.decompositions import saturated
from tnkfac.optim.rules.rule import NamedParts, Rule

_DONE, _FAILED, _NOT_FINITE = 0, 1, 2


@dataclass
class Attempt:
    """Outcome of refreshing a layer.

    Attributes:
        code: Whether it was done, failed, or what it reads is not finite.
        derived: What was derived, or what stands in for it.
        reason: Why it failed.
    """

    code: int = _DONE
    derived: NamedParts = field(default_factory=dict)
    reason: str = ""


def refresh(
    rule: Rule,
    due: Sequence[CapturedLayer],
    state: State,
    placing: Placing,
    fresh: Callable[[CapturedLayer], ParamState],
) -> list[CapturedLayer]:
    """Refresh some layers, each in the process that is to do it.

    Args:
        rule: What derives.
        due: Layers, the same in all processes.
        state: State of the optimizer.
        placing: Which process does what.
        fresh: The state of the curvature of a layer before any statistics.

    Returns:
        Layers that had to start anew.

    Raises:
        torch.linalg.LinAlgError: If one has failed more often in a row than is tolerated.
    """
    here = [layer for layer in due if placing.assignment.is_inv_worker(layer)]
    attempts = dict(zip(map(id, here), _attempts(rule, here, state), strict=True))
    codes = [attempts[id(la)].code if id(la) in attempts else _DONE for la in due]
    if any(placing.assignment.of(layer).inv_worker is not None for layer in due):
        codes = placing.processes.worst(codes, due[0].weight.device)
    changed, restarted = [], []
    for layer, code in zip(due, codes, strict=True):
        param_state = state[layer.weight]
        set_mark(state, layer, "last_refresh", layer.group["step"])
        attempt = attempts.get(id(layer), Attempt(code, reason="its decomposition failed"))
        if code != _NOT_FINITE:
            changed.append(layer)
            for name, parts in attempt.derived.items():
                for old, part in zip(unpack(param_state, name), parts, strict=True):
                    old.copy_(saturated(part, old.dtype))
        if code == _DONE:
            param_state["failures"].zero_()
            continue
        if code == _NOT_FINITE:
            _restart(rule, layer, state, fresh(layer))
            restarted.append(layer)
        _tell_failure(rule, layer, param_state, attempt.reason, restart=code == _NOT_FINITE)
    placing.share(changed, rule.derived, state)
    return restarted


def _attempts(rule: Rule, due: list[CapturedLayer], state: State) -> list[Attempt]:
    """Refresh some layers here; the host waits twice for all of them together."""
    sources = [
        [part for name in rule.source() for part in unpack(state[layer.weight], name)]
        for layer in due
    ]
    usable = _on_host([_all_finite(parts) for parts in sources])
    attempts = [
        Attempt() if good else Attempt(_NOT_FINITE, reason="its factors are not finite")
        for good in usable
    ]
    good = [index for index in range(len(due)) if usable[index]]
    sound: dict[int, Tensor] = {}
    for places in stacks([due[index] for index in good], state):
        indices = [good[place] for place in places]
        batch = Stack([due[index] for index in indices], state)
        try:
            derived = rule.refresh(batch)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        flags = rule.is_sound(batch, derived).view(len(indices), -1).all(1)
        sound.update(zip(indices, flags.unbind(), strict=True))
        pieces = [parted(parts, len(indices)) for parts in derived.values()]
        for index, layer_parts in zip(indices, zip(*pieces, strict=True), strict=True):
            attempts[index].derived = dict(zip(derived, layer_parts, strict=True))
    done = dict(zip(sound, _on_host(list(sound.values())), strict=True))
    for index in good:
        if not done.get(index, False):
            attempts[index] = _repaired(rule, Stack([due[index]], state))
    return attempts


def _repaired(rule: Rule, batch: Stack) -> Attempt:
    """Refresh one layer by all means, or have something stand in for it."""
    try:
        return Attempt(derived=rule.repair(batch))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        return Attempt(_FAILED, rule.stand_in(batch), str(error))


def _restart(rule: Rule, layer: CapturedLayer, state: State, fresh: ParamState) -> None:
    """Measure anew what a layer is refreshed from."""
    param_state = state[layer.weight]
    keys = chain.from_iterable(pack(name, unpack(fresh, name)) for name in rule.source())
    param_state.update({key: fresh[key] for key in keys if key in param_state})
    for mark in ("last_update", "last_refresh"):
        set_mark(state, layer, mark, -1)


def _tell_failure(
    rule: Rule, layer: CapturedLayer, param_state: ParamState, reason: str, restart: bool
) -> None:
    """Count a failure, and tell of it."""
    name, tolerated = layer.named()[0][0], rule.tolerated_failures(layer.group)
    param_state["failures"] += 1
    failures = int(param_state["failures"])
    if failures > tolerated:
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"The factors of {name} could not be decomposed {failures} times in a row: {reason}"
        )
    stand_in = "decomposition" if restart else "eigenvectors, and a bound on the eigenvalues"
    warn(
        f"The factors of {name} could not be decomposed: {reason}. The step goes on with the "
        f"last {stand_in} (failure {failures}, {tolerated} tolerated in a row)."
    )


def _all_finite(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.ones((), dtype=torch.bool, device="cpu")
    return torch.stack([part.isfinite().all() for part in tensors]).all()


def _on_host(flags: list[Tensor]) -> list[bool]:
    """Flags that may be on several devices, with a single wait for them."""
    if not flags:
        return []
    values: list[bool] = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return values
