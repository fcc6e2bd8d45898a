"""Sorting parameters into captured layers and those that the fallback trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tnkfac.curvature.callers import warn
from tnkfac.curvature.capture.batch import BatchSize
from tnkfac.curvature.capture.owners import Owner
from tnkfac.curvature.capture.statistics import Statistics
from tnkfac.curvature.capture.tap import Tap, attach
from tnkfac.curvature.layers import describe
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer, Needs, Uncaptured
from tnkfac.optim.params.history import begun_by_fallback, begun_in_layer, has_row_for_bias
from tnkfac.optim.params.sharding import fully_sharded, is_distributed
from tnkfac.optim.params.skipping import skipped
from tnkfac.optim.params.watching import Watched, is_watchable


class Sorting:
    """Parameters that are sorted into captured layers and those that the fallback trains."""

    def __init__(
        self,
        params: list[Tensor],
        owners: dict[int, list[Owner]],
        group_of: Callable[[Tensor], Group],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        needs: Callable[[Group], Needs],
        known: Iterable[int] = (),
        before: Mapping[int, str] = MappingProxyType({}),
        batch: BatchSize | None = None,
    ) -> None:
        """Nothing is sorted yet.

        Args:
            params: All parameters, in the order of the parameter groups.
            owners: Modules that own them, by ``id`` of the parameter, in module order.
            group_of: The parameter group of a parameter.
            state: State of the optimizer: what the fallback has begun to train, it goes on with.
            needs: What is to be measured of the layers of a group.
            known: ``id`` of parameters of layers that were captured before.
            before: Reasons that all other parameters had before, by ``id``.
            batch: How many samples a pass has.
        """
        self._params, self._owners, self._group_of = params, owners, group_of
        self._state, self._needs, self._before = state, needs, before
        self._batch = batch or BatchSize()
        self._by_id = {id(param): param for param in params}
        self._captured_before = set(known)
        self._done = set(known)
        self._reasons: dict[int, str] = {}
        self._sharded = fully_sharded(params)
        self.watched: list[Watched] = []

    def layers(self, owner: object) -> list[CapturedLayer]:
        """Find layers in module order, and put taps on their modules.

        Args:
            owner: The taps live as long as this object.
        """
        layers = []
        for key, entries in self._owners.items():
            weight = self._by_id.get(key)
            if weight is None or key in self._done or all(o.attribute == "bias" for o in entries):
                continue
            group = self._group_of(weight)
            if group["capture_embeddings"]:
                entries = _with_embeddings(entries)
            refusal = _refusal(weight, entries, self._sharded, group)
            reason = skipped(entries, group)
            if reason is None and begun_by_fallback(self._state.get(weight, {}), group):
                reason = _BEGUN
            if refusal is not None or reason is not None:
                self._reasons[key] = refusal or reason or ""
                if reason is None and self._may_be_used(weight, entries):
                    self._watch(weight, entries)
                continue
            bias, why = self._joint_bias(weight, entries)
            groups = group, group if bias is None else self._group_of(bias)
            layers.append(self._capture(owner, weight, bias, entries, groups))
            self._done |= {id(param) for param in layers[-1].params()}
            for entry in entries:
                other_bias = entry.module._parameters.get("bias")
                if other_bias is not None and other_bias is not bias:
                    self._reasons[id(other_bias)] = why
        return layers

    def _capture(
        self,
        owner: object,
        weight: Tensor,
        bias: Tensor | None,
        entries: list[Owner],
        groups: tuple[Group, Group],
    ) -> CapturedLayer:
        """The layer of a weight, with taps on its modules."""
        group, needs = groups[0], self._needs(groups[0])
        statistics = Statistics(
            group["kfac_approx"],
            group["structures"],
            bias is not None,
            group["loss_average"],
            outputs=needs.outputs,
            squares=needs.squares,
            explicit_passes=needs.explicit_passes,
            params=[weight] if bias is None else [weight, bias],
        )
        first = next(entry for entry in entries if entry.refusal is None)
        kind = type(first.module).__name__
        layer = CapturedLayer(first.name, kind, weight, bias, *groups, needs, statistics)
        for entry in entries:
            if entry.attribute == "weight" and entry.refusal is None:
                layer.removers.append(
                    attach(owner, entry.module, Tap(statistics, weight, self._batch))
                )
        return layer

    def _may_be_used(self, weight: Tensor, entries: list[Owner]) -> bool:
        """Whether calls may use a weight that is that of no supported layer."""
        if is_distributed(weight) and id(weight) not in self._sharded:
            return False
        supported = [owner for owner in entries if owner.refusal is None]
        return len(supported) < len(entries) and is_watchable(weight, entries)

    def _watch(self, weight: Tensor, entries: list[Owner]) -> None:
        watched = Watched.by(weight, entries)
        self.watched.append(watched)
        self._reasons[id(weight)] = watched.looked_for

    def others(self) -> list[Uncaptured]:
        """All other parameters in the order of the groups, once layers were found."""
        others = [
            self._uncaptured(index, param)
            for index, param in enumerate(self._params)
            if id(param) not in self._done
        ]
        parallel = [
            other.name
            for other in others
            if is_distributed(other.param) and id(other.param) not in self._sharded
        ]
        if parallel:
            warn(
                f"{', '.join(parallel)}: trained without curvature, because processes hold parts "
                "of them in the forward pass, too (tensor parallelism). Supported: fully_shard."
            )
        return others

    def _uncaptured(self, index: int, param: Tensor) -> Uncaptured:
        entries, group = self._owners.get(id(param), []), self._group_of(param)
        if not entries:
            reason = "no module that owns it was found"
            return Uncaptured(f"param_{index}", "", param, group, reason)
        first = entries[0]
        if id(first.module._parameters.get("weight")) in self._captured_before:
            reason = self._before.get(id(param), "it was added after its weight")
        else:
            lonely = _lonely(first, self._by_id, self._reasons)
            reason = self._reasons.get(id(param)) or lonely
        return Uncaptured(first.parameter_name, type(first.module).__name__, param, group, reason)

    def _joint_bias(self, weight: Tensor, entries: list[Owner]) -> tuple[Tensor | None, str]:
        """The bias that is trained together with the weight, or why there is none."""
        biases = [o.module._parameters.get("bias") for o in entries if o.refusal is None]
        bias = biases[0]
        if any(other_bias is not bias for other_bias in biases):
            return None, "its weight is shared by layers with other biases"
        if bias is None:
            return None, ""
        if id(bias) not in self._by_id or id(bias) in self._done:
            if not (weight.requires_grad and bias.requires_grad):
                return None, _frozen(weight)
            return None, "it is not trained together with its weight"
        bias_state = self._state.get(bias, {})
        if "exp_avg" in bias_state:
            return None, _BEGUN
        if not begun_in_layer(bias_state, self._group_of(bias)):
            module = next(entry.module for entry in entries if entry.refusal is None)
            row = _row_for_bias(self._state.get(weight), module, self._group_of(weight))
            if row is False:
                return None, "its weight was measured without it"
            if row is None and not (weight.requires_grad and bias.requires_grad):
                return None, _frozen(weight)
        why = skipped(self._owners[id(bias)], self._group_of(bias))
        return (bias, "") if why is None else (None, why)


_BEGUN = "the fallback had begun to train it before its layer was found"


def _row_for_bias(
    state: Mapping[str, Tensor] | None, module: nn.Module, group: Group
) -> bool | None:
    return has_row_for_bias(state, describe(module), group) if state else None


def _frozen(weight: Tensor) -> str:
    """Why a bias of which one is frozen is not trained together with its weight."""
    return (
        f"{'it' if weight.requires_grad else 'its weight'} was frozen when the optimizer was built"
    )


def _lonely(owner: Owner, by_id: dict[int, Tensor], reasons: dict[int, str]) -> str:
    """Why a parameter beside the weight of a module, such as its bias, has no curvature."""
    weight = owner.module._parameters.get("weight")
    if owner.refusal is not None:
        return owner.refusal
    if owner.attribute != "bias":
        return f"it is the {owner.attribute} of {type(owner.module).__name__}"
    if weight is None:
        return "its weight is not a parameter"
    if id(weight) not in by_id:
        return "its weight is in no parameter group"
    why = reasons.get(id(weight))
    return "its weight is not captured" + (f": {why}" if why else "")


def _with_embeddings(entries: list[Owner]) -> list[Owner]:
    """Owners of which embeddings are supported, unless they share the weight with another layer."""
    if any(entry.refusal is None for entry in entries):
        return entries
    return [replace(entry, indices=True) for entry in entries]


def _refusal(weight: Tensor, entries: list[Owner], sharded: set[int], group: Group) -> str | None:
    """Why a parameter with these owners is not the weight of a captured layer, if so.

    Args:
        weight: The parameter.
        entries: Its owners.
        sharded: ``id`` of the parameters that are cut, but whole in the forward pass.
        group: Its group.
    """
    supported = [owner for owner in entries if owner.refusal is None]
    if not supported:
        return entries[0].refusal
    if any(owner.attribute != "weight" for owner in supported):
        return f"it is the {supported[0].attribute} of {type(supported[0].module).__name__}"
    others = [owner for owner in entries if owner.refusal is not None and owner.runs]
    if others and not group.get("capture_tied", False):
        pair = others[0], supported[0]
        names = [f"{type(o.module).__name__} {o.name}".rstrip() for o in pair]
        return f"it is shared by {' and '.join(names)} (capture_tied is False)"
    if is_distributed(weight) and id(weight) not in sharded:
        return "it is distributed, also in the forward pass"
    if not weight.is_floating_point():
        return f"{weight.dtype} is not supported"
    if is_lazy(weight):
        return None
    if not weight.numel():
        return "it has no entries"
    first = describe(supported[0].module)
    if first.weight_shape != tuple(weight.shape):
        return f"its shape {tuple(weight.shape)} is not that of the layer"
    for entry in supported[1:]:
        if describe(entry.module).weight_layout != first.weight_layout:
            return "layers of different kinds share it"
    return None
