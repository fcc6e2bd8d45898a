"""Sorting parameters into captured layers and those that the fallback trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from tnkfac.curvature import Owner, Statistics, Tap, attach, describe
from tnkfac.optim.shards import fully_sharded, is_distributed

if TYPE_CHECKING:
    from tnkfac.optim.scaling import Scaling


@dataclass
class CapturedLayer:
    """A weight, perhaps with its bias, whose curvature is captured.

    Attributes:
        name: Qualified name of the first module that owns the weight.
        kind: Type name of that module.
        weight: The weight.
        bias: The bias, if it is trained with the weight.
        statistics: What the taps of its modules measure.
        last_update: Step of the last factor update, or -1.
        last_inverse: Step of the last decomposition, or -1.
        scaling: What an optimizer has derived from the state to precondition with, if anything.
        removers: Callables that remove the taps.
    """

    name: str
    kind: str
    weight: Tensor
    bias: Tensor | None
    statistics: Statistics
    last_update: int = -1
    last_inverse: int = -1
    scaling: Scaling | None = None
    removers: list[Callable[[], Any]] = field(default_factory=list)

    def params(self) -> list[Tensor]:
        """Weight, and bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def named(self) -> list[tuple[str, Tensor]]:
        """Its parameters with their qualified names."""
        prefix = f"{self.name}." if self.name else ""
        return [
            (prefix + name, p) for name, p in zip(("weight", "bias"), self.params(), strict=False)
        ]

    def close(self) -> None:
        """Remove the taps and what they have collected."""
        for remove in self.removers:
            remove()
        self.removers.clear()
        self.statistics.clear()


@dataclass
class Uncaptured:
    """A parameter that the fallback trains.

    Attributes:
        name: Qualified name, or ``param_<i>``.
        kind: Type name of the module that owns it, or empty.
        param: The parameter.
        reason: Why it has no Kronecker-factored curvature.
    """

    name: str
    kind: str
    param: Tensor
    reason: str


def sort(
    owner: object,
    params: list[Tensor],
    owners: dict[int, list[Owner]],
    group_of: Callable[[Tensor], dict[str, Any]],
    known: Iterable[int] = (),
) -> tuple[list[CapturedLayer], list[Uncaptured]]:
    """Find the layers among parameters, and put taps on their modules.

    Args:
        owner: The taps live as long as this object.
        params: All parameters, in the order of the parameter groups.
        owners: Modules that own them, by ``id`` of the parameter, in module order.
        group_of: The parameter group of a parameter.
        known: ``id`` of parameters that were sorted before.

    Returns:
        Captured layers in module order, and the other parameters in the order of the groups.
    """
    by_id = {id(param): param for param in params}
    done = set(known)
    layers: list[CapturedLayer] = []
    rest: list[Uncaptured] = []
    reasons: dict[int, str] = {}
    sharded = fully_sharded(params)
    for key, found in owners.items():
        weight = by_id.get(key)
        if weight is None or key in done or all(o.attribute == "bias" for o in found):
            continue
        if group_of(weight).get("capture_embeddings"):
            found = _with_embeddings(found)
        reason = _refusal(weight, found, sharded) or _skipped(found, group_of(weight))
        if reason is not None:
            reasons[key] = reason
            continue
        bias, why = _joint_bias(weight, found, by_id, done)
        layers.append(_capture(owner, weight, bias, found, group_of(weight)))
        done |= {id(param) for param in layers[-1].params()}
        for entry in found:
            other = entry.module._parameters.get("bias")
            if other is not None and other is not bias:
                reasons[id(other)] = why
    for index, param in enumerate(params):
        if id(param) in done:
            continue
        found = owners.get(id(param), [])
        if not found:
            reason = "no module that owns it was found"
            rest.append(Uncaptured(f"param_{index}", "", param, reason))
            continue
        reason = (
            reasons.get(id(param))
            or _refusal(param, found, sharded)
            or "its weight is not captured"
        )
        first = found[0]
        rest.append(Uncaptured(first.parameter_name, type(first.module).__name__, param, reason))
    parallel = [u.name for u in rest if is_distributed(u.param) and id(u.param) not in sharded]
    if parallel:
        warnings.warn(
            f"{', '.join(parallel)}: trained without curvature, because processes hold parts of "
            "them in the forward pass, too (tensor parallelism). Supported: fully_shard.",
            stacklevel=2,
        )
    return layers, rest


def _capture(
    owner: object,
    weight: Tensor,
    bias: Tensor | None,
    found: list[Owner],
    group: dict[str, Any],
) -> CapturedLayer:
    fisher = group.get("fisher_type", "empirical")
    statistics = Statistics(
        group["kfac_approx"],
        group["structures"],
        bias is not None,
        group["loss_average"],
        outputs=fisher != "forward-only",
        squares=group.get("compute_method") == "ekfac",
        chosen_passes=fisher == "mc",
    )
    first = next(entry for entry in found if entry.refusal is None)
    layer = CapturedLayer(first.name, type(first.module).__name__, weight, bias, statistics)
    for entry in found:
        if entry.attribute == "weight" and entry.refusal is None:
            layer.removers.append(attach(owner, entry.module, Tap(statistics, weight)))
    return layer


def _joint_bias(
    weight: Tensor, found: list[Owner], by_id: dict[int, Tensor], done: set[int]
) -> tuple[Tensor | None, str]:
    """The bias that is trained together with the weight, or why there is none."""
    biases = [o.module._parameters.get("bias") for o in found if o.refusal is None]
    bias = biases[0]
    if bias is None:
        return None, ""
    if any(other is not bias for other in biases):
        return None, "its weight is shared by layers with other biases"
    if not weight.requires_grad:
        return None, "its weight is frozen"
    if not bias.requires_grad:
        return None, "it was frozen when the optimizer was built"
    if id(bias) not in by_id or id(bias) in done:
        return None, "it is not trained together with its weight"
    return bias, ""


def _with_embeddings(found: list[Owner]) -> list[Owner]:
    """Owners of which embeddings are supported, unless they share the weight with another layer."""
    if any(entry.refusal is None for entry in found):
        return found
    return [replace(entry, indices=True) for entry in found]


def _skipped(found: list[Owner], group: dict[str, Any]) -> str | None:
    """Why the group's ``skip_layers`` leaves a layer out, if it does."""
    for skip in group.get("skip_layers", ()):
        for owner in found:
            if skip in (owner.name, owner.parameter_name, type(owner.module).__name__):
                return f"skip_layers names {skip}"
    return None


def _refusal(weight: Tensor, found: list[Owner], sharded: set[int]) -> str | None:
    """Why a parameter with these owners is not the weight of a captured layer, if so.

    Args:
        weight: The parameter.
        found: Its owners.
        sharded: ``id`` of the parameters that are cut, but whole in the forward pass.
    """
    supported = [owner for owner in found if owner.refusal is None]
    if not supported:
        return found[0].refusal
    if any(owner.attribute != "weight" for owner in supported):
        return f"it is the {supported[0].attribute} of {type(supported[0].module).__name__}"
    if is_distributed(weight) and id(weight) not in sharded:
        return "it is distributed, also in the forward pass"
    if not weight.is_floating_point():
        return f"{weight.dtype} is not supported"
    if is_lazy(weight):
        return None
    first = describe(supported[0].module)
    if first.weight_shape != tuple(weight.shape):
        return f"its shape {tuple(weight.shape)} is not that of the layer"
    for entry in supported[1:]:
        if describe(entry.module).weight_layout != first.weight_layout:
            return "layers of different kinds share it"
    return None
