"""Checkpoints in compiled models, whose modules use weights by themselves: whole graphs, once."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from oracles.uses_training import OPTIMIZERS, assert_equal, gaussian, loss
from oracles.uses_zoo import network
from tnkfac.curvature.uses.scopes import TRACEABLE

SHAPE = (4, 5, 4)
Run = Callable[[Tensor], Tensor]
pytestmark = pytest.mark.skipif(not TRACEABLE, reason="torch compiles function modes since 2.14")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


def recomputed(module: Run, x: Tensor) -> Tensor:
    return checkpoint(module, x, use_reentrant=False)


def of_all(model: nn.Sequential) -> Run:
    return lambda x: recomputed(model, x)


def of_each(model: nn.Sequential) -> Run:
    def run(x: Tensor) -> Tensor:
        for layer in model:
            x = recomputed(layer, x)
        return x

    return run


def of_one_in_one(model: nn.Sequential) -> Run:
    def inner(x: Tensor) -> Tensor:
        return recomputed(model[2], model[1](x)).tanh()

    return lambda x: model[4](recomputed(inner, model[0](x)))


def by_a_wrapper(model: nn.Sequential) -> Run:
    twin = copy.copy(model)
    twin._modules = {**model._modules, "2": checkpoint_wrapper(model[2])}
    return twin


BLOCKS = [
    ("foreign", of_each), ("foreign", of_one_in_one), ("Conv1D", by_a_wrapper), ("Conv1D", of_all),
    ("attention", of_each), ("attention", of_all), ("parts", of_one_in_one), ("parts", of_each),
    ("stock", of_all),
]  # fmt: skip


@pytest.mark.parametrize(("block", "around"), BLOCKS)
def test_steps_are_those_of_the_eager_run(block: str, around: Callable[..., Run]) -> None:
    models = []
    for compiled in (True, False):
        model = network("foreign" if block == "stock" else block)
        if block == "stock":
            model[2] = model[2].layer
        optimizer = OPTIMIZERS["KFAC"](model.parameters(), kfac_approx="reduce", damping=0.1)
        run, graphs = around(model), CompileCounterWithBackend("aot_eager")
        if block == "parts":
            optimizer.prepare(gaussian(9, *SHAPE))
        if compiled:
            run = torch.compile(run, backend=graphs, fullgraph=True)
        for step in range(3):
            optimizer.zero_grad()
            loss(run(gaussian(step, *SHAPE)), 4).backward()
            optimizer.step()
        assert graphs.frame_count == compiled
        assert {row.last_update for row in optimizer.report()} == {2}
        models.append(model)
    assert_equal([*zip(*(model.parameters() for model in models), strict=True)])
    assert torch._C._len_torch_function_stack() == 0


class Part(nn.Module):
    """Recomputes products with its own weight, in parts."""

    recompute = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(gaussian(8, 8, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[.., 4]`` to the same."""
        return recomputed(self.halves, x) if self.recompute else self.halves(x)

    def halves(self, x: Tensor) -> Tensor:
        a, b = self.weight.chunk(2)
        return F.linear(x, a).sigmoid() * F.linear(x, b)


@pytest.mark.filterwarnings("ignore:No statistics reached 2.weight")
def test_a_part_of_a_module() -> None:
    """Compiles as one graph with the right gradients, which go to the fallback, as is told."""
    model, alone = (network("foreign") for _ in range(2))
    model[2] = Part()
    alone[2] = copy.deepcopy(model[2])
    optimizer = OPTIMIZERS["SINGD dense"](model.parameters())
    optimizer.prepare(gaussian(9, *SHAPE))
    model[2].recompute = True
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(3):
        alone.load_state_dict(model.state_dict())
        for each in (run, alone):
            each.zero_grad()
            loss(each(gaussian(step, *SHAPE)), 4).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
        optimizer.step()
    rows = {row.name: row for row in optimizer.report()}
    assert {row.last_update for name, row in rows.items() if "2.weight" not in name} == {2}
    assert all("no statistics yet" in rows[f"2.weight[{part}]"].reason for part in ("0:4", "4:8"))
