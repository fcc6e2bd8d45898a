"""The rule of SINGD: factors of the inverse curvature, updated without inverses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tnkfac.curvature.capture.statistics import Factors
from tnkfac.curvature.structures import Matrices, Parts, Structure
from tnkfac.curvature.structures.diagonal import Diagonal
from tnkfac.curvature.structures.structure import Decomposable
from tnkfac.optim import options
from tnkfac.optim.options import Group, Option
from tnkfac.optim.params import auto_structure
from tnkfac.optim.params.batches import Batch, Stack
from tnkfac.optim.params.captured import CapturedLayer, update_dtype
from tnkfac.optim.params.registry import Registry
from tnkfac.optim.params.state import ParamState, State, pack, unpack
from tnkfac.optim.report.diagnostics import Spectra, inverse_squares
from tnkfac.optim.rules.rule import NamedParts, Rule
from tnkfac.optim.rules.singd_start import stationary_points

OPTIONS: options.Options = {
    **options.SHARED,
    **options.DAMPING,
    "momentum": options.SHARED["momentum"].but(0.7),
    "grafting": options.SHARED["grafting"].but(1.0),
    "structures": options.SHARED["structures"].but(
        "auto",
        'one of `"dense"`, `"diagonal"`, `"block{k}diagonal"`, `"hierarchical{k1}_{k2}"`, '
        '`"triltoeplitz"`, `"triutoeplitz"`, `"triltopleftdiag"`, `"trilbottomrightdiag"`, '
        '`"triutopleftdiag"`, `"triubottomrightdiag"`, or `"auto"` (blocks of 64 rows, or fewer '
        "within `max_state_ratio`); one name or a pair (input, output)",
    ),
    "alpha1": Option(0.0, partial(options.number, below=1.0), "momentum of the preconditioner"),
    "T": Option(
        10,
        options.growing_interval,
        'steps between updates of the preconditioner, a callable of the step, or `"auto"` for an '
        "interval that grows from 1 to 10 within fifty steps",
    ),
    "lr_cov": Option(
        0.4,
        options.scheduled(options.number),
        "step size of the preconditioner, or a callable of the step",
    ),
    "kfac_like": Option(
        False, options.flag, "IKFAC: no coupling of the two factors through their traces"
    ),
    "normalize_lr_cov": Option(
        False, options.flag, "bound the preconditioner's step by its largest entry"
    ),
    "preconditioner_dtype": Option(
        None,
        options.dtype_pair,
        "dtype of `K` and `C`, or a pair; `None` for that of the weight, or float32 if that is "
        "float16",
    ),
    "init": Option(
        "first_batch",
        partial(options.choices, supported=options.INIT),
        '`"first_batch"`: start where the first batch leaves the preconditioner at rest; or '
        '`"identity"`',
    ),
    "max_state_ratio": Option(
        "auto",
        options.automatic(options.number),
        'with `structures="auto"`, bound on the state relative to AdamW\'s; `"auto"` for 1.0 and '
        "at least 16 MiB, `None` for larger factors",
    ),
    "max_step_ratio": Option(
        None,
        options.optional(options.number),
        'with `"auto"`, bound on the cost of a training step relative to AdamW\'s',
    ),
}
"""Hyper-parameters of SINGD."""

GROWING = ((10, 1), (20, 2), (50, 5))
"""Steps before which an interval that grows by itself has some length."""
_GRADIENT_DTYPES = (torch.float32, torch.float64)


class SingdRule(Rule):
    r"""Structured ``K`` and ``C`` with :math:`C C^T \otimes K K^T` near the inverse curvature."""

    options = OPTIONS

    def update_interval(self, group: Group, step: int) -> int:
        """``T``; that of ``"auto"`` grows by factors, so that no update falls between two steps."""
        T = group["T"]
        if T == "auto":
            return next((every for before, every in GROWING if step < before), 10)
        return int(T(step) if callable(T) else T)

    def warms_up(self, layer: CapturedLayer) -> bool:
        """Whether the first batch gives but a multiple of the identity."""
        k, c = layer.statistics.k, layer.statistics.c
        return self.starts(layer.group) and not (k.has_eigenbasis and c.has_eigenbasis)

    def init(self, layer: CapturedLayer) -> NamedParts:
        """Identities, and momenta of zeros."""
        statistics, weight, group = layer.statistics, layer.weight, layer.group
        matrices: dict[str, Parts] = {}
        for name, structure, dtype in zip(
            ("K", "C"), (statistics.k, statistics.c), group["preconditioner_dtype"], strict=True
        ):
            kind = update_dtype(weight.dtype) if dtype is None else getattr(torch, dtype)
            matrices[name] = structure.identity(statistics.layer.groups, kind, weight.device)
            if _has_momentum(group):
                matrices[f"m_{name}"] = tuple(torch.zeros_like(part) for part in matrices[name])
        return matrices

    def starts(self, group: Group) -> bool:
        """Whether ``init`` is ``"first_batch"``."""
        return bool(group["init"] == "first_batch")

    def start(
        self, layers: Sequence[CapturedLayer], measured: Sequence[Factors]
    ) -> list[NamedParts]:
        """``K`` and ``C`` that the factors of the first batch leave at rest.

        Relative damping is a number for factors of mean eigenvalue one, whose preconditioner is
        then brought to the level of the curvature.
        """
        group = layers[0].group
        problems, levels = [], []
        for layer, factors in zip(layers, measured, strict=True):
            k, c = layer.statistics.k, layer.statistics.c
            unit = damped(k, c, factors.A, factors.B, {**group, "grafting": 1.0})
            problems.append((k, c, unit.A, unit.B))
            raw = group["grafting"] is None
            levels.append(damped(k, c, factors.A, factors.B, group).level if raw else None)
        damping = group["relative_damping"] if group["damping"] is None else group["damping"]
        starts: list[NamedParts] = []
        for layer, (K, C), level in zip(
            layers, stationary_points(problems, damping), levels, strict=True
        ):
            if level is not None:
                k, c = layer.statistics.k, layer.statistics.c
                K, C = k.scaled(K, level**-0.25), c.scaled(C, level**-0.25)
            starts.append({"K": K, "C": C})
        return starts

    def update(self, batch: Batch) -> NamedParts:
        """One step of ``K`` and ``C``, and of their momenta."""
        group, k, c = batch.group, batch.k, batch.c
        A, B = batch.factors()
        taken, lr_cov = damped(k, c, A, B, group), group["lr_cov"]
        rate = lr_cov(group["step"]) if callable(lr_cov) else lr_cov
        plain = not _has_momentum(group) and not group["normalize_lr_cov"]
        both = isinstance(k, Decomposable) and isinstance(c, Decomposable)
        if plain and both and isinstance(batch, Stack):
            K, C = left_update(
                self._side(batch, "K", taken.A, taken.on_K),
                self._side(batch, "C", taken.B, taken.on_C),
                lr_cov=rate,
                kfac_like=group["kfac_like"],
                bounded=self.starts(group),
                on_host=batch.on_host,
            )
            return {"K": K, "C": C}
        names = ["K", "C", "m_K", "m_C"] if _has_momentum(group) else ["K", "C"]
        for _, state in batch.each() if _has_momentum(group) else ():
            for name in ("K", "C"):  # momentum may have been asked for since
                if not unpack(state, f"m_{name}"):
                    zeros = tuple(torch.zeros_like(part) for part in unpack(state, name))
                    state.update(pack(f"m_{name}", zeros))
        old = {name: batch.read(name, A[0].dtype) for name in names}
        new = singd_update(
            k,
            c,
            old["K"],
            old["C"],
            old.get("m_K"),
            old.get("m_C"),
            taken.A,
            taken.B,
            damping=(taken.on_K, taken.on_C),
            alpha1=0.0 if group["kfac_like"] else group["alpha1"],
            lr_cov=rate,
            kfac_like=group["kfac_like"],
            normalize=group["normalize_lr_cov"],
            bounded=self.starts(group),
        )
        return dict(zip(names, new, strict=False))

    @staticmethod
    def _side(batch: Stack, name: str, A: Parts, damping: Tensor | float) -> Side:
        """A side of a stack, with the square of what its statistics' precision makes of ``K``."""
        structure = batch.k if name == "K" else batch.c
        assert isinstance(structure, Decomposable)
        kept = batch.read(name)
        if kept[0].dtype == A[0].dtype:
            return Side(structure, kept, batch.made_of(name, structure.square), A, damping)
        K = tuple(part.to(A[0].dtype) for part in kept)
        return Side(structure, K, structure.square(K), A, damping)

    def precondition(self, batch: Stack, gradient: Tensor) -> Tensor:
        """``C C^T G K K^T``."""
        outs, dim = gradient.shape[1:]
        apply_K = self._applied(batch, "K", batch.k, outs)
        apply_C = self._applied(batch, "C", batch.c, dim)
        pieces = []  # columns that K does not mix
        if gradient.device.type == "cpu" and gradient.numel() > 2 * IN_CACHE:
            pieces = apply_K.pieces(IN_CACHE // (len(gradient) * outs))
        if len(pieces) < 2:
            return apply_C(apply_K(gradient.mT).mT).to(gradient.dtype)
        update = torch.empty_like(gradient)
        for columns, apply in pieces:
            apply_C.write(update[:, :, columns], apply(gradient[:, :, columns].mT).mT)
        return update

    def _applied(self, batch: Stack, name: str, structure: Structure, columns: int) -> Applied:
        """``K K^T``; the square is formed if that pays until the next update.

        In half precision it is not: rounding it would cost its small eigenvalues.
        """
        T = batch.group["T"]
        every = T if isinstance(T, int) else 10
        kept = unpack(batch.each()[0][1], name)
        pays = (
            kept[0].dtype in _GRADIENT_DTYPES and structure.numel < every * structure.dim * columns
        )
        if pays and isinstance(structure, Decomposable):
            return Applied(structure, batch.made_of(name, structure.square), True)
        return Applied(structure, batch.read(name), False)

    def elementwise(self, layer: CapturedLayer, state: ParamState) -> tuple[Tensor, Tensor] | None:
        """``K`` and ``C`` where both are diagonal, in the precision of the weight."""
        dtype, statistics = layer.weight.dtype, layer.statistics
        if layer.weight.device.type not in ("cpu", "cuda") or dtype not in _GRADIENT_DTYPES:
            return None
        if not (isinstance(statistics.k, Diagonal) and isinstance(statistics.c, Diagonal)):
            return None
        K, C = state.get("K"), state.get("C")
        if K is None or C is None or K.dtype != dtype or C.dtype != dtype:
            return None
        return K, C

    def feed_taps(self, layer: CapturedLayer, state: ParamState | None, refreshed: bool) -> None:
        """Hand ``K`` and ``C`` to structures that measure ``K^T A K``."""
        statistics = layer.statistics
        if statistics.bound and (statistics.k.reads_factor or statistics.c.reads_factor):
            factors = None if state is None else (unpack(state, "K"), unpack(state, "C"))
            statistics.use_factors(factors)

    def spectra(self, layer: CapturedLayer, state: ParamState) -> Spectra:
        """Spectra of ``(K K^T)^-1`` and ``(C C^T)^-1``."""
        k, c = layer.statistics.k, layer.statistics.c
        return inverse_squares(k, unpack(state, "K")), inverse_squares(c, unpack(state, "C"))

    def choose_structures(
        self, new: Sequence[CapturedLayer], registry: Registry, groups: list[Group], state: State
    ) -> None:
        """Choose structures within ``max_state_ratio``; warn of those that are given and large."""
        auto_structure.limit_state(registry.layers, registry.others, groups, state)
        auto_structure.warn_of_size(new, groups)

    def revise_structures(self, registry: Registry, groups: list[Group], state: State) -> bool:
        """Choose structures of lazy layers, and within ``max_step_ratio``; tell of changes."""
        layers = registry.layers
        if all(state.get(layer.weight) or not layer.statistics.pending for layer in layers):
            return False
        changed = auto_structure.limit_time(layers, groups, state, self.update_interval)
        return auto_structure.limit_state(layers, registry.others, groups, state) or changed


IN_CACHE = 1 << 18
"""Numbers of a gradient that stay in the cache of a CPU between two products."""


@dataclass(frozen=True)
class Applied:
    """``K K^T`` as a function of matrices.

    Attributes:
        structure: Structure of ``K``.
        parts: ``K``, or its square.
        squared: Which of them.
    """

    structure: Structure
    parts: Parts
    squared: bool

    def __call__(self, X: Tensor) -> Tensor:
        """``K K^T X`` in the precision of ``K``, ``X [G, dim, columns]``."""
        X = X.to(self.parts[0].dtype)
        if self.squared and isinstance(self.structure, Decomposable):
            return self.structure.product(self.parts, X)
        return self.structure.apply_kkt(self.parts, X)

    def write(self, out: Tensor, X: Tensor) -> None:
        """Write ``K K^T X`` into a tensor."""
        exact = out.dtype == X.dtype == self.parts[0].dtype
        if exact and self.squared and isinstance(self.structure, Decomposable):
            self.structure.product_into(out, self.parts, X)
        else:
            out.copy_(self(X))

    def pieces(self, rows: int) -> list[tuple[slice, Applied]]:
        """Independent pieces of about so many rows, or all of them where there are none."""
        pieces = self.structure.pieces(self.parts, rows)
        return [(at, Applied(s, parts, self.squared)) for at, s, parts in pieces]


def _has_momentum(group: Group) -> bool:
    return group["alpha1"] != 0 and not group["kfac_like"]


LARGEST_CHANGE = 0.5
"""Largest relative change of the preconditioner in one update, unless it starts at the identity.

``K <- K (I - rate m)`` is an exponential cut off after its first order, and diverges when one
batch has far more curvature than those before, as happens near the end of training.
"""


def singd_update(
    k: Matrices,
    c: Matrices,
    K: Parts,
    C: Parts,
    m_K: Parts | None,
    m_C: Parts | None,
    A: Parts,
    B: Parts,
    *,
    damping: tuple[Tensor | float, Tensor | float],
    alpha1: float,
    lr_cov: float,
    kfac_like: bool,
    normalize: bool,
    bounded: bool = False,
) -> tuple[Parts, Parts, Parts, Parts]:
    """One update of ``K`` and ``C`` (arXiv 2312.05705, figure 4, right).

    Args:
        k: Structure of ``K`` and ``A``.
        c: Structure of ``C`` and ``B``.
        K: Input-side factor of the preconditioner.
        C: Output-side factor.
        m_K: Momentum of ``K``, or None for zero.
        m_C: Momentum of ``C``, or None for zero.
        A: Input factor of the curvature.
        B: Output-gradient factor.
        damping: Added to the curvature in the update of ``K`` and of ``C``.
        alpha1: Decay of the momenta.
        lr_cov: Step size.
        kfac_like: Replace the four traces by one (IKFAC).
        normalize: Scale the step by the largest entry of the momentum if it exceeds one.
        bounded: Shorten a step that would change ``K`` or ``C`` by more than half.

    Returns:
        New ``K``, ``C``, ``m_K``, ``m_C``.
    """
    H_K, H_C = k.congruence(K, A), c.congruence(C, B)
    KK, CC = k.gram(K), c.gram(C)
    for_K, for_C = damping
    on_K = (1.0, for_K) if kfac_like else (c.trace(H_C), for_K * c.trace(CC))
    on_C = (1.0, for_C) if kfac_like else (k.trace(H_K), for_C * k.trace(KK))
    half = 0.5 * (1 - alpha1 if normalize else 1.0)
    new: list[Parts] = []
    moved: list[Parts] = []
    for structure, X, m, H, gram, coefficients in (
        (k, K, m_K, H_K, KK, on_K),
        (c, C, m_C, H_C, CC, on_C),
    ):
        eye = structure.identity(X[0].shape[0], X[0].dtype, X[0].device)
        terms = zip(eye, *map(structure.scaled, (H, gram), coefficients), strict=True)
        step = tuple(half * (-identity + pulled + damped) for identity, pulled, damped in terms)
        if m is not None:
            step = tuple(alpha1 * old + part for old, part in zip(m, step, strict=True))
        rate: Tensor | float = lr_cov
        if normalize:
            rate = lr_cov / structure.largest(step).clamp(min=1.0)
        if bounded:
            rate = torch.clamp(LARGEST_CHANGE / structure.norm(step), max=rate)
        move = structure.scaled(structure.matmul(X, step), rate)
        moved.append(tuple(x - part for x, part in zip(X, move, strict=True)))
        new.append(step)
    return moved[0], moved[1], new[0], new[1]


class Side(NamedTuple):
    """One side of a layer in an update.

    Attributes:
        structure: Structure of all matrices.
        K: Factor of the preconditioner.
        square: ``K K^T``.
        A: Factor of the curvature.
        damping: Added to the curvature.
    """

    structure: Decomposable
    K: Parts
    square: Parts
    A: Parts
    damping: Tensor | float


def left_update(
    on_K: Side, on_C: Side, *, lr_cov: float, kfac_like: bool, bounded: bool, on_host: bool = True
) -> tuple[Parts, Parts]:
    """:func:`singd_update` without momentum, from the left.

    With ``M = s A + t I``, where ``s`` and ``t`` are the traces of the other side, ``K (I - h m)``
    is ``(I - h/2 (K K^T M - I)) K``: as ``K K^T`` is at hand, two products are left of four. The
    bound is another estimate of the same norm.

    Args:
        on_K: Input side.
        on_C: Output side.
        lr_cov: Step size ``h``.
        kfac_like: Replace the four traces by one (IKFAC).
        bounded: Shorten a step that would change ``K`` or ``C`` by more than half.
        on_host: Whether numbers can be read without waiting for a device.

    Returns:
        New ``K`` and ``C``.
    """
    moved = []
    for side, other in ((on_K, on_C), (on_C, on_K)):
        structure = side.structure
        scale: Tensor | float = 1.0
        shift = side.damping
        if not kfac_like:
            scale = other.structure.inner(other.square, other.A)
            shift = side.damping * other.structure.trace(other.square)
        metric = structure.add_identity_(structure.scaled(side.A, scale), shift)
        W = structure.add_identity_(structure.matmul(side.square, metric), -1.0)
        rate: Tensor | float = lr_cov
        if bounded:
            most = 2 * LARGEST_CHANGE / lr_cov if lr_cov else float("inf")
            norm = structure.similar_norm(W, metric, most if on_host else 0.0)
            rate = torch.clamp(2 * LARGEST_CHANGE / norm, max=lr_cov)
        change = structure.add_identity_(structure.scaled(W, -0.5 * rate), 1.0)
        moved.append(structure.matmul(change, side.K))
    return moved[0], moved[1]


@dataclass(frozen=True)
class Damped:
    """Factors as the update takes them, and what is added to the curvature.

    Attributes:
        A: Parts of the input factor.
        B: Parts of the output factor.
        on_K: Damping in the update of ``K``: a number, or one for each channel group, ``[G]``.
        on_C: The same for ``C``.
        level: Mean eigenvalue of the curvature in units of that of ``B (x) A``, ``[G]``, or None.
    """

    A: Parts
    B: Parts
    on_K: Tensor | float
    on_C: Tensor | float
    level: Tensor | None = None


def damped(k: Matrices, c: Matrices, A: Parts, B: Parts, group: Group) -> Damped:
    """Choose the damping of one layer for one batch.

    With ``damping=None`` it is ``relative_damping`` times the mean eigenvalue of ``B (x) A``, or
    of each factor with ``kfac_like``. Where grafting sets the size of an update anyway, factors
    of mean eigenvalue one serve for that: then the gradients may shrink by orders of magnitude in
    the course of training, and the preconditioner still follows the shape of the curvature.

    Args:
        k: Structure of ``A``.
        c: Structure of ``B``.
        A: Parts of the input factor of the batch.
        B: Parts of its output factor.
        group: Hyper-parameters of the layer.
    """
    if group["damping"] is not None:
        return Damped(A, B, group["damping"], group["damping"])
    share = group["relative_damping"]
    a, b = _usable(k.statistic_trace(A)), _usable(c.statistic_trace(B))
    if group["grafting"] is not None:
        return Damped(k.scaled(A, 1 / a), c.scaled(B, 1 / b), share, share)
    if group["kfac_like"]:
        return Damped(A, B, share * a, share * b, a * b)
    return Damped(A, B, share * a * b, share * a * b, a * b)


def _usable(trace: Tensor) -> Tensor:
    """One in the place of zero, so that a factor of zeros stays what it is."""
    return torch.where(trace > 0, trace, 1.0)
