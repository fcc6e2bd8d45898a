"""What every process does with ``fully_shard``; started by ``test_fsdp``."""

import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from forking import start
from network import batch, loss, network, using
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tnkfac import KFAC, SINGD
from tnkfac.optim.distributed import leave
from tnkfac.optim.params.sharding import local_shard

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SINGD": (SINGD, {"T": 2, "weight_decay": 0.1}),
    "SINGD diagonal": (SINGD, {"T": 2, "structures": "diagonal"}),
    "SINGD paper": (SINGD, {**SINGD.REFERENCE, "T": 2}),
    "SINGD adam": (SINGD, {"T": 2, "grafting": "adam", "fallback": "sgd"}),
    "KFAC": (KFAC, {"inv_update_steps": 2}),
    "KFAC trust region": (KFAC, {"kl_clip": 1e-3, "damping": 0.1}),
    "SINGD by half": (SINGD, {"T": 2, "grad_worker_fraction": 0.5}),
    "KFAC by one": (KFAC, {"inv_update_steps": 2, "grad_worker_fraction": 0.0}),
}
SCENARIOS: list[Callable[[], None]] = []


def scenario(function: Callable[[], None]) -> Callable[[], None]:
    """Run it in every process."""
    SCENARIOS.append(function)
    return function


def meshes() -> list[Any]:
    """Shards for all processes, and two replicas of shards where there are four."""
    world = dist.get_world_size()
    found = [init_device_mesh("cpu", (world,))]
    if world == 4:
        found.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")))
    return found


def built(name: str, mesh: Any, parts: bool = False) -> tuple[nn.Module, Any]:
    """A sharded model and its optimizer."""
    cls, options = OPTIMIZERS[name]
    model = network()
    if parts:
        fully_shard(model.conv, mesh=mesh)
        fully_shard(model.mix, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, cls(model.parameters(), lr=0.01, **options)


def part(tensor: Tensor) -> Tensor:
    return torch.chunk(tensor, dist.get_world_size())[dist.get_rank()]


def train(model: nn.Module, optimizer: Any, step: int) -> None:
    x, y = (part(t) for t in batch(step, 8))
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor().detach() for p in model.parameters()]


def reference(name: str, steps: int) -> nn.Module:
    """One process on whole batches."""
    cls, options = OPTIMIZERS[name]
    model = network()
    optimizer = cls(model.parameters(), lr=0.01, **options)
    for step in range(steps):
        x, y = batch(step, 8)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model


@scenario
def shards_equal_one_process() -> None:
    """Six steps, also with groups of their own for some layers, and with replicas."""
    few = dist.get_world_size() > 2
    for name in ("SINGD diagonal", "SINGD by half", "KFAC by one") if few else OPTIMIZERS:
        expected = reference(name, 6)
        for place, mesh in enumerate(meshes()):
            model, optimizer = built(name, mesh, parts=place == 0)
            for step in range(6):
                train(model, optimizer, step)
            for p, q in zip(whole(model), expected.parameters(), strict=True):
                close = torch.allclose(p, q, rtol=1e-11, atol=1e-11)
                assert close, (name, mesh, float((p - q).abs().max()))
            rows = {row.name: row for row in optimizer.report()}
            assert rows["mix.weight"].last_update is not None
            assert rows["norm.weight"].reason
            optimizer.close()


@scenario
def shards_of_weights_that_are_used_equal_one_process() -> None:
    """Those of attention, packed ones and stacks; blocks are cut across processes, too."""
    for name in ("SINGD", "SINGD diagonal", "KFAC"):
        cls, options = OPTIMIZERS[name]
        single, model = using(), using()
        fully_shard(model.attention, mesh=meshes()[0])
        fully_shard(model, mesh=meshes()[0])
        expected = cls(single.parameters(), lr=0.01, **options)
        optimizer = cls(model.parameters(), lr=0.01, **options)
        for step in range(4):
            train(model, optimizer, step)
            x, y = batch(step, 8)
            expected.zero_grad()
            loss(single(x), y).backward()
            expected.step()
        for p, q in zip(whole(model), single.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-9, atol=1e-9), (name, float((p - q).abs().max()))
        assert all(row.last_update is not None for row in optimizer.report())
        optimizer.close()


@scenario
def one_part_that_is_not_finite_is_skipped_by_all() -> None:
    """Gradients of a process are those of its rows only."""
    for name in ("SINGD", "KFAC"):
        model, optimizer = built(name, meshes()[0])
        for step in range(2):
            train(model, optimizer, step)
        before = whole(model)
        x, y = (part(t) for t in batch(2, 8))
        optimizer.zero_grad()
        loss(model(x), y).backward()
        if dist.get_rank() == 1:
            model.conv.weight.grad.to_local()[0] = float("nan")
        optimizer.step()
        assert optimizer.skipped_updates == 1
        for a, b in zip(before, whole(model), strict=True):
            assert torch.equal(a, b)
        train(model, optimizer, 3)
        assert not torch.equal(before[0], whole(model)[0])
        optimizer.close()


@scenario
def a_loss_scale_is_agreed_upon() -> None:
    """One part that is infinite halves the scale in all processes, and all skip the step."""
    for name in ("SINGD", "KFAC"):
        model, optimizer = built(name, meshes()[0])
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        expected = reference(name, 2)
        for step in (0, 1, 2):
            x, y = (part(t) for t in batch(step, 8))
            optimizer.zero_grad()
            scaler.scale(loss(model(x), y)).backward()
            if step == 2:
                before = whole(model)
                if dist.get_rank() == 1:
                    model.conv.weight.grad.to_local()[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            if step == 1:
                for p, q in zip(whole(model), expected.parameters(), strict=True):
                    assert torch.allclose(p, q, rtol=1e-11, atol=1e-11), name
        for a, b in zip(before, whole(model), strict=True):
            assert torch.equal(a, b)
        assert scaler.get_scale() == 32.0
        optimizer.close()


@scenario
def checkpoints_go_on_with_other_shards() -> None:
    """Loaded as another number of processes has saved them, if one has; saved once by each."""
    for name in ("SINGD", "SINGD diagonal", "SINGD by half", "KFAC by one"):
        own, other = (
            os.path.join(sys.argv[1], f"{world} {name}".replace(" ", "_"))
            for world in (dist.get_world_size(), 6 - dist.get_world_size())
        )
        model, optimizer = built(name, meshes()[0])
        written = os.path.isdir(own)
        dist.barrier()
        if not os.path.isdir(other):
            for step in range(3):
                train(model, optimizer, step)
        else:
            states = get_state_dict(model, optimizer)
            loaded = dict(zip(("model", "optimizer"), states, strict=True))
            dcp.load(loaded, checkpoint_id=other)
            set_state_dict(
                model,
                optimizer,
                model_state_dict=loaded["model"],
                optim_state_dict=loaded["optimizer"],
            )
        if not written:
            states = get_state_dict(model, optimizer)
            dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=own)
        for step in range(3, 6):
            train(model, optimizer, step)
        expected = reference(name, 6)
        for p, q in zip(whole(model), expected.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-11, atol=1e-11), (name, float((p - q).abs().max()))
        optimizer.close()


@scenario
def tensor_parallel_parameters_use_the_fallback() -> None:
    """With one warning that names them; what is whole is captured, and nothing is added up."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(4, 3)).double()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(model, mesh, plan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = SINGD(model.parameters(), lr=0.01, T=1)
    texts = [str(w.message) for w in caught if "tensor parallelism" in str(w.message)]
    assert len(texts) == 1
    assert texts[0].startswith("0.weight, 0.bias, 2.weight, 2.bias: ")
    before = [local_shard(p).clone() for p in model.parameters()]
    for step in range(4):
        torch.manual_seed(step)
        x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
        optimizer.zero_grad()
        loss(model(x), y).backward()
        if step == 3 and dist.get_rank() == 1:
            model[0].weight.grad.to_local()[0] = float("nan")
        optimizer.step()
    assert optimizer.skipped_updates == 1
    assert optimizer._processes.count == 1
    for old, param in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, local_shard(param))
        assert local_shard(param).isfinite().all()
    assert optimizer.report()[0].last_update == 2


def run(**group: Any) -> None:
    """All scenarios; the last group only loads what the one before it has saved."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60), **group)
    last = group["init_method"].endswith("2")
    for function in (checkpoints_go_on_with_other_shards,) if last else SCENARIOS:
        function()
        if dist.get_rank() == 0:
            print(function.__name__, "holds", flush=True)
    leave()


if __name__ == "__main__":
    start(run, [int(world) for world in sys.argv[2:]], sys.argv[1])
