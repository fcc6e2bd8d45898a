"""Which parameters of an optimizer are trained how."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any

from torch import Tensor, nn

from tnkfac.curvature.capture.batch import BatchSize, hook_batch
from tnkfac.curvature.capture.owners import Owner, find_owners, root_of
from tnkfac.curvature.uses.blocks import Span
from tnkfac.curvature.uses.matching import Declare
from tnkfac.curvature.uses.slots import Slot, Weight
from tnkfac.optim.options import Group, Params
from tnkfac.optim.params.captured import CapturedLayer, Needs, Uncaptured
from tnkfac.optim.params.history import begun_by_fallback, begun_in_layer, has_row_for_bias
from tnkfac.optim.params.parts import Parts, home, origin
from tnkfac.optim.params.skipping import Unmatched
from tnkfac.optim.params.sorting import Sorting
from tnkfac.optim.params.watching import (
    Watched,
    Watching,
    accepts_bias,
    expected_slots,
    is_watchable,
)

_SPELLINGS = "an iterable of parameters, named parameters or parameter groups, a torch.nn.Module"


class Registry:
    """Captured layers, and the parameters that the fallback trains.

    Attributes:
        layers: Captured layers in module order.
        others: All other parameters in the order of the groups.
        parts: Weights and biases of layers that are parts of parameters.
        has_parts: Whether there are any.
    """

    def __init__(self, needs: Callable[[Group], Needs]) -> None:
        """Nothing is known.

        Args:
            needs: What is to be measured of the layers of a group.
        """
        self._needs = needs
        self.layers: list[CapturedLayer] = []
        self.others: list[Uncaptured] = []
        self._roots: list[weakref.ref[nn.Module]] = []
        self._unmatched = Unmatched()
        self._group_of: dict[int, Group] = {}
        self._watching = Watching()
        self._batch = BatchSize()
        self._hooked: list[weakref.ref[nn.Module]] = []
        self._unhook: list[Callable[[], object]] = []
        self.parts, self.has_parts = Parts(), False
        self._sorted: list[Tensor] = []
        self._groups: list[Group] = []

    def spell_out(self, params: Params) -> list[Any]:
        """List what may hold parameters, remembering the module that it comes from.

        Args:
            params: Parameters, named parameters, parameter groups, or a module.

        Raises:
            TypeError: If it is nothing of that kind.
        """
        root = root_of(params)
        if root is not None:
            self.remember(root)
        if isinstance(params, nn.Module):
            params = (param for param in params.parameters() if param.requires_grad)
        try:
            if isinstance(params, Tensor):
                raise TypeError
            listed = list(params)
        except TypeError:
            kind = type(params).__name__
            raise TypeError(f"params: got a {kind}. Supported: {_SPELLINGS}.") from None
        return listed

    def remember(self, root: nn.Module) -> None:
        """Search this module first from now on."""
        self._roots.append(weakref.ref(root))

    def sort(
        self, owner: object, groups: list[Group], state: Mapping[Tensor, dict[str, Any]]
    ) -> bool:
        """Find the layers of all groups; tell whether any parameter's module was found.

        Args:
            owner: The optimizer; taps live as long as it does.
            groups: Its parameter groups.
            state: Its state.
        """
        group_of = by_parameter(groups)
        params = [param for group in groups for param in group["params"]]
        roots = [root for ref in self._roots if (root := ref()) is not None]
        owners = find_owners(params, roots)
        taken = {id(param) for layer in self.layers for param in layer.owned()}
        before = {id(uncaptured.param): uncaptured.reason for uncaptured in self.others}
        sorting = Sorting(
            params,
            owners,
            lambda p: group_of[id(p)],
            state,
            self._needs,
            taken,
            before,
            self._batch,
        )
        self.layers += sorting.layers(owner)
        self.others = sorting.others()
        self._group_of = group_of
        self._hook_roots(owner, owners, roots)
        self._watching.locate(owners, params)
        new = [found for found in sorting.watched if found.param not in self._watching]
        self._watching.watch(owner, new, _asking(owner), self._batch)
        for found in new:
            expected = expected_slots(found)
            if expected and self.declare(found.weight, expected, state):
                found.weight.add(expected)
        self._sorted, self._groups = [], []
        if owners:
            self._unmatched.check(groups, owners, roots)
        return bool(owners)

    def _hook_roots(
        self, owner: object, owners: Mapping[int, list[Owner]], roots: list[nn.Module]
    ) -> None:
        """Have the outermost modules tell how many samples they get."""
        found = [o.root for entries in owners.values() for o in entries if o.root is not None]
        for root in {id(module): module for module in [*roots, *found]}.values():
            if not any(known() is root for known in self._hooked):
                self._hooked.append(weakref.ref(root))
                self._unhook.append(hook_batch(owner, root, self._batch))

    def declare(
        self, weight: Weight, slots: list[Slot], state: Mapping[Tensor, dict[str, Any]]
    ) -> bool:
        """Take up layers that calls are seen to use; tell whether they can be trained.

        Args:
            weight: A weight that is captured by its uses.
            slots: What calls multiply with; they are given statistics.
            state: State of the optimizer.
        """
        param = self._watching.of(weight).param
        begun = state.get(param, {})
        if "exp_avg" in begun and not begun["step"]:  # a template of a state, or skipped steps
            begun.clear()
        if begun_by_fallback(begun, self._group_of[id(param)]):
            weight.refuse("the fallback had begun to train it before its uses were seen")
            return False
        kept = {id(slot.statistics) for slot in weight.slots}
        replaced = [
            layer
            for layer in self.layers
            if home(layer.weight) is param and id(layer.statistics) not in kept
        ]
        self.layers = [layer for layer in self.layers if layer not in replaced]
        for layer in replaced:
            layer.close()

        def joint(param: Tensor, bias: Tensor, slot: Slot) -> bool:
            taken = _spans([*self.layers, *new])
            return accepts_bias(param, bias, state, self._group_of.get(id(bias)), taken, slot)

        new: list[CapturedLayer] = []
        for slot in slots:
            new += self._watching.layers_of(weight, [slot], self._group_of, self._needs, joint)
        self._leave_to_fallback(replaced, "it is not added where its weight is used")
        self._place(new)
        return True

    def _place(self, new: list[CapturedLayer]) -> None:
        """Take up layers in the order of the parameters, which is the same in all processes."""
        order = {key: place for place, key in enumerate(self._group_of)}
        self.layers = [*self.layers, *new]
        self.layers.sort(key=lambda layer: (order[id(home(layer.weight))], _offset(layer)))
        captured = {id(param) for layer in self.layers for param in layer.owned()}
        self.others = [other for other in self.others if id(other.param) not in captured]
        self._keep_parts()

    def _keep_parts(self) -> None:
        self.parts.keep(param for layer in self.layers for param in layer.params())
        self.has_parts = bool(self.parts)

    def settle(self, paused: bool) -> tuple[list[Watched], bool]:
        """See how parameters were used.

        Args:
            paused: Whether the passes were not looked at.

        Returns:
            Those that no call was seen to use, and whether anything is known that was not before.
        """
        self.heal()
        if paused or self._watching.uses is None:
            return [], False

        def tied(param: Tensor) -> bool:
            return bool(self._group_of[id(param)].get("capture_tied", False))

        lost, news = self._watching.settle(self.layers, self.others, tied)
        called = {id(layer.weight) for layer in self.layers if layer.removers}
        return [found for found in lost if id(found.param) not in called], news

    def pending(self) -> list[CapturedLayer]:
        """Layers of which a step can take what was collected."""
        found = [layer for layer in self.layers if layer.statistics.settle()]
        if self._watching.uses is not None:
            self._watching.count_turns()
        return found

    def overlooked(self) -> list[Watched]:
        """Parameters whose gradients come from calls that could not be looked at."""
        return [] if self._watching.uses is None else self._watching.overlooked()

    def heal(self) -> None:
        """Clear away what an interrupt of a forward pass has left behind."""
        if self._watching.uses is not None:
            self._watching.uses.heal()

    def group_of(self, param: Tensor) -> Group:
        """The group of a parameter."""
        return self._group_of[id(param)]

    def roots(self) -> list[nn.Module]:
        """The outermost modules."""
        return [root for ref in self._hooked if (root := ref()) is not None]

    def slots(self) -> Iterator[Slot]:
        """Slots of the weights that are captured by their uses."""
        return self._watching.slots()

    def is_looked_for(self, param: Tensor) -> bool:
        """Whether calls may yet be seen to use a parameter, as a weight or as a bias."""
        return self._watching.awaits(param)

    def parts_of(self) -> dict[Tensor, set[str]]:
        """Labels of the layers that are parts of a parameter, once its uses were seen."""
        labels: dict[Tensor, set[str]] = {}
        for layer in self.layers:
            for param in layer.params():
                part = origin(param)
                if part is not None and self._watching.is_settled(home(layer.weight)):
                    labels.setdefault(part.param, set()).add(part.label)
        return labels

    def link(self, groups: list[Group]) -> bool:
        """Tell every parameter its group; tell whether all are still those that were sorted."""
        listed = [param for group in groups for param in group["params"]]
        if _are(listed, self._sorted) and _are(groups, self._groups):
            return True
        group_of = by_parameter(groups)
        if group_of.keys() != {id(param) for param in self.params()}:
            return False
        self._group_of = group_of
        for layer in self.layers:
            layer.group = layer.bias_group = group_of[id(home(layer.weight))]
            if layer.bias is not None:
                layer.bias_group = group_of[id(home(layer.bias))]
        for uncaptured in self.others:
            uncaptured.group = group_of[id(uncaptured.param)]
        self._sorted, self._groups = listed, list(groups)
        return True

    def drop_departed(self, groups: list[Group]) -> None:
        """Let go of layers of which a parameter is in no group any more."""
        left = by_parameter(groups)
        gone = [la for la in self.layers if not all(id(param) in left for param in la.owned())]
        for layer in gone:
            layer.close()
        self.layers = [layer for layer in self.layers if layer not in gone]
        self._watching.forget(home(layer.weight) for layer in gone)
        self._keep_parts()

    def release(self, released: list[CapturedLayer]) -> None:
        """Leave layers to the fallback from now on.

        Args:
            released: Some of the layers; their statistics say why.
        """
        gone = {id(layer) for layer in released}
        self.layers = [layer for layer in self.layers if id(layer) not in gone]
        for layer in released:
            layer.close()
        self._leave_to_fallback(released)
        self._watching.forget(home(layer.weight) for layer in released)
        self._keep_parts()

    def _leave_to_fallback(self, layers: list[CapturedLayer], why: str = "") -> None:
        """Add the parameters of layers to the others.

        Args:
            layers: Layers that are captured no more.
            why: Why not; what their statistics say if empty.
        """
        others = {id(uncaptured.param) for uncaptured in self.others}
        for layer in layers:
            for name, param in layer.named():
                part, owned = origin(param), home(param)
                if id(owned) in others:
                    continue
                others.add(id(owned))
                name = name if part is None else name.removesuffix(part.label)
                group, reason = layer.group_of(param), why or layer.statistics.refused
                self.others.append(Uncaptured(name, layer.kind, owned, group, reason))

    def look_everywhere(self, owner: object, layers: list[CapturedLayer]) -> None:
        """Look at all calls of the model for the weights of layers that were not called.

        Functions that take a module may use its weight, which no code of another module shows.

        Args:
            owner: The optimizer.
            layers: Layers with taps.
        """
        weights = [layer.weight for layer in layers if not self.is_looked_for(layer.weight)]
        owners = find_owners(weights, self.roots())
        found = []
        for weight in weights:
            entries = [replace(entry, reader=entry.root) for entry in owners.get(id(weight), ())]
            if entries and is_watchable(weight, entries):
                found.append(Watched.by(weight, entries))
        self._watching.locate(owners, [p for layer in layers for p in layer.params()])
        self._watching.watch(owner, found, _asking(owner), self._batch)

    def clear(self) -> None:
        """Drop pending statistics."""
        for layer in self.layers:
            layer.statistics.clear()

    def forget(self) -> None:
        """Remove all taps, and sort everything anew."""
        self.close()
        self.layers, self.others = [], []

    def contradicts(
        self, state: Mapping[Tensor, Mapping[str, Tensor]], groups: list[Group]
    ) -> bool:
        """Whether a state is that of another choice of layers, or of their biases.

        Args:
            state: State of the optimizer.
            groups: Its parameter groups.
        """
        group_of = by_parameter(groups)
        others = (
            (state.get(uncaptured.param, {}), uncaptured.param)
            for uncaptured in self.others
            if not self.is_looked_for(uncaptured.param)
        )
        return any(
            begun_in_layer(param_state, group_of[id(param)]) for param_state, param in others
        ) or any(_is_of_another(layer, state, layer.group) for layer in self.layers)

    def close(self) -> None:
        """Remove all taps."""
        for layer in self.layers:
            layer.close()
        self._watching.close()
        for remove in self._unhook:
            remove()
        self._hooked, self._unhook = [], []

    def params(self) -> Iterator[Tensor]:
        """All parameters."""
        seen: set[int] = set()
        for layer in self.layers:
            for param in layer.owned():
                if id(param) not in seen:
                    seen.add(id(param))
                    yield param
        for uncaptured in self.others:
            yield uncaptured.param

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters with their qualified names."""
        seen: set[int] = set()
        for layer in self.layers:
            for name, param in layer.named():
                part = origin(param)
                if part is None:
                    yield name, param
                elif id(part.param) not in seen:
                    seen.add(id(part.param))
                    yield name.removesuffix(part.label), part.param
        for uncaptured in self.others:
            yield uncaptured.name, uncaptured.param


def _asking(owner: object) -> Declare:
    """Ask an optimizer to take up slots, as long as it lives."""
    reference = weakref.ref(owner)

    def declare(weight: Weight, slots: list[Slot]) -> bool:
        alive: Any = reference()
        return alive is not None and alive._declare(weight, slots)

    return declare


def _offset(layer: CapturedLayer) -> int:
    """Where its weight begins in the parameter that it is a part of."""
    part = origin(layer.weight)
    return 0 if part is None else part.block.offset


def _spans(layers: list[CapturedLayer]) -> dict[int, list[Span]]:
    """Which numbers of which biases layers have, by ``id``; an empty list for all of them."""
    spans: dict[int, list[Span]] = {}
    for layer in layers:
        if layer.bias is None:
            continue
        part = origin(layer.bias)
        if part is None:
            spans[id(layer.bias)] = []
        elif isinstance(part.block, Span):
            spans.setdefault(id(part.param), []).append(part.block)
    return spans


def _are(these: Sequence[object], those: Sequence[object]) -> bool:
    """Whether two lists have the very same entries."""
    return len(these) == len(those) and all(map(is_, these, those))


def by_parameter(groups: list[Group]) -> dict[int, Group]:
    """The group of every parameter, by ``id``."""
    return {id(param): group for group in groups for param in group["params"]}


def _is_of_another(
    layer: CapturedLayer, state: Mapping[Tensor, Mapping[str, Tensor]], group: Group
) -> bool:
    """Whether a state is one of the fallback, or of the layer with or without its bias."""
    param_state = state.get(layer.weight, {})
    if begun_by_fallback(param_state, group):
        return True
    if layer.bias is not None and "exp_avg" in state.get(layer.bias, {}):
        return True
    row = None
    if layer.statistics.bound:
        row = has_row_for_bias(param_state, layer.statistics.layer, group)
    return row is not None and row != (layer.bias is not None)
