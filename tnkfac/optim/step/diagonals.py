"""SINGD's update for many layers with diagonal factors at once.

The factors of all layers lie end to end in one vector; every channel group of a layer is a segment
of it. The arithmetic is that of :mod:`tnkfac.optim.rules.singd_rule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from tnkfac.curvature import trusted
from tnkfac.curvature.structures.diagonal import Diagonal
from tnkfac.optim.finite import finite_on_host
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.rules.singd_rule import LARGEST_CHANGE

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
        longest: Length of the longest segment.
        lengths: Numbers of each segment.
        twice: The same for two such vectors end to end.
        own: The segment of every number.
        other: Its partner.
        partner: The partner of every segment.
        layer: The layer of every segment.
        entry: The segment's entry in a table with a number for every ``A``, then for every ``B``.
        starts: Where each segment begins.
    """

    longest: int
    lengths: Tensor
    twice: Tensor
    own: Tensor
    other: Tensor
    partner: Tensor
    layer: Tensor
    entry: Tensor
    starts: Tensor

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
    on_host = partial(torch.tensor, device="cpu")
    partner = on_host([*range(half, 2 * half), *range(half)])
    own = torch.repeat_interleave(on_host(lengths), output_size=sum(lengths))
    layer = on_host(layers)
    found = (
        on_host(lengths),
        on_host(lengths * 2),
        own,
        partner[own],
        partner,
        layer.repeat(2),
        torch.cat([layer, layer + len(shapes)]),
        on_host([0, *accumulate(lengths[:-1])]),
    )
    sent = [tensor.to(device) for tensor in found]
    return Segments(max(lengths), *sent)


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
    momentum = _joined(states, "m_K", "m_C") if group["alpha1"] else None
    weights = _weights(counts, group, loss_scale, at)
    rule = _rule(group, lr_cov)
    kernels = triton_kernels(X)
    if kernels is not None:
        keep = None if keep is None else keep.to(X.device, non_blocking=True)
        new = kernels.updated(X, momentum, factors, weights, at, rule, keep)
    else:
        new = _updated(X, momentum, factors, weights, at, rule)
        _put_back(new, [X] if momentum is None else [X, momentum], at, len(states), keep)
    for prefix, value in zip(("", "m_"), new, strict=False):
        parts = [state[prefix + name].view(-1) for name in ("K", "C") for state in states]
        torch._foreach_copy_(parts, torch.split(value, [len(part) for part in parts]))


def triton_kernels(like: Tensor) -> ModuleType | None:
    """Triton's kernels, if there are any for factors like this; their scalars are in float32."""
    if not like.is_cuda or like.dtype != torch.float32:
        return None
    return trusted(_load, like.device)


def _load() -> ModuleType:
    from tnkfac.optim.step import triton_kernels as kernels

    return kernels


@dataclass(frozen=True)
class Rule:
    """What an update does besides reading factors.

    Attributes:
        units: Of damping: ``"own"``, with factors brought to mean one; ``"product"``, the mean of
            ``B (x) A``; or ``"none"``.
        damping: The number.
        alpha: Share of the momentum that is kept.
        rate: Step size.
        most: Bound on the largest relative change, or zero for none.
    """

    units: Literal["own", "product", "none"]
    damping: float
    alpha: float
    rate: float
    most: float


def _rule(group: Group, lr_cov: float) -> Rule:
    units: Literal["own", "product", "none"] = "none"
    damping = group["damping"]
    if damping is None:
        units = "product" if group["grafting"] is None else "own"
        damping = group["relative_damping"]
    most = LARGEST_CHANGE if group["init"] == "first_batch" else 0.0
    return Rule(units, float(damping), float(group["alpha1"]), float(lr_cov), most)


def _weights(
    counts: Sequence[Tensor], group: Group, loss_scale: Tensor | float, at: Segments
) -> Tensor | None:
    """What normalises the sums of every segment; None where only their shape matters."""
    if group["damping"] is None and group["grafting"] is not None:
        return None
    samples, rows, terms = torch.stack(list(counts)).unbind(1)
    by_A = 1 / (rows if group["kfac_approx"] == "expand" else samples)
    by_B = (torch.ones_like(terms) if group["loss_average"] is None else terms) / loss_scale**2
    return torch.cat([by_A, by_B])[at.entry]


def _updated(
    X: Tensor,
    momentum: Tensor | None,
    factors: Tensor,
    weights: Tensor | None,
    at: Segments,
    rule: Rule,
) -> list[Tensor]:
    """``K`` and ``C`` after an update, and their momenta; arguments as for the kernel."""
    if weights is not None:
        factors = factors * weights[at.own]
    damping: Any = rule.damping
    if rule.units != "none":
        mean = at.mean(factors)
        mean += mean == 0  # factors of zeros stay what they are
        if rule.units == "own":
            factors = factors / mean.index_select(0, at.own)
        else:
            damping = damping * mean * mean.index_select(0, at.partner)
    XX = X * X
    both = torch.cat([XX * factors, XX])
    means = torch.segment_reduce(both, "mean", lengths=at.twice, unsafe=True).view(2, -1)
    means[1] *= damping
    step = (both.view(2, -1) * means.index_select(1, at.other)).sum(0).sub_(1).mul_(0.5)
    if momentum is not None:
        step.add_(momentum, alpha=rule.alpha)
    change = X * step
    if rule.most:
        rates = (rule.most / at.largest(step.abs())).clamp_max_(rule.rate)
        new = X - change.mul_(rates.index_select(0, at.own))
    else:
        new = X - change.mul_(rule.rate)
    return [new] if momentum is None else [new, step]


def _joined(states: Sequence[State], *names: str) -> Tensor:
    """Factors end to end."""
    return torch.cat([state[name].view(-1) for name in names for state in states])


def _put_back(
    new: list[Tensor], old: list[Tensor], at: Segments, layers: int, keep: Tensor | None
) -> None:
    """Keep what was in every layer where a number is not finite.

    Args:
        new: Numbers of ``K`` and ``C``, and their momenta; overwritten.
        old: The same before the update.
        at: Where they lie.
        layers: Number of layers.
        keep: Scalar that is zero where the batch is to be skipped.
    """
    if keep is None and new[0].device.type == "cpu" and finite_on_host(new):
        return
    largest = torch.stack([at.largest(value.abs()) for value in new]).amax(0)
    bad = torch.zeros(layers, device=largest.device)
    bad.index_add_(0, at.layer, (~largest.isfinite()).float())
    good = bad == 0 if keep is None else (bad == 0) & (keep.to(bad.device) > 0)
    chosen = good[at.layer][at.own]
    for place, (value, before) in enumerate(zip(new, old, strict=True)):
        new[place] = torch.where(chosen, value, before)
