"""What hooks have in common: copies that do nothing, and compiled models that are told of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class InertCopy:
    """A hook that copies and pickles as one that does nothing.

    So a copied model contributes no statistics.
    """

    def __call__(self, *args: Any) -> Any:
        """What the hook does."""
        raise NotImplementedError

    def __deepcopy__(self, memo: Any) -> Any:
        """A copied model has a hook that does nothing."""
        return no_hook

    def __reduce__(self) -> Any:
        """An unpickled model has a hook that does nothing."""
        return _make_no_hook, ()


class _NoHook:
    """Stand-in for a hook in a copied or unpickled model."""

    def __call__(self, module: nn.Module, *_: Any) -> None:
        return None

    def __deepcopy__(self, memo: Any) -> _NoHook:
        return self

    def __reduce__(self) -> Any:
        return _make_no_hook, ()


no_hook = _NoHook()


def _make_no_hook() -> _NoHook:
    return no_hook


def forget_compiled_frames() -> None:
    """A model that was compiled and run before would ignore its new hooks without a word."""
    dynamo = getattr(torch, "_dynamo", None)
    if dynamo is not None and dynamo.utils.counters["stats"]["unique_graphs"]:
        dynamo.reset()


def never_a_frame_alone(function: Callable[..., Any]) -> None:
    """Have a function compiled as a part of others, but run as it is where these are broken.

    A compiler that gives up on a module still tries one by one what that calls.

    Args:
        function: A plain function, such as a method in its class.
    """
    frames = torch._C._dynamo.eval_frame
    skip = getattr(getattr(frames, "_FrameAction", None), "SKIP", None)
    if skip is not None:
        strategy = frames._FrameExecStrategy(skip, skip)
        frames.set_code_exec_strategy(function.__code__, strategy)


def taking_notes(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that changes what an optimizer knows, also where that is being compiled.

    A compiler refuses such changes inside of a checkpoint, whose eager forward pass would repeat
    them. What is noted here is noted once.

    Args:
        function: The function.
        *args: Its arguments.
    """
    if not torch.compiler.is_compiling():
        return function(*args)
    unchecked = torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer
    return unchecked(function, *args)


def hook_around(
    owner: object, module: nn.Module, before: InertCopy, after: InertCopy
) -> list[Callable[[], object]]:
    """Call hooks before and after a module runs, also if it raises, as long as ``owner`` lives.

    Returns:
        Callables that remove the hooks.
    """
    handles = (
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True, prepend=True),
    )
    forget_compiled_frames()
    return [weakref.finalize(owner, handle.remove) for handle in handles]
