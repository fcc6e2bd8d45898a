"""Communication of the processes that train one model: the only file that calls collectives.

Processes are those of the group that the user names, of the ``DistributedDataParallel`` that holds
the parameters, or of the mesh that ``fully_shard`` has cut them for; else there are no others.
Every process has measured its own part of the batch. Statistics are added up once for each update,
in the order of the layers, so that all processes go on with the same factors.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from tnkfac.optim.distributed.buckets import buckets, packed, size, unpacked
from tnkfac.optim.distributed.process_groups import groups_of, holders_of, ranks_of, several
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.sharding import is_distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Copy:
    """Tensors that one process has and others are to have.

    Attributes:
        name: The layer whose they are, for errors.
        source: The place of the process that has them, among those that train the parameters.
        members: The places of all that are to have them, in order.
        tensors: Contiguous; overwritten in all but the source.
    """

    name: str
    source: int
    members: tuple[int, ...]
    tensors: list[Tensor]


class Processes:
    """The processes that train the same parameters, once they are known."""

    def __init__(self, process_group: ProcessGroup | str | None = "auto") -> None:
        """None are known yet.

        Args:
            process_group: Those that average gradients by hand; None if this process trains
                alone; ``"auto"`` to look for what ties the parameters to others.

        Raises:
            TypeError: If it is nothing of that kind.
        """
        kinds = (dist.ProcessGroup,) if dist.is_available() else ()
        if process_group not in ("auto", None) and not isinstance(process_group, kinds):
            raise TypeError(
                f"process_group: got {process_group!r}. Supported: 'auto', None, a "
                "torch.distributed.ProcessGroup."
            )
        self._given = process_group
        self._groups: list[ProcessGroup] = []
        self.holders: list[ProcessGroup] = []
        self._ranks: list[int] = [0]
        self._subgroups: dict[tuple[int, ...], ProcessGroup] = {}
        self._compared: set[int] = set()
        self._updates = 0

    def look(self, params: Callable[[], Iterable[Tensor]], due: bool = True) -> None:
        """Look for what ties some of these parameters to other processes.

        A model may be wrapped after the optimizer is made, so this looks at the first step and the
        first updates, then ever less often: to search all objects takes a while.

        Args:
            params: Lists the parameters.
            due: Whether factors are about to be updated.
        """
        if self._groups or not several() or not (due or self._updates == 0):
            return
        self._updates += 1
        if self._updates & (self._updates - 1) == 0:
            self.find(list(params()))

    def find(self, params: list[Tensor]) -> None:
        """Search for it now."""
        if not self._groups and several():
            self._groups = self._named() if self._given != "auto" else groups_of(params)
            self.holders = holders_of(params)
            self._ranks = ranks_of(params, self._groups)

    def _named(self) -> list[ProcessGroup]:
        """The group that the user named, unless it is this process alone."""
        group = self._given
        alone = group is None or isinstance(group, str) or dist.get_world_size(group) == 1
        return [] if alone else [group]  # type: ignore[list-item]

    @property
    def overlooked(self) -> bool:
        """Whether there are other processes, but nothing ties the parameters to them."""
        return not self._groups and self._given == "auto" and several()

    @property
    def count(self) -> int:
        """Number of processes."""
        return prod(dist.get_world_size(group) for group in self._groups) if self._groups else 1

    @property
    def rank(self) -> int:
        """The place of this process among them."""
        return self._ranks.index(dist.get_rank()) if self._groups else 0

    def agree(self, skip: Tensor | bool) -> Tensor | bool:
        """Skip a batch in all processes if one of them is to skip it.

        Args:
            skip: What this one has found; after :meth:`send`, all have found the same unless
                they hold different parts of the gradients.
        """
        if not self.holders:
            return skip
        flag = torch.tensor(float(skip), device="cpu") if isinstance(skip, bool) else skip
        for group in self.holders:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        return bool(flag) if isinstance(skip, bool) else flag

    def send(self, layers: Sequence[CapturedLayer]) -> Callable[[], None]:
        """Begin to add up the statistics of layers over all processes.

        A process in which a layer did not run contributes zeros. What no process has measured is
        dropped, as far as that can be told without waiting for a device.

        Args:
            layers: The same layers in the same order in every process.

        Returns:
            What waits for the sums and puts them in the place of the statistics; messages travel
            until then.

        Raises:
            RuntimeError: If processes have other layers, or a message is lost; it names the layers.
        """
        layers = [layer for layer in layers if layer.statistics.hidden_leaves]
        self._compare(layers)
        share = 1 / self.count
        sent = [layer.statistics.to_reduce(share) for layer in layers]
        entries = [entry for statistics in sent for entry in statistics]
        names = [layer.name for layer, parts in zip(layers, sent, strict=True) for _ in parts]
        arrive = self._travelling(entries, names)

        def receive() -> None:
            received = iter(arrive())
            for layer, parts in zip(layers, sent, strict=True):
                sums = [next(received) for _ in parts]
                counts = sums[-1]
                if counts.device.type == "cpu" and not bool(counts[0] > 0):
                    layer.statistics.clear()
                else:
                    layer.statistics.set_reduced(sums)

        return receive

    def _travelling(
        self, entries: list[tuple[Tensor, bool]], names: list[str]
    ) -> Callable[[], list[Tensor]]:
        """Send buckets, each of which travels while the next one is packed; return who waits."""
        travelling = []
        for bucket in buckets(entries):
            flat = torch.cat([packed(*entries[i]) for i in bucket])
            with _names([names[i] for i in bucket]):
                for group in self._groups[:-1]:
                    dist.all_reduce(flat, group=group)
                work = dist.all_reduce(flat, group=self._groups[-1], async_op=True)
            travelling.append((bucket, flat, work))

        def arrive() -> list[Tensor]:
            arrived: list[Tensor] = []
            for bucket, flat, work in travelling:
                with _names([names[i] for i in bucket]):
                    work.wait()
                sizes = [size(*entries[i]) for i in bucket]
                for i, part in zip(bucket, torch.split(flat, sizes), strict=True):
                    arrived.append(unpacked(part, *entries[i]))
            return arrived

        return arrive

    def copy(self, copies: Sequence[Copy], patience: timedelta | None = None) -> None:
        """Have tensors of some processes in others.

        Args:
            copies: The same in the same order in all members, of which this process is one.
            patience: How long to wait for the others; None for the time-out of their group.

        Raises:
            RuntimeError: If a message is lost; it names the layers.
        """
        together: dict[tuple[tuple[int, ...], int], list[tuple[str, Tensor]]] = {}
        for copy in copies:
            if len(copy.members) > 1:
                entries = together.setdefault((copy.members, copy.source), [])
                entries += [(copy.name, tensor) for tensor in copy.tensors]
        travelling = []
        for (members, source), named in sorted(together.items(), key=lambda item: item[0]):
            group, is_source = self._group(members), source == self.rank
            for bucket in buckets([(tensor, False) for _, tensor in named]):
                flat = torch.cat([named[i][1].detach().view(-1) for i in bucket])
                names = [named[i][0] for i in bucket]
                with _names(names):
                    work = dist.broadcast(flat, self._ranks[source], group=group, async_op=True)
                assert work is not None
                tensors = [] if is_source else [named[i][1] for i in bucket]
                travelling.append((work, flat, tensors, names))
        for work, flat, tensors, names in travelling:
            with _names(names):
                work.wait() if patience is None else work.wait(patience)
            if tensors:
                parts = torch.split(flat, [tensor.numel() for tensor in tensors])
                for tensor, part in zip(tensors, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def worst(self, codes: list[int], device: torch.device) -> list[int]:
        """The largest of each number over all processes."""
        if not self._groups or not codes:
            return codes
        worst = torch.tensor(codes, device=device)
        for group in self._groups:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
        listed: list[int] = worst.tolist()
        return listed

    def _group(self, members: tuple[int, ...]) -> ProcessGroup:
        """The process group of some of the places."""
        if len(members) == self.count and len(self._groups) == 1:
            return self._groups[0]
        if members not in self._subgroups:
            ranks = [self._ranks[member] for member in members]
            group: Any = dist.new_group(ranks, use_local_synchronization=True)
            self._subgroups[members] = group
        return self._subgroups[members]

    def _compare(self, layers: Sequence[CapturedLayer]) -> None:
        """Make sure, once for every list of layers, that all processes have the same."""
        words = ";".join(
            f"{layer.name} {[tuple(leaf.shape) for leaf in layer.statistics.hidden_leaves]}"
            for layer in layers
        )
        checksum = zlib.crc32(words.encode())
        if checksum in self._compared or not layers:
            return
        device = layers[0].statistics.hidden_leaves[0].device
        ends = torch.tensor([checksum, -checksum], dtype=torch.int64, device=device)
        for group in self._groups:
            dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
        if ends.tolist() != [checksum, -checksum]:
            raise RuntimeError(
                f"Processes are to add up the statistics of different layers; this one has {words}."
            )
        self._compared.add(checksum)


def full_tensor(tensor: Any) -> Tensor:
    """All of a tensor of which this process may hold but a part."""
    if not is_distributed(tensor):
        return tensor  # type: ignore[no-any-return]
    return tensor.full_tensor()  # type: ignore[no-any-return]


@contextmanager
def _names(layers: list[str]) -> Iterator[None]:
    """Name the layers whose message is lost."""
    try:
        yield
    except RuntimeError as error:
        which = ", ".join(dict.fromkeys(layers))
        raise RuntimeError(
            f"A message between the {dist.get_world_size()} processes was lost, with what is known "
            f"of {which}: one of them did not take part, or not in time."
        ) from error
