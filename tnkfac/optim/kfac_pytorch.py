"""KFAC as a preconditioner of gradients, to be followed by any optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import StateDict

from tnkfac.curvature.callers import warn
from tnkfac.optim import options
from tnkfac.optim.finite import finite
from tnkfac.optim.kfac import KFAC
from tnkfac.optim.params.sharding import local_shard, shard_like
from tnkfac.optim.report.summary import Report
from tnkfac.optim.step.pipeline import StepContext, preconditioned
from tnkfac.optim.uncompiled import uncompiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FRACTIONS = {"comm_opt": 1.0, "hybrid_opt": 0.5, "mem_opt": 0.0}
"""Its names of strategies, and ``grad_worker_fraction``."""
METHODS = {"eigen": ("eigen", "tikhonov"), "inverse": ("cholesky", "factor")}
"""Names here of the methods of kfac-pytorch."""
SHOWN = (
    "accumulation_steps",
    "compute_method",
    "damping",
    "factor_decay",
    "factor_update_steps",
    "grad_worker_fraction",
    "inv_dtype",
    "inv_update_steps",
    "kl_clip",
    "layers",
    "lr",
    "normalization",
    "skip_layers",
    "steps",
    "structures",
)
"""Attributes that a preconditioner shows."""
_KINDS = {
    "A": "a_factors",
    "B": "g_factors",
    **dict.fromkeys(("Q_A", "d_A", "A_inv"), "a_inverses"),
    **dict.fromkeys(("Q_B", "d_B", "B_inv"), "g_inverses"),
}
Scheduled = float | Callable[[int], float]


class _Rewriter(KFAC):
    """KFAC that replaces gradients by natural ones and leaves parameters alone."""

    def _step_params(self, context: StepContext) -> None:
        layers = [
            la for la in self._registry.layers if any(p.grad is not None for p in la.params())
        ]
        updates, self._trust = preconditioned(layers, self._precondition, context.found_inf)
        for layer, parts in updates:
            good = finite([new for _, new in parts])
            context.skipped.add_flags([layer.name], ~good.view(1))
            for param, new in parts:
                assert param.grad is not None
                local_shard(param.grad).copy_(shard_like(torch.where(good, new, 0.0), param))
        self._registry.parts.write_gradients()


def _current(name: str, what: str) -> property:
    def value(self: KFACPreconditioner) -> Any:
        return self._now(name)

    return property(value, doc=what)


class KFACPreconditioner:
    """Preconditions the gradients of a model's layers in place.

    The constructor is that of the preconditioner of kfac-pytorch. With its ``normalization``,
    which is the default, hyper-parameters that were tuned for that package carry over. Layers that
    it does not know (other convolutions, groups, padding modes, dilation) are preconditioned, too.

    Args:
        model: Its layers are preconditioned; all other gradients stay as they are.
        factor_update_steps: Steps between updates of the factors, or a callable of the step.
        inv_update_steps: Steps between decompositions, or a callable of the step.
        damping: Added to the curvature; a number or a callable of the step.
        factor_decay: Decay of the moving averages of the factors, likewise.
        kl_clip: Bound on the quadratic change of the loss, likewise, or None.
        lr: Learning rate of the optimizer that follows, for ``kl_clip``, likewise.
        accumulation_steps: Not needed: micro-batches are counted.
        allreduce_bucket_cap_mb: Has no effect on one device.
        assignment_strategy: Has no effect on one device.
        colocate_factors: Has no effect on one device.
        compute_method: ``"eigen"`` or ``"inverse"``, or a member of an enumeration so named.
        compute_eigenvalue_outer_product: Has no effect: damping may change at any step.
        grad_worker_fraction: Share of the processes that keep the preconditioner of a layer, or
            ``"comm_opt"`` (all), ``"hybrid_opt"`` (half), ``"mem_opt"`` (one), or a member of an
            enumeration so named.
        symmetry_aware: Has no effect: factors are always sent as triangles.
        grad_scaler: The ``GradScaler`` in use, or a callable that returns its scale.
        factor_dtype: Has no effect: factors are kept in float32 at least.
        inv_dtype: dtype of decompositions.
        skip_layers: Regular expressions for names of modules or of their types. One that matches
            no module is warned of.
        update_factors_in_hook: Has no effect: factors are updated in :meth:`step`.
        loglevel: Has no effect.
        normalization: ``"kfac-pytorch"``, or ``"fisher"`` for factors of the Fisher matrix.
        structures: Of the factors: ``"dense"``, ``"diagonal"``, ``"block{k}diagonal"``, ``"auto"``.
        process_group: The ``torch.distributed`` group whose processes average the gradients of
            these parameters by hand; None if this one trains alone; ``"auto"`` for what
            ``DistributedDataParallel`` or ``fully_shard`` say.
        capture_tied: Also precondition the gradient of a weight that a module other than a
            supported layer has as well, like that of an embedding tied to the output layer.

    Raises:
        TypeError: For a hyper-parameter of the wrong type.
        ValueError: For a hyper-parameter out of range, or a model without supported layers.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> preconditioner = KFACPreconditioner(model, lr=0.1)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(16, 4)).square().mean().backward()
        ...     preconditioner.step()
        ...     optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        factor_update_steps: int | Callable[[int], int] = 1,
        inv_update_steps: int | Callable[[int], int] = 1,
        damping: Scheduled = 0.001,
        factor_decay: Scheduled = 0.95,
        kl_clip: Scheduled | None = 0.001,
        lr: Scheduled = 0.1,
        accumulation_steps: int = 1,
        allreduce_bucket_cap_mb: float = 25.0,
        assignment_strategy: object = "compute",
        colocate_factors: bool = True,
        compute_method: object = "eigen",
        compute_eigenvalue_outer_product: bool = True,
        grad_worker_fraction: object = "comm_opt",
        symmetry_aware: bool = False,
        grad_scaler: GradScaler | Callable[[], float] | None = None,
        factor_dtype: torch.dtype | None = None,
        inv_dtype: torch.dtype = torch.float32,
        skip_layers: Sequence[str] | None = None,
        update_factors_in_hook: bool = True,
        loglevel: int = 10,
        normalization: str = "kfac-pytorch",
        structures: str | tuple[str, str] = "dense",
        process_group: ProcessGroup | str | None = "auto",
        capture_tied: bool = False,
    ) -> None:
        """See the class."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got a {type(model).__name__}. Supported: a torch.nn.Module.")
        method = str(getattr(compute_method, "name", compute_method)).lower()
        options.choices("compute_method", method, METHODS)
        fraction: Any = getattr(grad_worker_fraction, "name", grad_worker_fraction)
        if isinstance(fraction, str):
            options.choices("grad_worker_fraction", fraction.lower(), FRACTIONS)
            fraction = FRACTIONS[fraction.lower()]
        options.whole("accumulation_steps", accumulation_steps, least=1)
        given = {"damping": damping, "factor_decay": factor_decay, "kl_clip": kl_clip, "lr": lr}
        self._shown = {"accumulation_steps": accumulation_steps, "compute_method": method}
        self._schedules = {name: value for name, value in given.items() if callable(value)}
        now: dict[str, Any] = {k: v(0) if callable(v) else v for k, v in given.items()}
        scaler: Any = grad_scaler
        scaler = _Scale(scaler) if _is_function(scaler) else scaler
        self._kfac = _Rewriter(
            model,
            **now,
            factor_update_steps=factor_update_steps,
            inv_update_steps=inv_update_steps,
            momentum=0.0,
            compute_method=METHODS[method][0],
            damping_type=METHODS[method][1],
            structures=structures,
            inv_dtype=inv_dtype,
            skip_layers=_matching(model, skip_layers),
            capture_tied=capture_tied,
            normalization=normalization,
            grad_worker_fraction=fraction,
            fallback="sgd",
            grad_scaler=scaler,
            process_group=process_group,
        )
        if not self._kfac._registry.layers:
            raise ValueError("model: got no supported layer. Supported: Linear, Conv1d/2d/3d, ...")

    @uncompiled
    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self) -> None:
        """Update the factors where it is time, and replace the gradients of all layers."""
        for group in self._kfac.param_groups:
            for name, schedule in self._schedules.items():
                group[name] = schedule(group["step"])
        self._kfac.step()

    def reset_batch(self) -> None:
        """Drop what the passes since the last step have measured."""
        self._kfac._registry.clear()

    def state_dict(self, include_factors: bool = True) -> StateDict:
        """Hyper-parameters, and the factors with their decompositions unless left out.

        Args:
            include_factors: Whether to save more than hyper-parameters.
        """
        saved = self._kfac.state_dict()
        return saved if include_factors else {**saved, "state": {}}

    def load_state_dict(self, state_dict: StateDict, compute_inverses: bool = True) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state_dict: A saved state.
            compute_inverses: Has no effect: decompositions are part of the state.
        """
        self._kfac.load_state_dict(state_dict)

    @property
    def steps(self) -> int:
        """Number of steps so far."""
        steps: int = self._kfac.param_groups[0]["step"]
        return steps

    damping = _current("damping", "Added to the curvature at the next step.")
    factor_decay = _current("factor_decay", "Decay of the moving averages at the next step.")
    factor_update_steps = _current("factor_update_steps", "Steps between updates of the factors.")
    inv_update_steps = _current("inv_update_steps", "Steps between decompositions.")
    kl_clip = _current("kl_clip", "Bound on the change of the loss at the next step, or None.")
    lr = _current("lr", "Learning rate of the optimizer that follows, at the next step.")

    def _now(self, name: str) -> Any:
        """A hyper-parameter, or what its schedule says of the next step."""
        value = self._schedules.get(name, self._kfac.param_groups[0][name])
        return value(self.steps) if callable(value) else value

    def __repr__(self) -> str:
        """Hyper-parameters as of the next step, in the form of torch's optimizers."""
        info = {**self._shown, "layers": len(self._kfac._registry.layers), "steps": self.steps}
        lines = (f"    {name}: {info[name] if name in info else self._now(name)}" for name in SHOWN)
        return "\n".join([f"{type(self).__name__} (", *lines, ")"])

    def memory_usage(self) -> dict[str, int]:
        """Bytes of factors and decompositions of inputs and output gradients, and in all.

        Keys: ``a_factors``, ``g_factors``, ``a_inverses``, ``g_inverses``, ``total``.
        """
        usage = dict.fromkeys(("a_factors", "g_factors", "a_inverses", "g_inverses"), 0)
        for state in self._kfac.state.values():
            for key, value in state.items():
                kind = _KINDS.get(key.split(".")[0])
                if kind is not None:
                    usage[kind] += value.numel() * value.element_size()
        return {**usage, "total": sum(usage.values())}

    def report(self) -> Report:
        """How every parameter is treated: a list of rows that prints as a table."""
        return self._kfac.report()

    def close(self) -> None:
        """Remove every hook."""
        self._kfac.close()


def _matching(model: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Names of the layers that a regular expression finds by their name or type.

    Modules that contain others are none, as in kfac-pytorch; and nothing is to be skipped in those
    without parameters to train.
    """
    wanted = [re.compile(pattern) for pattern in options.names("skip_layers", patterns)]
    leaves = [(name, module) for name, module in model.named_modules() if not module._modules]
    matches = {
        pattern: [n for n, m in leaves if pattern.search(n) or pattern.search(type(m).__name__)]
        for pattern in wanted
    }
    silent = [pattern.pattern for pattern, names in matches.items() if not names]
    if silent:
        warn(
            f"skip_layers: {', '.join(map(repr, silent))} matches no layer. Supported: regular "
            "expressions for names of modules or of their types.",
        )
    trained = {n for n, m in leaves if any(p.requires_grad for p in m.parameters())}
    return sorted(trained & {name for names in matches.values() for name in names})


def _is_function(scaler: object) -> bool:
    return callable(scaler) and not hasattr(scaler, "is_enabled")


class _Scale:
    """A function that returns the scale of the loss, in the place of a scaler."""

    def __init__(self, function: Callable[[], float]) -> None:
        self._function = function

    def is_enabled(self) -> bool:
        """Whether there is a scale."""
        return True

    @property
    def _scale(self) -> float:
        return float(self._function())
