"""The layer table: what depends on the type of a module, and nothing else.

Every supported layer is a linear map with weight sharing, ``y_n = W U_n`` with ``U_n`` of shape
``[D, S]``: ``D`` features per row of ``W``, ``S`` positions that share the weight. A :class:`Layer`
says what the rows of its inputs and outputs are, how its parameters become the matrix ``[W | b]``,
and what the gradients of samples are. Everything else is the same for all layers.
"""

from torch import nn

from tnkfac.curvature.layers.convolution import Convolution, TransposedConvolution
from tnkfac.curvature.layers.embedding import Embedding
from tnkfac.curvature.layers.layer import Layer
from tnkfac.curvature.layers.linear import Linear
from tnkfac.curvature.layers.stock_forward import forward_of, leads_to

__all__ = ["LAYERS", "STOCK", "Layer", "describe", "is_wrapped", "layer_type"]

LAYERS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: Linear,
    nn.Conv1d: Convolution,
    nn.Conv2d: Convolution,
    nn.Conv3d: Convolution,
    nn.ConvTranspose1d: TransposedConvolution,
    nn.ConvTranspose2d: TransposedConvolution,
    nn.ConvTranspose3d: TransposedConvolution,
    nn.Embedding: Embedding,
}
"""Module type -> what is known of it. A new layer type is one class and one row."""


STOCK = {kind: kind.forward for kind in LAYERS}
"""The ``forward`` of the supported types as torch defines it, whoever replaces it later."""


def layer_type(module: nn.Module, indices: bool = False) -> type[nn.Module] | None:
    """The row of :data:`LAYERS` whose ``forward`` the module runs, or None.

    Subclasses count while they keep the stock ``forward``, and so do modules and classes whose
    ``forward`` is a wrapper that names it (``__wrapped__``); with another one, what multiplies the
    weight is unknown.

    Args:
        module: Any module.
        indices: Whether layers that read integers count.
    """
    for kind in type(module).__mro__:
        if kind in LAYERS:
            layer = LAYERS[kind]
            known = leads_to(forward_of(module), module, STOCK[kind]) and layer.accepts(module)
            return kind if known and (indices or not layer.reads_indices) else None
    return None


def is_wrapped(module: nn.Module) -> bool:
    """Whether a supported module runs its stock ``forward`` through somebody's wrapper."""
    kind = layer_type(module, indices=True)
    return kind is not None and forward_of(module) is not STOCK[kind]


def describe(module: nn.Module) -> Layer:
    """The :class:`Layer` of a module.

    Raises:
        TypeError: If the module is not one of the supported types with their own ``forward``.
    """
    kind = layer_type(module, indices=True)
    if kind is None:
        names = ", ".join(supported.__name__ for supported in LAYERS)
        raise TypeError(f"module: got {type(module).__name__}. Supported: {names}.")
    return LAYERS[kind].of(module)
