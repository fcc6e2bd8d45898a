"""Running a model over data without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tnkfac.curvature.capture.tap import silenced
from tnkfac.curvature.precision import FullPrecision

Data = Iterable[Any]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Differentiate, and leave buffers and what optimizers have captured as they were.

    Gradients of parameters stay untouched as long as nobody calls ``backward``.
    """
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.enable_grad(), silenced(model), FullPrecision(device):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, copy in saved:
                module._buffers[name] = buffer.copy_(copy)


def batches(data: Data) -> Iterator[tuple[Any, Any]]:
    """The pairs ``(x, y)`` of some data.

    Raises:
        TypeError: If ``data`` does not iterate over pairs.
        ValueError: If it is empty.
    """
    expected = "Expected an iterable of pairs (x, y), such as a DataLoader or [(x, y)]."
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(f"data: got {type(data).__name__}. {expected}")
    count = 0
    for batch in data:
        if isinstance(batch, Tensor) or not isinstance(batch, Sequence) or len(batch) != 2:
            raise TypeError(f"data: got an item of type {type(batch).__name__}. {expected}")
        count += 1
        yield batch[0], batch[1]
    if count == 0:
        raise ValueError(f"data: got nothing. {expected}")


def predict(model: nn.Module, x: Any) -> Tensor:
    """Outputs ``[N, ...]`` of the model.

    Raises:
        TypeError: If it does not return one tensor.
        ValueError: If the output has no batch axis.
    """
    outputs = model(x)
    if not isinstance(outputs, Tensor):
        raise TypeError(f"model: returned {type(outputs).__name__}. Supported: one tensor.")
    if outputs.ndim == 0:
        raise ValueError("model: returned a scalar. Supported: a batch of outputs [N, ...].")
    return outputs


def check_dependence(outputs: Tensor) -> None:
    """Raise a ``ValueError`` if no derivative of these outputs can be taken."""
    if not outputs.requires_grad:
        raise ValueError(
            f"model: its outputs {tuple(outputs.shape)} depend on no parameter that requires a "
            "gradient. Supported: outputs that were not detached or made under no_grad()."
        )


def check_model(model: nn.Module) -> None:
    """Raise a ``TypeError`` if this is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}. Supported: torch.nn.Module.")


def check_choice(argument: str, given: Any, choices: Sequence[Any]) -> None:
    """Raise a ``ValueError`` that lists the choices if the given value is none of them."""
    if not any(given == choice for choice in choices):
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{argument}: got {given!r}. Supported: {listed}.")


def check_samples(mc_samples: Any) -> None:
    """Raise a ``ValueError`` unless this is a positive integer."""
    if not isinstance(mc_samples, int) or isinstance(mc_samples, bool) or mc_samples < 1:
        raise ValueError(f"mc_samples: got {mc_samples!r}. Supported: integers of at least 1.")
