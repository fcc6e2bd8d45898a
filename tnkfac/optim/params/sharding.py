"""Parameters that ``fully_shard`` has cut along their first axis, one piece for each process."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch.distributed as dist
from torch import Tensor


@lru_cache(maxsize=1)
def _kind() -> type[Any] | None:
    """The class of tensors that are distributed, if torch was built with it."""
    if not dist.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return DTensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether processes hold parts of a tensor, however it was cut."""
    kind = _kind()
    return kind is not None and issubclass(type(tensor), kind)


def fully_sharded(params: Iterable[Tensor]) -> set[int]:
    """Which of some distributed parameters ``fully_shard`` has cut, by ``id``.

    Those of tensor parallelism are distributed as well, but are so in the forward pass, too.
    """
    candidates = {id(p) for p in params if is_distributed(p) and _along_first_axis(p)}
    if not candidates:
        return set()
    from torch.distributed.fsdp import FSDPModule

    sharded = set()
    for thing in gc.get_objects():
        if issubclass(type(thing), FSDPModule):
            sharded |= {id(param) for param in thing.parameters()}
    return candidates & sharded


def _along_first_axis(param: Any) -> bool:
    *outer, last = param.placements
    return bool(last.is_shard(0)) and all(placement.is_replicate() for placement in outer)


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(update: Tensor, param: Any) -> Tensor:
    """The part of a whole update for what this process holds of a parameter."""
    if not is_distributed(param):
        return update
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    for axis, (length, first) in enumerate(zip(shape, offset, strict=True)):
        update = update.narrow(axis, min(first, update.shape[axis]), length)
    return update
