"""Training of a model that uses weights by itself, and of the same one made of stock layers."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tnkfac import KFAC, SINGD

__all__ = [
    "OPTIMIZERS",
    "assert_equal",
    "assert_untouched",
    "copy_weights",
    "gaussian",
    "loss",
    "train",
]

Pairs = Sequence[tuple[Tensor, Tensor]]
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SINGD dense": partial(SINGD, lr=1e-2, structures="dense", T=1),
    "SINGD diagonal": partial(SINGD, lr=1e-2, structures="diagonal", T=1),
    "SINGD": partial(SINGD, lr=1e-2),
    "KFAC": partial(KFAC, lr=1e-2, inv_update_steps=1),
}


def gaussian(seed: int, *shape: int) -> Tensor:
    """Numbers that depend on a seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def loss(out: Tensor, samples: int) -> Tensor:
    """The mean over samples; the order of rows does not matter, that of outputs does."""
    wanted = torch.linspace(-1, 2, out.shape[-1], dtype=out.dtype)
    return (out - wanted).square().sum() / samples


def train(
    model: nn.Module,
    make: Callable[..., Any],
    shape: Sequence[int],
    micro: int = 1,
    steps: int = 3,
    **options: Any,
) -> Any:
    """Some steps, each of some micro-batches, of inputs of one shape; returns the optimizer."""
    optimizer = make(model.parameters(), **options)
    for step in range(steps):
        optimizer.zero_grad()
        for x in gaussian(step, *shape).chunk(micro):
            (loss(model(x), len(x)) / micro).backward()
        optimizer.step()
    return optimizer


def copy_weights(pairs: Pairs) -> None:
    """Write views of the parameters of one model into the parameters of the other."""
    with torch.no_grad():
        for view, param in pairs:
            param.copy_(view)


def assert_equal(pairs: Pairs, tolerance: float = 1e-9) -> None:
    """Views of the parameters of one model are the parameters of the other."""
    for place, (view, param) in enumerate(pairs):
        torch.testing.assert_close(
            view.detach(),
            param.detach(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, place=place: f"pair {place}: {text}",
        )


def assert_untouched(model: nn.Module, shape: Sequence[int]) -> None:
    """Outputs and gradients are those of the model alone, bit for bit, in several passes."""
    alone = copy.deepcopy(model)
    optimizer = SINGD(model.parameters(), lr=0.0, T=1)
    for seed in range(2):
        outputs, found = [], []
        for net in (model, alone):
            net.zero_grad()
            outputs.append(net(gaussian(seed, *shape)))
            (outputs[-1] - torch.ones_like(outputs[-1]).cumsum(0)).square().sum().backward()
            found.append([p.grad for p in net.parameters()])
        assert torch.equal(*outputs)
        assert all(map(torch.equal, *found))
        optimizer.step()
