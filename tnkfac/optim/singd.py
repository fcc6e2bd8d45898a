"""SINGD: structured inverse-free natural gradient descent (arXiv 2312.05705)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from tnkfac.curvature.callers import warn
from tnkfac.optim.base import CurvatureOptimizer
from tnkfac.optim.options import Group, Params
from tnkfac.optim.rules.singd_rule import SingdRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DTypes = torch.dtype | str | None


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
        T: Steps between updates of the preconditioner, a callable of the step, or ``"auto"``: 1
            for ten steps, 2 up to step 20, 5 up to step 50, then 10.
        loss_average: What the loss is averaged over: ``"batch"``, ``"batch+sequence"`` (every
            position too), None for a sum, or a callable ``(module, output_shape) -> terms``.
        lr_cov: Step size of the preconditioner, or a callable of the step.
        structures: ``"dense"``, ``"diagonal"``, ``"block{k}diagonal"``,
            ``"hierarchical{k1}_{k2}"``, ``"triltoeplitz"``, ``"triutoeplitz"``,
            ``"triltopleftdiag"``, ``"trilbottomrightdiag"``, ``"triutopleftdiag"``,
            ``"triubottomrightdiag"``, or ``"auto"`` (blocks of 64 rows, or fewer within
            ``max_state_ratio``), for both factors or as a pair (input, output).
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
        max_state_ratio: With ``structures="auto"``, bound on the state relative to AdamW's,
            including the squares of ``K`` and ``C`` that are kept between updates, but not what
            ``grafting="adam"`` adds. ``"auto"`` is 1.0, with at least 16 MiB for small models. None
            is for larger factors: input factors dense up to 1,024 rows, output factors up to 128,
            blocks of 128 above.
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

    rule = SingdRule()

    REFERENCE: ClassVar[Group] = {
        "structures": ("dense", "dense"),
        "momentum": 0.9,
        "damping": 1e-3,
        "alpha1": 0.5,
        "lr_cov": 1e-2,
        "init": "identity",
        "grafting": None,
        "decoupled_weight_decay": False,
    }
    """Keyword arguments under which the algorithm of the paper is followed to the letter."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.7,
        damping: float | None = None,
        alpha1: float = 0.0,
        weight_decay: float = 0.0,
        T: int | str | Callable[[int], int] = 10,
        loss_average: str | Callable[..., float] | None = "batch",
        lr_cov: float | Callable[[int], float] = 0.4,
        structures: str | tuple[str, str] = "auto",
        kfac_approx: str = "expand",
        kfac_like: bool = False,
        normalize_lr_cov: bool = False,
        preconditioner_dtype: DTypes | tuple[DTypes, DTypes] = None,
        *,
        init: str = "first_batch",
        grafting: str | float | None = 1.0,
        decoupled_weight_decay: bool = True,
        kl_clip: float | None = None,
        fallback: str = "adamw",
        fallback_options: Mapping[str, object] | None = None,
        grad_scaler: GradScaler | None = None,
        grad_worker_fraction: float = 1.0,
        max_state_ratio: float | str | None = "auto",
        max_step_ratio: float | None = None,
        relative_damping: float = 0.03,
        process_group: ProcessGroup | str | None = "auto",
        skip_layers: Sequence[str] = (),
        capture_tied: bool = False,
        capture_embeddings: bool = False,
    ) -> None:
        """See the class."""
        arguments = locals()
        if kfac_like and alpha1 != 0:
            warn(f"alpha1={alpha1} has no effect with kfac_like=True.")
        given = {name: arguments[name] for name in self.rule.options if name in arguments}
        super().__init__(
            params,
            grad_scaler=grad_scaler,
            process_group=process_group,
            fallback_options=fallback_options,
            **given,
        )
