"""The layers that ``skip_layers`` names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from tnkfac.curvature.callers import warn
from tnkfac.curvature.capture.owners import Owner, find_owners
from tnkfac.optim.options import Group


def skipped(owners: Iterable[Owner], group: Group) -> str | None:
    """Why the group's ``skip_layers`` leaves a parameter with these owners out, if it does."""
    for name in group.get("skip_layers", ()):
        if any(owner.answers_to(name) for owner in owners):
            return f"skip_layers names {name}"
    return None


class Unmatched:
    """Tells of names in ``skip_layers`` that nothing answers to, of each name once."""

    def __init__(self) -> None:
        """Nothing was said yet."""
        self._told: set[str] = set()

    def check(
        self, groups: list[Group], owners: dict[int, list[Owner]], roots: list[nn.Module]
    ) -> None:
        """Warn of names of no parameter: of its group, or of the model but in no group.

        Args:
            groups: Parameter groups.
            owners: Owners of their parameters.
            roots: Modules that the parameters come from.
        """
        unknown = {name for group in groups for name in group.get("skip_layers", ())} - self._told
        for group in groups:
            members = [owner for param in group["params"] for owner in owners.get(id(param), ())]
            for name in unknown.intersection(group.get("skip_layers", ())):
                if any(owner.answers_to(name) for owner in members):
                    unknown.remove(name)
        if unknown:
            unknown -= _names_outside(unknown, groups, roots)
        if unknown:
            self._told |= unknown
            warn(
                f"skip_layers: {', '.join(map(repr, sorted(unknown)))} matches nothing. Supported: "
                "names of modules or parameters as report() has them, or of types of modules that "
                "have parameters.",
            )


def _names_outside(names: set[str], groups: list[Group], roots: list[nn.Module]) -> set[str]:
    """Names that frozen parameters answer to, or others that no group has."""
    known = {id(param) for group in groups for param in group["params"]}
    outside = [p for root in roots for p in root.parameters() if id(p) not in known]
    owners = [owner for entries in find_owners(outside, roots).values() for owner in entries]
    return {name for name in names if any(owner.answers_to(name) for owner in owners)}
