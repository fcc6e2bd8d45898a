"""Where layers go: the grid of KAISA, balance against brute force, and the printed plan."""

from enum import Enum
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from tnkfac import KFAC, SINGD, KFACPreconditioner
from tnkfac.optim.distributed.assignment import Assignment, LayerAssignment, assign, workers
from tnkfac.optim.params.state import ON_HOST


@pytest.mark.parametrize(
    ("fraction", "world", "expected"),
    [(1.0, 8, 8), (0.5, 8, 4), (0.25, 8, 2), (1 / 8, 8, 1), (0.0, 8, 1), (1.0, 1, 1), (0.34, 3, 1)],
)
def test_how_many_workers(fraction: float, world: int, expected: int) -> None:
    assert workers(fraction, world) == expected


@pytest.mark.parametrize(("fraction", "world"), [(0.75, 4), (0.4, 8), (0.6, 3)])
def test_workers_must_divide_the_processes(fraction: float, world: int) -> None:
    with pytest.raises(ValueError, match=rf"grad_worker_fraction: got {fraction}.*0\.\d+, 1\.0"):
        workers(fraction, world)


class Layer:
    """Stands for a layer."""


def plans(
    costs: list[float], counts: list[int], world: int
) -> tuple[list[Layer], list[Assignment]]:
    layers = [Layer() for _ in costs]
    found = [Assignment(world, rank) for rank in range(world)]
    for plan in found:
        plan.extend(layers, costs, counts)  # type: ignore[arg-type]
    return layers, found


def test_the_grid_of_the_paper() -> None:
    """Eight processes, two keepers: columns {0, 4}, {1, 5}, ...; rows {0..3}, {4..7}."""
    layers, found = plans([5.0, 4.0, 3.0, 2.0], [2] * 4, 8)
    columns = [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [found[0].of(layer).grad_workers for layer in layers] == columns
    for plan in found:
        first = plan.rank // 4 * 4
        for layer, keepers in zip(layers, columns, strict=True):
            assert plan.row(layer) == tuple(range(first, first + 4))
            assert plan.source(layer) == keepers[plan.rank // 4]


@pytest.mark.parametrize("world", [1, 2, 4, 6])
@pytest.mark.parametrize("seed", range(3))
def test_every_process_gets_every_preconditioned_gradient_once(world: int, seed: int) -> None:
    """From a process that keeps the preconditioner, which the owner is one of."""
    generator = torch.Generator().manual_seed(seed)
    costs = [float(c) for c in torch.randint(0, 50, (12,), generator=generator)]
    divisors = [g for g in range(1, world + 1) if world % g == 0]
    picks = torch.randint(0, len(divisors), (12,), generator=generator)
    layers, found = plans(costs, [divisors[int(i)] for i in picks], world)
    assert len({tuple(map(repr, (p.of(la) for la in layers))) for p in found}) == 1
    for layer, cost in zip(layers, costs, strict=True):
        owners = [plan.rank for plan in found if plan.is_inv_worker(layer)]  # type: ignore[arg-type]
        keepers = [plan.rank for plan in found if plan.is_grad_worker(layer)]  # type: ignore[arg-type]
        assert set(owners) <= set(keepers)
        assert len(owners) == (1 if cost else world)
        for plan in found:
            assert plan.source(layer) in keepers  # type: ignore[arg-type]
            assert plan.rank in plan.row(layer)  # type: ignore[arg-type]
            assert plan.source(layer) in plan.row(layer)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_the_busiest_process_is_near_the_best_there_is(seed: int) -> None:
    """At most 4/3 of the best of all assignments (Graham 1969), for one keeper each."""
    generator = torch.Generator().manual_seed(seed)
    costs = [float(c) for c in torch.randint(1, 30, (8,), generator=generator)]
    loads = [0.0] * 3
    assign(costs, [1] * 8, loads)
    best = min(
        max(sum(c for c, r in zip(costs, chosen, strict=True) if r == rank) for rank in range(3))
        for chosen in product(range(3), repeat=8)
    )
    assert sum(loads) == sum(costs)
    assert max(loads) <= 4 / 3 * best


def test_layers_that_come_later_do_not_move_others() -> None:
    """Their state would have to move along."""
    layers, (plan, _) = plans([4.0, 3.0], [1, 1], 2)
    before = [plan.of(layer) for layer in layers]  # type: ignore[arg-type]
    late = Layer()
    plan.extend([late], [9.0], [1])  # type: ignore[list-item]
    assert [plan.of(layer) for layer in layers] == before  # type: ignore[arg-type]
    assert plan.of(late) == LayerAssignment(1, (1,))  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [SINGD, KFAC])
def test_on_one_device_all_is_here(cls: type) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    optimizer = cls(model.parameters(), structures="dense")
    plan = optimizer.placement()
    assert [row.name for row in plan] == ["0", "2"]
    assert [row.updated_by for row in plan] == ["all", "all"]
    assert plan[0].cost == 28**3 + 8**3
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    kept = sum(
        value.numel() * value.element_size()
        for module in (model[0], model[2])
        for key, value in optimizer.state[module.weight].items()
        if key not in ("momentum_buffer", *ON_HOST)
    )
    assert plan.state_bytes == [kept]
    text = str(plan)
    assert text.splitlines()[0].startswith("name")
    assert text.splitlines()[-1].split()[:2] == ["process", "0"]


class Strategy(Enum):
    """As of kfac-pytorch."""

    HYBRID_OPT = 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [("comm_opt", 1.0), ("MEM_OPT", 0.0), (Strategy.HYBRID_OPT, 0.5), (0.25, 0.25)],
)
def test_strategies_of_kfac_pytorch(given: Any, expected: float) -> None:
    model = nn.Linear(3, 2)
    shim = KFACPreconditioner(model, grad_worker_fraction=given)
    assert shim._kfac.param_groups[0]["grad_worker_fraction"] == expected


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grad_worker_fraction: got 'fast'.*mem_opt"):
        KFACPreconditioner(nn.Linear(3, 2), grad_worker_fraction="fast")
