"""Weights that are captured by the calls that use them: which these are, and their layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from tnkfac.curvature.capture.batch import BatchSize
from tnkfac.curvature.capture.owners import Owner
from tnkfac.curvature.capture.statistics import Statistics
from tnkfac.curvature.layers import LAYERS
from tnkfac.curvature.layers.linear import InputsFirstLinear, Linear
from tnkfac.curvature.uses.blocks import Block, Span, covers
from tnkfac.curvature.uses.matching import Declare
from tnkfac.curvature.uses.mode import Uses
from tnkfac.curvature.uses.scopes import TRACEABLE, Scope
from tnkfac.curvature.uses.slots import BiasSlot, Slot, Weight
from tnkfac.optim.options import Group
from tnkfac.optim.params.captured import CapturedLayer, Needs, Uncaptured
from tnkfac.optim.params.history import begun_by_fallback, has_row_for_bias
from tnkfac.optim.params.parts import home, origin, part_of

_UNWATCHED = (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, ParametrizationList)
"""Modules whose weights are looked up, multiplied inside of fused kernels, or not as they are."""
LOOKED_FOR = "looked for in the calls of"
"""How the reason begins of a parameter whose uses are not known yet."""
PROMISED = "promised by its"
"""How the reason begins of a parameter of a module whose type tells how it is used."""
BYPASSED = "not called itself (but, for example, its forward)" + (
    "" if TRACEABLE else ", or ran compiled, where such calls are seen from torch 2.14 on"
)
"""How a module gives a gradient to a parameter although its hooks do not run."""
NOT_COVERED = "used in parts that are not all of it"
BIAS_NOT_COVERED = "used with a part of a bias whose other parts belong to no call"


@dataclass(eq=False)
class Watched:
    """A parameter that is captured by its uses.

    Attributes:
        weight: What is known of its uses.
        param: The parameter.
        owner: The first module that holds it.
        entries: All of them.
        overlooked: Whether it got a gradient though no call of its user could be looked at.
    """

    weight: Weight
    param: Tensor
    owner: Owner
    entries: list[Owner]
    overlooked: bool = False

    @classmethod
    def by(cls, param: Tensor, entries: list[Owner]) -> Watched:
        """A parameter, and the modules that hold it."""
        first = next((owner for owner in entries if owner.runs), entries[0])
        owners = [(weakref.ref(owner.module), owner.attribute) for owner in entries]
        weight = Weight(first.parameter_name, tuple(param.shape), owners)
        return cls(weight, param, first, entries)

    @property
    def looked_for(self) -> str:
        """Where calls are looked at that may use it."""
        return f"{LOOKED_FOR} {self._user}"

    @property
    def overlooked_where(self) -> str:
        """Why no call could be looked at that has given it a gradient."""
        return f"{self.looked_for}, which was {self.weight.event or BYPASSED}"

    @property
    def promised(self) -> str:
        """Which module says how it will be used."""
        return f"{PROMISED} {self._user}"

    @property
    def _user(self) -> str:
        owner = self.owner
        return type(owner.enclosing if owner.reader is None else owner.reader).__name__


def is_watchable(param: Tensor, entries: Sequence[Owner]) -> bool:
    """Whether a parameter may be a matrix that calls multiply with.

    Args:
        param: The parameter.
        entries: Modules that own it.
    """
    if is_lazy(param) or not param.is_floating_point() or not param.numel():
        return False
    is_matrix = sum(size > 1 for size in param.shape) > 1
    if not is_matrix and not all(map(_of_known_kind, entries)):  # a scale, or a class token
        return False
    return all(
        owner.enclosing is not None and not isinstance(owner.module, _UNWATCHED)
        for owner in entries
    )


def _of_known_kind(owner: Owner) -> bool:
    """Whether a parameter is the weight of a supported layer, or of a subclass of one."""
    known = (kind for kind, layer in LAYERS.items() if not layer.reads_indices)
    return owner.attribute == "weight" and isinstance(owner.module, tuple(known))


def expected_slots(watched: Watched) -> list[Slot]:
    """Slots that are known before any call, which a compiled graph needs."""
    module, attribute = watched.owner.module, watched.owner.attribute
    shape = tuple(watched.param.shape)
    if isinstance(module, nn.MultiheadAttention):
        return _of_attention(module, attribute)
    bias = _bias_slot(module, "bias", None) if _one_bias(watched.entries) else None
    if type(module).__name__ == "Conv1D" and len(shape) == 2:  # of transformers
        return [Slot(None, False, InputsFirstLinear(*shape, bias is not None, 1), bias)]
    kind = next((LAYERS[kind] for kind in type(module).__mro__ if kind in LAYERS), None)
    if kind is None or attribute != "weight" or kind.reads_indices:
        return []
    layer = kind.of(module)
    if layer.weight_shape != shape:
        return []
    layer = replace(layer, bias=bias is not None)
    return [Slot(None, not layer.inputs_first, layer, bias)]


def _one_bias(entries: Sequence[Owner]) -> bool:
    """Whether modules that share a weight have the same bias, or none."""
    biases = {id(entry.module._parameters.get("bias")) for entry in entries}
    return len(biases) == 1


def _of_attention(module: nn.MultiheadAttention, attribute: str) -> list[Slot]:
    """Queries, keys and values as matrices of their own, packed or not."""
    size = module.embed_dim
    if attribute == "in_proj_weight":
        spans = [Span(i * size, size) for i in range(3)]
        blocks = [Block(i * size * size, size, size, size) for i in range(3)]
        biases = [_bias_slot(module, "in_proj_bias", span) for span in spans]
        layer = Linear(size, size, biases[0] is not None, 1)
        return [Slot(b, True, layer, s) for b, s in zip(blocks, biases, strict=True)]
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    if attribute not in names:
        return []
    bias = _bias_slot(module, "in_proj_bias", Span(names.index(attribute) * size, size))
    param = module._parameters[attribute]
    assert param is not None
    return [Slot(None, True, Linear(param.shape[1], size, bias is not None, 1), bias)]


def _bias_slot(module: nn.Module, attribute: str, span: Span | None) -> BiasSlot | None:
    bias = module._parameters.get(attribute)
    return None if bias is None else BiasSlot(weakref.ref(module), attribute, span)


class Watching:
    """The parameters of an optimizer that are captured by their uses.

    Attributes:
        uses: Who looks at the calls; None before the first such parameter.
    """

    def __init__(self) -> None:
        """There are none."""
        self.uses: Uses | None = None
        self._watched: dict[int, Watched] = {}
        self._scopes: list[Scope] = []
        self._places: dict[tuple[int, str], Tensor] = {}

    def __contains__(self, param: Tensor) -> bool:
        """Whether a parameter is looked for."""
        return id(param) in self._watched

    def is_settled(self, param: Tensor) -> bool:
        """Whether it is known how a parameter is used."""
        return id(param) not in self._watched or self._watched[id(param)].weight.settled

    def awaits(self, param: Tensor) -> bool:
        """Whether a parameter is looked for, or may be the bias of one whose uses are not seen."""
        if param in self:
            return True
        if param.ndim != 1:
            return False
        modules = (
            entry.module
            for watched in self._watched.values()
            if not (watched.weight.settled or watched.weight.refused)
            for entry in watched.entries
        )
        return any(
            self._places.get((id(module), attribute)) is param
            for module in modules
            for attribute, own in module._parameters.items()
            if own is not None and own.ndim == 1
        )

    def of(self, weight: Weight) -> Watched:
        """The parameter that a weight is."""
        return next(w for w in self._watched.values() if w.weight is weight)

    def slots(self) -> Iterator[Slot]:
        """Slots of all of them."""
        for watched in self._watched.values():
            yield from watched.weight.slots

    def locate(self, owners: Mapping[int, Iterable[Owner]], params: Iterable[Tensor]) -> None:
        """Remember which module holds which parameter, also where passes replace it.

        Args:
            owners: Modules that own parameters, by ``id`` of the parameter.
            params: The parameters.
        """
        for param in params:
            for owner in owners.get(id(param), ()):
                self._places[id(owner.module), owner.attribute] = param

    def watch(
        self, owner: object, found: Sequence[Watched], declare: Declare, batch: BatchSize
    ) -> None:
        """Look at the calls of the modules that may use some parameters.

        Args:
            owner: The optimizer; hooks live as long as it does.
            found: The parameters.
            declare: Takes up the slots that calls are seen to use.
            batch: How many samples a pass has.
        """
        if not found:
            return
        self.uses = self.uses or Uses(declare, batch)
        by_module: dict[int, tuple[nn.Module, list[Weight]]] = {}
        for watched in found:
            self._watched[id(watched.param)] = watched
            for entry in watched.entries:
                for module in (entry.enclosing, entry.reader):
                    if module is not None:
                        weights = by_module.setdefault(id(module), (module, []))[1]
                        if watched.weight not in weights:
                            weights.append(watched.weight)
        for module, weights in by_module.values():
            scope = Scope(self.uses, weights)
            scope.hook(owner, module)
            self._scopes.append(scope)

    def layers_of(
        self,
        weight: Weight,
        slots: Sequence[Slot],
        group_of: Mapping[int, Group],
        needs: Callable[[Group], Needs],
        joint: Callable[[Tensor, Tensor, Slot], bool],
    ) -> list[CapturedLayer]:
        """Layers for new slots, which are given statistics.

        Args:
            weight: Whose slots they are.
            slots: The slots.
            group_of: Group by ``id`` of the parameter.
            needs: What is to be measured of the layers of a group.
            joint: Whether a bias can be trained together with a weight.
        """
        watched = self.of(weight)
        return [self._layer(watched, slot, group_of, needs, joint) for slot in slots]

    def _layer(
        self,
        watched: Watched,
        slot: Slot,
        group_of: Mapping[int, Group],
        needs: Callable[[Group], Needs],
        joint: Callable[[Tensor, Tensor, Slot], bool],
    ) -> CapturedLayer:
        param, bias = watched.param, None
        group = group_of[id(param)]
        if slot.bias is not None:
            module, span = slot.bias.module(), slot.bias.span
            bias = self._places.get((id(module), slot.bias.attribute))
            if bias is None or not joint(param, bias, slot):
                slot.bias, bias = None, None
                slot.layer = replace(slot.layer, bias=False)
            elif span is not None:
                bias = part_of(bias, span)
        tensor = param
        if slot.block is not None:
            tensor = part_of(param, slot.block, idle=slot.is_entry(watched.weight))
        measured = needs(group)
        statistics = Statistics(
            group["kfac_approx"],
            group["structures"],
            bias is not None,
            group["loss_average"],
            outputs=measured.outputs,
            squares=measured.squares,
            explicit_passes=measured.explicit_passes,
            params=[param] if bias is None else [param, home(bias)],
        )
        statistics.last_event = watched.promised
        statistics.bind_to(slot.layer)
        statistics.leaves(param)
        slot.statistics = statistics
        module = watched.owner.module
        labels = _labelled(watched.owner.attribute, tensor), ""
        if bias is not None and slot.bias is not None:
            labels = labels[0], _labelled(slot.bias.attribute, bias)
        groups = group, group if bias is None else group_of[id(home(bias))]
        name, kind = watched.owner.name, type(module).__name__
        return CapturedLayer(name, kind, tensor, bias, *groups, measured, statistics, labels)

    # ---------------------------------------------------------------- after passes

    def settle(
        self,
        layers: Sequence[CapturedLayer],
        others: Iterable[Uncaptured],
        tied: Callable[[Tensor], bool],
    ) -> tuple[list[Watched], bool]:
        """See how the parameters were used that passes have given a gradient.

        Args:
            layers: All layers.
            others: Parameters that the fallback trains.
            tied: Whether a parameter is captured that is used in other ways, too.

        Returns:
            Those that no call was seen to use, which are looked for no more, and whether anything
            is known that was not before.
        """
        lost, news = [], False
        for watched in [*self._watched.values()]:
            weight, param = watched.weight, watched.param
            looked, weight.looked_at = weight.looked_at, False
            watched.overlooked = not (looked or weight.slots or param.grad is None)
            if weight.settled or param.grad is None or not looked:
                continue
            news = True
            seen = weight.seen or any(slot.statistics.pending for slot in weight.slots)
            if not weight.slots or not seen:
                weight.refuse(weight.refused or weight.event or weight.unused())
                lost.append(watched)
                continue
            weight.settled = True
            for slot in weight.slots:
                slot.measured = True
            if weight.functions and not tied(param):
                weight.refuse(weight.used_otherwise())
            if not weight.refused:
                self._check_cover(watched, layers)
        if lost:
            gone = {id(watched.weight) for watched in lost}
            self._watched = {
                key: watched
                for key, watched in self._watched.items()
                if id(watched.weight) not in gone
            }
            self._prune()
        reasons = {id(watched.param): watched.weight.refused for watched in lost}
        reasons |= {id(watched.param): watched.overlooked_where for watched in self.overlooked()}
        for uncaptured in others:
            uncaptured.reason = reasons.get(id(uncaptured.param), uncaptured.reason)
        return lost, news

    def count_turns(self) -> None:
        """Count passes that had no rows for some matrices of a stack."""
        for watched in self._watched.values():
            watched.weight.count_turns()

    def overlooked(self) -> list[Watched]:
        """Parameters whose gradients come from calls that could not be looked at."""
        return [watched for watched in self._watched.values() if watched.overlooked]

    def _check_cover(self, watched: Watched, layers: Sequence[CapturedLayer]) -> None:
        """Refuse a parameter of which known calls use only a part, or of whose bias."""
        weight = watched.weight
        blocks = [slot.block for slot in weight.slots if slot.block is not None]
        if blocks and not covers(blocks, watched.param.numel()):
            weight.refuse(NOT_COVERED)
            return
        mine = {id(slot.statistics) for slot in weight.slots}
        biases = {
            id(part.param): part.param
            for layer in layers
            if id(layer.statistics) in mine and layer.bias is not None
            if (part := origin(layer.bias)) is not None
        }
        for key, bias in biases.items():
            spans = [
                part.block
                for layer in layers
                if layer.bias is not None
                and (part := origin(layer.bias)) is not None
                and id(part.param) == key
            ]
            if not covers(spans, bias.numel()):
                weight.refuse(BIAS_NOT_COVERED)

    def forget(self, params: Iterable[Tensor]) -> None:
        """Look for some parameters no more."""
        for param in params:
            self._watched.pop(id(param), None)
        self._prune()

    def _prune(self) -> None:
        """Remove the hooks of modules in which nothing is left to look for."""
        wanted = {id(watched.weight) for watched in self._watched.values()}
        for scope in self._scopes:
            scope.weights = [weight for weight in scope.weights if id(weight) in wanted]
            if not scope.weights:
                scope.remove()
        self._scopes = [scope for scope in self._scopes if scope.weights]

    def close(self) -> None:
        """Remove all hooks."""
        for scope in self._scopes:
            scope.remove()
        self._scopes, self._watched, self.uses = [], {}, None


def _labelled(attribute: str, tensor: Tensor) -> str:
    part = origin(tensor)
    return attribute if part is None else attribute + part.label


def accepts_bias(
    weight: Tensor,
    bias: Tensor,
    state: Mapping[Tensor, Mapping[str, Any]],
    group: Group | None,
    taken: Mapping[int, list[Span]],
    slot: Slot,
) -> bool:
    """Whether a bias can be trained together with a weight.

    Args:
        weight: The weight.
        bias: The bias.
        state: State of the optimizer.
        group: Group of the bias, None if it has none.
        taken: Spans of biases that layers have, by ``id``; an empty list for all of it.
        slot: The matrix, with the bias.
    """
    if group is None or not (weight.requires_grad and bias.requires_grad):
        return False
    if begun_by_fallback(state.get(bias, {}), group) and not _has_row(weight, state, group, slot):
        return False
    assert slot.bias is not None
    span = slot.bias.span
    if id(bias) not in taken:
        return True
    ends = [(s.offset, s.offset + s.numel) for s in taken[id(bias)]]
    if span is None or not ends:
        return False
    return all(span.offset >= end or span.offset + span.numel <= first for first, end in ends)


def _has_row(
    weight: Tensor, state: Mapping[Tensor, Mapping[str, Any]], group: Group, slot: Slot
) -> bool:
    """Whether the factors of a slot in a state that was loaded have a row for its bias."""
    own = state.get(weight, {})
    if slot.block is not None:
        own = own.get(slot.block.label(tuple(weight.shape)), {})
    return "last_update" in own and bool(has_row_for_bias(own, slot.layer, group))
