"""The end of distributed training: threads of process groups are joined before Python exits.

A worker thread of gloo drops its reference to a message after the message counts as done. If a
tensor of Python dies with it while the interpreter exits, the thread is ended inside a destructor
and the process aborts: "terminate called without an active exception". Whoever drops the last
reference to a group joins its threads; ``destroy_process_group`` leaves other references alone,
and after ``fully_shard`` there are some for good: caches keep a ``DeviceMesh``, and it the group.
"""

from __future__ import annotations

import atexit
import gc
import time
import weakref
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

PAUSE = 0.3
"""Seconds that threads are given at exit where a group is still referred to."""


def leave() -> None:
    """Destroy all process groups and join their threads, so that the process can exit.

    To be called once all is done, in place of ``torch.distributed.destroy_process_group``. What
    still refers to a group (a model after ``fully_shard``, one in ``DistributedDataParallel``, an
    optimizer) has None there afterwards and communicates no more; what this process has of the
    parameters can still be read. Without process groups this does nothing.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    groups = _groups()
    dist.destroy_process_group()
    gc.unfreeze()  # frozen objects are not found
    _release(groups)
    if _alive(groups):
        atexit.register(_last, groups)


def _groups() -> list[weakref.ref[Any]]:
    """References that keep none of the process groups alive."""
    world = getattr(dist.distributed_c10d, "_world", None)
    return [weakref.ref(group) for group in {*getattr(world, "pg_map", ()), dist.group.WORLD}]


def _alive(groups: list[weakref.ref[Any]]) -> list[Any]:
    return [group for reference in groups if (group := reference()) is not None]


def _release(groups: list[weakref.ref[Any]]) -> None:
    """Put None in the place of groups in attributes, dictionaries and lists."""
    alive = _alive(groups)
    unwanted = {id(group) for group in alive}
    objects = gc.get_objects()
    wrapped = [x for x in objects if issubclass(type(x), DistributedDataParallel)]
    for model in wrapped:
        unwanted |= {id(vars(model).get(name)) for name in ("reducer", "logger")}
    # dictionaries of such values are not tracked, and so not among the referrers
    hidden = [x for x in gc.get_referents(*objects) if type(x) is dict and not gc.is_tracked(x)]
    for holder in [*gc.get_referrers(*alive), *wrapped, *hidden]:
        if holder is not alive:  # last of all, as only these wait without the lock of Python
            _forget(holder, unwanted)


def _forget(holder: Any, unwanted: set[int]) -> None:
    """Replace attributes or items with these ids by None."""
    if isinstance(holder, list):
        holder[:] = [None if id(value) in unwanted else value for value in holder]
        return
    values = holder if isinstance(holder, dict) else getattr(holder, "__dict__", None)
    if isinstance(values, dict):
        values.update({key: None for key, value in values.items() if id(value) in unwanted})


def _last(groups: list[weakref.ref[Any]]) -> None:
    """At exit variables of functions are gone; wait where something else has a group."""
    gc.collect()
    if _alive(groups):
        time.sleep(PAUSE)
