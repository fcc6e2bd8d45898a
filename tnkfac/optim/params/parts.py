"""Parts of parameters that are layers of their own, such as the three matrices of attention.

A part is a tensor that shares memory with its parameter, and stands for it wherever a layer has a
weight or a bias. Its state lies in that of the parameter, under the label of the part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnkfac.curvature.uses.blocks import Block, Span
from tnkfac.optim.params.sharding import is_distributed, local_shard, shard_like


@dataclass(frozen=True, eq=False)
class Part:
    """Where a part comes from.

    Attributes:
        param: The parameter.
        block: Which numbers of it.
        label: How these are written as an index.
        idle: Whether a gradient of zeros means that it took no part, like an expert without tokens.
    """

    param: Tensor
    block: Block | Span
    label: str
    idle: bool


def part_of(param: Tensor, block: Block | Span, idle: bool = False) -> Tensor:
    """A tensor that stands for a part of a parameter.

    Args:
        param: The parameter.
        block: Which numbers of it.
        idle: Whether it makes no step where its gradient is zero.
    """
    tensor = block.of(
        torch.empty(param.shape, dtype=param.dtype, device=param.device)
        if is_distributed(param)
        else param
    )
    tensor._tnkfac_part = Part(param, block, block.label(param.shape), idle)  # type: ignore[attr-defined]
    return tensor


def origin(tensor: Tensor) -> Part | None:
    """Where a tensor comes from, if it is a part of a parameter."""
    return getattr(tensor, "_tnkfac_part", None)


def home(tensor: Tensor) -> Tensor:
    """The parameter that a tensor is a part of, or that it is."""
    part = origin(tensor)
    return tensor if part is None else part.param


class PartStates(Mapping[Tensor, dict[str, Any]]):
    """States by parameter, in which those of parts are found as well."""

    def __init__(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Look into this state.

        Args:
            state: State of an optimizer, which makes an empty one for what it lacks.
        """
        self._state = state

    def __getitem__(self, tensor: Tensor) -> dict[str, Any]:
        """The state of a parameter or part; an empty one if there is none."""
        part = origin(tensor)
        if part is None:
            return self._state[tensor]
        state: dict[str, Any] = self._state[part.param].setdefault(part.label, {})
        return state

    def get(self, tensor: Tensor, default: Any = None) -> Any:
        """The state of a parameter or part, if there is one."""
        part = origin(tensor)
        if part is None:
            return self._state.get(tensor, default)
        return self._state.get(part.param, {}).get(part.label, default)

    def __iter__(self) -> Iterator[Tensor]:
        """All parameters that have a state."""
        return iter(self._state)

    def __len__(self) -> int:
        """Number of parameters that have a state."""
        return len(self._state)


def nested(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter from a file, where parts have their label before each name."""
    own: dict[str, Any] = {}
    for key, value in state.items():
        label, found, name = key.rpartition("].")
        if isinstance(key, str) and found:
            own.setdefault(f"{label}]", {})[name] = value
        else:
            own[key] = value
    return own


def flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of :func:`nested`."""
    listed: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            listed |= {f"{key}.{name}": part for name, part in value.items()}
        else:
            listed[key] = value
    return listed


class Parts:
    """The parts of all layers of an optimizer, which follow their parameters through a step."""

    def __init__(self) -> None:
        """There are none."""
        self._of: dict[int, list[Tensor]] = {}
        self._params: dict[int, Tensor] = {}
        self._whole: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._of)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Have exactly the parts among these tensors.

        Args:
            tensors: Weights and biases of layers.
        """
        self._of, self._params = {}, {}
        for tensor in tensors:
            part = origin(tensor)
            if part is not None:
                self._of.setdefault(id(part.param), []).append(tensor)
                self._params[id(part.param)] = part.param

    def begin(self, whole: Callable[[Tensor], Tensor]) -> None:
        """Take memory and gradients from the parameters, as they are now.

        Args:
            whole: Puts together what processes hold parts of.
        """
        for key, tensors in self._of.items():
            param = self._params[key]
            values, grad = param.detach(), param.grad
            if is_distributed(param):
                values = self._whole[key] = whole(values)
                grad = None if grad is None else whole(grad)
            if grad is not None:
                grad = self._gradients[key] = grad.contiguous()
            for tensor in tensors:
                part = origin(tensor)
                assert part is not None
                tensor.data = part.block.of(values)
                tensor.grad = None if grad is None else part.block.of(grad)
        self._drop_idle()

    def _drop_idle(self) -> None:
        """Take the gradients from parts that took no part in the passes."""
        doubtful = [
            tensor
            for tensors in self._of.values()
            for tensor in tensors
            if (part := origin(tensor)) is not None and part.idle and tensor.grad is not None
        ]
        if not doubtful:
            return
        used = torch.stack([t.grad.any() for t in doubtful if t.grad is not None]).tolist()
        for tensor, was_used in zip(doubtful, used, strict=True):
            if not was_used:
                tensor.grad = None

    def write_gradients(self) -> None:
        """Write the gradients of parts into those of the parameters, where they are copies."""
        for key, tensors in self._of.items():
            grad = self._params[key].grad
            if grad is None or (not is_distributed(grad) and grad.is_contiguous()):
                continue
            whole = self._gradients[key]
            for tensor in tensors:
                part = origin(tensor)
                if part is not None and tensor.grad is not None:
                    part.block.of(whole).copy_(tensor.grad)
            local_shard(grad).copy_(shard_like(whole, self._params[key]))

    def end(self) -> None:
        """Let go of the gradients, and write what was put together back into the parameters."""
        self._gradients.clear()
        for key, tensors in self._of.items():
            param = self._params[key]
            if key in self._whole:
                local_shard(param.detach()).copy_(shard_like(self._whole.pop(key), param))
            for tensor in tensors:
                tensor.grad = None
