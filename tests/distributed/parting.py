"""Process groups that are left while models, optimizers and variables refer to them."""

import atexit
import gc
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from network import batch, loss, network
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tnkfac import KFAC, SINGD
from tnkfac.optim.distributed import leave


def workers() -> int:
    """Threads of this process that send messages of gloo."""
    found = 0
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):
            found += path.read_text() == "pt_gloo_runloop\n"
    return found


def left() -> int:
    """Those that are still there after a while: a thread is listed for a moment after its end."""
    until = time.monotonic() + 2
    while workers() and time.monotonic() < until:
        time.sleep(0.01)
    return workers()


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def replicas(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("r", "s")))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "sharded": sharded,
    "replicas of shards": replicas,
    "data-parallel": DistributedDataParallel,
    "averaged by hand": lambda model: model,
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda params, group: torch.optim.AdamW(params),
    "SINGD": lambda params, group: SINGD(
        params, lr=0.01, T=1, grad_worker_fraction=0.5, process_group=group
    ),
    "KFAC": lambda params, group: KFAC(params, lr=0.01, process_group=group),
}

CASES = [  # and whether the garbage collector lists no objects
    ("sharded", "AdamW", False),
    ("sharded", "SINGD", True),
    ("replicas of shards", "KFAC", False),
    ("data-parallel", "SINGD", False),
    ("averaged by hand", "KFAC", False),
]


def train(wrapper: str, optimizer: str) -> Any:
    """Three steps; what is to outlive the process group."""
    model = WRAPPERS[wrapper](network())
    group = dist.new_group() if wrapper == "averaged by hand" else "auto"
    built = OPTIMIZERS[optimizer](model.parameters(), group)
    for step in range(3):
        built.zero_grad()
        x, y = (torch.chunk(t, 2)[dist.get_rank()] for t in batch(step, 8))
        loss(model(x), y).backward()
        built.step()
    return model, built


def main(folder: Path, rank: int) -> None:
    """All kinds in turn, each with groups of its own."""
    kept = []
    for wrapper, optimizer, frozen in CASES:
        store = f"file://{folder}/{wrapper} {optimizer}"
        dist.init_process_group("gloo", store, rank=rank, world_size=2)
        kept.append(train(wrapper, optimizer))
        if frozen:
            gc.freeze()
        assert workers() > 0
        leave()
        assert left() == 0, (wrapper, optimizer)
        own = [getattr(p, "to_local", p.detach)() for p in kept[-1][0].parameters()]
        assert all(part.isfinite().all() for part in own)
        leave()
        print(wrapper, optimizer, "left", flush=True)
    dist.init_process_group("gloo", f"file://{folder}/last", rank=rank, world_size=2)
    group = dist.group.WORLD
    atexit.register(lambda: print("at exit", left(), flush=True))  # the last of these functions
    leave()
    print("with a variable", workers(), group is not None, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(os.environ["RANK"]))
