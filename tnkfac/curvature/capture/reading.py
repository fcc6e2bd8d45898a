"""Which modules read parameters of others by themselves, as far as their bytecode tells.

In it, ``self.qkv.weight`` is an attribute of an attribute. It is a hint: to look at the calls of a
module in vain costs microseconds.
"""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules that are never called."""


@lru_cache(maxsize=1024)
def reads(kind: Any) -> tuple[frozenset[tuple[str, str]], frozenset[str], frozenset[str]]:
    """What the methods of a class read of its children.

    Args:
        kind: A class of modules.

    Returns:
        Pairs ``(child, attribute)`` of ``self.child.attribute``; attributes that are read of
        something else than ``self`` or a child, such as an entry of a list; and all names.
    """
    pairs, loose, names = set(), set(), set()
    for code in _codes(kind):
        before: tuple[str, str] = "", ""
        for instruction in dis.get_instructions(code):
            operation, name = instruction.opname, instruction.argval
            if operation in ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "PRECALL"):
                continue
            if operation in ("LOAD_ATTR", "LOAD_METHOD"):
                names.add(name)
                if before[0] == "attribute":
                    pairs.add((before[1], name))
                elif before != ("local", "self"):
                    loose.add(name)
                before = "attribute", name
            elif operation.startswith(("LOAD_FAST", "LOAD_DEREF")):
                before = "local", name[-1] if isinstance(name, tuple) else str(name)
            else:
                before = "", ""
    return frozenset(pairs), frozenset(loose), frozenset(names)


def _codes(kind: type) -> Iterator[CodeType]:
    """Code of the methods of a class, and of what decorators close over, without constructors."""
    functions = [
        function
        for base in kind.__mro__
        if base not in (nn.Module, object)
        for name, function in vars(base).items()
        if isinstance(function, FunctionType) and "init" not in name and name != "reset_parameters"
    ]
    seen: set[int] = set()
    while functions:
        function = functions.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        functions += _closed_over(function)
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            codes += [const for const in code.co_consts if isinstance(const, CodeType)]
            yield code


def _closed_over(function: FunctionType) -> Iterator[FunctionType]:
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not filled
            continue
        if isinstance(content, FunctionType):
            yield content


def reader_of(attribute: str, path: Iterable[tuple[nn.Module, str]]) -> nn.Module | None:
    """The module around another one that reads a parameter of it by itself, or None.

    Args:
        attribute: Name of the parameter in the module that owns it.
        path: Modules around that, from the inside out, each with the name of what it holds.
    """
    contained = False
    for around, child in path:
        if isinstance(around, CONTAINERS):
            contained = True
            continue
        pairs, loose, names = reads(type(around))  # type: ignore[arg-type]
        if isinstance(around, nn.MultiheadAttention) or (child, attribute) in pairs:
            return around
        return around if contained and child in names and attribute in loose else None
    return None
