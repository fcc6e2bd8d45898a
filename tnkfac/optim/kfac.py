"""KFAC: Kronecker-factored approximate curvature (arXiv 1503.05671, 1602.01407, 1806.03884)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from tnkfac.optim import options
from tnkfac.optim.base import CurvatureOptimizer
from tnkfac.optim.options import Params
from tnkfac.optim.params.captured import CapturedLayer
from tnkfac.optim.rules import levenberg_marquardt, sampled_fisher
from tnkfac.optim.rules.kfac_rule import KfacRule, averages
from tnkfac.optim.uncompiled import uncompiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ALIASES = {
    "stat_decay": "factor_decay",
    "curvature_ema": "factor_decay",
    "TCov": "factor_update_steps",
    "TInv": "inv_update_steps",
}
"""Spellings of other KFAC optimizers."""


class KFAC(CurvatureOptimizer):
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

    rule = KfacRule()

    def __init__(
        self,
        params: Params,
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
        inv_dtype: torch.dtype | str = torch.float32,
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
        fallback_options: Mapping[str, object] | None = None,
        grad_scaler: GradScaler | None = None,
        relative_damping: float = 0.03,
        process_group: ProcessGroup | str | None = "auto",
        capture_tied: bool = False,
        capture_embeddings: bool = False,
        **aliases: object,
    ) -> None:
        """See the class."""
        arguments = locals()
        options.take_aliases(arguments, aliases, ALIASES, KFAC.__init__)
        given = {name: arguments[name] for name in self.rule.options if name in arguments}
        super().__init__(
            params,
            grad_scaler=grad_scaler,
            process_group=process_group,
            fallback_options=fallback_options,
            **given,
        )

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
        trial = levenberg_marquardt.QuadraticModel(
            p for group in self.param_groups for p in group["params"]
        )
        loss = super().step(closure)
        with torch.no_grad():
            trial.moved()
            layers = [layer for layer in self._registry.layers if self._last_update(layer) >= 0]
            curvature = [(la, *averages(la, self._states[la.weight])) for la in layers]
            predicted = trial.predicted(curvature, adaptive[0]["damping"])
            with self.no_stats():
                change = trial.evaluate(closure) - float(loss)
            for group in adaptive:
                group["damping"] = levenberg_marquardt.adapted(group["damping"], change, predicted)
        self._excluded = False
        return loss

    # ---------------------------------------------------------------- drawn targets

    @uncompiled
    def sample_fisher(
        self,
        output: Tensor,
        likelihood: str = "categorical",
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw targets from the model's own distribution and back-propagate for the factors only.

        To be called between forward and backward pass, for every micro-batch; every ``.grad`` stays
        as it is. On steps without a factor update it does nothing. ``B`` is the mean over draws;
        every call counts as further samples.

        Args:
            output: Output of the model that the loss is computed from: logits ``[N, C, ..]``, or
                anything ``[N, ..]`` for the other likelihoods.
            likelihood: ``"categorical"`` (cross-entropy), ``"gaussian"`` with variance one (half
                the squared error, summed over outputs) or ``"bernoulli"`` (binary cross-entropy
                with logits, summed over outputs).
            generator: Source of random numbers, or torch's own.

        Raises:
            ValueError: If ``fisher_type`` is not ``"mc"``, or for an unknown likelihood.
        """
        options.choices("likelihood", likelihood, sampled_fisher.LIKELIHOODS)
        sampled_fisher.sample(self._sampled_layers("sample_fisher"), output, likelihood, generator)

    @contextmanager
    def fisher_pass(self) -> Iterator[None]:
        """Backward passes inside count for the factors, and leave every ``.grad`` as it is.

        For targets drawn by oneself: the loss has to be averaged like that of training, and not
        scaled. Keep the graph (``retain_graph=True``) if the training loss follows on it. Passes
        through the same outputs are draws, over which ``B`` is the mean, here and in later blocks.

        Raises:
            ValueError: If ``fisher_type`` is not ``"mc"``.
        """
        sampled = self._sampled_layers("fisher_pass")
        params = [param for group in self.param_groups for param in group["params"]]
        listeners = [layer.statistics.listening() for layer in sampled]
        with sampled_fisher.listening(listeners), sampled_fisher.kept_gradients(params):
            yield

    def _sampled_layers(self, caller: str) -> list[CapturedLayer]:
        """Layers whose output factor is that of drawn targets, and due."""
        sampled = [layer for layer in self._registry.layers if layer.statistics.explicit_passes]
        if not sampled:
            raise ValueError(
                f"fisher_type: got {self.defaults['fisher_type']!r}, but {caller}() is for 'mc'."
            )
        return [layer for layer in sampled if layer.statistics.enabled]
