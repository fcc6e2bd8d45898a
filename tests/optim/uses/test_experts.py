"""Experts: tokens go to some of the matrices of one parameter, whatever calls do it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnkfac
from oracles.uses_training import OPTIMIZERS, assert_equal, gaussian, loss

EXPERTS, SAMPLES, TOKENS, WIDTH = 3, 6, 5, 4


def all_in_a_loop(x: Tensor, w: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        (place,) = torch.where(chosen == e)
        out = out.index_add(0, place, F.linear(x[place], w[e]))
    return out


def chosen_in_a_loop(x: Tensor, w: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in chosen.unique().tolist():
        (place,) = torch.where(chosen == e)
        out = out.index_add(0, place, x[place] @ w[e].T)
    return out


def by_index(x: Tensor, w: Tensor, chosen: Tensor) -> Tensor:
    return torch.bmm(w[chosen], x.unsqueeze(-1)).squeeze(-1)


def grouped(x: Tensor, w: Tensor, chosen: Tensor) -> Tensor:
    order = chosen.argsort(stable=True)
    ends = chosen.bincount(minlength=EXPERTS).cumsum(0).int()
    rows = torch._grouped_mm(x[order], w.mT, offs=ends)
    return torch.zeros_like(rows).index_copy(0, order, rows)


Use = Callable[[Tensor, Tensor, Tensor], Tensor]
USES: list[Use] = [all_in_a_loop, chosen_in_a_loop, by_index]
if hasattr(torch, "_grouped_mm"):
    USES.append(grouped)


class Experts(nn.Module):
    """Each sample goes, with all of its tokens, to the expert that is chosen for it."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.use = use
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 2)
        self.choice = torch.zeros(0, dtype=torch.long)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4]`` to the same."""
        chosen = self.choice.repeat_interleave(x.shape[1])
        return self.use(x.flatten(0, 1), self.weight, chosen).view_as(x)


def build(use: Use) -> tuple[nn.Sequential, float]:
    """The same weights for all, and how near to each other they stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Experts(use), nn.Linear(WIDTH, 3)).double()
    return (model.float(), 1e-4) if use is USES[-1] and len(USES) == 4 else (model, 1e-9)


def passes(model: Any, optimizer: Any, step: int, choice: list[int], micro: int = 1) -> None:
    optimizer.zero_grad()
    x = gaussian(step, SAMPLES, TOKENS, WIDTH).to(model[0].weight.dtype)
    for some, chosen in zip(x.chunk(micro), torch.tensor(choice).chunk(micro), strict=True):
        model[1].choice = chosen
        (loss(model(some), len(some)) / micro).backward()


MAKES: dict[str, Callable[..., Any]] = {
    "SINGD": OPTIMIZERS["SINGD dense"],
    "KFAC": lambda params: tnkfac.KFAC(params, lr=1e-2, damping=0.1, inv_update_steps=1),
    "decay": lambda params: tnkfac.SINGD(params, lr=1e-2, T=1, weight_decay=0.1),
}
CHOICES = [[0, 1, 2, 0, 1, 2], [0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1], [1, 2, 2, 2, 2, 2]]


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("first", [0, 1], ids=["all at first", "one comes late"])
@pytest.mark.parametrize("use", USES)
def test_all_ways_and_micro_batches_take_the_same_steps(use: Use, first: int, name: str) -> None:
    """Experts without tokens do not move, and their state stays bit for bit.

    But for the date of a decomposition, which KFAC repeats for all layers, with the same result.
    """
    (model, tolerance), (twin, _) = build(use), build(all_in_a_loop)
    optimizers = MAKES[name](model.parameters()), MAKES[name](twin.parameters())
    weight = model[1].weight
    for step, choice in enumerate(CHOICES[first:]):
        before = weight.detach().clone()
        kept = copy.deepcopy(optimizers[0].state[weight])
        passes(model, optimizers[0], step, choice, micro=3)
        passes(twin, optimizers[1], step, choice)
        for optimizer in optimizers:
            optimizer.step()
        for e in range(EXPERTS):
            assert torch.equal(before[e], weight[e]) == (e not in choice)
            state = optimizers[0].state[weight].get(f"[{e}]", {})
            for key, value in kept.get(f"[{e}]", {}).items():
                same = torch.equal(torch.as_tensor(value), torch.as_tensor(state[key]))
                assert same or e in choice or key == "last_refresh", key
    pairs = [*zip(model.parameters(), twin.parameters(), strict=True)]
    assert_equal([(p.double(), q) for p, q in pairs], tolerance)
    seen = {f"[{e}]" for choice in CHOICES[first:] for e in choice}
    assert {key for key in optimizers[0].state[weight] if key.startswith("[")} == seen


@pytest.mark.parametrize("micro", [1, 2, 3])
@pytest.mark.parametrize("use", USES)
def test_factors_are_those_of_the_tokens_of_an_expert(use: Use, micro: int) -> None:
    """Inputs in the mean over its rows; gradients of the loss, a mean over all samples."""
    model, tolerance = build(use)
    optimizer = MAKES["KFAC"](model.parameters())
    choice = [0, 1, 2, 0, 1, 0]
    passes(model, optimizer, 0, choice, micro)
    layers = [layer for layer in optimizer._registry.pending() if layer.name == "1"]
    with torch.no_grad():
        x = model[0](gaussian(0, SAMPLES, TOKENS, WIDTH).to(model[0].weight.dtype))
    model[1].choice = torch.tensor(choice)
    out = model[1](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(model[2](out), SAMPLES), out)
    assert len(layers) == EXPERTS
    for e, layer in enumerate(layers):
        mine = torch.tensor(choice) == e
        rows, gradients = x[mine].flatten(0, 1), g[mine].flatten(0, 1)
        found = layer.statistics.factors()
        for one, other in (
            (found.A[0][0], rows.T @ rows / len(rows)),
            (found.B[0][0], SAMPLES * gradients.T @ gradients),
        ):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_passes_that_are_dropped_are_not_counted() -> None:
    """Those before gradients were reset, and those of which gradients were returned."""
    factors = []
    for dropped in (True, False):
        model, _ = build(chosen_in_a_loop)
        optimizer = MAKES["KFAC"](model.parameters())
        if dropped:
            passes(model, optimizer, 1, [2, 1, 0, 1, 2, 0], micro=3)
        passes(model, optimizer, 0, [0, 0, 1, 1, 2, 0], micro=2)
        if dropped:
            model[1].choice = torch.tensor([2, 2])
            x = gaussian(2, 2, TOKENS, WIDTH).requires_grad_()
            torch.autograd.grad(model(x).sum(), x)
        layers = optimizer._registry.pending()
        factors.append([layer.statistics.factors() for layer in layers])
    for one, other in zip(*factors, strict=True):
        torch.testing.assert_close(one.B, other.B)
        torch.testing.assert_close(one.A, other.A)
