"""Which modules own the given parameters: layers are found from parameters alone."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from tnkfac.curvature.capture.reading import reader_of
from tnkfac.curvature.layers import LAYERS, STOCK, layer_type
from tnkfac.curvature.layers.stock_forward import REPLACED_FORWARD


@dataclass(frozen=True)
class Owner:
    """A module that holds a parameter under an attribute.

    Attributes:
        name: Qualified name of the module from its root; empty for the root itself.
        module: The module.
        attribute: Name of the parameter in the module.
        reader: The module around it that reads the parameter without calling the module, if any.
        enclosing: The innermost module around it that runs, or itself if it does.
        root: The outermost module around it.
        indices: Whether layers that read integers are supported.
    """

    name: str
    module: nn.Module
    attribute: str
    reader: nn.Module | None = None
    enclosing: nn.Module | None = None
    root: nn.Module | None = None
    indices: bool = False

    @property
    def parameter_name(self) -> str:
        """Qualified name of the parameter."""
        return f"{self.name}.{self.attribute}" if self.name else self.attribute

    def answers_to(self, name: str) -> bool:
        """Whether this names the parameter, its module, a module around that, or the type."""
        return name in (self.parameter_name, self.name, type(self.module).__name__) or (
            bool(name) and self.name.startswith(f"{name}.")
        )

    @property
    def runs(self) -> bool:
        """Whether the module computes anything, unlike a list of parameters."""
        return _runs(self.module)

    @property
    def refusal(self) -> str | None:
        """Why the module is not a supported layer, or None if it is one."""
        kind = type(self.module).__name__
        if isinstance(self.module, ParametrizationList):
            return "the weight that its layer uses is computed of it (a parametrization)"
        if self.reader is not None:
            return f"its {type(self.reader).__name__} reads it without calling it"
        if layer_type(self.module, self.indices) is not None:
            return None
        known = tuple(kind for kind, layer in LAYERS.items() if not layer.reads_indices)
        if self.attribute in ("weight", "bias") and isinstance(self.module, known):
            overrides = getattr(type(self.module), "forward", None) not in STOCK.values()
            return f"{kind} overrides forward" if overrides else REPLACED_FORWARD
        return f"{kind} is not a supported layer"


def root_of(params: Any) -> nn.Module | None:
    """The module whose ``parameters()`` or ``named_parameters()`` generator this is, if it is one.

    Filters and generator expressions around it are looked through.
    """
    for _ in range(8):
        if isinstance(params, nn.Module):
            return params
        if isinstance(params, types.GeneratorType) and params.gi_frame is not None:
            scope = params.gi_frame.f_locals
            caller = scope.get("self")
            if isinstance(caller, nn.Module):
                return caller
            params = scope.get(".0")
        elif isinstance(params, filter | map | enumerate | zip):
            inner = [ref for ref in gc.get_referents(params) if hasattr(ref, "__next__")]
            params = inner[0] if inner else None
        else:
            return None
    return None


def find_owners(params: Iterable[Tensor], roots: Iterable[nn.Module]) -> dict[int, list[Owner]]:
    """Owners of parameters, by ``id`` of the parameter.

    Args:
        params: The parameters.
        roots: Modules to search first; all living modules are searched for what they lack.

    Returns:
        For every parameter that has one, its owners in the order of ``root.named_modules()``.
        Tied parameters have several.
    """
    wanted = {id(p) for p in params}
    owners: dict[int, list[Owner]] = {}
    roots = list(dict.fromkeys(_unwrapped(root) for root in roots))
    if len(roots) == 1:
        _search(roots, wanted, owners)
    if wanted - owners.keys():  # also with several roots: another module may tie their weights
        _search(_living_roots(wanted - owners.keys()), wanted, owners)
    return owners


def _search(roots: list[nn.Module], wanted: set[int], owners: dict[int, list[Owner]]) -> None:
    seen = {id(owner.module) for entries in owners.values() for owner in entries}
    prefix = len(roots) > 1
    for root in roots:
        parents: dict[int, tuple[nn.Module, str]] = {}
        for name, module in root.named_modules():
            for child_name, child in module._modules.items():
                if child is not None:
                    parents.setdefault(id(child), (module, child_name))
            if id(module) in seen:
                continue
            seen.add(id(module))
            if prefix:
                name = f"{type(root).__name__}.{name}" if name else type(root).__name__
            for attribute, param in module._parameters.items():
                if param is not None and id(param) in wanted:
                    around = list(_around(module, parents))
                    reader = reader_of(attribute, around) if around else None
                    running = (m for m, _ in [(module, ""), *around] if _runs(m))
                    owner = Owner(name, module, attribute, reader, next(running, None), root)
                    owners.setdefault(id(param), []).append(owner)


def _around(
    module: nn.Module, parents: dict[int, tuple[nn.Module, str]]
) -> Iterator[tuple[nn.Module, str]]:
    """Modules around another one, from the inside out, each with the name of what it holds."""
    met = {id(module)}
    while id(module) in parents:
        module, name = parents[id(module)]
        if id(module) in met:
            return
        met.add(id(module))
        yield module, name


def _runs(module: nn.Module) -> bool:
    """Whether a module computes anything, unlike a list."""
    return getattr(type(module), "forward", None) not in (None, nn.Module.forward)


def _living_roots(wanted: set[int]) -> list[nn.Module]:
    """Outermost modules that hold a wanted parameter, by one scan over all living objects."""
    modules = [obj for obj in gc.get_objects() if issubclass(type(obj), nn.Module)]
    holders: list[nn.Module] = []
    parents: dict[int, nn.Module] = {}
    for module in modules:
        scope = module.__dict__
        if any(id(param) in wanted for param in scope.get("_parameters", {}).values()):
            holders.append(module)
        for child in scope.get("_modules", {}).values():
            if child is not None:
                parents.setdefault(id(child), module)
    roots: dict[int, nn.Module] = {}
    for module in holders:
        path = {id(module)}
        while id(module) in parents and id(parents[id(module)]) not in path:
            module = parents[id(module)]
            path.add(id(module))
        module = _unwrapped(module)
        roots[id(module)] = module
    return list(roots.values())


def _unwrapped(root: nn.Module) -> nn.Module:
    """The user's model behind data parallelism and compilation, so that names do not change."""
    while (child := _WRAPPERS.get(type(root).__name__)) in root._modules:
        inner = root._modules[str(child)]
        assert inner is not None
        root = inner
    return root


_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
"""Name of the wrapped module, by type of the wrapper."""
