"""SINGD's update for many layers with diagonal factors at once.

The factors of all layers lie end to end in one vector; every channel group of a layer is a segment
of it. The arithmetic is that of :mod:`tnkfac.optim.singd_rule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tnkfac.curvature.structures.diagonal import Diagonal
from tnkfac.optim.guard import finite_on_host
from tnkfac.optim.layers import CapturedLayer
from tnkfac.optim.registry import Group
from tnkfac.optim.singd_rule import LARGEST_CHANGE

State = Any
_KINDS = (torch.float32, torch.float64)


def suits(layer: CapturedLayer, state: State) -> bool:
    """Whether both factors of a layer are diagonal, in the precision of its weight."""
    if "K" not in state or layer.weight.device.type not in ("cpu", "cuda"):
        return False
    statistics, kind = layer.statistics, layer.weight.dtype
    if kind not in _KINDS:
        return False
    if not (isinstance(statistics.k, Diagonal) and isinstance(statistics.c, Diagonal)):
        return False
    return all(state[name].dtype == kind for name in ("K", "C"))


@dataclass(frozen=True)
class Segments:
    """Where each channel group of each ``K`` and each ``C`` lies in a vector of all of them.

    All ``K`` come first. The *partner* of a segment of ``K`` is that of the same channel group of
    ``C``, and the other way round.

    Attributes:
        lengths: Numbers of each segment.
        twice: The same for two such vectors end to end.
        own: The segment of every number.
        other: Its partner.
        partner: The partner of every segment.
        layer: The layer of every segment.
        entry: The segment's entry in a table with a number for every ``A``, then for every ``B``.
    """

    lengths: Tensor
    twice: Tensor
    own: Tensor
    other: Tensor
    partner: Tensor
    layer: Tensor
    entry: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """Mean of every segment."""
        return torch.segment_reduce(values, "mean", lengths=self.lengths, unsafe=True)

    def largest(self, values: Tensor) -> Tensor:
        """Largest number of every segment."""
        return torch.segment_reduce(values, "max", lengths=self.lengths, unsafe=True)


@lru_cache(maxsize=64)
def _segments(shapes: tuple[tuple[int, int, int], ...], device: torch.device) -> Segments:
    """Segments of layers ``(G, D, C_out / G)``; kept, since copies to a device wait for it."""
    layers = [layer for layer, (groups, _, _) in enumerate(shapes) for _ in range(groups)]
    lengths = [D for groups, D, _ in shapes for _ in range(groups)]
    lengths += [out for groups, _, out in shapes for _ in range(groups)]
    half = len(layers)
    partner = torch.arange(2 * half).roll(half)
    own = torch.repeat_interleave(torch.tensor(lengths), output_size=sum(lengths))
    layer = torch.tensor(layers)
    found = (
        torch.tensor(lengths),
        torch.tensor(lengths * 2),
        own,
        partner[own],
        partner,
        layer.repeat(2),
        torch.cat([layer, layer + len(shapes)]),
    )
    return Segments(*(tensor.to(device) for tensor in found))


def update(
    states: Sequence[State],
    collected: Sequence[Sequence[Tensor]],
    group: Group,
    loss_scale: Tensor | float,
    lr_cov: float,
    keep: Tensor | None,
) -> None:
    """One update of ``K`` and ``C`` of layers of one device and dtype.

    Args:
        states: States of the layers.
        collected: Their statistics, un-normalised: ``A [G, D]``, ``B [G, C_out / G]``, counts.
        group: Hyper-parameters that they share, without ``kfac_like`` and ``normalize_lr_cov``.
        loss_scale: Number by which the loss was multiplied before it was back-propagated.
        lr_cov: Step size.
        keep: Scalar that is zero where the batch is to be skipped.
    """
    A, B, counts = zip(*collected, strict=True)
    shapes = tuple((*a.shape, b.shape[1]) for a, b in zip(A, B, strict=True))
    at = _segments(shapes, A[0].device)
    X, factors = _joined(states, "K", "C"), torch.cat([part.reshape(-1) for part in (*A, *B)])
    factors, damping = _damped(factors, counts, group, loss_scale, at)
    XX = X * X
    both = torch.cat([XX * factors, XX])
    means = torch.segment_reduce(both, "mean", lengths=at.twice, unsafe=True).view(2, -1)
    means[1] *= damping
    step = (both.view(2, -1) * means.index_select(1, at.other)).sum(0).sub_(1).mul_(0.5)
    new = {}
    if group["alpha1"]:
        step.add_(_joined(states, "m_K", "m_C"), alpha=group["alpha1"])
        new["m_"] = step
    change = X * step
    if group["init"] == "first_batch":
        rates = (LARGEST_CHANGE / at.largest(step.abs())).clamp_max_(lr_cov)
        new[""] = X - change.mul_(rates.index_select(0, at.own))
    else:
        new[""] = X - change.mul_(lr_cov)
    _write(states, new, at, keep)


def _damped(
    factors: Tensor,
    counts: Sequence[Tensor],
    group: Group,
    loss_scale: Tensor | float,
    at: Segments,
) -> tuple[Tensor, Any]:
    """Normalised factors, and the damping of every segment, as :mod:`tnkfac.optim.damping`."""
    damping = group["damping"]
    if damping is not None or group["grafting"] is None:
        samples, rows, terms = torch.stack(list(counts)).unbind(1)
        by_A = 1 / (rows if group["kfac_approx"] == "expand" else samples)
        by_B = (torch.ones_like(terms) if group["loss_average"] is None else terms) / loss_scale**2
        factors = factors * torch.cat([by_A, by_B])[at.entry][at.own]
    if damping is not None:
        return factors, damping
    mean = at.mean(factors)
    mean += mean == 0  # factors of zeros stay what they are
    if group["grafting"] is None:
        return factors, group["relative_damping"] * mean * mean.index_select(0, at.partner)
    return factors / mean.index_select(0, at.own), group[
        "relative_damping"
    ]  # counts and scales do not matter


def _joined(states: Sequence[State], *names: str) -> Tensor:
    """Factors end to end."""
    return torch.cat([state[name].view(-1) for name in names for state in states])


def _write(
    states: Sequence[State], new: dict[str, Tensor], at: Segments, keep: Tensor | None
) -> None:
    """Write factors into the states, but none of a layer where one of its numbers is not finite.

    Args:
        states: States of the layers.
        new: Numbers of ``K`` and ``C``, and of what bears their names behind a prefix.
        at: Where they lie.
        keep: Scalar that is zero where the batch is to be skipped.
    """
    values = list(new.values())
    if keep is not None or values[0].device.type != "cpu" or not finite_on_host(values):
        largest = torch.stack([at.largest(value.abs()) for value in values]).amax(0)
        bad = torch.zeros(len(states), device=largest.device)
        bad.index_add_(0, at.layer, (~largest.isfinite()).float())
        good = bad == 0 if keep is None else (bad == 0) & (keep.to(bad.device) > 0)
        chosen = good[at.layer][at.own]
        for prefix, value in new.items():
            old = _joined(states, f"{prefix}K", f"{prefix}C")
            new[prefix] = torch.where(chosen, value, old)
    for prefix, value in new.items():
        parts = [state[prefix + name].view(-1) for name in ("K", "C") for state in states]
        torch._foreach_copy_(parts, torch.split(value, [len(part) for part in parts]))
