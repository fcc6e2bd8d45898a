"""SINGD: structured inverse-free natural gradient descent (arXiv 2312.05705)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tnkfac.curvature import Preconditioner, fast, stationary_points, warn
from tnkfac.optim import options
from tnkfac.optim.base import CurvatureOptimizer
from tnkfac.optim.finite import loss_scale
from tnkfac.optim.options import Group
from tnkfac.optim.params import budget
from tnkfac.optim.params.batches import Batch, EndToEnd, Stack, joined
from tnkfac.optim.params.captured import CapturedLayer, update_dtype
from tnkfac.optim.params.marks import mark, set_mark
from tnkfac.optim.params.parts import load, overwrite, store
from tnkfac.optim.params.scaling import Scaling
from tnkfac.optim.report.diagnostics import Spectra, inverse_squares
from tnkfac.optim.rules.damping import damped
from tnkfac.optim.rules.singd_rule import singd_update
from tnkfac.optim.step import elementwise
from tnkfac.optim.step.elementwise import is_diagonal


class SINGD(CurvatureOptimizer):
    r"""Structured inverse-free natural gradient descent for every parameter of a model.

    For each supported layer with gradient ``G``, input factor ``A`` and output factor ``B`` it
    keeps structured ``K`` and ``C`` with :math:`C C^T \otimes K K^T \approx (B \otimes A + \lambda
    I)^{-1}`, updates them without a matrix inverse every ``T`` steps, and steps along
    :math:`C C^T G K K^T`. All other parameters are trained by AdamW.

    Args:
        params: Parameters, named parameters, parameter groups, or a ``torch.nn.Module``. Layers
            are found from the parameters alone.
        lr: Learning rate; with grafting, AdamW's.
        momentum: Of the parameter updates; a moving average with grafting.
        damping: :math:`\lambda`, added to the curvature; None for ``relative_damping`` times the
            mean eigenvalue of the layer's curvature.
        alpha1: Momentum of the preconditioner.
        weight_decay: Coefficient; see ``decoupled_weight_decay``.
        T: Steps between updates of the preconditioner, or a callable of the step.
        loss_average: What the loss is averaged over: ``"batch"``, ``"batch+sequence"`` (every
            position too), None for a sum, or a callable ``(module, output_shape) -> terms``.
        lr_cov: Step size of the preconditioner, or a callable of the step.
        structures: ``"dense"``, ``"diagonal"``, ``"block{k}diagonal"``,
            ``"hierarchical{k1}_{k2}"``, ``"triltoeplitz"``, ``"triutoeplitz"``,
            ``"triltopleftdiag"``, ``"trilbottomrightdiag"``, ``"triutopleftdiag"``,
            ``"triubottomrightdiag"``, or ``"auto"`` (input factors dense up to 1,024 rows, output
            factors up to 128, blocks of 128 above), for both factors or as a pair (input, output).
        kfac_approx: ``"expand"`` or ``"reduce"`` (arXiv 2311.00636).
        kfac_like: IKFAC: no trace coupling, and no momentum of the preconditioner.
        normalize_lr_cov: Bound the preconditioner's step by its largest entry.
        preconditioner_dtype: dtype of ``K`` and ``C``, or a pair; None for that of the weight, or
            float32 if that is float16.
        init: ``"first_batch"``: start where the first batch's factors leave the preconditioner at
            rest, and bound every later change. ``"identity"``: start at the identity, with the
            paper's unbounded updates.
        grafting: Size of a layer's update: a number (its root mean square, before momentum),
            ``"rms"`` (0.2), ``"adam"`` (that of its AdamW update), ``"sgd"`` (that of its
            gradient), or None.
        decoupled_weight_decay: Shrink parameters beside the update instead of through it.
        kl_clip: Bound on the quadratic change of the loss over all layers, or None.
        fallback: ``"adamw"``, ``"sgd"``, or ``"error"`` to refuse parameters without a layer.
        fallback_options: Its ``lr``, ``betas``, ``eps``, ``weight_decay``, ``momentum``.
        grad_scaler: A ``GradScaler`` whose ``step`` is not what calls this optimizer's.
        grad_worker_fraction: Share of the processes that keep the preconditioner of a layer and
            apply it; the others get preconditioned gradients. Less takes less memory and sends
            more; 0 is one process. Has no effect on one device. See :meth:`placement`.
        max_state_ratio: With ``"auto"``, bound on the state relative to AdamW's.
        max_step_ratio: With ``"auto"``, bound on the cost of a step relative to AdamW's.
        relative_damping: Share of the mean eigenvalue that is the damping of ``damping=None``.
        process_group: The ``torch.distributed`` group whose processes average the gradients of
            these parameters by hand; None if this one trains alone; ``"auto"`` for what
            ``DistributedDataParallel`` or ``fully_shard`` say.
        skip_layers: Names of modules, with all that is in them, of parameters, or of types of
            modules, to be left to the fallback. A name that matches nothing is warned of.
        capture_tied: Also capture a weight that a module other than a supported layer has as well,
            like that of an embedding tied to the output layer, from the calls of its layers alone;
            otherwise the fallback trains it.
        capture_embeddings: Whether ``Embedding`` layers have curvature as well; their input factor
            has a row for every index. Those with ``sparse``, ``max_norm`` or
            ``scale_grad_by_freq``, and those that share their weight with another kind of layer,
            are left to the fallback.

    Raises:
        TypeError: For a hyper-parameter of the wrong type.
        ValueError: For a hyper-parameter out of range, or no parameters.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        >>> optimizer = SINGD(model.parameters(), lr=1e-2, structures="diagonal")
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(16, 4)).square().mean()
        ...     loss.backward()
        ...     _ = optimizer.step()
    """

    REFERENCE: ClassVar[dict[str, Any]] = {
        "structures": ("dense", "dense"),
        "momentum": 0.9,
        "damping": 1e-3,
        "lr_cov": 1e-2,
        "init": "identity",
        "grafting": None,
        "decoupled_weight_decay": False,
    }
    """Keyword arguments under which the algorithm of the paper is followed to the letter."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.7,
        damping: float | None = None,
        alpha1: float = 0.5,
        weight_decay: float = 0.0,
        T: int | Callable[[int], int] = 10,
        loss_average: str | Callable[..., float] | None = "batch",
        lr_cov: float | Callable[[int], float] = 0.2,
        structures: str | tuple[str, str] = "auto",
        kfac_approx: str = "expand",
        kfac_like: bool = False,
        normalize_lr_cov: bool = False,
        preconditioner_dtype: Any = None,
        *,
        init: str = "first_batch",
        grafting: str | float | None = 1.0,
        decoupled_weight_decay: bool = True,
        kl_clip: float | None = None,
        fallback: str = "adamw",
        fallback_options: dict[str, Any] | None = None,
        grad_scaler: Any = None,
        grad_worker_fraction: float = 1.0,
        max_state_ratio: float | None = None,
        max_step_ratio: float | None = None,
        relative_damping: float = 0.03,
        process_group: Any = "auto",
        skip_layers: Sequence[str] = (),
        capture_tied: bool = False,
        capture_embeddings: bool = False,
    ) -> None:
        """See the class."""
        if kfac_like and alpha1 != 0:
            warn(f"alpha1={alpha1} has no effect with kfac_like=True.")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "relative_damping": relative_damping,
            "capture_embeddings": capture_embeddings,
            "alpha1": alpha1,
            "weight_decay": weight_decay,
            "T": T,
            "loss_average": loss_average,
            "lr_cov": lr_cov,
            "structures": structures,
            "kfac_approx": kfac_approx,
            "kfac_like": kfac_like,
            "normalize_lr_cov": normalize_lr_cov,
            "preconditioner_dtype": preconditioner_dtype,
            "init": init,
            "grafting": grafting,
            "decoupled_weight_decay": decoupled_weight_decay,
            "kl_clip": kl_clip,
            **options.fallback_settings(fallback, fallback_options),
            "grad_worker_fraction": grad_worker_fraction,
            "max_state_ratio": max_state_ratio,
            "max_step_ratio": max_step_ratio,
            "skip_layers": skip_layers,
            "capture_tied": capture_tied,
        }
        self._check_group(defaults, defaults)
        super().__init__(params, defaults, grad_scaler, process_group)

    def _check_group(self, group: Group, given: Group) -> None:
        options.shared(group, given)
        options.number("alpha1", group["alpha1"], below=1.0)
        options.interval("T", group["T"])
        if not callable(group["lr_cov"]):
            options.number("lr_cov", group["lr_cov"])
        options.choices("init", group["init"], options.INIT)
        for name in ("max_state_ratio", "max_step_ratio"):
            if group[name] is not None:
                options.number(name, group[name])
        for name in ("kfac_like", "normalize_lr_cov"):
            options.flag(name, group[name])
        given["structures"] = options.structure_pair(group["structures"])
        given["preconditioner_dtype"] = options.dtype_pair(group["preconditioner_dtype"])

    def _sort(self) -> None:
        known = {id(layer) for layer in self._registry.layers}
        super()._sort()
        new = [layer for layer in self._registry.layers if id(layer) not in known]
        budget.limit_state(new, self._registry.others, self.param_groups, self.state)

    def _ensure_state(self) -> None:
        if budget.limit_time(self._registry.layers, self.param_groups, self.state):
            self._excluded = True  # statistics that are missing from this step are no surprise
        super()._ensure_state()

    def _read_marks(self) -> None:
        for layer in self._registry.layers:
            budget.follow_state(layer, layer.group, self.state)
        super()._read_marks()

    def _is_due(self, group: Group, step: int) -> bool:
        T = group["T"]
        every: int = T(step) if callable(T) else T
        return step % every == 0

    def _due_since(self, layer: CapturedLayer, group: Group) -> int:
        """A start that is but a multiple of the identity is followed by frequent updates."""
        if _starts_roughly(layer, group) and self._last_update(layer) >= 0:
            step: int = group["step"]
            T = group["T"](step) if callable(group["T"]) else group["T"]
            start = max(0, mark(self.state, layer, "first_update"))  # older files lack it
            if step < start + T:
                return step
        return super()._due_since(layer, group)

    def _advance(self, updated: list[CapturedLayer]) -> None:
        for layer in updated:
            group = layer.group
            starts = _starts_roughly(layer, group) and self._last_update(layer) < 0
            if starts and "first_update" in self.state[layer.weight]:  # older files lack it
                set_mark(self.state, layer, "first_update", group["step"])
        super()._advance(updated)

    def _share_state(self, layer: CapturedLayer, group: Group) -> None:
        statistics = layer.statistics
        if statistics.bound and (statistics.k.reads_factor or statistics.c.reads_factor):
            if not self._has_factors(layer):
                statistics.use(None)
                return
            K, C = load(layer, self.state[layer.weight], ("K", "C"))
            statistics.use((K, C))

    def _init_layer(self, layer: CapturedLayer, group: Group) -> dict[str, Tensor]:
        statistics, weight = layer.statistics, layer.weight
        groups = statistics.layer.groups
        momentum = group["alpha1"] != 0 and not group["kfac_like"]
        state: dict[str, Tensor] = {}
        for name, structure, dtype in zip(
            ("K", "C"), (statistics.k, statistics.c), group["preconditioner_dtype"], strict=True
        ):
            kept = update_dtype(weight.dtype) if dtype is None else getattr(torch, dtype)
            eye = structure.identity(groups, kept, weight.device)
            store(state, name, eye)
            if momentum:
                store(state, f"m_{name}", tuple(torch.zeros_like(part) for part in eye))
        if _starts_roughly(layer, group):
            state["first_update"] = torch.tensor(-1, device="cpu")
        return state

    def _update_layers(
        self, layers: list[CapturedLayer], group: Group, scale: Tensor | float, keep: Tensor | None
    ) -> None:
        self._update_batch(Stack(layers), scale, keep)

    def _update_batch(self, batch: Batch, scale: Tensor | float, keep: Tensor | None) -> None:
        group, k, c = batch.layers[0].group, batch.k, batch.c
        states = [self.state[layer.weight] for layer in batch.layers]
        A, B = batch.factors(scale)
        names = ["K", "C"]
        if group["alpha1"] != 0 and not group["kfac_like"]:
            names += ["m_K", "m_C"]
        old = {name: batch.read(states, name, A[0].dtype) for name in names}
        taken = damped(k, c, A, B, group)
        found = singd_update(
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
            lr_cov=_at(group["lr_cov"], group["step"]),
            kfac_like=group["kfac_like"],
            normalize=group["normalize_lr_cov"],
            bounded=group["init"] == "first_batch",
        )
        batch.write(states, dict(zip(names, found, strict=False)), keep)

    def _start(self, layers: list[CapturedLayer], group: Group, scale: Tensor | float) -> None:
        """Start where the factors of the first batch leave ``K`` and ``C`` at rest.

        Relative damping is a number for factors of mean eigenvalue one, whose preconditioner is
        then brought to the level of the curvature.
        """
        problems, levels = [], []
        for layer in layers:
            k, c = layer.statistics.k, layer.statistics.c
            factors = layer.statistics.factors(scale)
            unit = damped(k, c, factors.A, factors.B, {**group, "grafting": 1.0})
            problems.append((k, c, unit.A, unit.B))
            own = group["grafting"] is None
            levels.append(damped(k, c, factors.A, factors.B, group).level if own else None)
        damping = group["relative_damping"] if group["damping"] is None else group["damping"]
        found = stationary_points(problems, damping)
        for layer, (K, C), level in zip(layers, found, levels, strict=True):
            if level is not None:
                k, c = layer.statistics.k, layer.statistics.c
                K, C = k.scaled(K, level**-0.25), c.scaled(C, level**-0.25)
            overwrite(self.state[layer.weight], {"K": K, "C": C}, None)

    def _stack_kind(self, layer: CapturedLayer, group: Group) -> Hashable:
        state = self.state[layer.weight]
        return tuple(tensor.dtype for key, tensor in state.items() if key[0] in "KC")

    def _update_factors(self, pending: list[CapturedLayer], keep: Tensor | None) -> None:
        """Starts together; layers with diagonal factors together; all others in stacks."""
        starts: dict[Any, list[CapturedLayer]] = {}
        together: dict[Any, list[CapturedLayer]] = {}
        rest = []
        for layer in pending:
            group = layer.group
            key = id(group), layer.weight.device, layer.weight.dtype
            if self._last_update(layer) < 0 and group["init"] == "first_batch":
                starts.setdefault(key if fast() else id(layer), []).append(layer)
            elif fast() and is_diagonal(layer, self.state[layer.weight]):
                together.setdefault(key, []).append(layer)
            else:
                rest.append(layer)
        scale = loss_scale(self._grad_scaler) if pending else 1.0
        sent = [*rest, *(layer for layers in starts.values() for layer in layers)]
        if starts and (keep is None or bool(keep)):  # decompositions wait for the device anyway
            for layers in starts.values():
                mine = [layer for layer in layers if self._plan.computes(layer)]
                if mine:
                    self._start(mine, mine[0].group, scale)
        for layers in together.values():
            self._update_batch(EndToEnd(layers), scale, keep)
        mine = [layer for layer in rest if self._plan.computes(layer)]
        super()._update_factors(mine, keep)
        self._share(sent, ("K", "C", "m_K", "m_C"))

    def _scales(self, layer: CapturedLayer) -> bool:
        alone = len(self._plan.row(layer)) == 1  # nobody waits for what it preconditions
        return alone and is_diagonal(layer, self.state.get(layer.weight, {}))

    def _scalings(self, layers: list[CapturedLayer]) -> list[Scaling | None]:
        states = [self.state.get(layer.weight, {}) for layer in layers]
        pairs = [
            (state["K"], state["C"]) if self._scales(layer) else None
            for layer, state in zip(layers, states, strict=True)
        ]
        return elementwise.read(layers, pairs)

    def _spectra(self, layer: CapturedLayer) -> Spectra | None:
        if not self._plan.keeps(layer):
            return None
        K, C = load(layer, self.state[layer.weight], ("K", "C"))
        return inverse_squares(layer.statistics.k, K), inverse_squares(layer.statistics.c, C)

    def _natural(self, layers: list[CapturedLayer], group: Group, gradients: Tensor) -> Tensor:
        statistics = layers[0].statistics
        pairs = [load(layer, self.state[layer.weight], ("K", "C")) for layer in layers]
        K, C = (joined([pair[side] for pair in pairs]) for side in (0, 1))
        return Preconditioner(statistics.k, statistics.c, K, C).apply(gradients)


def _starts_roughly(layer: CapturedLayer, group: Group) -> bool:
    """Whether the first batch only gives a multiple of the identity."""
    statistics = layer.statistics
    exact = statistics.bound and statistics.k.has_eigenbasis and statistics.c.has_eigenbasis
    return group["init"] == "first_batch" and not exact


def _at(lr_cov: float | Callable[[int], float], step: int) -> float:
    """Step size of the preconditioner at a step."""
    return lr_cov(step) if callable(lr_cov) else lr_cov
