"""History of a parameter as its state tells it: trained by the fallback, or in a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from tnkfac.curvature.layers import Layer
from tnkfac.optim.options import Group
from tnkfac.optim.params.auto_structure import matching

State = Mapping[str, Tensor]


def begun_by_fallback(state: State, group: Group) -> bool:
    """Whether the state of a weight is one that the fallback has made.

    Args:
        state: State of the weight; that of a layer may have lost its curvature.
        group: Its group.
    """
    if not state or "last_update" in state or any(key.endswith("]") for key in state):
        return False  # parts have their states under their labels
    return group["fallback"] == "sgd" or "exp_avg" in state


def begun_in_layer(state: State, group: Group) -> bool:
    """Whether the state of a parameter is surely one of a captured layer.

    The momentum of a bias there is no other than that of the fallback's SGD. Parts of a parameter
    have states of their own in it.
    """
    if "last_update" in state or any(isinstance(value, dict) for value in state.values()):
        return True
    return "momentum_buffer" in state and "exp_avg" not in state and group["fallback"] == "adamw"


def has_row_for_bias(state: State, layer: Layer, group: Group) -> bool | None:
    """Whether the factors in the state of a weight have a row for the bias.

    Args:
        state: State of the weight.
        layer: What kind of layer it is, of whose bias nothing is asked.
        group: Group of the weight.

    Returns:
        None if there are no factors, or none of these structures.
    """
    shapes = [
        tuple(value.shape)
        for names in ("KA", "CB")
        for key, value in state.items()
        if key.split(".")[0] in tuple(names)
    ]
    both = [replace(layer, bias=bias) for bias in (True, False)] if shapes else []
    fits = [each.bias for each in both if matching(each, group["structures"], shapes)]
    return fits[0] if len(fits) == 1 else None
