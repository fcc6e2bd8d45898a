"""A run that loses a process during a step; torchrun starts all anew from the last checkpoint."""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoints import Checkpoints
from network import batch, loss, network
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tnkfac import KFAC, SINGD
from tnkfac.optim.distributed import leave

STEPS = 9


def die(*arguments: object) -> None:
    """As if the machine had lost its power."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, kind: str, name: str, fatal: int) -> None:
    """Train; write the losses of this attempt and the final weights."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    model = network()
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    else:
        model = DistributedDataParallel(model)
    cls = {"SINGD": SINGD, "KFAC": KFAC}[name]
    interval = {"T": 2} if cls is SINGD else {"inv_update_steps": 2}
    optimizer = cls(model.parameters(), lr=0.01, grad_worker_fraction=0.5, **interval)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    checkpoints = Checkpoints(folder / "checkpoints")
    newest, first = checkpoints.newest(), 0
    if newest is not None:
        first = checkpoints.load(newest, model, optimizer, schedule=schedule, step=0)["step"]
    for step in range(first, STEPS):
        if step == fatal and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and rank == 1:
            optimizer._step_params = die
        x, y = (torch.chunk(t, world)[rank] for t in batch(step, 8))
        optimizer.zero_grad()
        value = loss(model(x), y) + 1e-3 * torch.rand(())  # drawn, so that generators count
        value.backward()
        optimizer.step()
        schedule.step()
        if rank == 0:
            with (folder / "losses.txt").open("a", encoding="utf-8") as file:
                file.write(f"{step} {value.item()!r}\n")
        if step % 2 == 1:
            checkpoints.save(step + 1, model, optimizer, schedule=schedule, step=step + 1)
    options = StateDictOptions(full_state_dict=True)
    weights = get_model_state_dict(model, options=options)
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
