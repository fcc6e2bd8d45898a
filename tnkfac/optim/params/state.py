"""State of a parameter: structured matrices as one tensor per part, and numbers of the host.

The state of a layer lies under its weight. It holds what the rule keeps, when that was updated, and
the names of its structures; weight and bias have a buffer for their momentum. Everything is a plain
tensor, so that a checkpoint needs no class of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tnkfac.curvature.structures import Parts
from tnkfac.optim.finite import finite
from tnkfac.optim.options import Group
from tnkfac.optim.params.auto_structure import matching
from tnkfac.optim.params.captured import CapturedLayer, update_dtype

ParamState = dict[str, Tensor]
"""State of one parameter, by name."""
State = Mapping[Tensor, ParamState]
"""State of an optimizer, by parameter."""
Initializer = Callable[[CapturedLayer], Mapping[str, Parts]]
"""Makes the matrices that a rule keeps of a layer, before any statistics."""

MARKS = ("first_update", "last_update", "last_refresh")
"""Steps at which something was done to a layer; -1 before."""
ON_HOST = (*MARKS, "failures", "structures")
"""Names of the state that lie on the host, which reads them."""
TAKEN = (*ON_HOST, "momentum_buffer", "exp_avg", "exp_avg_sq", "step")
"""Names that a rule cannot use."""


# -------------------------------------------------------------------------------- matrices


def pack(name: str, parts: Parts) -> ParamState:
    """Parts of a matrix by key: its name alone if there is one part, else ``name.0``, .."""
    if len(parts) == 1:
        return {name: parts[0]}
    return {f"{name}.{index}": part for index, part in enumerate(parts)}


def unpack(state: Mapping[str, Tensor], name: str, dtype: torch.dtype | None = None) -> Parts:
    """The parts of a matrix, cast if a dtype is given; none where nothing is kept of it."""
    if name in state:
        parts = [state[name]]
    else:
        parts = []
        while (key := f"{name}.{len(parts)}") in state:
            parts.append(state[key])
    return tuple(part if dtype is None else part.to(dtype) for part in parts)


def write_where(state: ParamState, new: Mapping[str, Parts], found_inf: Tensor | None) -> None:
    """Write matrices into the state, unless one is not finite or ``found_inf`` is one."""
    pairs = [
        (state[key], part.to(state[key].dtype))
        for name, parts in new.items()
        for key, part in pack(name, parts).items()
    ]
    good = finite([part for _, part in pairs])
    if found_inf is not None:
        good = good & (found_inf.to(good.device) == 0)
    for old, part in pairs:
        old.copy_(torch.where(good, part, old))


# -------------------------------------------------------------------------------- marks


def mark(state: Mapping[Tensor, ParamState], layer: CapturedLayer, name: str) -> int:
    """One of :data:`MARKS`, or -1.

    The state has the only copy, a tensor on the CPU. What was read of it is remembered as long as
    it is the same tensor and nobody has written to it.

    Args:
        state: State of the optimizer.
        layer: The layer.
        name: Of the mark.
    """
    param_state = state.get(layer.weight)
    tensor: Tensor | None = param_state.get(name) if param_state else None
    if tensor is None:
        return -1
    seen = layer.cached_marks.get(name)
    if seen is not None and seen[0] is tensor and seen[1] == tensor._version:
        return seen[2]
    value = int(tensor)
    _remember(layer, name, tensor, value)
    return value


def set_mark(state: State, layer: CapturedLayer, name: str, value: int) -> None:
    """Write a mark that the state has of a layer."""
    tensor = state[layer.weight][name]
    tensor.fill_(value)
    _remember(layer, name, tensor, value)


def _remember(layer: CapturedLayer, name: str, tensor: Tensor, value: int) -> None:
    if not tensor.is_inference():  # these do not tell that they were written to
        layer.cached_marks[name] = (tensor, tensor._version, value)


def has_curvature(layer: CapturedLayer, state: Mapping[Tensor, ParamState]) -> bool:
    """Whether there is a state of curvature; none where only the bias was ever trained."""
    return "last_update" in state.get(layer.weight, {})


# -------------------------------------------------------------------------------- making


def curvature_state(
    layer: CapturedLayer, init: Initializer, warms_up: bool, refreshed: bool
) -> ParamState:
    """The state of the curvature of a layer before any statistics.

    Args:
        layer: The layer; its shape is known.
        init: What the rule keeps of it.
        warms_up: Whether it is updated at every one of the first steps.
        refreshed: Whether something is derived from its factors now and then.

    Raises:
        ValueError: If the rule uses a name of the optimizer's own.
    """
    state: ParamState = {}
    for name, parts in init(layer).items():
        if name in TAKEN or "." in name:
            raise ValueError(
                f"Rule.init: got a matrix {name!r}. Supported: names without dots, but not "
                f"{', '.join(TAKEN)}."
            )
        state |= pack(name, parts)
    present = {"first_update": warms_up, "last_update": True, "last_refresh": refreshed}
    for name in MARKS:
        if present[name]:
            state[name] = torch.tensor(-1, device="cpu")
    if refreshed:
        state["failures"] = torch.tensor(0, device="cpu")
    state["structures"] = _encoded((layer.statistics.k.name, layer.statistics.c.name))
    return state


def complete(state: ParamState, param: Tensor, group: Group) -> None:
    """Add to the state of a weight or bias what does not depend on the rule."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(param, dtype=update_dtype(param.dtype))
    if group["grafting"] == "adam" and "exp_avg_sq" not in state:
        state.update(adam_state(param))


def adam_state(param: Tensor) -> ParamState:
    """State of ``grafting="adam"``: the second moment of a parameter, and its own updates."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    return {
        "exp_avg_sq": torch.zeros(param.shape, dtype=dtype, device=param.device),
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
    }


def size(state: Mapping[str, Tensor]) -> int:
    """Bytes of a state that lie with its parameter."""
    parts = (part for name, part in state.items() if name not in ON_HOST)
    return sum(part.numel() * part.element_size() for part in parts)


# -------------------------------------------------------------------------------- structures


def _encoded(structures: tuple[str, str]) -> Tensor:
    return torch.tensor(list(", ".join(structures).encode()), dtype=torch.uint8, device="cpu")


def follow_structures(layer: CapturedLayer, state: Mapping[Tensor, ParamState]) -> None:
    """Give a layer the structures that its state was saved with, where they were not given."""
    param_state, statistics, group = state.get(layer.weight), layer.statistics, layer.group
    if not param_state or "auto" not in group["structures"] or not statistics.bound:
        return
    saved = param_state.get("structures")
    names: tuple[str, ...] | None
    if saved is not None:
        names = tuple(bytes(map(int, saved.tolist())).decode().split(", "))
    else:  # up to 0.1 the shapes have to tell
        names = matching(statistics.layer, group["structures"], part_shapes(param_state))
    if names is not None and names != (statistics.k.name, statistics.c.name):
        k, c = names
        statistics.restructure((k, c), layer.weight)


def part_shapes(state: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """Shapes of the parts of the factors in a state, those of the input side first."""
    sides = ("K", "C") if any(key.split(".")[0] == "K" for key in state) else ("A", "B")
    return [tuple(part.shape) for side in sides for part in unpack(state, side)]
