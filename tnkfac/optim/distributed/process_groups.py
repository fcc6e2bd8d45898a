"""Which processes train the same parameters: found from the parameters alone."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tnkfac.optim.params.sharding import fully_sharded, is_distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def several() -> bool:
    """Whether there may be other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def groups_of(params: list[Tensor]) -> list[ProcessGroup]:
    """Process groups over whose product statistics are to be added up."""
    sharded = fully_sharded(params)
    for param in params:
        if id(param) in sharded:
            return _axes(param)
    known = {id(param) for param in params}
    for thing in gc.get_objects():
        if not issubclass(type(thing), DistributedDataParallel):
            continue
        if any(id(param) in known for param in thing.parameters()):
            return [thing.process_group]
    return []


def ranks_of(params: list[Tensor], groups: list[ProcessGroup]) -> list[int]:
    """Ranks of all processes of such groups."""
    if len(groups) == 1:
        return dist.get_process_group_ranks(groups[0])
    for param in params:
        if is_distributed(param) and _axes(param) == groups:
            mesh: Any = param.device_mesh  # type: ignore[attr-defined]
            return [int(rank) for rank in mesh.mesh.flatten()]
    return [0]


def holders_of(params: list[Tensor]) -> list[ProcessGroup]:
    """Process groups that hold parts of some parameters."""
    groups = {id(group): group for p in params if is_distributed(p) for group in _axes(p)}
    return list(groups.values())


def _axes(param: Any) -> list[ProcessGroup]:
    mesh = param.device_mesh
    return [mesh.get_group(axis) for axis in range(mesh.ndim)]
