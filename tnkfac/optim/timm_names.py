"""Names for timm's factory of optimizers."""

from __future__ import annotations

from tnkfac.optim.kfac import KFAC
from tnkfac.optim.singd import SINGD


def register_timm() -> None:
    """Have ``timm.optim.create_optimizer_v2`` know ``"singd"`` and ``"kfac"``.

    timm passes ``momentum=0.9`` unless it is told another one. Every other argument of the two goes
    through as it is, as in ``create_optimizer_v2(model, "singd", lr=1e-3, structures="diagonal")``,
    or ``--opt singd --opt-kwargs structures=diagonal`` for timm's training script.

    Raises:
        ImportError: Without timm 1.0.12 or newer.

    Example:
        >>> import timm, torch
        >>> model = torch.nn.Linear(4, 3)
        >>> register_timm()
        >>> optimizer = timm.optim.create_optimizer_v2(model, "kfac", structures="diagonal")
        >>> type(optimizer).__name__
        'KFAC'
    """
    try:
        from timm.optim._optim_factory import OptimInfo, default_registry
    except ImportError as error:
        raise ImportError("register_timm needs timm: pip install 'timm>=1.0.12'.") from error
    for cls, description in (
        (SINGD, "Inverse-free natural gradient descent, curvature from tensor networks"),
        (KFAC, "Kronecker-factored approximate curvature, factors from tensor networks"),
    ):
        default_registry.register(
            OptimInfo(
                name=cls.__name__.lower(),
                opt_class=cls,
                description=description,
                has_eps=False,
                has_momentum=True,
                second_order=False,  # for timm that is whether the graph of gradients is needed
            )
        )
