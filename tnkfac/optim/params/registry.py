"""Which parameters of an optimizer are trained how."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn

from tnkfac.curvature.capture.owners import find_owners, root_of
from tnkfac.optim.options import Group, Params
from tnkfac.optim.params.captured import CapturedLayer, Needs, Uncaptured
from tnkfac.optim.params.history import begun_by_fallback, begun_in_layer, has_row_for_bias
from tnkfac.optim.params.skipping import Unmatched
from tnkfac.optim.params.sorting import Sorting

_SPELLINGS = "an iterable of parameters, named parameters or parameter groups, a torch.nn.Module"


class Registry:
    """Captured layers, and the parameters that the fallback trains.

    Attributes:
        layers: Captured layers in module order.
        others: All other parameters in the order of the groups.
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
        self, owner: object, groups: list[Group], state: Mapping[Tensor, Mapping[str, Tensor]]
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
        taken = {id(param) for layer in self.layers for param in layer.params()}
        before = {id(uncaptured.param): uncaptured.reason for uncaptured in self.others}
        sorting = Sorting(
            params, owners, lambda p: group_of[id(p)], state, self._needs, taken, before
        )
        self.layers += sorting.layers(owner)
        self.others = sorting.others()
        self._sorted, self._groups = [], []
        if owners:
            self._unmatched.check(groups, owners, roots)
        return bool(owners)

    def link(self, groups: list[Group]) -> bool:
        """Tell every parameter its group; tell whether all are still those that were sorted."""
        listed = [param for group in groups for param in group["params"]]
        if _are(listed, self._sorted) and _are(groups, self._groups):
            return True
        group_of = by_parameter(groups)
        if group_of.keys() != {id(param) for param in self.params()}:
            return False
        for layer in self.layers:
            layer.group = layer.bias_group = group_of[id(layer.weight)]
            if layer.bias is not None:
                layer.bias_group = group_of[id(layer.bias)]
        for uncaptured in self.others:
            uncaptured.group = group_of[id(uncaptured.param)]
        self._sorted, self._groups = listed, list(groups)
        return True

    def drop_departed(self, groups: list[Group]) -> None:
        """Let go of layers of which a parameter is in no group any more."""
        left = by_parameter(groups)
        gone = [la for la in self.layers if not all(id(param) in left for param in la.params())]
        for layer in gone:
            layer.close()
        self.layers = [layer for layer in self.layers if layer not in gone]

    def release(self, released: list[CapturedLayer]) -> None:
        """Leave layers to the fallback from now on.

        Args:
            released: Some of the layers; their statistics say why.
        """
        gone = {id(layer) for layer in released}
        self.layers = [layer for layer in self.layers if id(layer) not in gone]
        for layer in released:
            layer.close()
            self.others += [
                Uncaptured(name, layer.kind, param, layer.group_of(param), layer.statistics.refused)
                for name, param in layer.named()
            ]

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
        others = ((state.get(uncaptured.param, {}), uncaptured.param) for uncaptured in self.others)
        return any(
            begun_in_layer(param_state, group_of[id(param)]) for param_state, param in others
        ) or any(_is_of_another(layer, state, group_of[id(layer.weight)]) for layer in self.layers)

    def close(self) -> None:
        """Remove all taps."""
        for layer in self.layers:
            layer.close()

    def params(self) -> Iterator[Tensor]:
        """All parameters."""
        for layer in self.layers:
            yield layer.weight
            if layer.bias is not None:
                yield layer.bias
        for uncaptured in self.others:
            yield uncaptured.param

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters with their qualified names."""
        for layer in self.layers:
            yield from layer.named()
        for uncaptured in self.others:
            yield uncaptured.name, uncaptured.param


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
