"""Training loops and comparisons that the tests of the optimizers share."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from oracles.singd_reference import structure_support

__all__ = [
    "assert_same_numbers",
    "assert_same_state",
    "assert_same_weights",
    "dense_factor",
    "fit",
    "gradients",
    "mlp_batch",
    "squares",
    "state_by_name",
    "weights",
]

Loss = Callable[[Any, Any], Tensor]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by parameter name, without touching ``.grad``; None becomes zero."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


def squares(output: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over outputs, averaged over samples."""
    return (output - target).square().flatten(1).sum(1).mean()


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Any, Any]],
    loss_fn: Loss = squares,
) -> list[float]:
    """One step per batch; returns the losses."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_numbers(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same keys, and bit for bit the same tensors of the same dtype."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def assert_same_weights(actual: nn.Module, expected: nn.Module) -> None:
    """Bit for bit the same parameters."""
    assert_same_numbers(weights(actual), weights(expected))


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all state tensors, by ``parameter/key``."""
    return {
        f"{name}/{key}": value.detach().clone()
        for name, p in model.named_parameters()
        if p in optimizer.state
        for key, value in optimizer.state[p].items()
    }


def assert_same_state(
    first: nn.Module,
    first_optimizer: torch.optim.Optimizer,
    second: nn.Module,
    second_optimizer: torch.optim.Optimizer,
) -> None:
    """Bit for bit the same optimizer state."""
    assert_same_numbers(
        state_by_name(first, first_optimizer), state_by_name(second, second_optimizer)
    )


def _blocks(state: dict[str, Tensor], name: str) -> Iterator[Tensor]:
    yield from state[f"{name}.0"].unbind(1)
    if state[f"{name}.1"].numel():
        yield state[f"{name}.1"]


def dense_factor(state: dict[str, Tensor], name: str, structure: str = "") -> Tensor:
    """``K`` or ``C`` of a layer's state written out, ``[G, d, d]`` in float64."""
    if structure.startswith("hierarchical"):
        return _hierarchical([state[f"{name}.{part}"] for part in range(5)])
    if structure.endswith("toeplitz"):
        (dim,) = state[name].shape[1:]
        pairs = [(i, i - offset, offset) for i in range(dim) for offset in range(i + 1)]
        if structure.startswith("triu"):
            pairs = [(j, i, offset) for i, j, offset in pairs]
        return _filled(state[name], dim, pairs)
    if structure.startswith("tri"):
        diagonal, arm = state[f"{name}.0"], state[f"{name}.1"]
        dim = diagonal.shape[1]
        support = structure_support(structure, dim) & ~torch.eye(dim, dtype=torch.bool)
        pairs = [(i, i, i) for i in range(dim)]
        pairs += [(i, j, dim + k) for k, (i, j) in enumerate(support.nonzero().tolist())]
        return _filled(torch.cat([diagonal, arm], 1), dim, pairs)
    if name not in state:
        blocks = list(_blocks(state, name))
        groups = range(blocks[0].shape[0])
        dense = torch.stack([torch.block_diag(*(block[g] for block in blocks)) for g in groups])
    else:
        dense = state[name] if state[name].ndim == 3 else torch.diag_embed(state[name])
    return dense.detach().double()


def _filled(values: Tensor, dim: int, places: list[tuple[int, int, int]]) -> Tensor:
    dense = torch.zeros(values.shape[0], dim, dim, dtype=torch.float64)
    for row, column, index in places:
        dense[:, row, column] = values[:, index].detach().double()
    return dense


def _hierarchical(parts: list[Tensor]) -> Tensor:
    """First rows, right of them, middle diagonal, left of the end, end."""
    first, right, middle, left, end = (part.detach().double() for part in parts)
    groups, top, dim = first.shape[0], first.shape[1], first.shape[1] + right.shape[2]
    stop = top + middle.shape[1]
    dense = torch.zeros(groups, dim, dim, dtype=torch.float64)
    dense[:, :top] = torch.cat([first, right], 2)
    dense[:, top:stop, top:stop] = torch.diag_embed(middle)
    dense[:, stop:, top:] = torch.cat([left, end], 2)
    return dense


def mlp_batch(
    seed: int, d_in: int, d_out: int, samples: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random inputs ``[samples, d_in]`` and targets ``[samples, d_out]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, d_in, generator=generator, dtype=torch.float64)
    y = torch.randn(samples, d_out, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)
