"""The rule of KFAC: moving averages of both factors, and their decompositions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from tnkfac.curvature.structures import Decomposable, Parts
from tnkfac.optim import options
from tnkfac.optim.options import Group, Option
from tnkfac.optim.params.batches import Batch, Stack, joined
from tnkfac.optim.params.captured import CapturedLayer, Needs, update_dtype
from tnkfac.optim.params.state import ParamState, unpack
from tnkfac.optim.report.diagnostics import Spectra, eigenvalues
from tnkfac.optim.rules.decompositions import METHODS, Decomposer
from tnkfac.optim.rules.normalization import NORMALIZATIONS, normalized
from tnkfac.optim.rules.rule import NamedParts, Rule

CLASSIC = {"momentum": 0.9, "damping": 1e-3, "kl_clip": 1e-3, "grafting": None}
"""Meaning of ``"auto"`` once a scale of the natural gradient is given."""
UNTUNED = {"momentum": 0.7, "damping": None, "kl_clip": None, "grafting": 1.0}
"""Meaning of ``"auto"`` otherwise."""
FISHER_TYPES = ("empirical", "mc", "forward-only")

OPTIONS: options.Options = {
    **options.SHARED,
    **options.DAMPING,
    **{name: {**options.SHARED, **options.DAMPING}[name].but("auto") for name in UNTUNED},
    "decoupled_weight_decay": options.SHARED["decoupled_weight_decay"].but(False),
    "structures": Option(
        "auto",
        partial(options.structure_pair, factors=True),
        '`"dense"`, `"diagonal"`, `"block{k}diagonal"`, `"auto"`, or a pair',
    ),
    "factor_decay": Option(
        0.95,
        partial(options.number, below=1.0),
        "of the moving averages; their start is corrected for. Also `stat_decay`, `curvature_ema`",
    ),
    "factor_update_steps": Option(
        1,
        options.interval,
        "steps between updates of the factors, or a callable of the step. Also `TCov`",
    ),
    "inv_update_steps": Option(
        10, options.interval, "steps between decompositions, or a callable. Also `TInv`"
    ),
    "fisher_type": Option(
        "empirical",
        partial(options.choices, supported=FISHER_TYPES),
        '`"empirical"`: gradients of the training loss; `"mc"`: of drawn targets; '
        '`"forward-only"`: `B` is the identity',
    ),
    "mc_samples": Option(1, partial(options.whole, least=1), "draws of each `sample_fisher`"),
    "compute_method": Option(
        "eigen",
        partial(options.choices, supported=METHODS),
        '`"eigen"`, `"cholesky"`, `"ekfac"`',
    ),
    "damping_type": Option(
        None,
        lambda name, value: value,  # what is supported depends on the method
        '`"tikhonov"` (eigen, ekfac), `"pi"` or `"factor"` (cholesky)',
    ),
    "inv_dtype": Option(
        torch.float32,
        options.dtype_name,
        "of decompositions; float64 parameters are decomposed in float64",
    ),
    "num_tolerated_failures": Option(
        3,
        partial(options.whole, least=0),
        "decompositions of a layer that may fail in a row",
    ),
    "nesterov": Option(False, options.flag, "Nesterov momentum"),
    "adaptive_damping": Option(False, options.flag, "Levenberg-Marquardt rule; needs a closure"),
    "normalization": Option(
        "fisher",
        partial(options.choices, supported=NORMALIZATIONS),
        '`"kfac-pytorch"` for the scale of that package',
    ),
    "compact_state": Option(False, options.flag, "leave decompositions out of checkpoints"),
}
"""Hyper-parameters of KFAC."""


class KfacRule(Rule):
    r"""``A`` and ``B`` with :math:`B \otimes A` near the curvature, and their decompositions."""

    options = OPTIONS
    derived = ("Q_A", "Q_B", "d_A", "d_B", "scales", "A_inv", "B_inv")
    stacks_updates = False  # an average gains nothing from it

    def complete(self, given: Mapping[str, object]) -> Group:
        """All hyper-parameters, with what ``"auto"`` stands for."""
        group = super().complete(given)
        scaled = (group[name] for name in ("damping", "kl_clip"))
        classic = not all(value is None or isinstance(value, str) for value in scaled)
        classic |= group["adaptive_damping"] or group["normalization"] == "kfac-pytorch"
        for name, value in (CLASSIC if classic else UNTUNED).items():
            if group[name] == "auto":
                group[name] = value
        return group

    def check(self, group: Group, given: Group) -> None:
        """Each by itself, and those that go together.

        Raises:
            TypeError: For a value of the wrong type.
            ValueError: For a value out of range, or a pair that does not go together.
        """
        super().check(group, given)
        damping_types = METHODS[group["compute_method"]]
        if group["damping_type"] is not None:
            options.choices(
                f"damping_type of compute_method={group['compute_method']!r}",
                group["damping_type"],
                damping_types,
            )
        given["damping_type"] = group["damping_type"] or damping_types[0]
        if group["normalization"] == "kfac-pytorch" and group["kfac_approx"] != "expand":
            raise ValueError(
                "kfac_approx: got 'reduce' with normalization='kfac-pytorch', which is for "
                "'expand'. Supported: kfac_approx='expand', normalization='fisher'."
            )
        if group["adaptive_damping"] and group["damping"] is None:
            raise ValueError("damping: got None. Supported with adaptive_damping: a number.")

    def needs(self, group: Group) -> Needs:
        """Measurements that ``fisher_type`` and ``compute_method`` need."""
        fisher = group["fisher_type"]
        return Needs(
            outputs=fisher != "forward-only",
            squares=group["compute_method"] == "ekfac",
            explicit_passes=fisher == "mc",
            everywhere=group["adaptive_damping"],
        )

    def update_interval(self, group: Group, step: int) -> int:
        """``factor_update_steps``."""
        every = group["factor_update_steps"]
        return int(every(step) if callable(every) else every)

    def refresh_interval(self, group: Group, step: int) -> int:
        """``inv_update_steps``."""
        every = group["inv_update_steps"]
        return int(every(step) if callable(every) else every)

    # ---------------------------------------------------------------- factors

    def init(self, layer: CapturedLayer) -> NamedParts:
        """Averages without any weight, and what leaves a gradient almost as it is."""
        statistics, weight, group = layer.statistics, layer.weight, layer.group
        groups, device = statistics.layer.groups, weight.device
        dtype = torch.promote_types(weight.dtype, torch.float32)
        matrices: dict[str, Parts] = {}
        start = group["normalization"] == "kfac-pytorch"  # its averages start at the identity
        for name, structure in (("A", statistics.k), ("B", statistics.c)):
            eye = structure.identity(groups, dtype, device)
            matrices[name] = eye if start else tuple(torch.zeros_like(part) for part in eye)
        matrices["factor_weight"] = (torch.full((), float(start), dtype=dtype, device=device),)
        identity = _decomposer(layer).identity(groups, inverse_dtype(dtype, group), device)
        return {**matrices, **identity}

    def update(self, batch: Batch) -> NamedParts:
        """One step of the averages of both factors, and of ``"ekfac"``'s second moments."""
        assert isinstance(batch, Stack)
        group, ((layer, state),) = batch.group, batch.each()
        (measured,) = batch.measured()
        factors = normalized(measured, layer.statistics, group["normalization"])
        decay = group["factor_decay"]

        def averaged(name: str, new: Parts) -> Parts:
            old = batch.read(name)
            if old[0].dtype != new[0].dtype:  # the model was cast
                new = tuple(part.to(old[0].dtype) for part in new)
            return tuple(o.lerp(n, 1 - decay) for o, n in zip(old, new, strict=True))

        new = {"A": averaged("A", factors.A), "B": averaged("B", factors.B)}
        new["factor_weight"] = averaged("factor_weight", (torch.ones_like(factors.counts[0]),))
        if factors.squares is not None and int(state["last_refresh"]) >= 0:
            new["scales"] = averaged("scales", (factors.squares,))
        return new

    def source(self) -> tuple[str, ...]:
        """The averages."""
        return "A", "B", "factor_weight"

    def factors(self, batch: Stack) -> tuple[Parts, Parts]:
        """Both averages without the bias of their start, in the dtype of decompositions."""
        each = [averages(layer, state) for layer, state in batch.each()]
        return joined([A for A, _ in each]), joined([B for _, B in each])

    # ---------------------------------------------------------------- decompositions

    def refresh(self, batch: Stack) -> NamedParts:
        """Eigenbases, or damped inverses."""
        A, B = self.factors(batch)
        return _decomposer(batch.layers[0]).decompose(A, B, damping_of(batch.group))

    def is_sound(self, batch: Stack, derived: NamedParts) -> Tensor:
        """Finite, and inverses not larger than one over the damping."""
        if batch.group["compute_method"] != "cholesky":
            return super().is_sound(batch, derived)
        A, B = self.factors(batch)
        return _decomposer(batch.layers[0]).sound(derived, A, B, damping_of(batch.group))

    def repair(self, batch: Stack) -> NamedParts:
        """In other precisions, or from eigenvalues."""
        A, B = self.factors(batch)
        return _decomposer(batch.layers[0]).repaired(A, B, damping_of(batch.group))

    def stand_in(self, batch: Stack) -> NamedParts:
        """The last eigenvectors, and a bound on the eigenvalues."""
        A, B = self.factors(batch)
        derived = {name: batch.read(name) for name in self.derived}
        return _decomposer(batch.layers[0]).bounded(derived, A, B, damping_of(batch.group))

    def tolerated_failures(self, group: Group) -> int:
        """``num_tolerated_failures``."""
        return int(group["num_tolerated_failures"])

    def saves_derived(self, group: Group) -> bool:
        """Unless the state is to be compact."""
        return not group["compact_state"]

    def precondition(self, batch: Stack, gradient: Tensor) -> Tensor:
        """``(B (x) A + damping I)^-1``."""
        ((_, state), *_) = batch.each()
        kind = inverse_dtype(state["factor_weight"].dtype, batch.group)
        dtype = torch.promote_types(kind, torch.float32)
        derived = {name: batch.read(name, dtype) for name in self.derived}
        decomposer = _decomposer(batch.layers[0])
        update = decomposer.precondition(derived, gradient.to(dtype), damping_of(batch.group))
        return update.to(update_dtype(gradient.dtype))

    # ---------------------------------------------------------------- what else can be said

    def feed_taps(self, layer: CapturedLayer, state: ParamState | None, refreshed: bool) -> None:
        """``"ekfac"`` measures in the eigenbasis."""
        statistics = layer.statistics
        if statistics.bound and statistics.squares:
            usable = state is not None and refreshed and "scales" in state
            basis = (unpack(state, "Q_A"), unpack(state, "Q_B")) if state and usable else None
            statistics.use_eigenbasis(basis)

    def spectra(self, layer: CapturedLayer, state: ParamState) -> Spectra:
        """Spectra of both averages, with the root of the damping added to each."""
        group = layer.group
        A, B = averages(layer, state)
        a, b = eigenvalues(layer.statistics.k, A), eigenvalues(layer.statistics.c, B)
        damping = damping_of(group)
        if group["damping"] is None:
            damping *= float(a.mean() * b.mean())
        shift, pi = damping**0.5, float((a.mean() / b.mean()) ** 0.5)
        return a.clamp(min=0) + shift * pi, b.clamp(min=0) + shift / pi


def averages(layer: CapturedLayer, state: ParamState) -> tuple[Parts, Parts]:
    """Both factors of a layer without the bias of their start, in the dtype of decompositions."""
    weight = state["factor_weight"]
    dtype = torch.promote_types(inverse_dtype(weight.dtype, layer.group), torch.float32)
    A, B = (tuple((part / weight).to(dtype) for part in unpack(state, name)) for name in ("A", "B"))
    return A, B


def damping_of(group: Group) -> float:
    """Damping of the group as the decomposer takes it."""
    given = group["relative_damping"] if group["damping"] is None else group["damping"]
    return float(given)


def inverse_dtype(dtype: torch.dtype, group: Group) -> torch.dtype:
    """``inv_dtype``, but float64 for factors in float64."""
    configured: torch.dtype = getattr(torch, group["inv_dtype"])
    return dtype if dtype == torch.float64 else configured


def _decomposer(layer: CapturedLayer) -> Decomposer:
    """How the group of a layer decomposes its factors."""
    group, k, c = layer.group, layer.statistics.k, layer.statistics.c
    assert isinstance(k, Decomposable)
    assert isinstance(c, Decomposable)
    relative = group["damping"] is None
    eps = torch.finfo(torch.promote_types(layer.weight.dtype, torch.float32)).eps
    return Decomposer(group["compute_method"], group["damping_type"], k, c, relative, eps)
