"""SINGD's update and preconditioning for many layers with diagonal factors at once.

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
from tnkfac.optim.layers import CapturedLayer
from tnkfac.optim.registry import Group
from tnkfac.optim.singd_rule import LARGEST_CHANGE

State = Any
_KINDS = (torch.float32, torch.float64)


def suits(layer: CapturedLayer, state: State) -> bool:
    """Whether both factors of a layer are diagonal, in the precision of its weight."""
    statistics, kind = layer.statistics, layer.weight.dtype
    if kind not in _KINDS or layer.weight.device.type not in ("cpu", "cuda") or "K" not in state:
        return False
    if not (isinstance(statistics.k, Diagonal) and isinstance(statistics.c, Diagonal)):
        return False
    return all(state[name].dtype == kind for name in ("K", "C"))


def precondition(pairs: Sequence[tuple[State, Tensor]]) -> list[Tensor]:
    """``C C^T G K K^T`` for the states and gradient matrices ``[G, C_out / G, D]`` of layers."""
    K, C = [state["K"] for state, _ in pairs], [state["C"] for state, _ in pairs]
    right = [part.unsqueeze(1) for part in torch._foreach_mul(K, K)]
    left = [part.unsqueeze(2) for part in torch._foreach_mul(C, C)]
    found = torch._foreach_mul([matrix for _, matrix in pairs], right)
    torch._foreach_mul_(found, left)
    return list(found)


@dataclass(frozen=True)
class Segments:
    """Where each channel group of each layer lies in a vector.

    Attributes:
        lengths: Numbers of each segment.
        total: Numbers of all.
    """

    lengths: Tensor
    total: int

    def mean(self, values: Tensor) -> Tensor:
        """Mean of every segment."""
        return torch.segment_reduce(values, "mean", lengths=self.lengths, unsafe=True)

    def largest(self, values: Tensor) -> Tensor:
        """Largest number of every segment."""
        return torch.segment_reduce(values, "max", lengths=self.lengths, unsafe=True)

    def spread(self, values: Tensor) -> Tensor:
        """One number for every segment, to all its places."""
        return torch.repeat_interleave(values, self.lengths, output_size=self.total)


@lru_cache(maxsize=64)
def _segments(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Segments:
    """Segments of factors ``[G, dim]``; kept, since copying lengths to a device waits for it."""
    lengths = [dim for groups, dim in shapes for _ in range(groups)]
    return Segments(torch.tensor(lengths, device=device), sum(lengths))


def update(
    states: Sequence[State],
    factors: Sequence[tuple[Tensor, Tensor]],
    group: Group,
    lr_cov: float,
    keep: Tensor | None,
) -> None:
    """One update of ``K`` and ``C`` of layers of one device and dtype.

    Args:
        states: States of the layers.
        factors: ``A [G, D]`` and ``B [G, C_out / G]`` of each.
        group: Hyper-parameters that they share, without ``kfac_like`` and ``normalize_lr_cov``.
        lr_cov: Step size.
        keep: Scalar that is zero where the batch is to be skipped.
    """
    device = factors[0][0].device
    k = _segments(tuple((A.shape[0], A.shape[1]) for A, _ in factors), device)
    c = _segments(tuple((B.shape[0], B.shape[1]) for _, B in factors), device)
    K, C = (_joined([state[name] for state in states]) for name in ("K", "C"))
    A, B = _joined([A for A, _ in factors]), _joined([B for _, B in factors])
    damping: Any = group["damping"]
    if damping is None:
        a, b = k.mean(A), c.mean(B)
        a, b = torch.where(a > 0, a, 1.0), torch.where(b > 0, b, 1.0)
        damping = group["relative_damping"]
        if group["grafting"] is None:
            damping = damping * a * b
        else:
            A, B = A / k.spread(a), B / c.spread(b)
    KK, CC = K * K, C * C
    H_K, H_C = KK * A, CC * B
    alpha1 = group["alpha1"]
    new: dict[str, Tensor] = {}
    for names, mine, other, X, H, XX, other_H, other_XX in (
        (("K", "m_K"), k, c, K, H_K, KK, H_C, CC),
        (("C", "m_C"), c, k, C, H_C, CC, H_K, KK),
    ):
        step = mine.spread(other.mean(other_H)) * H
        step += mine.spread(damping * other.mean(other_XX)) * XX
        step = 0.5 * (step - 1)
        if alpha1:
            step += alpha1 * _joined([state[names[1]] for state in states])
            new[names[1]] = step
        rate: Any = lr_cov
        if group["init"] == "first_batch":
            rate = mine.spread(torch.clamp(LARGEST_CHANGE / mine.largest(step.abs()), max=lr_cov))
        new[names[0]] = X - rate * (X * step)
    _write(states, new, keep)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Factors end to end."""
    return torch.cat([part.reshape(-1) for part in parts])


def _write(states: Sequence[State], new: dict[str, Tensor], keep: Tensor | None) -> None:
    """Write factors into the states, but none of a layer where one of its numbers is not finite."""
    split = {
        name: torch.split(values, [state[name].numel() for state in states])
        for name, values in new.items()
    }
    on_host = keep is None and next(iter(new.values())).device.type == "cpu"
    if on_host and all(bool(values.isfinite().all()) for values in new.values()):
        for name, parts in split.items():
            torch._foreach_copy_([state[name].view(-1) for state in states], parts)
        return
    for index, state in enumerate(states):
        mine = {name: parts[index].view_as(state[name]) for name, parts in split.items()}
        good = torch.stack([part.isfinite().all() for part in mine.values()]).all()
        if keep is not None:
            good = good & (keep.to(good.device) > 0)
        for name, part in mine.items():
            state[name].copy_(torch.where(good, part, state[name]))
