"""Decomposing the factors of many layers, whatever happens to some of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tnkfac.curvature import Decomposable, Parts, warn
from tnkfac.optim.keeping import Keeping
from tnkfac.optim.options import Group
from tnkfac.optim.params.batches import joined, parted
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.marks import set_mark
from tnkfac.optim.params.parts import read
from tnkfac.optim.report.diagnostics import Spectra, eigenvalues
from tnkfac.optim.rules.decompositions import Decomposer, saturated

DERIVED = ("Q_A", "Q_B", "d_A", "d_B", "scales", "A_inv", "B_inv")
"""What of the state follows from the factors."""
_DONE, _FAILED, _NOT_FINITE = 0, 1, 2


@dataclass
class Attempt:
    """What came of decomposing the factors of a layer.

    Attributes:
        code: Whether it was done, failed, or the factors are not finite.
        found: The decomposition, or what stands in for one that failed.
        reason: Why it failed.
    """

    code: int = _DONE
    found: dict[str, Parts] = field(default_factory=dict)
    reason: str = ""


class Refreshing(Keeping):
    """Adds decompositions of factors to an optimizer that keeps them in its state."""

    _restarted: tuple[CapturedLayer, ...] = ()
    """Layers that this step has to do without factors."""

    def _decompose(self, due: list[CapturedLayer]) -> None:
        """Decompose the factors of some layers, each in the process that is to do it.

        Args:
            due: Layers, the same in all processes.
        """
        mine = [layer for layer in due if self._plan.computes(layer)]
        attempts = self._attempts(mine) if mine else []
        outcomes = dict(zip(map(id, mine), attempts, strict=True))
        codes = [outcomes[id(la)].code if id(la) in outcomes else _DONE for la in due]
        if any(self._plan.place(layer).owner is not None for layer in due):
            codes = self._processes.worst(codes, due[0].weight.device)
        changed = []
        for layer, code in zip(due, codes, strict=True):
            state, group = self.state[layer.weight], layer.group
            set_mark(self.state, layer, "last_inverse", group["step"])
            attempt = outcomes.get(id(layer), Attempt(code, reason="its decomposition failed"))
            if code != _NOT_FINITE:
                changed.append(layer)
                for name, parts in attempt.found.items():
                    for old, part in zip(read(state, name, len(parts)), parts, strict=True):
                        old.copy_(saturated(part, old.dtype))
            if code == _DONE:
                state["failures"].zero_()
            else:
                self._fail(layer, group, attempt.reason, restart=code == _NOT_FINITE)
        self._share(changed, tuple(DERIVED))

    def _attempts(self, due: list[CapturedLayer]) -> list[Attempt]:
        """Decompositions of some layers; the host waits twice for all of them together."""
        pairs = [self._factors(layer, layer.group) for layer in due]
        usable = _on_host([_all_finite([*A, *B]) for A, B in pairs])
        found = [
            Attempt() if good else Attempt(_NOT_FINITE, reason="its factors are not finite")
            for good in usable
        ]
        good = [index for index in range(len(due)) if usable[index]]
        sound: dict[int, Tensor] = {}
        for places, group in self._stacks([due[index] for index in good]):
            stack = [good[place] for place in places]
            decomposer, damping = decomposer_of(due[stack[0]], group), damping_of(group)
            try:
                A, B = (joined([pairs[index][side] for index in stack]) for side in (0, 1))
                together = decomposer.decompose(A, B, damping)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                continue
            flags = decomposer.sound(together, A, B, damping).view(len(stack), -1).all(1)
            sound.update(zip(stack, flags.unbind(), strict=True))
            for name, parts in together.items():
                for index, mine in zip(stack, parted(parts, len(stack)), strict=True):
                    found[index].found[name] = mine
        done = dict(zip(sound, _on_host(list(sound.values())), strict=True))
        for index in good:
            if not done.get(index, False):
                found[index] = self._repair(due[index], *pairs[index])
        return found

    def _repair(self, layer: CapturedLayer, A: Parts, B: Parts) -> Attempt:
        """Decompose the factors of one layer by all means, or have something stand in for it."""
        group = layer.group
        decomposer, damping = decomposer_of(layer, group), damping_of(group)
        try:
            return Attempt(found=decomposer.repaired(A, B, damping))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            state = self.state[layer.weight]
            kept = {name: read(state, name, count) for name, count in decomposer.counts.items()}
            return Attempt(_FAILED, decomposer.bounded(kept, A, B, damping), str(error))

    def _factors(self, layer: CapturedLayer, group: Group) -> tuple[Parts, Parts]:
        """Both factors without the bias of their start, in the dtype of decompositions."""
        state, statistics = self.state[layer.weight], layer.statistics
        weight = state["factor_weight"]
        dtype = torch.promote_types(inverse_dtype(weight.dtype, group), torch.float32)
        A, B = (
            tuple((part / weight).to(dtype) for part in read(state, name, len(s.shapes)))
            for name, s in (("A", statistics.k), ("B", statistics.c))
        )
        return A, B

    def _spectra(self, layer: CapturedLayer) -> Spectra | None:
        if not self._plan.keeps(layer):
            return None
        group = layer.group
        A, B = self._factors(layer, group)
        a, b = eigenvalues(layer.statistics.k, A), eigenvalues(layer.statistics.c, B)
        damping = damping_of(group)
        if group["damping"] is None:
            damping *= float(a.mean() * b.mean())
        shift, pi = damping**0.5, float((a.mean() / b.mean()) ** 0.5)
        return a.clamp(min=0) + shift * pi, b.clamp(min=0) + shift / pi

    def _fail(self, layer: CapturedLayer, group: Group, reason: str, restart: bool) -> None:
        """Tell of a failure; factors that are not finite are measured and decomposed anew."""
        state, name = self.state[layer.weight], layer.named()[0][0]
        state["failures"] += 1
        failures = int(state["failures"])
        if restart:
            state.update(
                {
                    k: v
                    for k, v in self._init_layer(layer, group).items()
                    if k in state
                    and (k in ("A", "B", "factor_weight") or k.startswith(("A.", "B.")))
                }
            )
            for mark in ("last_update", "last_inverse"):
                set_mark(self.state, layer, mark, -1)
            self._restarted = (*self._restarted, layer)
        if failures > group["num_tolerated_failures"]:
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"The factors of {name} could not be decomposed {failures} times in a row: {reason}"
            )
        kept = "decomposition" if restart else "eigenvectors, and a bound on the eigenvalues"
        warn(
            f"The factors of {name} could not be decomposed: {reason}. The step goes on with the "
            f"last {kept} (failure {failures}, {group['num_tolerated_failures']} tolerated in a "
            "row)."
        )


def decomposer_of(layer: CapturedLayer, group: Group) -> Decomposer:
    """How the group decomposes the factors of a layer."""
    k, c = layer.statistics.k, layer.statistics.c
    assert isinstance(k, Decomposable)
    assert isinstance(c, Decomposable)
    relative = group["damping"] is None
    eps = torch.finfo(torch.promote_types(layer.weight.dtype, torch.float32)).eps
    return Decomposer(group["compute_method"], group["damping_type"], k, c, relative, eps)


def damping_of(group: Group) -> float:
    """What the decomposer of the group takes."""
    given = group["relative_damping"] if group["damping"] is None else group["damping"]
    return float(given)


def inverse_dtype(dtype: torch.dtype, group: Group) -> torch.dtype:
    """``inv_dtype``, but float64 for factors in float64."""
    chosen: torch.dtype = getattr(torch, group["inv_dtype"])
    return dtype if dtype == torch.float64 else chosen


def _all_finite(tensors: list[Tensor]) -> Tensor:
    return torch.stack([part.isfinite().all() for part in tensors]).all()


def _on_host(flags: list[Tensor]) -> list[bool]:
    """Flags that may be on several devices, with a single wait for them."""
    if not flags:
        return []
    found: list[bool] = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return found
