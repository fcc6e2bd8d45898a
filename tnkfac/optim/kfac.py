"""KFAC: Kronecker-factored approximate curvature (arXiv 1503.05671, 1602.01407, 1806.03884)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tnkfac.curvature import Parts
from tnkfac.optim import options
from tnkfac.optim.base import CurvatureOptimizer
from tnkfac.optim.options import Group
from tnkfac.optim.params.batches import joined
from tnkfac.optim.params.captured import CapturedLayer, update_dtype
from tnkfac.optim.params.marks import mark, set_mark
from tnkfac.optim.params.parts import overwrite, read, store
from tnkfac.optim.refresh import DERIVED, Refreshing, damping_of, decomposer_of, inverse_dtype
from tnkfac.optim.rules import levenberg_marquardt
from tnkfac.optim.rules.decompositions import METHODS
from tnkfac.optim.rules.normalization import NORMALIZATIONS, normalized
from tnkfac.optim.rules.sampled_fisher import FisherPasses
from tnkfac.optim.uncompiled import uncompiled

ALIASES = {
    "stat_decay": "factor_decay",
    "curvature_ema": "factor_decay",
    "TCov": "factor_update_steps",
    "TInv": "inv_update_steps",
}
"""Spellings of other KFAC optimizers."""
CLASSIC = {"momentum": 0.9, "damping": 1e-3, "kl_clip": 1e-3, "grafting": None}
"""What ``"auto"`` stands for once a scale of the natural gradient is given."""
UNTUNED = {"momentum": 0.7, "damping": None, "kl_clip": None, "grafting": 1.0}
"""What ``"auto"`` stands for otherwise."""
FISHER_TYPES = ("empirical", "mc", "forward-only")


class KFAC(FisherPasses, Refreshing, CurvatureOptimizer):
    r"""Kronecker-factored approximate curvature for every parameter of a model.

    For each supported layer it keeps moving averages of the input factor ``A`` and the output
    factor ``B``, decomposes them every ``inv_update_steps``, and steps along
    :math:`(B \otimes A + \lambda I)^{-1} \mathrm{vec}\, G`. All other parameters are trained by
    AdamW.

    Args:
        params: Parameters, named parameters, parameter groups, or a ``torch.nn.Module``. Layers
            are found from the parameters alone.
        lr: Learning rate; AdamW's, as long as ``damping`` and ``kl_clip`` are not given.
        momentum: Of the parameter updates; a moving average with grafting.
        damping: :math:`\lambda`, added to the curvature; None for ``relative_damping`` times the
            mean eigenvalue of the layer's curvature.
        weight_decay: Coefficient; see ``decoupled_weight_decay``.
        factor_decay: Decay of the moving averages of the factors, which start without bias.
        factor_update_steps: Steps between updates of the factors, or a callable of the step.
        inv_update_steps: Steps between decompositions, or a callable of the step.
        kl_clip: Bound on the quadratic change of the loss over all layers, or None.
        kfac_approx: ``"expand"`` or ``"reduce"`` (arXiv 2311.00636).
        loss_average: What the loss is averaged over: ``"batch"``, ``"batch+sequence"`` (every
            position too), None for a sum, or a callable ``(module, output_shape) -> terms``.
        fisher_type: ``"empirical"``: gradients of the training loss; ``"mc"``: gradients for
            drawn targets, see :meth:`sample_fisher`; ``"forward-only"``: ``B`` is the identity.
        mc_samples: Draws of each :meth:`sample_fisher`.
        compute_method: ``"eigen"``: exact damping in the eigenbasis; ``"cholesky"``: inverses of
            damped factors; ``"ekfac"``: second moments of per-sample gradients in the eigenbasis,
            averaged between decompositions.
        damping_type: ``"tikhonov"`` (eigen and ekfac), ``"pi"`` or ``"factor"`` (cholesky); None
            for the first that the method takes.
        structures: ``"dense"``, ``"diagonal"``, ``"block{k}diagonal"`` or ``"auto"`` (input
            factors dense up to 1,024 rows, output factors up to 128, blocks of 128 above), for
            both factors or as a pair (input, output).
        inv_dtype: dtype of decompositions; float64 parameters are decomposed in float64.
        skip_layers: Names of modules, with all that is in them, of parameters, or of types of
            modules, to be left to the fallback. A name that matches nothing is warned of.
        num_tolerated_failures: How many decompositions of a layer may fail in a row.
        nesterov: Nesterov momentum.
        grafting: Size of a layer's update: a number (its root mean square, before momentum),
            ``"rms"`` (0.2), ``"adam"``, ``"sgd"`` or None.
        decoupled_weight_decay: Shrink parameters beside the update instead of through it.
        adaptive_damping: Adapt ``damping`` to how well the quadratic model predicts the loss; needs
            a closure, which every fifth step is evaluated twice.
        normalization: Scale of the factors: ``"fisher"``, or ``"kfac-pytorch"`` for that of the
            package of this name, to go on with hyper-parameters tuned for it.
        compact_state: Leave decompositions out of checkpoints; they are made anew on loading.
        grad_worker_fraction: Share of the processes that keep the preconditioner of a layer and
            apply it; the others get preconditioned gradients. Less takes less memory and sends
            more; 0 is one process. Has no effect on one device. See :meth:`placement`.
        fallback: ``"adamw"``, ``"sgd"``, or ``"error"`` to refuse parameters without a layer.
        fallback_options: Its ``lr``, ``betas``, ``eps``, ``weight_decay``, ``momentum``.
        grad_scaler: A ``GradScaler`` whose ``step`` is not what calls this optimizer's.
        relative_damping: Share of the mean eigenvalue that is the damping of ``damping=None``.
        process_group: The ``torch.distributed`` group whose processes average the gradients of
            these parameters by hand; None if this one trains alone; ``"auto"`` for what
            ``DistributedDataParallel`` or ``fully_shard`` say.
        capture_tied: Also capture a weight that a module other than a supported layer has as well,
            like that of an embedding tied to the output layer, from the calls of its layers alone;
            otherwise the fallback trains it.
        capture_embeddings: Whether ``Embedding`` layers have curvature as well; their input factor
            has a row for every index. Those with ``sparse``, ``max_norm`` or
            ``scale_grad_by_freq``, and those that share their weight with another kind of layer,
            are left to the fallback.
        **aliases: ``stat_decay`` or ``curvature_ema`` for ``factor_decay``, ``TCov`` for
            ``factor_update_steps``, ``TInv`` for ``inv_update_steps``.

    What is left at ``"auto"`` goes together: updates of AdamW's size with a damping relative to
    the curvature, which need no tuning; or, as soon as ``damping`` or ``kl_clip`` is a number,
    ``adaptive_damping`` is set or ``normalization`` is that of kfac-pytorch, the classic: natural
    gradients in a trust region. :data:`UNTUNED` and :data:`CLASSIC` have the values of both.

    Raises:
        TypeError: For a hyper-parameter of the wrong type, unknown, or given twice.
        ValueError: For a hyper-parameter out of range, or no parameters.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        >>> optimizer = KFAC(model.parameters(), lr=1e-2, damping=1e-2)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(16, 4)).square().mean()
        ...     loss.backward()
        ...     _ = optimizer.step()
    """

    _counters: ClassVar[tuple[str, ...]] = ("step", "last_due", "last_inverse_due")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float | str = "auto",
        damping: float | str | None = "auto",
        weight_decay: float = 0.0,
        factor_decay: float = 0.95,
        factor_update_steps: int | Callable[[int], int] = 1,
        inv_update_steps: int | Callable[[int], int] = 10,
        kl_clip: float | str | None = "auto",
        kfac_approx: str = "expand",
        loss_average: str | Callable[..., float] | None = "batch",
        fisher_type: str = "empirical",
        mc_samples: int = 1,
        compute_method: str = "eigen",
        damping_type: str | None = None,
        structures: str | tuple[str, str] = "auto",
        inv_dtype: Any = torch.float32,
        skip_layers: Sequence[str] = (),
        num_tolerated_failures: int = 3,
        *,
        nesterov: bool = False,
        grafting: str | float | None = "auto",
        decoupled_weight_decay: bool = False,
        adaptive_damping: bool = False,
        normalization: str = "fisher",
        compact_state: bool = False,
        grad_worker_fraction: float = 1.0,
        fallback: str = "adamw",
        fallback_options: dict[str, Any] | None = None,
        grad_scaler: Any = None,
        relative_damping: float = 0.03,
        process_group: Any = "auto",
        capture_tied: bool = False,
        capture_embeddings: bool = False,
        **aliases: Any,
    ) -> None:
        """See the class."""
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "relative_damping": relative_damping,
            "capture_embeddings": capture_embeddings,
            "weight_decay": weight_decay,
            "factor_decay": factor_decay,
            "factor_update_steps": factor_update_steps,
            "inv_update_steps": inv_update_steps,
            "kl_clip": kl_clip,
            "kfac_approx": kfac_approx,
            "loss_average": loss_average,
            "fisher_type": fisher_type,
            "mc_samples": mc_samples,
            "compute_method": compute_method,
            "damping_type": damping_type,
            "structures": structures,
            "inv_dtype": inv_dtype,
            "skip_layers": skip_layers,
            "capture_tied": capture_tied,
            "num_tolerated_failures": num_tolerated_failures,
            "nesterov": nesterov,
            "grafting": grafting,
            "decoupled_weight_decay": decoupled_weight_decay,
            "adaptive_damping": adaptive_damping,
            "normalization": normalization,
            "compact_state": compact_state,
            "grad_worker_fraction": grad_worker_fraction,
            **options.fallback_settings(fallback, fallback_options),
        }
        options.take_aliases(defaults, aliases, ALIASES, KFAC.__init__)
        scaled = not all(given is None or isinstance(given, str) for given in (damping, kl_clip))
        classic = scaled or adaptive_damping or normalization == "kfac-pytorch"
        for name, value in (CLASSIC if classic else UNTUNED).items():
            if defaults[name] == "auto":
                defaults[name] = value
        self._check_group(defaults, defaults)
        super().__init__(params, defaults, grad_scaler, process_group)

    def _check_group(self, group: Group, given: Group) -> None:
        options.shared(group, given)
        options.number("factor_decay", group["factor_decay"], below=1.0)
        options.interval("factor_update_steps", group["factor_update_steps"])
        options.interval("inv_update_steps", group["inv_update_steps"])
        options.choices("fisher_type", group["fisher_type"], FISHER_TYPES)
        options.whole("mc_samples", group["mc_samples"], least=1)
        options.whole("num_tolerated_failures", group["num_tolerated_failures"], least=0)
        options.choices("compute_method", group["compute_method"], METHODS)
        supported = METHODS[group["compute_method"]]
        if group["damping_type"] is not None:
            options.choices(
                f"damping_type of compute_method={group['compute_method']!r}",
                group["damping_type"],
                supported,
            )
        given["damping_type"] = group["damping_type"] or supported[0]
        options.choices("normalization", group["normalization"], NORMALIZATIONS)
        if group["normalization"] == "kfac-pytorch" and group["kfac_approx"] != "expand":
            raise ValueError(
                "kfac_approx: got 'reduce' with normalization='kfac-pytorch', which is for "
                "'expand'. Supported: kfac_approx='expand', normalization='fisher'."
            )
        for name in ("nesterov", "adaptive_damping", "compact_state"):
            options.flag(name, group[name])
        if group["adaptive_damping"] and group["damping"] is None:
            raise ValueError("damping: got None. Supported with adaptive_damping: a number.")
        given["structures"] = options.structure_pair(group["structures"], factors=True)
        given["inv_dtype"] = options.dtype_name("inv_dtype", group["inv_dtype"])

    # ---------------------------------------------------------------- the step

    @uncompiled
    @torch.inference_mode(False)
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Re-evaluates the model and returns the loss. Called once, with gradients;
                with ``adaptive_damping`` twice at every fifth step.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: If a gradient is sparse, or ``adaptive_damping`` misses its closure.
        """
        adaptive = [group for group in self.param_groups if group["adaptive_damping"]]
        if not adaptive:
            return super().step(closure)
        if closure is None:
            raise ValueError("closure: got None. Supported with adaptive_damping: a closure.")
        if (adaptive[0]["step"] + 1) % levenberg_marquardt.EVERY:
            return super().step(closure)
        trial = levenberg_marquardt.Trial(p for group in self.param_groups for p in group["params"])
        loss = super().step(closure)
        with torch.no_grad():
            trial.moved()
            layers = [layer for layer in self._registry.layers if self._last_update(layer) >= 0]
            curvature = [(layer, *self._factors(layer, layer.group)) for layer in layers]
            predicted = trial.predicted(curvature, adaptive[0]["damping"])
            with self.no_stats():
                change = trial.evaluate(closure) - float(loss)
            for group in adaptive:
                group["damping"] = levenberg_marquardt.adapted(group["damping"], change, predicted)
        self._excluded = False
        return loss

    # ---------------------------------------------------------------- factors

    def _is_due(self, group: Group, step: int) -> bool:
        return step % _interval(group["factor_update_steps"], step) == 0

    def _last_inverse(self, layer: CapturedLayer) -> int:
        """Step of the last decomposition of its factors, or -1."""
        return mark(self.state, layer, "last_inverse")

    def _init_layer(self, layer: CapturedLayer, group: Group) -> dict[str, Tensor]:
        statistics, weight = layer.statistics, layer.weight
        groups, device = statistics.layer.groups, weight.device
        dtype = torch.promote_types(weight.dtype, torch.float32)
        state: dict[str, Tensor] = {}
        start = group["normalization"] == "kfac-pytorch"  # its averages start at the identity
        for name, structure in (("A", statistics.k), ("B", statistics.c)):
            eye = structure.identity(groups, dtype, device)
            store(state, name, eye if start else tuple(torch.zeros_like(part) for part in eye))
        state["factor_weight"] = torch.full((), float(start), dtype=dtype, device=device)
        kept = decomposer_of(layer, group).identity(groups, inverse_dtype(dtype, group), device)
        for name, parts in kept.items():
            store(state, name, parts)
        state["last_inverse"] = torch.tensor(-1, device="cpu")
        state["failures"] = torch.tensor(0, device="cpu")
        return state

    def _update_layers(
        self,
        layers: list[CapturedLayer],
        group: Group,
        scale: Tensor | float,
        keep: Tensor | None,
    ) -> None:
        for layer in layers:
            if self._plan.keeps(layer):
                self._update_layer(layer, group, scale, keep)

    def _update_layer(
        self, layer: CapturedLayer, group: Group, scale: Tensor | float, keep: Tensor | None
    ) -> None:
        state, statistics = self.state[layer.weight], layer.statistics
        if group["fisher_type"] == "mc":
            scale = 1.0  # the loss of these passes is our own
        found = normalized(statistics.factors(scale), statistics, group["normalization"])
        decay = group["factor_decay"]

        def averaged(name: str, new: Parts) -> Parts:
            old = read(state, name, len(new))
            if old[0].dtype != new[0].dtype:  # the model was cast
                new = tuple(part.to(old[0].dtype) for part in new)
            return tuple(o.lerp(n, 1 - decay) for o, n in zip(old, new, strict=True))

        new = {"A": averaged("A", found.A), "B": averaged("B", found.B)}
        new["factor_weight"] = averaged("factor_weight", (torch.ones_like(found.counts[0]),))
        if found.squares is not None and self._last_inverse(layer) >= 0:
            new["scales"] = averaged("scales", (found.squares,))
        overwrite(state, new, keep)

    def _share_state(self, layer: CapturedLayer, group: Group) -> None:
        statistics = layer.statistics
        if statistics.bound and statistics.squares:
            state = self.state.get(layer.weight)
            if state and self._last_inverse(layer) >= 0 and "scales" in state:
                counts = decomposer_of(layer, group).counts
                Q_A, Q_B = (read(state, name, counts[name]) for name in ("Q_A", "Q_B"))
                statistics.project((Q_A, Q_B))
            else:
                statistics.project(None)

    # ---------------------------------------------------------------- decompositions

    def _update_factors(self, pending: list[CapturedLayer], keep: Tensor | None) -> None:
        self._restarted = ()
        super()._update_factors(pending, keep)
        measured = {id(layer) for layer in pending}
        due = []
        for layer in self._registry.layers:
            group = layer.group
            if not self.state.get(layer.weight):
                continue
            waits = self._last_inverse(layer) < group["last_inverse_due"]
            if waits and (id(layer) in measured or self._last_update(layer) >= 0):
                due.append(layer)
        if due and (keep is None or bool(keep)):
            self._decompose(due)

    def _natural(self, layers: list[CapturedLayer], group: Group, gradients: Tensor) -> Tensor:
        decomposer = decomposer_of(layers[0], group)
        states = [self.state[layer.weight] for layer in layers]
        kind = inverse_dtype(states[0]["factor_weight"].dtype, group)
        dtype = torch.promote_types(kind, torch.float32)
        kept = {
            name: tuple(
                part.to(dtype) for part in joined([read(state, name, count) for state in states])
            )
            for name, count in decomposer.counts.items()
        }
        update = decomposer.precondition(kept, gradients.to(dtype), damping_of(group))
        return update.to(update_dtype(gradients.dtype))

    def _advance(self, updated: list[CapturedLayer]) -> None:
        for group in self.param_groups:
            step = group["step"] + 1
            if step % _interval(group["inv_update_steps"], step) == 0:
                group["last_inverse_due"] = step
        restarted = set(map(id, self._restarted))  # what they had is gone with their factors
        super()._advance([layer for layer in updated if id(layer) not in restarted])

    # ---------------------------------------------------------------- checkpoints

    def _saved(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Without decompositions in groups with ``compact_state``."""
        saved = super()._saved(saved)
        for group in saved["param_groups"]:
            if group["compact_state"]:
                for index in group["params"]:
                    state = saved["state"].get(index, {})
                    saved["state"][index] = {k: v for k, v in state.items() if not _is_derived(k)}
        return saved

    def _restore(self, saved: dict[str, Any], before: list[Group]) -> None:
        """Decompositions that are missing are made anew."""
        super()._restore(saved, before)
        for layer in self._registry.layers:
            if not self._has_factors(layer) or not self._plan.keeps(layer):
                continue
            state, group = self.state[layer.weight], layer.group
            if not any(map(_is_derived, state)):
                fresh = self._init_layer(layer, group)
                state.update({key: value for key, value in fresh.items() if _is_derived(key)})
                set_mark(self.state, layer, "last_inverse", -1)
        self._read_marks()


def _is_derived(key: str) -> bool:
    """Whether a part of the state follows from the factors."""
    return key.split(".")[0] in DERIVED


def _interval(value: int | Callable[[int], int], step: int) -> int:
    return value(step) if callable(value) else value
