"""A forward pass that leaves no trace in a model, so that its calls can be looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def rehearse(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Call a model once as training does, but not compiled.

    Args:
        model: The model; of one that is wrapped for several processes, what is inside is called.
        args: What it is called with.
        kwargs: The same, by name.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module  # the wrapper would wait for a backward pass
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    eager = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(cuda), _as_it_was(model), torch.enable_grad(), eager:
        model(*args, **kwargs)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Training mode inside; modes and buffers, such as running means, as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
