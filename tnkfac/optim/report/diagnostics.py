"""How the curvature of every layer looks: condition of its factors, size of its last update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tnkfac.curvature.structures import Decomposable, Parts, Structure
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.params.sharding import local_shard
from tnkfac.optim.params.state import ParamState, State, mark
from tnkfac.optim.report.table import aligned

Spectra = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Diagnosis:
    """Diagnosis of one layer; None where nothing is known, as where others keep the factors.

    Attributes:
        name: Qualified name of the layer.
        condition_input: Largest over smallest eigenvalue of the damped input factor.
        condition_output: Likewise of the output factor.
        update_rms: Root mean square of what the last step has added to the weight, without decay.
    """

    name: str
    condition_input: float | None
    condition_output: float | None
    update_rms: float | None


class Diagnostics(list[Diagnosis]):
    """List of :class:`Diagnosis`; prints as a table.

    Attributes:
        trust_region: By what ``kl_clip`` scaled the last updates of all layers; None without it.
        skipped_updates: Batches that were skipped for numbers that are not finite.
        spectra: Eigenvalues of both factors by layer, in falling order, of all channel groups.
    """

    trust_region: float | None = None
    skipped_updates: int = 0
    spectra: Mapping[str, Spectra] = MappingProxyType({})

    def write(self, writer: Any, step: int) -> None:
        """Write all numbers for TensorBoard.

        Args:
            writer: A ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_scalar``.
            step: Number of steps done.

        Example:
            >>> import tnkfac
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
            >>> optimizer = tnkfac.SINGD(model.parameters())
            >>> model(torch.ones(2, 4)).sum().backward()
            >>> _ = optimizer.step()
            >>> class Writer:
            ...     def add_scalar(self, tag, value, step):
            ...         print(tag, step)
            >>> optimizer.diagnostics().write(Writer(), 1)
            curvature/0/condition_input 1
            curvature/0/condition_output 1
            curvature/0/update_rms 1
            curvature/skipped_updates 1
        """
        for row in self:
            for name in ("condition_input", "condition_output", "update_rms"):
                value = getattr(row, name)
                if value is not None:
                    writer.add_scalar(f"curvature/{row.name}/{name}", value, step)
        if self.trust_region is not None:
            writer.add_scalar("curvature/trust_region", self.trust_region, step)
        writer.add_scalar("curvature/skipped_updates", self.skipped_updates, step)

    def __str__(self) -> str:
        """One line per layer."""
        titles = [field.name.replace("_", " ") for field in fields(Diagnosis)]
        cells = [[_cell(getattr(row, f.name)) for f in fields(Diagnosis)] for row in self]
        return "\n".join(aligned(titles, cells))

    __repr__ = __str__


def diagnose(
    layers: Iterable[CapturedLayer],
    state: State,
    spectra: Callable[[CapturedLayer, ParamState], Spectra | None],
) -> Diagnostics:
    """Look at the state of every layer.

    Args:
        layers: The layers.
        state: State of the optimizer.
        spectra: Eigenvalues of the damped factors of a layer, or None.
    """
    rows = Diagnostics()
    known_spectra: dict[str, Spectra] = {}
    rows.spectra = known_spectra
    for layer in layers:
        param_state = state.get(layer.weight, {})
        conditions: tuple[float | None, float | None] = (None, None)
        known = spectra(layer, param_state) if mark(state, layer, "last_update") >= 0 else None
        if known is not None:
            known_spectra[layer.name] = known
            conditions = _condition(known[0]), _condition(known[1])
        rms = None
        if "momentum_buffer" in param_state:
            buffer = local_shard(param_state["momentum_buffer"])
            if buffer.numel() and bool(buffer.any()):
                size = torch.linalg.vector_norm(buffer, dtype=torch.float64) / buffer.numel() ** 0.5
                rms = float(size) * float(layer.group["lr"])
        rows.append(Diagnosis(layer.name, *conditions, rms))
    return rows


def eigenvalues(structure: Structure, parts: Parts) -> Tensor:
    """Eigenvalues of a symmetric matrix of a class, of all channel groups, in falling order."""
    wide = tuple(part.double() for part in parts)
    if isinstance(structure, Decomposable):
        values = structure.eigen(wide)[0]
    else:
        dense = structure.to_dense(wide)
        values = torch.linalg.eigvalsh((dense + dense.mT) / 2)
    return _falling(values)


def inverse_squares(structure: Structure, K: Parts) -> Tensor:
    """Eigenvalues of ``(K K^T)^-1``, of all channel groups, in falling order."""
    wide = tuple(part.double() for part in K)
    if isinstance(structure, Decomposable):
        values = structure.eigen(structure.gram(wide))[0]
    else:
        values = torch.linalg.svdvals(structure.to_dense(wide)).square()
    return _falling(values.clamp(min=1e-300).reciprocal())


def _falling(values: Tensor) -> Tensor:
    return torch.sort(values.flatten(), descending=True)[0]


def _condition(values: Tensor) -> float:
    return float(values[0] / values[-1])


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
