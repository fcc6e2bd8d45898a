"""What processes that train one model tell each other: the only file that calls collectives.

Processes are those of the ``DistributedDataParallel`` that holds the parameters, or of the mesh
that ``fully_shard`` has cut them for; without either there are no others. Every process has
measured its own part of the batch. Statistics are added up once for each update, in the order of
the layers, so that all processes go on with the same factors.
"""

from __future__ import annotations

import gc
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tnkfac.optim.layers import CapturedLayer
from tnkfac.optim.shards import fully_sharded, is_distributed

BUCKET = 25 * 2**20
"""Bytes that are sent in one message."""


class Processes:
    """The processes that train the same parameters, once they are known."""

    def __init__(self) -> None:
        """There are no others."""
        self._groups: list[Any] = []
        self._holders: list[Any] = []
        self._compared: set[int] = set()
        self._updates = 0

    def look(self, params: Callable[[], Iterable[Tensor]]) -> None:
        """Look for what ties some of these parameters to other processes.

        A model may be wrapped after the optimizer is made, so this looks at the first updates, then
        ever less often: to search all objects takes a while.
        """
        if not self._groups and _several():
            self._updates += 1
            if self._updates & (self._updates - 1) == 0:
                listed = list(params())
                self._groups = _groups_of(listed)
                self._holders = _holders_of(listed)

    @property
    def count(self) -> int:
        """Number of processes."""
        return prod(dist.get_world_size(group) for group in self._groups) if self._groups else 1

    def agree(self, skip: Tensor | bool) -> Tensor | bool:
        """Skip a batch in all processes if one of them is to skip it.

        Args:
            skip: What this one has found; after :meth:`reduce`, all have found the same unless
                they hold different parts of the gradients.
        """
        if not self._holders:
            return skip
        flag = torch.tensor(float(skip)) if isinstance(skip, bool) else skip
        for group in self._holders:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        return bool(flag) if isinstance(skip, bool) else flag

    def reduce(self, layers: Sequence[CapturedLayer]) -> None:
        """Add up the statistics of layers over all processes.

        A process in which a layer did not run contributes zeros. What no process has measured is
        dropped, as far as that can be told without waiting for a device.

        Args:
            layers: The same layers in the same order in every process.

        Raises:
            RuntimeError: If processes have other layers, or a message is lost; it names the layers.
        """
        layers = [layer for layer in layers if layer.statistics.hidden_leaves]
        self._compare(layers)
        share = 1 / self.count
        sent = [layer.statistics.exchanged(share) for layer in layers]
        entries = [entry for statistics in sent for entry in statistics]
        names = [layer.name for layer, own in zip(layers, sent, strict=True) for _ in own]
        received = iter(self._summed(entries, names))
        for layer, own in zip(layers, sent, strict=True):
            sums = [next(received) for _ in own]
            counts = sums[-1]
            if counts.device.type == "cpu" and not bool(counts[0] > 0):
                layer.statistics.clear()
            else:
                layer.statistics.take(sums)

    def _summed(self, entries: list[tuple[Tensor, bool]], names: list[str]) -> list[Tensor]:
        """Sums over processes, in buckets that travel while the next one is packed."""
        travelling = []
        for bucket in _buckets(entries):
            flat = torch.cat([_packed(*entries[i]) for i in bucket])
            try:
                for group in self._groups[:-1]:
                    dist.all_reduce(flat, group=group)
                work = dist.all_reduce(flat, group=self._groups[-1], async_op=True)
            except RuntimeError as error:
                raise _lost(names, bucket) from error
            travelling.append((bucket, flat, work))
        found: list[Tensor] = []
        for bucket, flat, work in travelling:
            try:
                work.wait()
            except RuntimeError as error:
                raise _lost(names, bucket) from error
            sizes = [_size(*entries[i]) for i in bucket]
            for i, part in zip(bucket, torch.split(flat, sizes), strict=True):
                found.append(_unpacked(part, *entries[i]))
        return found

    def _compare(self, layers: Sequence[CapturedLayer]) -> None:
        """Make sure, once for every list of layers, that all processes have the same."""
        words = ";".join(
            f"{layer.name} {[tuple(leaf.shape) for leaf in layer.statistics.hidden_leaves]}"
            for layer in layers
        )
        mine = zlib.crc32(words.encode())
        if mine in self._compared or not layers:
            return
        device = layers[0].statistics.hidden_leaves[0].device
        ends = torch.tensor([mine, -mine], dtype=torch.int64, device=device)
        for group in self._groups:
            dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
        if ends.tolist() != [mine, -mine]:
            raise RuntimeError(
                f"Processes are to add up the statistics of different layers; this one has {words}."
            )
        self._compared.add(mine)


def whole(tensor: Any) -> Tensor:
    """All of a tensor of which this process may hold but a part."""
    if not is_distributed(tensor):
        return tensor  # type: ignore[no-any-return]
    return tensor.full_tensor()  # type: ignore[no-any-return]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _groups_of(params: list[Tensor]) -> list[Any]:
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


def _holders_of(params: list[Tensor]) -> list[Any]:
    """Process groups that hold parts of some parameters."""
    found = {id(group): group for p in params if is_distributed(p) for group in _axes(p)}
    return list(found.values())


def _axes(param: Any) -> list[Any]:
    mesh = param.device_mesh
    return [mesh.get_group(axis) for axis in range(mesh.ndim)]


def _lost(names: list[str], bucket: list[int]) -> RuntimeError:
    which = ", ".join(dict.fromkeys(names[i] for i in bucket))
    return RuntimeError(f"The statistics of {which} could not be added up over the processes.")


def _buckets(entries: Sequence[tuple[Tensor, bool]]) -> Iterator[list[int]]:
    """Places of entries that are sent together: neighbours of one device and dtype."""
    bucket: list[int] = []
    kind, room = None, 0
    for place, (tensor, symmetric) in enumerate(entries):
        size = _size(tensor, symmetric) * tensor.element_size()
        if bucket and (kind != (tensor.device, tensor.dtype) or size > room):
            yield bucket
            bucket = []
        if not bucket:
            kind, room = (tensor.device, tensor.dtype), BUCKET
        bucket.append(place)
        room -= size
    if bucket:
        yield bucket


def _size(tensor: Tensor, symmetric: bool) -> int:
    """Numbers that are sent: of symmetric matrices, upper triangles."""
    if not symmetric:
        return tensor.numel()
    rows = tensor.shape[-1]
    return tensor.numel() // (rows * rows) * (rows * (rows + 1) // 2)


def _packed(tensor: Tensor, symmetric: bool) -> Tensor:
    if not symmetric:
        return tensor.reshape(-1)
    upper, _ = _triangle(tensor.shape[-1], tensor.device)
    return tensor.reshape(-1, tensor.shape[-1] ** 2).index_select(1, upper).view(-1)


def _unpacked(flat: Tensor, like: Tensor, symmetric: bool) -> Tensor:
    if not symmetric:
        return flat.view(like.shape)
    _, back = _triangle(like.shape[-1], like.device)
    size = like.shape[-1] * (like.shape[-1] + 1) // 2
    return flat.view(-1, size).index_select(1, back).view(like.shape)


@lru_cache(maxsize=64)
def _triangle(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the upper triangle lies in a matrix, and where an entry of that lies in the former."""
    i, j = torch.triu_indices(rows, rows)
    back = torch.empty(rows, rows, dtype=torch.int64)
    back[i, j] = back[j, i] = torch.arange(len(i))
    return (i * rows + j).to(device), back.view(-1).to(device)
